import math
from itertools import pairwise

import pytest

from common.schedule import constant, cosine, step

# The rate that the MoCo authors' CIFAR-10 notebook prints in its saved log, at the end of each of its 200 epochs.
NOTEBOOK = {1: 0.059996, 2: 0.059985, 3: 0.059967, 118: 0.021630, 119: 0.021179, 120: 0.020729, 158: 0.006295,
            159: 0.006009, 160: 0.005729, 199: 0.000004, 200: 0.000000}


@pytest.mark.parametrize("epoch", NOTEBOOK)
def test_cosine_by_epoch_from_1_is_the_column_of_the_notebook(epoch):
    factor = cosine(200, by="epoch", first=1)
    for within in (0.0, 0.5, 0.99):
        assert 0.06 * factor(epoch - 1 + within) == pytest.approx(NOTEBOOK[epoch], abs=5.1e-7)


def test_cosine_by_epoch_from_0_is_moco_v2s():
    factor = cosine(200, by="epoch")
    for epoch in range(200):
        assert factor(epoch + 0.7) == pytest.approx(0.5 * (1 + math.cos(math.pi * epoch / 200)))


def test_cosine_by_step_falls_at_every_step_to_0():
    factor = cosine(10)
    values = [factor(i / 7) for i in range(71)]
    assert values == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 70)) for i in range(71)])
    assert all(a > b for a, b in pairwise(values))


def test_steps_are_at_120_and_160():
    factor = step([120, 160])
    steps_per_epoch = 195
    at = {epoch: factor(epoch * steps_per_epoch / steps_per_epoch) for epoch in (0, 119, 120, 159, 160, 199)}
    assert at == pytest.approx({0: 1, 119: 1, 120: 0.1, 159: 0.1, 160: 0.01, 199: 0.01})
    assert factor((120 * steps_per_epoch - 1) / steps_per_epoch) == 1
    assert step([2], gamma=0.5)(2) == 0.5


@pytest.mark.parametrize("schedule", [constant(10), step([120], warmup=10), cosine(100, warmup=10),
                                      cosine(100, warmup=10, by="epoch", first=1)])
def test_warm_up_rises_in_a_line_from_0(schedule):
    assert [schedule(epoch) for epoch in (0, 2.5, 5, 9.9)] == pytest.approx([0, 0.25, 0.5, 0.99])


def test_cosine_after_warm_up_is_moco_v3s():
    factor = cosine(100, warmup=10)
    assert factor(10) == 1 and factor(55) == pytest.approx(0.5) and factor(100) == pytest.approx(0)
    assert factor(37.25) == pytest.approx(0.5 * (1 + math.cos(math.pi * (37.25 - 10) / (100 - 10))))


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert constant()(0) == step([3])(0) == cosine(5)(0) == 1


@pytest.mark.parametrize("warmup", [-1, 5, 6])
def test_a_warm_up_as_long_as_the_training_is_refused(warmup):
    with pytest.raises(ValueError, match="warmup"):
        cosine(5, warmup=warmup)

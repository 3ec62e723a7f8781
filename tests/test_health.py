"""Spikes and collapse: what is told, on numbers whose answer is known, and on real runs, sound and broken."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common.health import Chance, Collapse, Health, Spikes, Spread, directions, spread
from common.method import AtChance
from common.train import Step


def steady(spikes, steps=40, seed=0):
    """A loss about 5 and a gradient norm about 2."""
    draw = random.Random(seed)
    return [spikes.add(5 + draw.gauss(0, 0.1), 2 * math.exp(draw.gauss(0, 0.3))) for _ in range(steps)]


def test_a_gradient_ten_times_its_median_and_a_loss_far_above_its_own_are_spikes():
    spikes = Spikes()
    assert steady(spikes) == [[]] * 40
    assert spikes.add(5.0, 15.0) == [] and spikes.add(7.0, 2.0) == []
    found = spikes.add(5.0, 40.0) + spikes.add(15.0, 2.0)
    assert [(spike.what, spike.value) for spike in found] == [("gradient_norm", 40.0), ("loss", 15.0)]
    assert [spike.median for spike in found] == [pytest.approx(2, rel=0.3), pytest.approx(5, rel=0.02)]


def test_a_spike_does_not_hide_the_next_and_the_first_steps_are_none():
    spikes = Spikes()
    assert spikes.add(1.0, 1.0) == [] and spikes.add(100.0, 1000.0) == []
    steady(spikes, 100)
    assert all(len(spikes.add(50.0, 100.0)) == 2 for _ in range(10))


@pytest.mark.parametrize("seed", range(10))
def test_steady_losses_rising_ones_and_falling_ones_are_no_spikes(seed):
    draw = random.Random(seed)
    for slope in (0.0, 0.02, -0.004):
        spikes = Spikes()
        assert not any(spikes.add(5 + slope * step + draw.gauss(0, 0.2), math.exp(draw.gauss(0, 0.5)))
                       for step in range(1000))


def test_spikes_after_their_state_is_restored_are_those_without_a_pause():
    whole, before, after = Spikes(), Spikes(), Spikes()
    steady(whole), steady(before)
    after.load_state(before.state())
    assert [whole.add(*step) for step in [(5, 2), (5, 90), (60, 2)]] == \
           [after.add(*step) for step in [(5, 2), (5, 90), (60, 2)]]


def unit(x_BC):
    return F.normalize(x_BC, dim=1)


def kinds(rows=256, dim=128):
    """The kinds of collapse of docs/reliability.md, made of normal numbers."""
    x_BC = torch.randn(rows, dim)
    return {"healthy": unit(x_BC), "one point": unit(torch.ones(dim) + 1e-3 * x_BC),
            "four directions": unit(x_BC[:, :4] @ torch.randn(4, dim)),
            "shifted": unit(unit(x_BC) + 3 * unit(torch.randn(1, dim)))}


def test_spread_against_its_definition_pair_by_pair():
    for x_BC in kinds(24, 16).values():
        found = spread(x_BC)
        pairs = [float(x_BC[i] @ x_BC[j]) for i in range(24) for j in range(24) if i != j]
        assert found.cosine == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
        assert found.std == pytest.approx(float(x_BC.var(dim=0, correction=0).sum().sqrt()), rel=1e-3)
        value_M = torch.linalg.svdvals((x_BC - x_BC.mean(dim=0)).double())
        share_M = value_M / value_M.sum()
        assert found.rank == pytest.approx(float((-(share_M * share_M.log()).nan_to_num().sum()).exp()), rel=1e-3)
        assert found.full == 16


def test_each_kind_of_collapse_is_told_at_the_third_look_once_and_again_after_it_has_passed():
    looks = {name: spread(x_BC) for name, x_BC in kinds().items()}
    for name in ("one point", "four directions", "shifted"):
        collapse = Collapse()
        said = [collapse.add(looks[kind]) for kind in ["healthy"] * 3 + [name] * 6 + ["healthy"] + [name] * 3]
        assert [bool(text) for text in said] == [False] * 5 + [True] + [False] * 6 + [True], name
        assert ("directions" in said[5]) == (name == "four directions")


def test_features_alike_from_the_start_are_no_collapse():
    collapse = Collapse()
    said = [collapse.add(Spread(0.3 + look / 1000, 40.0, 0.91, 127)) for look in range(100)]
    assert not any(said)


def two_classes(noise):
    """Features near one of two points, 64 of 48 numbers each."""
    return unit(torch.eye(2, 48).repeat(32, 1) + noise * torch.randn(64, 48))


def labelled(labels, together=1):
    images = SimpleNamespace(labels=torch.tensor(labels), together=together)
    return [directions(SimpleNamespace(supervised=supervised), images) for supervised in (True, False)]


def test_classes_that_become_points_are_no_collapse_where_labels_make_them_so():
    assert labelled([0, 3, 3, 7, -1]) == [2, math.inf] and labelled([0, 0, 1, 2], together=2) == [1, math.inf]
    looks = [spread(two_classes(noise)) for noise in (1.0, 1e-3, 1e-3, 1e-3)]
    for most, expected in ((math.inf, 1), (1, 0)):
        collapse = Collapse(most)
        assert sum(bool(collapse.add(look)) for look in looks) == expected
    one_point = spread(unit(torch.ones(48) + 1e-3 * torch.randn(64, 48)))
    assert [bool(collapse.add(one_point)) for _ in range(3)] == [False, False, True]


def test_a_loss_at_chance_for_long_is_told_once_and_one_below_it_is_not():
    chance, told = Chance(), AtChance()
    said = [chance.add(6.93, 6.932, told) for _ in range(2500)]
    assert [step for step, text in enumerate(said, 1) if text] == [1000] and "chance for 1,000 steps" in said[999]
    below = Chance()
    assert not any(below.add(6.8, 6.932, told) or below.add(6.93, None, told) for _ in range(2500))


def test_a_method_says_itself_what_its_chance_means_and_when():
    chance = Chance()
    said = [chance.add(0.2, 0.2, AtChance(30, text="stuck for {steps} steps")) for _ in range(100)]
    assert [text for text in said if text] == [said[29]] == ["stuck for 30 steps"]


def test_health_after_its_state_is_restored_says_what_it_would_have_said():
    looks = [unit(torch.ones(8) + 1e-4 * torch.randn(16, 8)) if look else unit(torch.randn(16, 8)) for look in range(6)]
    steps = [Step(number, 0.1, {}, 0.0, False, 2.0, 1.0, x_BC) for number, x_BC in enumerate(looks)]
    whole, first, second = Health(), Health(), Health()
    said = [whole.alarms(step, 3.0, AtChance()) for step in steps]
    before = [first.alarms(step, 3.0, AtChance()) for step in steps[:3]]
    second.load_state(first.state())
    assert before + [second.alarms(step, 3.0, AtChance()) for step in steps[3:]] == said and any(said)
    assert second.values() == whole.values() and second.state() == whole.state()


def test_a_loss_at_chance_is_told_where_features_are_as_alike_as_the_method_says():
    told = AtChance(10, 0.05, 0.9, "stuck for {steps} steps")
    for x_BC, loss, expected in ((unit(torch.ones(16, 8)), 0.209, 1), (unit(torch.ones(16, 8)), 0.211, 0),
                                 (unit(torch.randn(16, 8)), 0.2, 0), (None, 0.2, 1)):
        health = Health()
        said = [health.alarms(Step(n, 0.1, {}, 0.0, False, loss, 1.0, x_BC), 0.2, told) for n in range(30)]
        assert sum("stuck for 10 steps" in text for texts in said for text in texts) == expected

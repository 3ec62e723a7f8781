"""No slower by accident: each case costs what costs.json says, within a tenth; and a planted slowdown is seen."""

import pytest
import torch

from common.data.views import Views
from moco import MoCo
from tests import costs

RENEW = """
If this is meant, write the new counts into the same commit: make costs (or python -m tests.costs --write).
A count that fell is asked for, too: the guard is as tight as what is written down."""


@pytest.mark.parametrize("case", costs.CASES)
def test_nothing_costs_more_than_is_written_down(case):
    lines = costs.differences(case, costs.CASES[case](), costs.read().get(case, {}))
    assert not lines, "\n".join(lines) + RENEW


def test_every_cost_that_is_written_down_is_counted():
    assert costs.read().keys() == costs.CASES.keys()


@pytest.mark.parametrize("found, lines", [
    ({"calls": 110, "clone": 2}, []),
    ({"calls": 111, "clone": 2}, ["case: calls grew from 100 to 111"]),
    ({"calls": 89, "clone": 2}, ["case: calls fell from 100 to 89"]),
    ({"calls": 100, "clone": 3}, ["case: clone grew from 2 to 3"]),
    ({"calls": 100, "clone": 2, "nonzero": 1}, ["case: nonzero grew from 0 to 1"]),
    ({"calls": 100}, ["case: clone fell from 2 to 0"]),
])
def test_a_tenth_more_or_less_is_told(found, lines):
    assert costs.differences("case", found, {"calls": 100, "clone": 2}) == lines


def test_an_operator_counts_once_and_its_memory_where_it_takes_some():
    x = torch.ones(250, requires_grad=True)                     # 1 kB
    with costs.Tally() as found:
        (x * 2).view(10, 25).sum().backward()
    assert found.cost() == {"calls": sum(found.kinds.values()), "kilobytes": pytest.approx(2, abs=0.1)}
    assert found.kinds["mul"] == 2 and found.kinds["view"] == 2                         # forward and backward
    with costs.Tally() as found:
        x.detach().add_(1)
        torch.mul(x.detach(), 2, out=torch.empty(0))
    assert found.cost()["kilobytes"] <= 1                       # views and sums in place take none


class Wasteful(MoCo):
    """What shall be seen: the official code's copy of the queue at each step."""

    def after_step(self, batches, outputs, progress):
        self.dictionary.keys.clone()
        super().after_step(batches, outputs, progress)


def test_a_copy_at_each_step_is_seen(monkeypatch):
    monkeypatch.setattr(costs, "MoCo", Wasteful)
    assert any("step: moco: clone grew" in line for line in changed("step: moco"))


def test_a_loop_over_the_images_of_a_batch_is_seen(monkeypatch):
    whole = Views.finish

    def one_by_one(self, crop_BcSS, seed, epoch, index_B, view):
        rows = zip(crop_BcSS.split(1), index_B.split(1))
        return torch.cat([whole(self, crop, seed, epoch, index, view) for crop, index in rows])

    monkeypatch.setattr(Views, "finish", one_by_one)
    assert any(": calls grew" in line for line in changed("views from crops: moco_v2"))


def test_a_picture_is_decoded_once_and_leaves_a_worker_as_the_bytes_of_its_crops():
    found = costs.CASES["loader: a batch from files"]()
    assert found["decodes a picture"] == 1
    assert found["bytes a picture"] == 2 * 3 * 224 * 224


def changed(case: str) -> list[str]:
    return costs.differences(case, costs.CASES[case](), costs.read()[case])

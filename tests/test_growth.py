"""What the benchmarks of losses compare and fit: the same gradient on both sides, crossings and slopes."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.crossover import crossing
from benchmarks.growth import slope
from benchmarks.losses import instdisc_sides, moco_sides


@pytest.mark.parametrize(("make", "theirs", "ours"), [
    (lambda: moco_sides(5, 40, "cpu"), "official", "one pass"),
    (lambda: instdisc_sides(5, 40, 7, 0.1, "cpu"), "full softmax, dense", "full softmax, one pass")])
def test_two_sides_that_are_compared_end_with_the_same_gradient(make, theirs, ours):
    sides = make()
    grads = []
    for side in (theirs, ours):
        q, bank = sides[side].args[0 if side == "official" else 1], sides[ours].args[0]
        keys = {name: value.clone() for name, value in bank.state_dict().items()}
        q.grad = None
        sides[side]()
        bank.load_state_dict(keys)
        grads.append(q.grad)
    torch.testing.assert_close(*grads)


def test_the_authors_nce_restated_pulls_where_ours_does():
    """Each draws its own negatives, of 30 rows so many that the direction of the gradient is the same."""
    torch.manual_seed(0)
    sides = instdisc_sides(2, 30, 6000, 0.5, "cpu")
    q, (bank, *_) = sides["official NCE"].args[0], sides["NCE, one buffer"].args
    start, grads = bank.v.clone(), []
    for side in ("official NCE", "NCE, one buffer"):
        q.grad = None
        sides[side]()
        bank.v.copy_(start)
        grads.append(F.normalize(q.grad, dim=1))
    assert (grads[0] * grads[1]).sum(dim=1).min() > 0.98


def test_two_lines_cross_where_they_are_equal():
    sizes = [10, 100, 1000]
    n, value = crossing(sizes, [2 * size for size in sizes], [500.0] * 3)
    assert n == pytest.approx(250) and value == pytest.approx(500)
    assert crossing(sizes, [1.0] * 3, [2.0] * 3) is None


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_the_slope_is_the_power(power):
    assert slope([(1, 99.0), *((size, 3 * size**power) for size in (10, 20, 70))]) == pytest.approx(power)
    assert math.isfinite(slope([(1, 1.0), (2, 2.0)]))

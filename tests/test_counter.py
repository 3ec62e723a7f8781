import math

import pytest
import torch
from scipy import stats

from common import counter


def python_bits(*keys: int) -> int:
    """The same hash in Python's integers, which never overflow."""
    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    state = 0
    for key in keys:
        state = mix((state + 0x9E3779B97F4A7C15 + mix(key % 2**64)) % 2**64)
    return state


def test_mixing_gives_the_published_numbers_of_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
                 16408922859458223821]                                  # seed 1234567, the reference implementation
    state = torch.tensor([(1234567 + i * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63 for i in range(1, 6)])
    assert [x % 2**64 for x in counter._mix(state).tolist()] == published


@pytest.mark.parametrize("keys", [(0, 0), (1, 2, 3), (2**62, -1, 7), (-5, 2**63 - 1)])
def test_bits_are_those_of_arbitrary_precision_integers(keys):
    *first, last = keys
    found = counter.bits(*first, torch.tensor([last, 11])).tolist()
    assert [x % 2**64 for x in found] == [python_bits(*first, last), python_bits(*first, 11)]


def test_uniform_fills_the_unit_interval_evenly_in_steps_of_float32():
    x = counter.uniform(3, torch.arange(20_000))
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() < 1
    assert torch.equal(x * 2**24, (x * 2**24).round())
    assert stats.kstest(x.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("vary", ["seed", "epoch", "index"])
def test_draws_that_differ_in_one_key_are_independent(vary):
    i = torch.arange(20_000)
    x, y = {"seed": (counter.uniform(0, 0, i), counter.uniform(1, 0, i)),
            "epoch": (counter.uniform(0, 0, i), counter.uniform(0, 1, i)),
            "index": (counter.uniform(0, 0, i), counter.uniform(0, 0, i + 1))}[vary]
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 4 / math.sqrt(len(i))


def test_a_draw_does_not_depend_on_what_stands_beside_it():
    alone = counter.bits(4, torch.tensor(17), 2)
    among = counter.bits(4, torch.arange(30)[:, None], torch.arange(5))
    assert among.shape == (30, 5) and among[17, 2] == alone


def test_the_order_of_the_keys_and_the_name_of_the_stream_matter():
    one = torch.tensor(1)
    assert counter.bits(one, 2) != counter.bits(2, one)
    assert counter.bits(one, counter.stream("crop")) != counter.bits(one, counter.stream("flip"))


def test_integers_are_uniform_below_the_bound():
    counts = counter.integers(7, 0, torch.arange(70_000)).bincount()
    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_permutation_holds_each_thing_once_and_every_order_is_as_likely():
    seen = {}
    for epoch in range(2400):
        order = tuple(counter.permutation(4, 0, epoch).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert all(sorted(order) == [0, 1, 2, 3] for order in seen) and len(seen) == 24
    assert stats.chisquare(list(seen.values())).pvalue > 1e-3


def test_no_draw_touches_torchs_own_generator():
    before = torch.get_rng_state()
    counter.permutation(100, 0), counter.uniform(0, torch.arange(9)), counter.integers(3, 0, torch.arange(9))
    assert torch.equal(torch.get_rng_state(), before)

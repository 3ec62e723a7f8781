"""Intervals and paired tests against scipy, by simulation, and by hand."""

import numpy as np
import pytest
import torch
from scipy import stats

from common import counter
from common.evaluate import statistics
from common.evaluate.statistics import bootstrap, holm, mcnemar, paired, resampled


def draws(*shape, seed=0):
    n = torch.Size(shape).numel()
    return counter.uniform(seed, torch.arange(n)).view(shape)


def right(m, share, seed=0):
    """Whether each of ``m`` images is right, as 0 and 1."""
    return (draws(m, seed=seed) < share).double().tolist()


def test_the_interval_is_scipys():
    score = draws(300).square()
    (low, high), = bootstrap(score[:, None])
    oracle = stats.bootstrap([score.double().numpy()], np.mean, n_resamples=20_000, method="percentile",
                             rng=np.random.default_rng(0)).confidence_interval
    within = 0.05 * (oracle.high - oracle.low)              # what two sets of draws differ by
    assert low == pytest.approx(oracle.low, abs=within) and high == pytest.approx(oracle.high, abs=within)


def test_a_sample_has_as_many_images_and_the_columns_share_it():
    score = torch.stack([torch.ones(7), torch.arange(7.0), 3 * torch.arange(7.0)], dim=1)
    means = resampled(score, draws=500)
    assert means.shape == (500, 3)
    assert torch.allclose(means[:, 0], torch.ones(500).double()) and torch.allclose(means[:, 2], 3 * means[:, 1])
    assert len(means[:, 1].unique()) > 20


@pytest.mark.parametrize("held", [1, 7 * 30, 7 * 31])          # a draw at a time; dividing the draws, and not
def test_draws_do_not_depend_on_how_many_are_held(held, monkeypatch):
    score = draws(7, 2)
    expected = resampled(score, draws=60)
    monkeypatch.setattr(statistics, "HELD", held)
    assert torch.equal(resampled(score, draws=60), expected)


def test_95_percent_of_intervals_hold_the_true_value(monkeypatch):
    """Scores of mean 1/3; 400 sets of 100 images: 95 % of 400 is 380 +- 4.4 (one standard deviation)."""
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    scores = draws(100, 400).square()                       # a column is a set
    held = sum(low <= 1 / 3 <= high for low, high in bootstrap(scores))
    assert 362 <= held <= 396


@pytest.mark.parametrize(("shares", "m"), [((0.8, 0.7), 200), ((0.9, 0.9), 61), ((0.3, 0.9), 500), ((0.5, 0.5), 2000)])
def test_mcnemars_test_is_the_binomial_one(shares, m):
    one, other = right(m, shares[0]), right(m, shares[1], seed=1)
    only = sum(a > b for a, b in zip(one, other, strict=True))
    other_only = sum(a < b for a, b in zip(one, other, strict=True))
    oracle = stats.binomtest(only, only + other_only).pvalue
    assert mcnemar(one, other) == pytest.approx(oracle, rel=1e-9)
    assert mcnemar(other, one) == mcnemar(one, other)


def test_mcnemars_test_by_hand():
    assert mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]) == 2 / 2**5        # five of five for one side
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1
    assert mcnemar([1, 0.5], [1, 0]) is None


def test_the_paired_test_agrees_with_the_exact_one_and_with_the_t_test():
    one, other = right(800, 0.82), right(800, 0.79, seed=1)
    found = paired(one, other)
    assert found.difference == pytest.approx(100 * (np.mean(one) - np.mean(other)))
    assert found.p == pytest.approx(stats.ttest_rel(one, other).pvalue, abs=0.02)
    assert found.p == pytest.approx(found.p_mcnemar, abs=0.03)
    back = paired(other, one)
    assert back.difference == -found.difference and back.p == found.p
    assert back.interval == pytest.approx((-found.interval[1], -found.interval[0]))


def test_pairing_sees_what_two_intervals_hide():
    """One is better by 2 images of 100 that it alone gets right: each interval is 16 points wide."""
    one = right(1000, 0.8)
    other = [0.0 if i % 50 == 0 else score for i, score in enumerate(one)]
    (low, high), = bootstrap(torch.tensor(one)[:, None])
    found = paired(one, other)
    assert high - low > 0.04 and found.p < 0.001 and found.interval[0] > 0 and found.p_mcnemar < 1e-3


def test_the_test_gives_a_false_alarm_in_5_percent(monkeypatch):
    """300 pairs of equal ones: 15 +- 3.8 have p < 0.05."""
    monkeypatch.setattr(statistics, "DRAWS", 400)
    alarms = sum(paired(draws(60, seed=2 * i).tolist(), draws(60, seed=2 * i + 1).tolist()).p < 0.05
                 for i in range(300))
    assert 4 <= alarms <= 29


def test_equal_ones_do_not_differ():
    assert paired([1, 0, 1], [1, 0, 1]) == (0, (0, 0), 1, 1)


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])      # 3 * 0.01; 2 * 0.03; then no smaller
    assert holm([0.4]) == [0.4] and holm([]) == [] and holm([0.9, 0.8]) == [1, 1]


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="paired: 2 and 3 images"):
        paired([1, 0], [1, 0, 1])

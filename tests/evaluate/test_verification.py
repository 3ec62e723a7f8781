"""Measures of verification and the density of one subject, against loops, scikit-learn and SciPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.metrics import roc_auc_score, roc_curve

from common.evaluate.subject import Normal, probability
from common.evaluate.verification import (
    area,
    area_interval,
    at_far,
    best_threshold,
    decided,
    equal_error_rate,
    k_fold,
    roc,
    scores,
)

INF = math.inf


def made(count=200, seed=0, ties=False):
    """Scores of which those of same pairs are higher on the whole; with ``ties`` only 9 different ones."""
    draw = torch.Generator().manual_seed(seed)
    same = torch.rand(count, generator=draw) < 0.4
    score = torch.randn(count, generator=draw, dtype=torch.float64) + same
    return (score.mul(2).round().clamp(-4, 4) if ties else score), same


def rates(score, same, threshold):
    """FAR and TAR by counting."""
    accepted = [s >= threshold for s in score.tolist()]
    kinds = same.tolist()
    far = sum(a for a, k in zip(accepted, kinds) if not k) / kinds.count(False)
    return far, sum(a for a, k in zip(accepted, kinds) if k) / kinds.count(True)


SOME = [made(), made(ties=True), made(7, seed=3), made(50, seed=4, ties=True)]


@pytest.mark.parametrize("score, same", SOME)
def test_roc_is_that_of_counting_and_of_scikit_learn(score, same):
    curve = roc(score, same)
    for far, tar, threshold in zip(*(x.tolist() for x in curve)):
        assert (far, tar) == pytest.approx(rates(score, same, threshold))
    theirs = roc_curve(same.numpy(), score.numpy(), drop_intermediate=False)
    for ours, other in zip(curve, theirs):
        assert np.allclose(ours.numpy(), other)


@pytest.mark.parametrize("score, same", SOME)
def test_area_is_the_chance_of_the_right_order(score, same):
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in score[same].tolist() for b in score[~same].tolist()]
    assert area(roc(score, same)) == pytest.approx(sum(wins) / len(wins))
    assert area(roc(score, same)) == pytest.approx(roc_auc_score(same.numpy(), score.numpy()))


@pytest.mark.parametrize("score, same", SOME)
def test_the_areas_interval_is_delongs_by_a_plain_loop(score, same):
    a, b = score[same].tolist(), score[~same].tolist()
    psi = [[1.0 if x > y else 0.5 if x == y else 0.0 for y in b] for x in a]
    rows, columns = [sum(row) / len(b) for row in psi], [sum(column) / len(a) for column in zip(*psi)]
    half = 1.959964 * math.sqrt(np.var(rows, ddof=1) / len(a) + np.var(columns, ddof=1) / len(b))
    middle = sum(rows) / len(a)
    assert area_interval(score, same) == pytest.approx((max(0, middle - half), min(1, middle + half)))


def test_the_areas_interval_covers_the_truth():
    """Same pairs one deviation higher: AUC is the normal distribution at 1 / sqrt(2), 0.7602."""
    truth, draw, inside = 0.7602499, torch.Generator().manual_seed(5), 0
    same = torch.arange(120) < 50
    for _ in range(400):
        low, high = area_interval(torch.randn(120, generator=draw) + same, same)
        inside += low <= truth <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_equal_error_rate_of_known_curves():
    score, same = torch.tensor([5., 4, 3, 2, 1, 0]), torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    assert equal_error_rate(roc(score, same)).far == pytest.approx(1 / 3)       # 1 of 3 accepted, 1 of 3 refused
    assert equal_error_rate(roc(torch.arange(6.), torch.arange(6) > 2)) == (3.0, 0.0, 1.0)
    assert equal_error_rate(roc(torch.zeros(6), torch.arange(6) > 2)) == (0.0, 0.5, 0.5)        # no knowledge
    assert equal_error_rate(roc(-torch.arange(6.), torch.arange(6) > 2)).far == 1.0


@pytest.mark.parametrize("score, same", SOME)
def test_equal_error_rate_lies_on_the_curve_where_both_errors_are_equal(score, same):
    threshold, far, tar = equal_error_rate(roc(score, same))
    assert far == pytest.approx(1 - tar)
    theirs = roc_curve(same.numpy(), score.numpy(), drop_intermediate=False)
    assert tar == pytest.approx(np.interp(far, *theirs[:2])) or far in theirs[0]
    near = [rates(score, same, t) for t in (np.nextafter(threshold, INF), threshold)]
    assert min(f for f, _ in near) <= far + 1e-9 and math.isfinite(threshold)


@pytest.mark.parametrize("wanted", [0, 0.001, 0.01, 0.1, 0.33, 0.5, 1])
@pytest.mark.parametrize("score, same", SOME)
def test_tar_at_far_is_the_best_that_no_threshold_exceeds(score, same, wanted):
    point = at_far(roc(score, same), wanted)
    assert (point.far, point.tar) == pytest.approx(rates(score, same, point.threshold))
    allowed = [rates(score, same, t)[1] for t in [INF, *score.tolist()] if rates(score, same, t)[0] <= wanted]
    assert point.far <= wanted and point.tar == pytest.approx(max(allowed))


def test_nothing_is_accepted_where_a_different_pair_scores_highest():
    point = at_far(roc(torch.tensor([3., 2, 1]), torch.tensor([False, True, True])), 0.5)
    assert point == (INF, 0.0, 0.0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        at_far(roc(*SOME[0]), 1.5)


@pytest.mark.parametrize("score, same", SOME)
def test_the_best_threshold_has_no_better_one(score, same):
    def right(threshold):
        return ((score >= threshold) == same).sum().item()

    best = best_threshold(score, same)
    values = sorted(set(score.tolist()))
    candidates = [values[0], *((a + b) / 2 for a, b in itertools.pairwise(values)), values[-1] + 1]
    assert right(best) == max(map(right, candidates))
    strictest = max(t for t in candidates if right(t) == right(best))
    assert best == strictest or (strictest > values[-1] and best == np.nextafter(values[-1], INF))


def test_the_best_threshold_lies_in_the_middle_of_the_gap():
    assert best_threshold(torch.tensor([0., 1, 4, 5]), torch.tensor([False, False, True, True])) == 2.5
    assert best_threshold(torch.tensor([0., 1, 2]), torch.tensor([True, True, False])) == 0.0       # all accepted
    none = best_threshold(torch.tensor([2., 1, 0]), torch.tensor([False, True, False]))             # or none, as good
    assert none == np.nextafter(2.0, INF)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12)
       .filter(lambda rows: len({kind for _, kind in rows}) == 2))
@settings(max_examples=60, deadline=None)
def test_measures_agree_with_counting_for_any_pairs(rows):
    score, same = torch.tensor([value for value, _ in rows]).double(), torch.tensor([kind for _, kind in rows])
    curve = roc(score, same)
    assert curve.far_T[0] == curve.tar_T[0] == 0 and curve.far_T[-1] == curve.tar_T[-1] == 1
    assert area(curve) == pytest.approx(roc_auc_score(same.numpy(), score.numpy()))
    assert 0 <= equal_error_rate(curve).far == pytest.approx(1 - equal_error_rate(curve).tar)
    best = max(((score >= t) == same).sum().item() for t in [*score.tolist(), INF])
    assert ((score >= best_threshold(score, same)) == same).sum() == best


@pytest.mark.parametrize("folds", [2, 3, 10])
def test_k_fold_is_the_plain_loop(folds):
    score, same = made(90, seed=6)
    kinds = {True: same.nonzero()[:, 0].tolist(), False: (~same).nonzero()[:, 0].tolist()}
    found = k_fold(score, same, folds)
    accuracies = []
    for k in range(folds):
        held = {i for rows in kinds.values() for place, i in enumerate(rows) if place * folds // len(rows) == k}
        train = torch.tensor([i for i in range(90) if i not in held])
        threshold = best_threshold(score[train], same[train])
        accuracies.append(np.mean([(score[i].item() >= threshold) == same[i].item() for i in held]))
    assert found.accuracy_K.tolist() == pytest.approx(accuracies)
    assert found.mean == pytest.approx(np.mean(accuracies))
    assert found.standard_error == pytest.approx(np.std(accuracies, ddof=1) / math.sqrt(folds))


def test_the_default_folds_are_the_sets_of_lfws_list():
    """Ten times 30 same pairs, then 30 different ones: a threshold that suits one set alone is never tested on it."""
    same = (torch.arange(600) // 30) % 2 == 0
    of_set = torch.arange(600) // 60
    score = torch.randn(600, generator=torch.Generator().manual_seed(1)) + same
    one, other = k_fold(score, same), k_fold(score, same, fold_P=of_set)
    assert torch.equal(one.right_P, other.right_P) and torch.equal(one.accuracy_K, other.accuracy_K)


def test_a_fold_is_not_judged_by_its_own_threshold():
    """Fold 1 has its scores elsewhere: its own threshold would decide all rightly, that of fold 0 none of the same."""
    score, same = torch.tensor([9., 8, 1, 2]), torch.tensor([True, False, False, True])
    found = k_fold(score, same, 2, fold_P=torch.tensor([0, 0, 1, 1]))
    assert found.accuracy_K.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("score, same, said", [
    ([1., 2], [True, True], "2 same and 0 different"),
    ([1., math.nan], [True, False], "1 of 2 scores are not finite"),
    ([1., 2, 3], [True, False], "same pairs"),
])
def test_pairs_that_cannot_be_measured_are_refused(score, same, said):
    with pytest.raises(ValueError, match=said):
        roc(torch.tensor(score), torch.tensor(same))


def test_folds_that_cannot_be_are_refused():
    score, same = made(12, seed=2)
    with pytest.raises(ValueError, match="fewer folds"):
        k_fold(score, same, 10)
    with pytest.raises(ValueError, match="each of 0 to 1"):
        k_fold(score, same, 2, fold_P=torch.zeros(12, dtype=torch.int64))


def test_a_threshold_chosen_before_is_counted_and_its_own_score_accepted():
    score, same = torch.tensor([0.9, 0.7, 0.7, 0.4, 0.2]), torch.tensor([True, False, True, True, False])
    for threshold, found in ((0.69, (3, 1, 2)), (score[1].item(), (3, 1, 2)), (0.8, (3, 0, 1)),
                             (math.inf, (2, 0, 0)), (-math.inf, (3, 2, 3))):
        assert decided(score, same, threshold) == found
    with pytest.raises(ValueError, match="at least 1"):
        decided(score, torch.ones(5, dtype=torch.bool), 0.5)


def test_scores_are_higher_for_what_is_more_alike():
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    for i in range(5):
        cosine = (a[i] @ b[i] / a[i].norm() / b[i].norm()).item()
        assert scores(a, b, "cosine")[i].item() == pytest.approx(cosine, abs=1e-6)
        distance = math.sqrt(sum((x - y) ** 2 for x, y in zip(a[i].tolist(), b[i].tolist())))
        assert scores(a, b, "euclidean")[i].item() == pytest.approx(-distance)


@pytest.mark.parametrize("n, D, shrinkage", [(40, 3, 0.0), (5, 8, 0.3), (5, 8, 1.0), (30, 1, 0.0)])
def test_the_density_is_scipys(n, D, shrinkage):
    x = torch.randn(n, D, dtype=torch.float64) * torch.arange(1, D + 1)
    cov = np.cov(x.numpy().T, bias=True).reshape(D, D)
    cov = (1 - shrinkage) * cov + shrinkage * np.trace(cov) / D * np.eye(D)
    theirs = multivariate_normal(x.mean(dim=0).numpy(), cov)
    asked = torch.randn(6, D, dtype=torch.float64)
    assert Normal.fit(x, shrinkage).log_density(asked).tolist() == pytest.approx(theirs.logpdf(asked.numpy()).ravel())


def test_the_probability_is_the_papers_formula():
    subject, impostors, asked = torch.randn(20, 3) + 2, torch.randn(15, 3), torch.randn(4, 3) + 1
    normal = Normal.fit(subject, 0.1)
    impostor = np.mean(np.exp(normal.log_density(impostors).numpy()))
    for x, found in zip(asked, probability(normal, impostors, asked)):
        genuine = math.exp(normal.log_density(x[None]).item())
        assert found.item() == pytest.approx(genuine / (genuine + impostor))


def test_many_dimensions_and_few_images_give_probabilities_all_the_same():
    """Whose densities are beyond any float, and whose covariance has no inverse by itself."""
    subject, others, further = torch.randn(10, 2048) + 1, torch.randn(20, 2048) - 1, torch.randn(2, 2048) - 2
    found = probability(Normal.fit(subject[:8]), others, torch.cat([subject[8:], further]))
    assert found.isfinite().all() and (found[:2] > 0.99).all() and (found[2:] < 0.01).all()
    with pytest.raises(ValueError, match="shrinkage above"):
        Normal.fit(subject[:8], 0.0)


def test_a_subject_that_cannot_be_modelled_is_refused():
    with pytest.raises(ValueError, match="1 images"):
        Normal.fit(torch.randn(1, 3))
    with pytest.raises(ValueError, match="images that differ"):
        Normal.fit(torch.ones(4, 3))
    with pytest.raises(ValueError, match="impostors: none"):
        probability(Normal.fit(torch.randn(9, 2)), torch.empty(0, 2), torch.randn(1, 2))

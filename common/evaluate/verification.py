"""Verification: are two images of the same thing? Measures of scores, of which higher means more alike.

A pair is accepted, called the same, if its score is at least the threshold. FAR, the false accept rate, is the share of
the different pairs that are accepted; TAR, the true accept rate, that of the same pairs (VAL in Schroff et al. 2015,
Sec. 4). All are shares from 0 to 1, float64.

Axes: P pairs, T thresholds, K folds, D features; s same and d different pairs.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.evaluate.result import Z95

Measure = Literal["cosine", "euclidean"]


class Roc(NamedTuple):
    """Rates at each threshold that matters, strictest first: infinity, which accepts nothing, then each score."""

    far_T: Tensor
    tar_T: Tensor
    threshold_T: Tensor


class Point(NamedTuple):
    """A threshold, and how it does."""

    threshold: float
    far: float
    tar: float


class Decided(NamedTuple):
    """How many pairs a threshold decides rightly, and how many different and same ones it accepts."""

    right: int
    false_accepts: int
    true_accepts: int


class Folds(NamedTuple):
    """Accuracies [K] of held-out folds, the threshold of each, and which pairs were decided rightly, bool [P]."""

    accuracy_K: Tensor
    threshold_K: Tensor
    right_P: Tensor

    @property
    def mean(self) -> float:
        return self.accuracy_K.mean().item()

    @property
    def standard_error(self) -> float:
        """Of the mean, as the results on LFW have it: the deviation over folds by the root of their number."""
        return (self.accuracy_K.std() / len(self.accuracy_K) ** 0.5).item()


def scores(a_PD: Tensor, b_PD: Tensor, measure: Measure) -> Tensor:
    """How alike the features of each pair are, float64 [P]: the cosine, or the Euclidean distance below zero."""
    a_PD, b_PD = a_PD.double(), b_PD.double()
    return F.cosine_similarity(a_PD, b_PD, dim=1) if measure == "cosine" else -(a_PD - b_PD).norm(dim=1)


def roc(score_P: Tensor, same_P: Tensor) -> Roc:
    """Rates at every threshold. ``score_P`` real, ``same_P`` bool. Raises ValueError where a rate has no pairs."""
    _check(score_P, same_P)
    order_P = score_P.argsort(descending=True)
    score_P, same_P = score_P[order_P].double(), same_P[order_P].cpu()
    last_T = torch.cat([(score_P.diff() != 0).cpu(), torch.tensor([True])])        # of equal scores the last
    tar_T, far_T = (kind_P.double().cumsum(0)[last_T] / kind_P.sum() for kind_P in (same_P, ~same_P))
    zero, infinity = torch.zeros(1, dtype=torch.float64), torch.full((1,), torch.inf, dtype=torch.float64)
    return Roc(torch.cat([zero, far_T]), torch.cat([zero, tar_T]), torch.cat([infinity, score_P.cpu()[last_T]]))


def area(curve: Roc) -> float:
    """AUC: the chance that a same pair scores above a different one, equal scores counted half."""
    return torch.trapezoid(curve.tar_T, curve.far_T).item()


def area_interval(score_P: Tensor, same_P: Tensor) -> tuple[float, float]:
    """The 95 % interval of AUC (DeLong, DeLong & Clarke-Pearson 1988), cut at 0 and 1.

    It takes pairs for independent: where many share an image it is too narrow. Raises ValueError for fewer than two
    pairs of a kind, which have no variance.
    """
    _check(score_P, same_P, least=2)
    score_s, score_d = score_P[same_P].double(), score_P[~same_P].double()
    share_s, share_d = _share_below(score_s, score_d), _share_below(score_d, score_s)
    half = Z95 * (share_s.var() / len(share_s) + share_d.var() / len(share_d)).sqrt().item()
    middle = share_s.mean().item()
    return max(0.0, middle - half), min(1.0, middle + half)


def equal_error_rate(curve: Roc) -> Point:
    """EER: where as many different pairs are accepted as same ones are not; ``far`` is the rate.

    Between two thresholds the curve is a straight line, and so is the threshold, but on the first stretch, which begins
    at infinity: there it is the highest score.
    """
    gap_T = curve.far_T + curve.tar_T - 1               # rises from -1 to 1
    i = int((gap_T >= 0).nonzero()[0])
    part = (gap_T[i - 1] / (gap_T[i - 1] - gap_T[i])).item()
    far, tar, threshold = (torch.lerp(x_T[i - 1], x_T[i], part).item() for x_T in curve)
    return Point(threshold if i > 1 else curve.threshold_T[1].item(), far, tar)


def at_far(curve: Roc, far: float) -> Point:
    """The most lenient threshold with a false accept rate of at most ``far``, and its TAR (TAR at FAR).

    Nothing lies between the rates that occurred. Below 1 / (different pairs) that is a rate of 0; the threshold is
    infinity where even the highest score is a different pair's.
    """
    if not 0 <= far <= 1:
        raise ValueError(f"far: {far} given; a wanted false accept rate is a share, from 0 to 1.")
    i = int((curve.far_T <= far).nonzero()[-1])
    return Point(curve.threshold_T[i].item(), curve.far_T[i].item(), curve.tar_T[i].item())


def best_threshold(score_P: Tensor, same_P: Tensor) -> float:
    """The threshold with the most right decisions; of equally good ones the strictest.

    It lies in the middle between two neighbouring scores, or, where all or no pair is best accepted, at the lowest
    score or just above the highest. Raises ValueError where there are no pairs of a kind.
    """
    curve = roc(score_P, same_P)
    num_same = int(same_P.sum())
    right_T = curve.tar_T * num_same + (1 - curve.far_T) * (len(same_P) - num_same)
    i = int(right_T.round().argmax())                   # argmax gives the first of equal ones
    if i == 0:
        return torch.nextafter(curve.threshold_T[1], curve.threshold_T[0]).item()
    below = curve.threshold_T[i:i + 2]
    middle = below.mean().item()
    return middle if middle > below[-1].item() else below[0].item()         # neighbouring numbers have no middle


def decided(score_P: Tensor, same_P: Tensor, threshold: float) -> Decided:
    """By a threshold that was chosen on other pairs. Raises ValueError where there are no pairs of a kind."""
    _check(score_P, same_P)
    accepted_P = (score_P.double() >= threshold).to(same_P.device)
    counts = ((accepted_P == same_P).sum(), (accepted_P & ~same_P).sum(), (accepted_P & same_P).sum())
    return Decided(*(int(count) for count in counts))


def k_fold(score_P: Tensor, same_P: Tensor, folds: int = 10, fold_P: Tensor | None = None) -> Folds:
    """Each fold is decided by the threshold that is best on all others (Huang et al. 2007, LFW, view 2).

    Fold ``fold_P`` [P] of each pair, 0 to ``folds`` - 1; by default the same and the different pairs are each cut into
    equal stretches in the order they stand in, which for LFW's list are its ten sets. Raises ValueError where there are
    fewer pairs of a kind than folds, or ``fold_P`` leaves a fold empty.
    """
    _check(score_P, same_P, least=folds)
    if folds < 2:
        raise ValueError(f"folds: {folds} given; a threshold needs at least one fold to be chosen on, and one to test.")
    fold_P = _stretches(same_P, folds) if fold_P is None else fold_P
    if fold_P.unique().tolist() != list(range(folds)):
        raise ValueError(f"fold_P: its folds are {fold_P.unique().tolist()}; each of 0 to {folds - 1} needs pairs.")
    threshold_K = torch.tensor([best_threshold(score_P[fold_P != k], same_P[fold_P != k]) for k in range(folds)],
                               dtype=torch.float64)
    right_P = (score_P.double() >= threshold_K[fold_P]) == same_P
    accuracy_K = torch.stack([right_P[fold_P == k].double().mean() for k in range(folds)])
    return Folds(accuracy_K, threshold_K, right_P)


def _stretches(same_P: Tensor, folds: int) -> Tensor:
    fold_P = torch.empty(len(same_P), dtype=torch.int64)
    for kind_P in (same_P, ~same_P):
        count = int(kind_P.sum())
        fold_P[kind_P] = torch.arange(count) * folds // count
    return fold_P


def _share_below(x_n: Tensor, other_m: Tensor) -> Tensor:
    """For each of ``x_n`` the share of ``other_m`` below it, equal ones counted half."""
    sorted_m = other_m.sort().values
    counts = [torch.searchsorted(sorted_m, x_n, side=side) for side in ("left", "right")]
    return (counts[0] + counts[1]).double() / (2 * len(other_m))


def _check(score_P: Tensor, same_P: Tensor, least: int = 1) -> None:
    """Raises ValueError where nothing could be measured of these pairs."""
    if score_P.shape != same_P.shape or score_P.dim() != 1 or same_P.dtype != torch.bool:
        raise ValueError(f"pairs: {list(score_P.shape)} scores and {list(same_P.shape)} marks of {same_P.dtype}; both "
                         "are of the same pairs, [P], and the marks bool.")
    if bad := int((~score_P.isfinite()).sum()):
        raise ValueError(f"pairs: {bad} of {len(score_P)} scores are not finite: the features are broken.")
    if min(same := int(same_P.sum()), different := len(same_P) - same) < least:
        raise ValueError(f"pairs: {same} same and {different} different ones; at least {least} of each "
                         f"{'is' if least == 1 else 'are'} needed. Give more pairs, or fewer folds.")

"""How sure a value is, and a difference of two that were measured on the same images.

All of it is about the test images: had others been drawn from where these come from, what would have come out? It says
nothing of other seeds of the training. The draws are fixed, so a value always comes with the same interval.

Axes: m test images, M values measured on them, R draws.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common import counter

DRAWS = 5000
HELD = 1 << 22          # counts of images in draws at a time


class Paired(NamedTuple):
    """By how much one is ahead of another on the same images, in percentage points, and whether that is chance."""

    difference: float
    interval: tuple[float, float]       # 95 %, bootstrap over images
    p: float                            # bootstrap test of no difference
    p_mcnemar: float | None             # None unless each image is right or wrong in both


def bootstrap(score_mM: Tensor) -> list[tuple[float, float]]:
    """The 95 % percentile interval of each column's mean (Efron & Tibshirani 1993, Sec. 13.3), in the scores' unit."""
    low_M, high_M = resampled(score_mM).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return list(zip(low_M.tolist(), high_M.tolist(), strict=True))


def resampled(score_mM: Tensor, draws: int = DRAWS) -> Tensor:
    """Means [R, M] over ``draws`` samples of m images with replacement, the same samples for each column: float64."""
    m = len(score_mM)
    generator = torch.Generator().manual_seed(counter.stream("bootstrap"))
    means = []
    for first in range(0, draws, step := max(1, HELD // m)):
        index_Rm = torch.randint(m, (min(step, draws - first), m), generator=generator)
        count_Rm = torch.zeros(index_Rm.shape).scatter_add_(1, index_Rm, torch.ones(()).expand(index_Rm.shape))
        means.append(count_Rm.double() @ score_mM.double() / m)
    return torch.cat(means)


def paired(score_m: Sequence[float], other_m: Sequence[float]) -> Paired:
    """How far ``score_m`` is ahead of ``other_m``, image by image; both 0 to 1.

    ``p`` is two-sided, from the bootstrap of the differences moved to mean 0 (Efron & Tibshirani 1993, Sec. 16.4); at
    least 1 / (draws + 1). Raises ValueError where the two are not of the same number of images.
    """
    if len(score_m) != len(other_m) or not len(score_m):
        raise ValueError(f"paired: {len(score_m)} and {len(other_m)} images; both are of the same ones, at least one.")
    ahead_m1 = (torch.tensor(score_m, dtype=torch.float64) - torch.tensor(other_m, dtype=torch.float64))[:, None]
    mean_R, mean = resampled(ahead_m1)[:, 0], ahead_m1.mean().item()
    as_far = (mean_R - mean).abs() >= abs(mean) - 1e-12             # 1e-12: sums in another order
    low, high = mean_R.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    p = (1 + int(as_far.sum())) / (1 + len(mean_R))
    return Paired(100 * mean, (100 * low, 100 * high), p, mcnemar(score_m, other_m))


def mcnemar(score_m: Sequence[float], other_m: Sequence[float]) -> float | None:
    """McNemar's test (1947), exact: of the images that only one gets right, is it half of them for each?

    The two-sided p of a binomial of 1/2, in whole numbers. None where a score is neither 0 nor 1.
    """
    if not set(score_m) | set(other_m) <= {0.0, 1.0}:
        return None
    only, other_only = (sum(a > b for a, b in zip(*both, strict=True))
                        for both in ((score_m, other_m), (other_m, score_m)))
    n, ways, up_to = only + other_only, 1, 0
    for i in range(min(only, other_only) + 1):
        up_to += ways
        ways = ways * (n - i) // (i + 1)            # of choosing i + 1 of n
    return min(1.0, 2 * up_to / 2**n)


def holm(p: Sequence[float]) -> list[float]:
    """Each p corrected for their number (Holm 1979): below alpha, the chance of any false alarm is below alpha."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, highest = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * p[i]))
        corrected[i] = highest
    return corrected

"""Which labels are given, and what several draws of them say together.

Axes: n labelled images, m test images, C classes.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.evaluate.linear import draw_labels
from common.evaluate.result import Z95, Result, Setting, accuracy


@dataclass(frozen=True)
class Labels:
    """How many labels are given: a share of those of each class, or so many of each class."""

    share: float | None = None
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Labels":
        """argparse's type: "10%", or "5" of each class. Raises ValueError."""
        if found := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
            if 0 < (share := float(found[1]) / 100) <= 1:
                return cls(share, None)
        elif text.isdecimal() and int(text):
            return cls(None, int(text))
        raise ValueError(f"--labels {text}: give a share of the labels, such as 1%, or how many of each class, such as "
                         "10.")

    def __str__(self) -> str:
        return f"{100 * self.share:g}%" if self.share else f"{self.count} of each class"

    def draw(self, label_n: Tensor, draw: int) -> Tensor:
        """The images whose labels are given, [m]: the draws of ``FewLabels``, so a larger number holds a smaller one.

        Of each class its share, rounded, and at least one image.
        """
        if self.count:
            return draw_labels(label_n, self.count, draw)
        order_n = draw_labels(label_n, len(label_n), draw)                  # by class
        size_C = label_n.bincount()
        place_n = torch.arange(len(label_n)) - (size_C.cumsum(0) - size_C)[label_n[order_n]]
        wanted_C = (size_C * (self.share or 0)).round().clamp(min=1)
        return order_n[place_n < wanted_C[label_n[order_n]]]


def over_draws(metric: str, answers: Sequence[tuple[Tensor, Tensor]], protocol: dict[str, Setting]) -> Result:
    """The mean accuracy over draws of (predicted, label), its standard deviation and 95 % interval.

    The interval is Student's over draws, as far as it lies within 0 and 100 %; of a single draw it is that of the test
    images.
    """
    single = [accuracy(metric, predicted_m, label_m, protocol) for predicted_m, label_m in answers]
    if len(single) == 1:
        return single[0]
    value_R = torch.tensor([result.value for result in single], dtype=torch.float64)
    score_m = torch.tensor([result.score_m for result in single], dtype=torch.float64).mean(dim=0)
    low, high = student(value_R)
    return Result(metric, value_R.mean().item(), value_R.std().item(), protocol, (max(0.0, low), min(100.0, high)),
                  tuple(score_m.tolist()))


def difference(one: Sequence[tuple[Tensor, Tensor]], other: Sequence[tuple[Tensor, Tensor]], metric: str,
               protocol: dict[str, Setting]) -> Result:
    """``one``'s mean accuracy less ``other``'s, in points, with the paired 95 % interval.

    Both were taught the same labels in each draw and asked of the same images. Over draws the interval is Student's on
    the differences; of a single draw it is of the test images that only one of the two got right.
    """
    gained_Rm = torch.stack([(a == label).int() - (b == label).int()
                             for (a, label), (b, _) in zip(one, other, strict=True)])
    value_R = 100 * gained_Rm.double().mean(dim=1)
    if len(value_R) > 1:
        return Result(metric, value_R.mean().item(), value_R.std().item(), protocol, student(value_R))
    gained, lost = (int((gained_Rm == sign).sum()) for sign in (1, -1))
    return Result(metric, value_R.item(), None, protocol, matched(gained, lost, gained_Rm.shape[1]))


def matched(gained: int, lost: int, n: int) -> tuple[float, float]:
    """The 95 % interval, in points, of the difference of two shares of the same ``n`` images.

    Half an image is added to each of the four cases (Agresti & Min 2005, Sec. 3), so that it is not empty where the two
    never differ.
    """
    middle, either = (gained - lost) / (n + 2), (gained + lost + 1) / (n + 2)
    half = Z95 * math.sqrt((either - middle**2) / (n + 2))
    return 100 * (middle - half), 100 * (middle + half)


def student(value_R: Tensor) -> tuple[float, float]:
    """The 95 % interval of a mean of R values (Student 1908)."""
    half = t95(len(value_R) - 1) * value_R.std().item() / math.sqrt(len(value_R))
    return value_R.mean().item() - half, value_R.mean().item() + half


def t95(freedom: int) -> float:
    """97.5 % of Student's distribution lies below: by halving, from the share within (Abramowitz & Stegun, 26.7)."""
    low, high = Z95, 13.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return low


def _within(t: float, freedom: int) -> float:
    """The share of Student's distribution between -t and t (Eqs. 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = (math.cos(angle) if freedom > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, freedom, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

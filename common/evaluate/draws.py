"""Which labels are given, and what several draws of them say together.

Axes: n labelled images, m test images, C classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common import counter
from common.evaluate.result import Z95, Result, Setting, accuracy

Labels = int | str          # so many of each class, or a share of all, such as "1%"


def amount(text: str) -> Labels:
    """argparse's type for --labels: a number of images, or a share such as 1%."""
    return text if text.endswith("%") else int(text)


def check_labels(labels: Labels) -> None:
    """Raises ValueError unless ``labels`` is a number of images from 1 up, or a share above 0 % up to 100 %."""
    try:
        right = labels >= 1 if isinstance(labels, int) else 0 < _share(labels) <= 1
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"labels: {labels} given; must be at least 1 (images of each class), or a share of them above "
                         "0% and up to 100%, such as 1%.")


def draw_labels(label_n: Tensor, labels: Labels, draw: int) -> Tensor:
    """Indices of ``labels`` images of each class (all, if they are fewer; of a share, at least one), by class.

    A function of the draw's number alone: what is drawn of a class is a part of what a larger number draws.
    """
    order_n = counter.permutation(len(label_n), counter.stream("few labels"), draw)
    order_n = order_n[label_n[order_n].argsort(stable=True)]            # by class, shuffled within each
    size_C = label_n.bincount()
    place_n = torch.arange(len(label_n)) - (size_C.cumsum(0) - size_C)[label_n[order_n]]
    if isinstance(labels, int):
        return order_n[place_n < labels]
    wanted_C = (size_C * _share(labels)).round().clamp(min=1)
    return order_n[place_n < wanted_C[label_n[order_n]]]


def _share(labels: str) -> float:
    """Of "2.5%", 0.025. Raises ValueError for other text."""
    if not labels.endswith("%"):
        raise ValueError(labels)
    return float(labels.removesuffix("%")) / 100


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

"""One measured number, which never travels without its protocol.

Axes: m test images.
"""

import math
from typing import Any, NamedTuple

from torch import Tensor

Setting = str | int | float | bool

SIZES = ("train", "test", "queries", "gallery", "left_out",       # keys of a protocol that count images,
         "pairs", "same", "different")                              # or pairs of them
Z95 = 1.959964          # 97.5 % of a normal distribution lies below


class Result(NamedTuple):
    """A value in percent, and all that two people must agree on before they compare it."""

    # "knn", "linear", "few", "recall", "mAP", "mAP@R", "verification", "AUC", "EER", "TAR", "accuracy",
    # "false accepts", "true accepts"
    metric: str
    value: float                        # top-1 accuracy, or what the metric says, percent
    spread: float | None                # standard deviation over draws of labels, in points; None for a single value
    # Layer first, then the settings; then perhaps "won": which of several heads was chosen for this encoder; then
    # SIZES: how many images.
    protocol: dict[str, Setting]
    interval: tuple[float, float] | None = None     # 95 %, in percent
    score_m: tuple[float, ...] = ()     # each test image's share of the value, 0 to 1: what a paired test compares
    interval_by: str = ""               # "Wilson", or "bootstrap" over test images

    def settings(self) -> dict[str, Setting]:
        """The protocol without the layer, the numbers of images and what was chosen by it: the same for each row."""
        return {key: value for key, value in self.protocol.items() if key not in ("layer", "won", *SIZES)}

    def label(self) -> str:
        """The name under which the value is recorded, like ``knn(layer=backbone, k=20, tau=0.07, norm=l2)``."""
        return call(self.metric, {"layer": self.protocol["layer"], **self.settings()})

    def short(self) -> str:
        """For a line that is read once: the metric, its first setting and the value, like ``knn k=20 98.2``."""
        (key, value), *_ = self.settings().items()
        return f"{self.metric} {key}={value} {self.text()}"

    def text(self) -> str:
        """The value as people write it: ``98.2``, or ``96.0 ± 0.3`` over draws."""
        return f"{self.value:.1f}" if self.spread is None else f"{self.value:.1f} ± {self.spread:.1f}"

    def plain(self) -> dict[str, Any]:
        """What is written down of it: all but the single images."""
        return {name: value for name, value in self._asdict().items() if name != "score_m"}


def call(metric: str, settings: dict[str, Setting]) -> str:
    """``metric(key=value, ...)``."""
    return f"{metric}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def accuracy(metric: str, predicted_m: Tensor, label_m: Tensor, protocol: dict[str, Setting]) -> Result:
    """Top-1 accuracy with its 95 % interval (Wilson 1927), which is of the test images alone, not of seeds."""
    right_m = (predicted_m == label_m).cpu()
    count, n = int(right_m.sum()), len(right_m)
    return Result(metric, top1(predicted_m, label_m), None, protocol, wilson(count, n), tuple(right_m.float().tolist()),
                  "Wilson")


def wilson(count: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share ``count`` / ``n``, in percent (Wilson 1927): never outside 0 to 100."""
    share, z2 = count / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def top1(predicted_m: Tensor, label_m: Tensor) -> float:
    """The share of right predictions, in percent."""
    return 100 * (predicted_m == label_m).double().mean().item()

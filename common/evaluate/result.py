"""One measured number, which never travels without its protocol."""

from typing import NamedTuple

from torch import Tensor

Setting = str | int | float | bool


class Result(NamedTuple):
    """A value in percent, and all that two people must agree on before they compare it."""

    metric: str                         # "knn", "linear", "few"
    value: float                        # top-1 accuracy, percent
    spread: float | None                # standard deviation over draws of labels, in points; None for a single value
    protocol: dict[str, Setting]        # layer first, then the settings, then "train" and "test": how many images

    def settings(self) -> dict[str, Setting]:
        """The protocol without the layer and the numbers of images: the same for each row of a table."""
        return {key: value for key, value in self.protocol.items() if key not in ("layer", "train", "test")}

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


def call(metric: str, settings: dict[str, Setting]) -> str:
    """``metric(key=value, ...)``."""
    return f"{metric}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def top1(predicted_m: Tensor, label_m: Tensor) -> float:
    """The share of right predictions, in percent."""
    return 100 * (predicted_m == label_m).double().mean().item()

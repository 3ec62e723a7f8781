"""What an operation on a batch of views is, and the helpers that all of them share.

Axes: B images of the batch, N images that an operation is applied to, c channels, H W pixels, R draws per image.

Operations work on float32 batches of 0..255 with a value of each parameter for each image. Parameters are functions of
uniform numbers and live on the CPU, so that which images an operation touches is known without asking the device:
an operation costs what the images it is applied to cost, and nothing waits.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Parameters = dict[str, Tensor]      # name -> [B, ...] on the CPU


class Op(Protocol):
    """One operation of a recipe, after the crop."""

    @property
    def num_draws(self) -> int:
        """R: how many uniform numbers each image needs."""

    def draw(self, u_RB: Tensor) -> Parameters:
        """The parameters of B images, from uniform numbers in [0, 1) [R, B]."""

    def __call__(self, x_BcHW: Tensor, parameters: Parameters) -> Tensor:
        """The batch with the operation done; may overwrite ``x_BcHW``."""


@dataclass(frozen=True)
class Sometimes:
    """An operation without parameters, done with probability ``p``; a subclass says what it is in ``change``."""

    p: float = 0.5
    num_draws: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_probability(type(self).__name__, self.p)

    def draw(self, u_RB: Tensor) -> Parameters:
        return {"applied": u_RB[0] < self.p}

    def __call__(self, x_BcHW: Tensor, parameters: Parameters) -> Tensor:
        if parameters["applied"].all():
            return self.change(x_BcHW)
        if not parameters["applied"].any():
            return x_BcHW
        index_N = chosen(parameters["applied"], x_BcHW.device)
        return x_BcHW.index_copy_(0, index_N, self.change(x_BcHW.index_select(0, index_N)))

    def change(self, x_NcHW: Tensor) -> Tensor:
        """The chosen images, changed; may overwrite them."""
        raise NotImplementedError


def between(low: float, high: float, u: Tensor) -> Tensor:
    """Uniform in [low, high) from uniform in [0, 1)."""
    return low + (high - low) * u


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, without making the host wait for it; itself if it is there."""
    from_host = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if from_host else x.to(device)


def chosen(applied_B: Tensor, device: torch.device) -> Tensor:
    """The numbers [N] of the images for which ``applied_B`` (bool, on the CPU) holds, on ``device``."""
    return to_device(applied_B.nonzero().squeeze(1), device)


def check_probability(where: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{where}: p is {p}; a probability lies in [0, 1].")


def check_range(where: str, pair: tuple[float, float]) -> None:
    low, high = pair
    if not 0 < low <= high:
        raise ValueError(f"{where}: the range is {pair}; give two positive numbers, the smaller first.")

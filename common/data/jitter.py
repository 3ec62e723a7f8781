"""Colour jitter: brightness, contrast, saturation and hue, in an order of its own for each image.

Axes: B images of the batch, N images that an operation is applied to, c channels, H W pixels, K steps of the jitter.
Values are 0..255; the formulas are torchvision's for float images, whose range is 0..1. Functions ending in ``_``
overwrite their first argument.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common.data.augment import Parameters, between, check_probability, to_device

_LUMA = (0.2989, 0.587, 0.114)      # ITU-R BT.601, in torchvision's digits


def grey(x_BcHW: Tensor) -> Tensor:
    """Luma [B, 1, H, W] of three channels; the mean of any other number of them."""
    if x_BcHW.shape[1] != 3:
        return x_BcHW.mean(1, keepdim=True)
    red, green, blue = x_BcHW.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def brightness_(x_BcHW: Tensor, factor_B111: Tensor) -> None:
    x_BcHW.mul_(factor_B111).clamp_(0, 255)


def contrast_(x_BcHW: Tensor, factor_B111: Tensor) -> None:
    mean_B111 = grey(x_BcHW.mean((2, 3), keepdim=True))
    x_BcHW.mul_(factor_B111).add_((1 - factor_B111) * mean_B111).clamp_(0, 255)


def saturation_(x_B3HW: Tensor, factor_B111: Tensor) -> None:
    rest_B1HW = grey(x_B3HW).mul_(1 - factor_B111)
    x_B3HW.mul_(factor_B111).add_(rest_B1HW).clamp_(0, 255)


def hue_(x_B3HW: Tensor, shift_B111: Tensor) -> None:
    """Hue turned by ``shift`` of the whole circle, in HSV: value and chroma stay as they are.

    With hue h in [0, 1), channel n of (red, green, blue) is ``value - chroma * clamp(2 - |6 frac(h + a_n) - 2|, 0, 1)``
    for a = (5, 3, 1) / 6: the usual six cases in one line.
    """
    red, green, blue = x_B3HW.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    sixth = torch.where(value == red, green - blue,
                        torch.where(value == green, (blue - red).add_(chroma, alpha=2),
                                    (red - green).add_(chroma, alpha=4)))
    hue = sixth.div_(chroma.mul(6).add_(1e-12)).add_(shift_B111 + 2)    # + 2: frac() wants a positive number
    channel_311 = torch.arange(5, 0, -2, device=hue.device).view(3, 1, 1) / 6
    distance = (hue + channel_311).frac_().sub_(1 / 3).abs_()
    turned = torch.rsub(distance, 2, alpha=6).clamp_(0, 1)
    torch.addcmul(value, turned, chroma, value=-1, out=x_B3HW)


_JITTER: dict[str, Callable[[Tensor, Tensor], None]] = {
    "brightness": brightness_, "contrast": contrast_, "saturation": saturation_, "hue": hue_
}
_NAMES = list(_JITTER)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue changed in a random order, another for each image, with probability p.

    Factors are uniform in [max(0, 1 - strength), 1 + strength], the hue's shift in [-hue, hue]; a strength of 0
    leaves an operation out. Images that do not have three channels get brightness and contrast only.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0
    num_draws: ClassVar[int] = 9

    def __post_init__(self) -> None:
        check_probability("ColorJitter", self.p)
        if min(self.brightness, self.contrast, self.saturation, self.hue) < 0 or self.hue > 0.5:
            raise ValueError(f"{self}: strengths are 0 or more, and hue at most 0.5 (half the circle).")

    def draw(self, u_RB: Tensor) -> Parameters:
        """``order`` [B, 4] says which is first, second, ... of 0 brightness, 1 contrast, 2 saturation, 3 hue."""
        strengths = (self.brightness, self.contrast, self.saturation)
        factors_RB = [between(max(0.0, 1 - strength), 1 + strength, u_B) for strength, u_B in zip(strengths, u_RB)]
        values = dict(zip(_NAMES, [*factors_RB, between(-self.hue, self.hue, u_RB[3])]))
        return {**values, "order": u_RB[4:8].T.argsort(1), "applied": u_RB[8] < self.p}

    def __call__(self, x_BcHW: Tensor, parameters: Parameters) -> Tensor:
        """Each step sorts the batch by the operation that is due; then each operation has one slice, in place."""
        used = [name for name in (_NAMES if x_BcHW.shape[1] == 3 else _NAMES[:2]) if getattr(self, name)]
        if not used:
            return x_BcHW
        moves, factors, counts = _plan(parameters, used)
        moves, factors = to_device(moves, x_BcHW.device), to_device(factors, x_BcHW.device)
        for move_B, factor_B, counts_K in zip(moves, factors.view(*factors.shape, 1, 1, 1), counts):
            x_BcHW = _moved(x_BcHW, move_B)
            # zip leaves out the last slice, the images that the jitter is not applied to
            for name, x_NcHW, factor_N111 in zip(used, x_BcHW.split(counts_K), factor_B.split(counts_K)):
                if len(x_NcHW):
                    _JITTER[name](x_NcHW, factor_N111)
        return _moved(x_BcHW, moves[-1])


def _moved(x_BcHW: Tensor, move_B: Tensor) -> Tensor:
    return x_BcHW.index_select(0, move_B) if len(x_BcHW) > 1 else x_BcHW


def _plan(parameters: Parameters, used: list[str]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """How to visit B images in K steps, each step sorted by the operation that it is an image's turn for.

    Returns moves [K + 1, B] (the rows to take before each step; the last restores the order), factors [K, B] in the
    order of each step, and for each step how many images each operation has, then how many are left as they are.
    """
    position_BK = parameters["order"].argsort(1)[:, [_NAMES.index(name) for name in used]]
    due_KB = position_BK.argsort(1).masked_fill(~parameters["applied"].unsqueeze(1), len(used)).T
    sorted_KB = due_KB.argsort(stable=True, dim=1)
    all_1B = torch.arange(due_KB.shape[1]).unsqueeze(0)
    row_of_KB = torch.cat([all_1B, sorted_KB.argsort(1)])               # where each image stands before a step
    moves = row_of_KB.gather(1, torch.cat([sorted_KB, all_1B]))
    values_KB = torch.stack([parameters[name] for name in used])
    factors_KB = values_KB[due_KB.gather(1, sorted_KB).clamp_max(len(used) - 1), sorted_KB]
    return moves, factors_KB, [torch.bincount(due_B, minlength=len(used) + 1).tolist() for due_B in due_KB]

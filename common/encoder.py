"""Backbone + projection head -> features, of unit length if not told otherwise; and its slowly moving copy."""

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import guard

M = TypeVar("M", bound=nn.Module)


class Encoder(nn.Module):
    """``backbone`` [B,c,H,W] -> [B,D] is what is kept; ``head`` [B,D] -> [B,C] is thrown away after pretraining.

    ``unit``: features are scaled to length 1. Losses on Euclidean distances and centres may want them as they come.
    """

    unit = True         # of classes of one's own, too

    def __init__(self, backbone: nn.Module, head: nn.Module, unit: bool = True):
        super().__init__()
        self.backbone, self.head, self.unit = backbone, head, unit

    def extra_repr(self) -> str:
        return "" if self.unit else "unit=False"

    @property
    def dim(self) -> int:
        """C, by the last linear layer of the head. Raises ValueError where there is none."""
        widths = [layer.out_features for layer in self.head.modules() if isinstance(layer, nn.Linear)]
        if not widths:
            raise ValueError("encoder: its head has no linear layer, and how many features it gives is not known. Give "
                             "one with such a layer.")
        return widths[-1]

    def project(self, image_BcHW: Tensor) -> Tensor:
        """The head's output before normalisation, [B, C], in float32 (float64 stays) whatever the trunk ran in."""
        x_BC = self.head(self.backbone(image_BcHW))
        return x_BC.to(torch.promote_types(x_BC.dtype, torch.float32))

    def forward(self, image_BcHW: Tensor) -> Tensor:
        return self.scaled(self.project(image_BcHW))

    def scaled(self, x_BC: Tensor) -> Tensor:
        """The features that ``project`` gave, at their length."""
        return F.normalize(x_BC, dim=1) if self.unit else x_BC


def require_lengths(encoder: Encoder) -> None:
    """Raises ValueError for an encoder that scales its features, whose lengths the loss needs."""
    if encoder.unit:
        raise ValueError("encoder.unit: true, the default, scales features to length 1, and this loss learns their "
                         "lengths, too. Give unit: false.")


def require_unit(encoder: Encoder) -> None:
    """Raises ValueError for an encoder whose features are no directions, which a temperature asks for."""
    if not encoder.unit:
        raise ValueError("encoder.unit: false given. This loss compares directions: leave it true.")


def frozen_copy(module: M) -> M:
    """A copy that starts equal, head included, and gets no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """MoCo Eq. 2, in place: theta_slow <- m theta_slow + (1 - m) theta_fast.

    Parameters only: BatchNorm's running statistics stay the slow network's own, as in the authors' code.
    """
    if (skip := guard.skip()) is not None:
        _ema_unless_(skip, list(slow.parameters()), list(fast.parameters()), 1 - momentum)
        return
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - momentum)


def _ema_unless_(skip: Tensor, slow: list[Tensor], fast: list[Tensor], rate: float) -> None:
    """slow <- slow - rate (slow - fast), one pass that leaves all as it is where ``skip`` is 1.

    It is a step of SGD: "weight decay" gives slow, "maximize" the minus. No other fused operation asks the device.
    """
    torch._fused_sgd_(slow, fast, [], lr=rate, weight_decay=1.0, maximize=True, momentum=0.0, dampening=0.0,
                      nesterov=False, is_first_step=False, found_inf=skip)

"""Backbone + projection head -> unit-length features; and its slowly moving copy."""

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Encoder(nn.Module):
    """``backbone`` [B,c,H,W] -> [B,D] is what is kept; ``head`` [B,D] -> [B,C] is thrown away after pretraining."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def project(self, image_BcHW: Tensor) -> Tensor:
        """The head's output before normalisation, [B, C], in float32 (float64 stays) whatever the trunk ran in."""
        x_BC = self.head(self.backbone(image_BcHW))
        return x_BC.to(torch.promote_types(x_BC.dtype, torch.float32))

    def forward(self, image_BcHW: Tensor) -> Tensor:
        return F.normalize(self.project(image_BcHW), dim=1)


def frozen_copy(module: M) -> M:
    """A copy that starts equal, head included, and gets no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """MoCo Eq. 2, in place: theta_slow <- m theta_slow + (1 - m) theta_fast.

    Parameters only: BatchNorm's running statistics stay the slow network's own, as in the authors' code.
    """
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - momentum)

"""What else changes a view's pixels: greyscale, blur, solarize.

Axes: B images of the batch, N images that an operation is applied to, c channels, H W pixels, K taps of a filter.
Values are 0..255.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.augment import Parameters, Sometimes, between, check_probability, check_range, chosen, to_device
from common.data.jitter import grey

_WIDEST = 6             # sigmas; beyond it a tap weighs 1.5e-8 of the one in the middle, below float32's resolution


@dataclass(frozen=True)
class Grayscale(Sometimes):
    """The luma in all three channels, with probability ``p``; images of another number of channels are left alone."""

    p: float = 0.2

    def change(self, x_NcHW: Tensor) -> Tensor:
        return x_NcHW.copy_(grey(x_NcHW)) if x_NcHW.shape[1] == 3 else x_NcHW


@dataclass(frozen=True)
class GaussianBlur:
    """Convolution with a Gaussian of standard deviation ``sigma`` (uniform, in pixels), with probability ``p``.

    Pixels beyond the border repeat it, as in Pillow. Pillow's own filter is three box filters that come near a
    Gaussian (0.4 grey levels on average); this is the Gaussian itself, cut off at three of the largest sigma.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5
    num_draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_range("GaussianBlur.sigma", self.sigma)
        check_probability("GaussianBlur", self.p)

    @property
    def radius(self) -> int:
        """Pixels from the middle of the filter to its end."""
        return math.ceil(3 * self.sigma[1])

    def draw(self, u_RB: Tensor) -> Parameters:
        return {"sigma": between(*self.sigma, u_RB[0]), "applied": u_RB[1] < self.p}

    def __call__(self, x_BcHW: Tensor, parameters: Parameters) -> Tensor:
        if not parameters["applied"].any():
            return x_BcHW
        index_N = chosen(parameters["applied"], x_BcHW.device)
        sigma_N = parameters["sigma"][parameters["applied"]]
        return x_BcHW.index_copy_(0, index_N, blur(x_BcHW.index_select(0, index_N), sigma_N, self.radius))


def gaussians(sigma_N: Tensor, radius: int) -> Tensor:
    """The weights [N, K] of 2 * ``radius`` + 1 taps for each sigma; their sum is 1, those beyond ``_WIDEST`` are 0."""
    tap_K = torch.arange(-radius, radius + 1, device=sigma_N.device)
    sigmas_NK = tap_K / sigma_N.unsqueeze(1)
    return torch.softmax((-0.5 * sigmas_NK**2).masked_fill_(sigmas_NK.abs() > _WIDEST, -math.inf), dim=1)


def blur(x_NcHW: Tensor, sigma_N: Tensor, radius: int) -> Tensor:
    """Each image convolved with its own Gaussian of 2 * ``radius`` + 1 taps, columns and rows in turn.

    ``sigma_N`` lies on the CPU. There the sum over taps is a sum of shifted images, of those taps that weigh anything;
    elsewhere it is a convolution with a group for each channel of each image.
    """
    if x_NcHW.device.type != "cpu":
        return convolution(x_NcHW, gaussians(to_device(sigma_N, x_NcHW.device), radius))
    weighs = min(radius, math.ceil(_WIDEST * float(sigma_N.max())))
    kernel_NK = gaussians(sigma_N, radius)[:, radius - weighs : radius + weighs + 1]
    return _shifted(_shifted(F.pad(x_NcHW, [weighs] * 4, mode="replicate"), kernel_NK, 2), kernel_NK, 3)


def _shifted(x_NcHW: Tensor, kernel_NK: Tensor, dim: int) -> Tensor:
    """The sum of ``x``, shifted along ``dim`` and weighted; shorter by K - 1 pixels."""
    length = x_NcHW.shape[dim] - kernel_NK.shape[1] + 1
    first_N111, *others = kernel_NK.T.reshape(-1, len(x_NcHW), 1, 1, 1)
    out_NcHW = x_NcHW.narrow(dim, 0, length) * first_N111
    for k, weight_N111 in enumerate(others, start=1):
        out_NcHW.addcmul_(x_NcHW.narrow(dim, k, length), weight_N111)
    return out_NcHW


def convolution(x_NcHW: Tensor, kernel_NK: Tensor) -> Tensor:
    """``blur`` for a device that has its own kernel for a group per channel; the border is repeated."""
    N, c, H, W = x_NcHW.shape
    radius = kernel_NK.shape[1] // 2
    kernel = kernel_NK.repeat_interleave(c, dim=0).view(N * c, 1, 1, -1)
    x = F.pad(x_NcHW, [radius] * 4, mode="replicate").view(1, N * c, H + 2 * radius, W + 2 * radius)
    x = F.conv2d(F.conv2d(x, kernel, groups=N * c), kernel.transpose(2, 3), groups=N * c)
    return x.view(N, c, H, W)


@dataclass(frozen=True)
class Solarize(Sometimes):
    """Values of 128 and more inverted, ``255 - x``, with probability ``p``."""

    p: float = 0.2

    def change(self, x_NcHW: Tensor) -> Tensor:
        return torch.where(x_NcHW < 128, x_NcHW, 255 - x_NcHW)

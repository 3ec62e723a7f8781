"""Where a view lies in its image: random resized crop, flip, rotation; and the resize of the evaluation.

Axes: B images of the batch, N images that an operation is applied to, c channels, H W pixels of the input, S pixels of
the output's side, I O pixels of the input and the output along one axis, R draws per image, T tries at a box.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.augment import Parameters, Sometimes, between, check_range, to_device

_TRIES = 10


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area (share of the image, ``scale``) and shape (``ratio``, log-uniform), resized to a square.

    Distribution of torchvision's ``RandomResizedCrop``: ten tries at a box that fits, else the largest central one.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    num_draws: ClassVar[int] = 2 * _TRIES + 2

    def __post_init__(self) -> None:
        check_range("RandomResizedCrop.scale", self.scale)
        check_range("RandomResizedCrop.ratio", self.ratio)
        if self.scale[1] > 1:
            raise ValueError(f"RandomResizedCrop.scale: {self.scale}; the largest share of an image is 1.")

    def shares(self, u_RB: Tensor) -> Tensor:
        """A box before the image's size is known, float64 [R, B]: areas and shapes to try, then how far down and right.

        The first T rows are shares of the image's area, the next T are width / height; the last two lie in [0, 1).
        """
        return torch.cat(self._shares(u_RB))

    def _shares(self, u_RB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u_RB = u_RB.double()
        ratio_TB = between(math.log(self.ratio[0]), math.log(self.ratio[1]), u_RB[_TRIES:-2]).exp()
        return between(*self.scale, u_RB[:_TRIES]), ratio_TB, u_RB[-2:]

    def box(self, shares_R: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
        """What ``draw`` gives for one image, ``top left height width``: the same numbers at a hundredth of the time."""
        for share, ratio in zip(shares_R[:_TRIES], shares_R[_TRIES:-2]):
            area = share * (height * width)
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 1 <= h <= height and 1 <= w <= width:
                return int(shares_R[-2] * (height - h + 1)), int(shares_R[-1] * (width - w + 1)), h, w
        h, w = self._largest(height, width)
        return (height - h) // 2, (width - w) // 2, h, w

    def draw(self, u_RB: Tensor, height: int, width: int) -> Parameters:
        """Boxes inside images of ``height`` x ``width`` pixels: ``top left height width``, int64 [B] each."""
        share_TB, ratio_TB, place_2B = self._shares(u_RB)
        area_TB = share_TB * (height * width)
        h_TB, w_TB = (area_TB / ratio_TB).sqrt().round(), (area_TB * ratio_TB).sqrt().round()
        fits_TB = (h_TB >= 1) & (h_TB <= height) & (w_TB >= 1) & (w_TB <= width)
        first_1B, found_B = fits_TB.int().argmax(0, keepdim=True), fits_TB.any(0)
        last_h, last_w = self._largest(height, width)
        h_B = torch.where(found_B, h_TB.gather(0, first_1B)[0], last_h)
        w_B = torch.where(found_B, w_TB.gather(0, first_1B)[0], last_w)
        top_B = torch.where(found_B, place_2B[0] * (height - h_B + 1), (height - last_h) // 2)
        left_B = torch.where(found_B, place_2B[1] * (width - w_B + 1), (width - last_w) // 2)
        return {"top": top_B.long(), "left": left_B.long(), "height": h_B.long(), "width": w_B.long()}

    def _largest(self, height: int, width: int) -> tuple[int, int]:
        """The largest box whose shape is allowed."""
        if width / height < self.ratio[0]:
            return round(width / self.ratio[0]), width
        if width / height > self.ratio[1]:
            return height, round(height * self.ratio[1])
        return height, width


@dataclass(frozen=True)
class HorizontalFlip(Sometimes):
    """Left and right exchanged, with probability ``p``."""

    def change(self, x_NcHW: Tensor) -> Tensor:
        return x_NcHW.flip(-1)


@dataclass(frozen=True)
class Rotate:
    """Rotation about the centre by an angle in [-degrees, degrees], counter-clockwise, bilinear, black outside."""

    degrees: float
    num_draws: ClassVar[int] = 1

    def draw(self, u_RB: Tensor) -> Parameters:
        return {"degrees": between(-self.degrees, self.degrees, u_RB[0])}

    def __call__(self, x_BcHW: Tensor, parameters: Parameters) -> Tensor:
        angle_B = parameters["degrees"].deg2rad()
        cos_B, sin_B = angle_B.cos(), angle_B.sin()
        aspect, zero_B = x_BcHW.shape[2] / x_BcHW.shape[3], torch.zeros_like(angle_B)
        theta_B23 = torch.stack([cos_B, -sin_B * aspect, zero_B, sin_B / aspect, cos_B, zero_B], 1).view(-1, 2, 3)
        grid = F.affine_grid(to_device(theta_B23, x_BcHW.device), list(x_BcHW.shape), align_corners=False)
        return F.grid_sample(x_BcHW, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def crop_resize(images_BcHW: Tensor, box: Parameters, size: int) -> Tensor:
    """The box of each image resized to float32 [B, c, S, S]: antialiased bilinear, two matmuls for the whole batch.

    A resize is linear and separable, ``A_y @ image @ A_x^T``, and so is cutting out a box: a matrix for each image
    and axis does both. Equal to Pillow's, up to Pillow's rounding to whole grey levels.
    """
    B, c, H, W = images_BcHW.shape
    top_B, height_B, left_B, width_B = to_device(
        torch.stack([box[name] for name in ("top", "height", "left", "width")]).float(), images_BcHW.device
    )
    rows_BSH = _resize_matrix(top_B, height_B, H, size)
    columns_BSW = _resize_matrix(left_B, width_B, W, size)
    x_BHcW = images_BcHW.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x_BScW = rows_BSH @ x_BHcW.view(B, H, c * W)
    x_BScS = x_BScW.view(B, size * c, W) @ columns_BSW.transpose(1, 2)
    return x_BScS.view(B, size, c, size).transpose(1, 2).contiguous()


def _resize_matrix(start_B: Tensor, length_B: Tensor, num_in: int, num_out: int) -> Tensor:
    """Weights [B, O, I] that resize pixels ``start .. start + length`` of ``num_in`` to ``num_out``.

    A triangle around each output pixel's centre, as wide as two output pixels (two input pixels when enlarging), cut
    off at the box and normalised.
    """
    start_B11, length_B11 = start_B.view(-1, 1, 1), length_B.view(-1, 1, 1)
    scale_B11 = length_B11 / num_out
    in_I = torch.arange(num_in, device=start_B.device) + 0.5
    out_O1 = torch.arange(num_out, device=start_B.device).unsqueeze(1) + 0.5
    widest_B11 = scale_B11.clamp_min(1)
    centre_BO1 = (start_B11 + out_O1 * scale_B11) / widest_B11
    weight_BOI = (in_I / widest_B11 - centre_BO1).abs_().neg_().add_(1).clamp_min_(0)
    weight_BOI *= (in_I > start_B11) & (in_I < start_B11 + length_B11)
    return weight_BOI.div_(weight_BOI.sum(2, keepdim=True))


def cut(image_cHW: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    """The box ``top left height width`` of one uint8 image, resized to [c, S, S]; on the CPU, stored channels last."""
    top, left, height, width = box
    image_1chw = image_cHW[:, top : top + height, left : left + width].unsqueeze(0)
    # torch packs what is neither one layout nor the other, and then unpacks its result: 0.38 ms become 0.27.
    return resize(image_1chw.contiguous(memory_format=torch.channels_last), size, size)[0]


def resize(images_BcHW: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bilinear resize, all images alike; uint8 (CPU only) or float, as given."""
    return F.interpolate(images_BcHW, (height, width), mode="bilinear", align_corners=False, antialias=True)


def centre(images_BcHW: Tensor, size: int, short_side: int) -> Tensor:
    """Resized so that the shorter side has ``short_side`` pixels, then the central ``size`` x ``size`` of it."""
    H, W = images_BcHW.shape[-2:]
    height, width = (short_side * side // min(H, W) for side in (H, W))
    if (height, width) != (H, W):
        images_BcHW = resize(images_BcHW, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images_BcHW[..., top : top + size, left : left + size]

"""The operations after the crop as a few Triton kernels, for CUDA; the plain operations are what they must give.

Plain operations read and write the batch about 45 times. Here an image is read twice, and it is written once, or three
times if it is blurred. This has not run on a GPU yet: the tests run the kernels in Triton's interpreter.

Axes: B images, N of them blurred, c channels, H W pixels, K steps, P columns of the table.
"""

import logging
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.augment import Op, Parameters, to_device
from common.data.filters import GaussianBlur, Grayscale, Solarize
from common.data.geometry import HorizontalFlip
from common.data.jitter import ColorJitter

Plain = Callable[[Tensor, dict[str, Parameters], Tensor], None]     # as ``Fused.__call__``
BLOCK = 1024                                                        # pixels that a program of the kernels has
CODES = {"brightness": 1, "contrast": 2, "saturation": 3, "hue": 4, "Grayscale": 5, "Solarize": 6}      # 0: nothing
COLUMNS = ("mirrored", "before", "place", "sigma", "blurred")       # of the table, see there
# Grey levels by which the first batch may differ from the plain one: the mean, and the largest. Where rounding moves a
# value over Solarize's threshold it is one.
LIMITS = 0.05, 2.0


def fusable(ops: Sequence[Op], channels: int) -> bool:
    """Whether the kernels know all of ``ops``, in their order, for so many channels."""
    kinds = [type(op) for op in ops]
    known = set(kinds) <= {ColorJitter, GaussianBlur, HorizontalFlip, Grayscale, Solarize}
    jitter_after_blur = GaussianBlur in kinds and ColorJitter in kinds[kinds.index(GaussianBlur):]
    return known and channels == 3 and not jitter_after_blur


class Fused:
    """The operations of one view, by kernels where that works, and else by plain operations.

    The first batch is made both ways, and others until one has had an image to blur, which takes kernels of its own. If
    a kernel fails, or the two differ, this is said once and all is plain.
    """

    def __init__(self, ops: Sequence[Op], mean: Sequence[float], std: Sequence[float]) -> None:
        self.ops, self.mean, self.std = ops, mean, std
        self.wanted, self.checked = fusable(ops, len(mean)), False

    def __call__(self, crop_BcHW: Tensor, parameters: dict[str, Parameters], out_BcHW: Tensor, plain: Plain) -> None:
        """Fill ``out_BcHW`` from crops of 0..255, uint8 or float32; the latter may be overwritten."""
        if self.wanted and not self.checked:
            self._check(crop_BcHW, parameters, plain)
        if self.wanted:
            fill(crop_BcHW, self.ops, parameters, self.mean, self.std, out_BcHW)
        else:
            plain(crop_BcHW, parameters, out_BcHW)

    def _check(self, crop_BcHW: Tensor, parameters: dict[str, Parameters], plain: Plain) -> None:
        self.checked = all(parameters[type(op).__name__]["applied"].any() for op in self.ops
                           if isinstance(op, GaussianBlur) and op.p > 0)
        try:
            fused_BcHW, plain_BcHW = torch.empty(2, *crop_BcHW.shape, device=crop_BcHW.device)
            fill(crop_BcHW, self.ops, parameters, self.mean, self.std, fused_BcHW)
            plain(crop_BcHW.clone(), parameters, plain_BcHW)
            self._compare(fused_BcHW, plain_BcHW)
        except Exception as error:          # no Triton, no compiler, a GPU that it does not know, a wrong kernel
            self.wanted = False
            logging.getLogger(__name__).warning("views: the fused operations are not used, the plain ones are: %s: %s",
                                                type(error).__name__, error)

    def _compare(self, fused_BcHW: Tensor, plain_BcHW: Tensor) -> None:
        std_c11 = torch.tensor(self.std, device=fused_BcHW.device).view(-1, 1, 1)
        error_BcHW = (fused_BcHW - plain_BcHW).abs_() * (255 * std_c11)
        mean, largest = float(error_BcHW.mean()), float(error_BcHW.max())
        if not (mean <= LIMITS[0] and largest <= LIMITS[1]):        # NaN is neither
            raise ArithmeticError(f"they differ from the plain ones by {mean:.3g} grey levels on average and "
                                  f"{largest:.3g} at most; allowed are {LIMITS[0]} and {LIMITS[1]}")


def fill(crop_BcHW: Tensor, ops: Sequence[Op], parameters: dict[str, Parameters], mean: Sequence[float],
         std: Sequence[float], out_BcHW: Tensor) -> None:
    """Launch the kernels; ``out_BcHW`` may have any strides and any type of float. The host waits for nothing."""
    from common.data import fused_kernels as kernels  # only here: it imports Triton

    B, c, H, W = crop_BcHW.shape
    if not crop_BcHW.is_contiguous(memory_format=torch.channels_last):      # as a worker's crops are
        crop_BcHW = crop_BcHW.contiguous()
    crops = crop_BcHW, crop_BcHW.stride(1), crop_BcHW.stride(3)
    rows_BP, num_before, num_after, N = table(ops, parameters, B)
    num_blocks, P, device = math.ceil(H * W / BLOCK), rows_BP.shape[1], crop_BcHW.device
    rows_BP = to_device(rows_BP, device)
    sums = torch.empty(B, num_blocks, device=device)
    points, rows = torch.empty(2, N, c, H, W, device=device)
    normalisation = [1 / (255 * s) for s in std] + [-m / s for m, s in zip(mean, std)]
    view = out_BcHW, H, W, *out_BcHW.stride(), *normalisation, P, num_before, num_after
    kernels.luma_sums[B, num_blocks](*crops, rows_BP, sums, H * W, P, num_blocks, BLOCK)
    kernels.points[B, num_blocks](*crops, rows_BP, sums, points, num_blocks, *view,
                                  1 << (num_blocks - 1).bit_length(), BLOCK)
    if N:
        radius = next(op.radius for op in ops if isinstance(op, GaussianBlur))
        kernels.blur_rows[N, num_blocks](points, rows_BP, rows, H, W, P, radius, BLOCK)
        kernels.blur_columns[N, num_blocks](rows, rows_BP, *view, radius, BLOCK)


def table(ops: Sequence[Op], parameters: dict[str, Parameters], B: int) -> tuple[Tensor, int, int, int]:
    """What each image gets, float32 [B, P] on the CPU; how many steps stand before the blur, and after it; N.

    A row says whether its image is mirrored; how many steps stand before its contrast, -1 if it gets none; its place
    among the blurred images, -1 if it is not blurred; its sigma. Row n < N gives the number of the n-th blurred image.
    Then come K pairs (code, value), for each operation that changes pixels one by one, in the image's own order.
    """
    mirrored_B, sigma_B, blurred_B = torch.zeros(B), torch.ones(B), torch.zeros(B, dtype=torch.bool)
    steps_BK2, num_before = torch.zeros(B, 0, 2), None
    for op in ops:
        found = parameters[type(op).__name__]
        if isinstance(op, HorizontalFlip):                  # commutes with all the others
            mirrored_B = found["applied"]
        elif isinstance(op, GaussianBlur):
            sigma_B, blurred_B, num_before = found["sigma"], found["applied"], steps_BK2.shape[1]
        else:
            steps_BK2 = torch.cat([steps_BK2, _steps(op, found)], dim=1)
    contrast_BK = F.pad(steps_BK2[..., 0] == CODES["contrast"], (0, 1))         # one more: argmax wants one
    before_B = torch.where(contrast_BK.any(1), contrast_BK.int().argmax(1), -1)
    place_B = torch.where(blurred_B, blurred_B.cumsum(0) - 1, -1)
    number_B = (~blurred_B).int().argsort(stable=True)
    columns = torch.stack([x.float() for x in (mirrored_B, before_B, place_B, sigma_B, number_B)], dim=1)
    K = steps_BK2.shape[1]
    num_before = K if num_before is None else num_before
    return torch.cat([columns, steps_BK2.flatten(1)], dim=1), num_before, K - num_before, int(blurred_B.sum())


def _steps(op: Op, parameters: Parameters) -> Tensor:
    """[B, K, 2] codes and values; the code of what is not applied, or has strength 0, is 0."""
    applied_B1 = parameters["applied"].unsqueeze(1)
    if not isinstance(op, ColorJitter):
        return F.pad(CODES[type(op).__name__] * applied_B1.float().unsqueeze(2), (0, 1))
    names, order_B4 = list(CODES)[:4], parameters["order"]
    used_B4 = torch.tensor([bool(getattr(op, name)) for name in names])[order_B4] & applied_B1
    values_B4 = torch.stack([parameters[name] for name in names], dim=1).gather(1, order_B4)
    return torch.stack([(order_B4 + 1) * used_B4, values_B4], dim=2)

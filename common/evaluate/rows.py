"""Features as a probe is fitted to them: standardised, float32, on its device, some rows at a time.

Those of ImageNet are 10 GB in float32. They may be kept in float16, and no other copy of them all is made.

Axes: R problems solved at once, n training and m test images, b rows of a block, D features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.loader import free_bytes
from common.evaluate.features import CPU, Features
from common.evaluate.result import Setting

HELD = 2**28        # bytes of a block, and of all the blocks that are kept from one pass to the next


class Rows:
    """Features [n, D] as (x - shift_D) * scale_D in float32 (float64 stays), made when they are asked for.

    They stay as they are stored, float16 or wider, on ``device`` if they fill no more than half of what is free there.
    ``unit``: each row is given length 1 first.
    """

    def __init__(self, x_nD: Tensor, shift_D: Tensor | float = 0.0, scale_D: Tensor | float = 1.0,
                 device: torch.device = CPU, unit: bool = False):
        self.unit = unit
        self.x_nD = placed(x_nD, device)
        self.device, self.dtype = device, torch.promote_types(x_nD.dtype, torch.float32)
        self.shift_D, self.scale_D = (torch.as_tensor(x, dtype=self.dtype, device=device) for x in (shift_D, scale_D))

    def __len__(self) -> int:
        return len(self.x_nD)

    @property
    def width(self) -> int:
        return self.x_nD.shape[1]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Those rows, [..., D] for an index [...]."""
        x_bD = self.x_nD[rows].to(self.device, self.dtype)
        x_bD = F.normalize(x_bD, dim=-1) if self.unit else x_bD
        return (x_bD - self.shift_D).mul_(self.scale_D)

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, [b, D] at a time."""
        step = block_length(self.width)
        return (self[first:first + step] for first in range(0, len(self), step))


class Problems:
    """R sets of n rows and their labels, ``index_Rn`` of them: [R, b, D] and [R, b] at a time on the rows' device.

    What makes a single block is kept; more is made anew in each pass.
    """

    def __init__(self, rows: Rows, label_n: Tensor, index_Rn: Tensor):
        self.rows, self.label_n, self.index_Rn = rows, label_n, index_Rn
        self.shape = *index_Rn.shape, rows.width
        self.step = block_length(len(index_Rn) * rows.width)
        self._kept = list(self._made()) if self.step >= index_Rn.shape[1] else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._made() if self._kept is None else iter(self._kept)

    def _made(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index_Rb in self.index_Rn.split(self.step, dim=1):
            yield self.rows[index_Rb], self.label_n[index_Rb].to(self.rows.device)


class Standardised(NamedTuple):
    """What a probe is trained and tested on; labels on the CPU."""

    train: Rows
    train_label_n: Tensor
    test: Rows
    test_label_m: Tensor
    split: dict[str, Setting]           # for the protocol


def standardised(features: Features, device: torch.device) -> Standardised:
    """Features with the training images' mean 0 and standard deviation 1; those that are constant become 0."""
    split: dict[str, Setting] = {} if features.test_mD is not None else {"split": "fifth-held-out"}
    train_nD, train_label_n, test_mD, test_label_m = features.with_test()
    shift_D, scale_D = standardisation(Rows(train_nD, device=device))
    train, test = (Rows(x_nD, shift_D, scale_D, device) for x_nD in (train_nD, test_mD))
    return Standardised(train, train_label_n, test, test_label_m,
                        split | {"train": len(train), "test": len(test)})


def standardisation(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean, and 1 / standard deviation, of each feature; 0 for one that is constant. Summed in float64."""
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    mean_D = sum(x_bD.to(wide).sum(dim=0) for x_bD in rows.blocks()) / len(rows)
    squares_D = sum((x_bD.to(wide) - mean_D).square().sum(dim=0) for x_bD in rows.blocks())
    std_D = (torch.as_tensor(squares_D) / (len(rows) - 1)).sqrt()
    return torch.as_tensor(mean_D).to(rows.dtype), torch.where(std_D > 1e-6, 1 / std_D, 0).to(rows.dtype)


def placed(x_nD: Tensor, device: torch.device) -> Tensor:
    """On ``device``, if that leaves half of what is free there."""
    return x_nD.to(device) if x_nD.nbytes <= free_bytes(device) / 2 else x_nD


def block_length(width: int) -> int:
    """How many rows of so many float32 values make a block."""
    return max(1, HELD // (4 * width))

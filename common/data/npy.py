"""One ``.npy`` file -> one uint8 tensor [c, H, W]."""

import os
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

_HEADER = 10_000        # bytes

def read_npy(file: BinaryIO, channels: int | None, max_pixels: int) -> Tensor:
    """The array in ``file`` as uint8 [c, H, W]; its axes and limits as in ``read_image``. Raises ValueError.

    It is read, not mapped: a file that is cut while it is mapped kills the process. What the header promises is
    compared with the file's length before any memory is asked for.
    """
    shape, fortran = _npy_header(file)
    sides = list(shape if len(shape) == 3 else (1, *shape))
    first = len(shape) == 2 or channels_first(shape[0], shape[2], channels)
    num_channels = sides.pop(0 if first else 2)
    if sides[0] * sides[1] > max_pixels:
        raise ValueError(f"{sides[1]} x {sides[0]} pixels by its header, more than max_pixels = {max_pixels:,}")
    count = num_channels * sides[0] * sides[1]
    if count > (there := os.fstat(file.fileno()).st_size - file.tell()):
        raise ValueError(f"its header promises {count:,} bytes of pixels, and {there:,} are there")
    pixels = np.fromfile(file, np.uint8, count).reshape(shape, order="F" if fortran else "C")
    pixels = pixels.reshape(num_channels, *sides) if first else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool]:
    """The shape of uint8 [H, W], [H, W, c] or [c, H, W], and whether its first axis is the fastest. No pickles."""
    start = file.read(12)
    if (length := int.from_bytes(start[8:10] if start[6:7] == b"\1" else start[8:12], "little")) > _HEADER:
        raise ValueError(f"has a header of {length:,} bytes, more than {_HEADER:,}")      # NumPy would read it first
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype != np.uint8 or len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"holds {dtype} {list(shape)}, not uint8 [H, W], [H, W, c] or [c, H, W]")
    return shape, fortran


def channels_first(first: int, last: int, channels: int | None) -> bool:
    """Whether the channels are the ``first`` axis of an array, by the number of entries, and not the ``last``."""
    if (first == channels) != (last == channels):
        return first == channels
    return first < last

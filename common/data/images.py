"""One image file -> one uint8 tensor [c, H, W]: upright, eight bits, grey or colour, or an error that says why not."""

import math
import os
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".npy")
MAX_PIXELS = 64_000_000
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")    # no other decoder sees a file, whatever its name
_ORIENTATION = 0x0112                                              # EXIF 2.3, table 4
_TURN = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
_LUMA = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(3, 1, 1)     # ITU-R 601-2 in 1/65536, as in PIL


class UnreadableImage(Exception):
    """``path`` gives no image; the message is the reason."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)          # both, so that it can be pickled: workers send it to the main process
        self.path = str(path)

    def __str__(self) -> str:
        return self.args[1]


def read_image(path: str | Path, channels: int | None = 3, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The image in ``path``, uint8 [c, H, W]. Raises UnreadableImage, and nothing else, when there is none to be had.

    EXIF orientation is applied; alpha is composited on white; 16-bit grey is scaled, and float grey too, from 0..1 or
    else 0..255; of several frames the first is taken. A ``.npy`` file holds uint8 [H, W], or [H, W, c] or [c, H, W]:
    its channels are the axis that has ``channels`` entries, or else the shorter of the two, or else the last.
    ``channels``: 1 and 3 are converted into each other, other numbers must be found; None leaves what is found
    (grey 1, all else 3). An image of more than ``max_pixels``, by its header, is refused before it is decoded.
    """
    try:
        _require_file(path)
        read = _read_npy if str(path).lower().endswith(".npy") else _read_picture
        return as_channels(read(path, channels, max_pixels), channels)
    except Exception as error:                  # on damaged data the decoders raise nearly anything
        raise UnreadableImage(path, _reason(error)) from error


def image_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) by the header alone, before EXIF turns it. Raises UnreadableImage."""
    try:
        _require_file(path)
        if str(path).lower().endswith(".npy"):
            height, width = _read_npy(path, None, max_pixels).shape[1:]
            return height, width
        with _open(path, max_pixels) as image:
            return image.height, image.width
    except Exception as error:
        raise UnreadableImage(path, _reason(error)) from error


def as_channels(image: Tensor, channels: int | None) -> Tensor:
    """uint8 [..., c, H, W] with ``channels`` channels: grey is repeated, colour weighted to luma, None leaves it."""
    found = image.shape[-3]
    if channels is None or found == channels:
        return image
    if (found, channels) == (1, 3):
        return image.expand(*image.shape[:-3], 3, -1, -1).contiguous()
    if (found, channels) == (3, 1):
        return (((image.int() * _LUMA).sum(-3, keepdim=True, dtype=torch.int32) + 2**15) >> 16).byte()
    raise ValueError(f"has {found} channels, not {channels}; only 1 and 3 can be converted into each other")


def _require_file(path: str | Path) -> None:
    """Opening a pipe would wait for its writer, for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")


def _open(path: str | Path, max_pixels: int) -> Image.Image:
    image = Image.open(path, formats=_FORMATS)      # reads the header only
    if image.width * image.height > max_pixels:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels by its header, more than max_pixels = {max_pixels:,}")
    return image


def _read_picture(path: str | Path, channels: int | None, max_pixels: int) -> Tensor:
    with _open(path, max_pixels) as image:
        image.load()
        pixels = np.array(_eight_bits(_upright(image)))
    # The strides stay those of H, W, c, as decoded: torch resizes them twice as fast.
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURN.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:                               # damaged metadata around a sound picture
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """In mode L or RGB."""
    if image.mode.startswith("I"):
        return _scaled(np.asarray(image), 65535)
    if image.mode == "F":
        values = np.asarray(image)
        return _scaled(values, 1 if values.max() <= 1 else 255)
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _scaled(values: np.ndarray, full: int) -> Image.Image:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= full):             # NaN is neither
        raise ValueError(f"its values reach from {low} to {high}; read are 8 and 16 bits, and floats in 0..1 or 0..255")
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))


def _read_npy(path: str | Path, channels: int | None, max_pixels: int) -> Tensor:
    array: np.ndarray = np.lib.format.open_memmap(path, mode="r")       # no pickles; the header, and the file's length
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"holds {array.dtype} {list(array.shape)}, not uint8 [H, W], [H, W, c] or [c, H, W]")
    if array.ndim == 2:
        array = array[None]
    elif not channels_first(array.shape[0], array.shape[2], channels):
        array = array.transpose(2, 0, 1)
    if math.prod(array.shape[1:]) > max_pixels:
        raise ValueError(f"{array.shape[2]} x {array.shape[1]} pixels, more than max_pixels = {max_pixels:,}")
    return torch.from_numpy(np.array(array, order="C"))


def channels_first(first: int, last: int, channels: int | None) -> bool:
    """Whether the channels are the ``first`` axis of an array, by the number of entries, and not the ``last``."""
    if (first == channels) != (last == channels):
        return first == channels
    return first < last


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image in a known format (" + ", ".join(_FORMATS) + ")"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__

"""One image file -> one uint8 tensor [c, H, W]: upright, eight bits, grey or colour, or an error that says why not."""

import contextlib
import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from common.data.jpeg import jpeg_pixels
from common.data.npy import read_npy
from common.data.whole import require_whole
from common.printable import printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".npy")
MAX_PIXELS = 64_000_000
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")    # no other decoder sees a file, whatever its name
_ORIENTATION = 0x0112                                              # EXIF 2.3, table 4
# Its values -> whether rows and columns are exchanged, then the steps along both.
_TURN = {2: (False, 1, -1), 3: (False, -1, -1), 4: (False, -1, 1),
         5: (True, 1, 1), 6: (True, 1, -1), 7: (True, -1, -1), 8: (True, -1, 1)}
logging.getLogger("PIL").setLevel(logging.CRITICAL)     # its words do not name the file; the error it raises will
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
        with _regular(path) as file, _strict(max_pixels):
            read = read_npy if _is_npy(path) else _read_picture
            return as_channels(read(file, channels, max_pixels), channels)
    except Exception as error:                  # on damaged data the decoders raise nearly anything
        raise UnreadableImage(path, _reason(error, max_pixels)) from error


def read_bytes(data: memoryview, name: str, channels: int | None = 3, max_pixels: int = MAX_PIXELS) -> Tensor:
    """As ``read_image``, of the bytes of a picture; ``name`` is what to call it. Raises UnreadableImage."""
    try:
        with _strict(max_pixels):
            return as_channels(_read_picture(io.BytesIO(data), channels, max_pixels), channels)
    except Exception as error:
        raise UnreadableImage(name, _reason(error, max_pixels)) from error


def image_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) by the header alone, before EXIF turns it. Raises UnreadableImage."""
    try:
        with _regular(path) as file, _strict(max_pixels):
            if _is_npy(path):
                height, width = read_npy(file, None, max_pixels).shape[1:]
                return height, width
            image = _open(file, max_pixels)
            return image.height, image.width
    except Exception as error:
        raise UnreadableImage(path, _reason(error, max_pixels)) from error


def upright_jpeg(path: str | Path, short_side: int, limit: int) -> bytes | None:
    """The file as it is, if it is a grey or RGB JPEG that need not be turned, no larger than that; else None."""
    with contextlib.suppress(Exception), _regular(path) as file, _strict(MAX_PIXELS):
        image = _open(file, MAX_PIXELS)
        small = min(image.size) <= short_side and os.fstat(file.fileno()).st_size <= limit
        plain = image.format == "JPEG" and image.mode in ("L", "RGB") and not _is_npy(path)
        if small and plain and image.getexif().get(_ORIENTATION, 1) not in _TURN:
            file.seek(0)
            return file.read()
    return None


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


@contextlib.contextmanager
def _regular(path: str | Path) -> Iterator[BinaryIO]:
    """The file, opened without waiting for the writer of a pipe; anything but a regular file is refused.

    Decoders get the open file, not its path: they would map it into memory, and be killed where it is cut meanwhile.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        yield file


@contextlib.contextmanager
def _strict(max_pixels: int) -> Iterator[None]:
    """Pillow's globals as we need them, whatever another library has set: truncated files are errors.

    A file's faults are in the error that it raises, not in warnings that do not name it.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, max_pixels    # Pillow's limit is twice its number
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """libtiff writes to standard error, where nothing tells which file it means."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _is_npy(path: str | Path) -> bool:
    return str(path).lower().endswith(".npy")


def _open(file: BinaryIO, max_pixels: int) -> Image.Image:
    image = Image.open(file, formats=_FORMATS)      # reads the header only
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels by its header, more than max_pixels = {max_pixels:,}")
    return image


def _read_picture(file: BinaryIO, channels: int | None, max_pixels: int) -> Tensor:
    image = _open(file, max_pixels)
    pixels = jpeg_pixels(file, image)
    if pixels is None:
        pixels = _decoded(file, image)
    if (pixels.shape[2], channels) == (1, 3):
        pixels = pixels.repeat(3, axis=2)
    # The strides stay those of H, W, c, as decoded: torch resizes them twice as fast.
    return torch.from_numpy(_upright(pixels, image)).permute(2, 0, 1)


def _decoded(file: BinaryIO, image: Image.Image) -> np.ndarray:
    """uint8 [H, W, c] by Pillow."""
    with _silence() if image.format == "TIFF" else contextlib.nullcontext():
        image.load()
    require_whole(file, image)
    pixels = np.array(_eight_bits(image))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """[H, W, c], turned as the header of ``image`` says."""
    try:
        turn = _TURN.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:                               # damaged metadata around a sound picture
        return pixels
    if turn is None:
        return pixels
    exchanged, rows, columns = turn
    return np.ascontiguousarray((pixels.swapaxes(0, 1) if exchanged else pixels)[::rows, ::columns])


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


def _reason(error: Exception, max_pixels: int) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image in a known format (" + ", ".join(_FORMATS) + ")"
    if isinstance(error, Image.DecompressionBombError):
        return f"more pixels by its header than max_pixels = {max_pixels:,}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(str(error) or f"damaged ({type(error).__name__})", 200)       # decoders quote from the file

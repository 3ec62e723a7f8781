"""Pictures that end early although the decoder saw no error: it leaves the rest black (PNG) or grey (JPEG).

Only a picture that ends in that very colour is looked at twice, so this costs next to nothing.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image, ImageChops

_ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}                           # PNG's colour type -> samples of a pixel
_FILLER = bytes([0x55] * 64)
GREY = (127, 128)                                                   # what a JPEG decoder leaves where data lack


def require_whole(file: BinaryIO, image: Image.Image) -> None:
    """Raises ValueError if the decoded ``image`` of ``file`` lacks its end."""
    if image.format == "PNG" and _ends_black(image):
        file.seek(0)
        expected, found = _png_bytes(file)
        if found < expected:
            raise ValueError(f"image file is truncated: {found:,} of the {expected:,} bytes of its pixels are there")
    elif image.format == "JPEG" and _ends_grey(image):
        file.seek(0)
        if _takes_more(file.read(), image):
            raise ValueError("image file is truncated: it ends before its last pixels, which would be grey")


def _ends_black(image: Image.Image) -> bool:
    """In one of the last two rows: that which an interlaced file writes last may be the one before the last."""
    rows = range(max(image.height - 2, 0), image.height)
    return any(image.crop((0, y, image.width, y + 1)).getbbox(alpha_only=False) is None for y in rows)


def _png_bytes(file: BinaryIO) -> tuple[int, int]:
    """How many bytes the pixels of a PNG file take, and how many its data hold; never more than a block in memory."""
    file.seek(16)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", file.read(13))
    expected = 0
    for x, y, dx, dy in _ADAM7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0:
            expected += max(rows, 0) * (1 + -(-columns * depth * _SAMPLES[colour] // 8))
    decoder, found = zlib.decompressobj(), 0
    for data in _png_data(file):
        while data:
            found += len(decoder.decompress(data, 2**16))
            data = decoder.unconsumed_tail
    return expected, found + len(decoder.flush())


def _png_data(file: BinaryIO) -> Iterator[bytes]:
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT":
            yield file.read(length)
        else:
            file.seek(length, io.SEEK_CUR)
        file.seek(4, io.SEEK_CUR)


def _ends_grey(image: Image.Image) -> bool:
    last = image.getpixel((image.width - 1, image.height - 1))
    return all(value in GREY for value in (last if isinstance(last, tuple) else (last,)))


def _takes_more(data: bytes, image: Image.Image) -> bool:
    """Whether bytes put before the end marker change the picture: of a whole one the decoder ignores them."""
    end = data.rfind(b"\xff\xd9")
    with Image.open(io.BytesIO(data[:end] + _FILLER + data[end:]), formats=["JPEG"]) as filled:
        return ImageChops.difference(filled.convert("RGB"), image.convert("RGB")).getbbox() is not None

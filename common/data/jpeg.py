"""The pixels of a JPEG file without Pillow's copies: the same bits as Pillow's, or none.

simplejpeg is optional. It runs libjpeg-turbo as Pillow does: the exact cosine transform, smooth upsampling of the
colours, the whole picture. What it saves is Pillow's way from the decoder's rows to an array. It only ever accepts:
what it finds fault with is left to Pillow, so a file is refused for the same reason whether it is installed or not.
"""

import importlib
import os
from types import ModuleType
from typing import BinaryIO

import numpy as np
from PIL import Image

from common.data.whole import GREY

_FORMATS = ("JPEG", "MPO")                                  # MPO: several pictures, of which the first is taken
_CHANNELS = {"L": ("GRAY", 1), "RGB": ("RGB", 3)}           # Pillow's mode -> the decoder's word for it; no CMYK
_SPARE = 2**20                                              # bytes for what is not pixels


def _installed(name: str = "simplejpeg") -> ModuleType | None:
    """From 1.9 on, with which Pillow was compared: an older one may know less, or decode to other pixels."""
    try:
        module = importlib.import_module(name)
        major, minor = module.__version__.split(".")[:2]
        return module if (int(major), int(minor)) >= (1, 9) else None
    except (ImportError, AttributeError, ValueError):
        return None


simplejpeg = _installed()


def jpeg_pixels(file: BinaryIO, image: Image.Image) -> np.ndarray | None:
    """uint8 [H, W, c] of the ``file`` whose header is ``image``; None if that is for Pillow to decode, or to refuse.

    ``strict``: the decoder's warnings (data that end early, bits that are no code) are errors. A picture that ends in
    grey goes to Pillow, too, for ``require_whole``. The memory is of the size that the header gave, so nothing larger
    can be decoded. Of the decoder's options, none is taken that is faster and less exact, whatever its defaults are.
    """
    if simplejpeg is None or image.format not in _FORMATS or image.mode not in _CHANNELS:
        return None
    colours, channels = _CHANNELS[image.mode]
    shape = image.height, image.width, channels
    if file.seek(0, os.SEEK_END) > 4 * image.height * image.width + _SPARE:     # Pillow reads no more than it needs
        return None
    file.seek(0)
    pixels = np.empty(shape, np.uint8)
    try:
        found = simplejpeg.decode_jpeg(file.read(), colours, fastdct=False, fastupsample=False, buffer=pixels,
                                        strict=True)
    except ValueError:
        return None
    whole = found.shape == shape and not all(value in GREY for value in pixels[-1, -1].tolist())
    return pixels if whole else None

"""Packs a set of images, once, for ``common.data.packed`` to read: tar shards and an index.

What is written is a function of the images and the settings: for any number of workers, and however often it was
stopped.
"""

import hashlib
import io
import json
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor

from common.data.check import each
from common.data.datasets import Images, Splits
from common.data.files import FileImages
from common.data.images import UnreadableImage, read_bytes, read_image, upright_jpeg
from common.data.pack_index import FORMAT, LARGEST, NPY_HEADER
from common.data.worker import Note
from common.data.workers import PLAIN_CARE, Care
from common.pack_tar import member_names
from common.pack_writer import Member, Writer, is_done
from common.printable import printable

SHARD_BYTES = 2**30
_COPIED = 2**24         # bytes: a small picture in a larger file is written anew


@dataclass(frozen=True)
class Settings:
    """``short_side`` in pixels, larger images are made smaller; ``raw``: pixels in place of JPEGs of ``quality``."""

    short_side: int = 256
    quality: int = 90
    raw: bool = False

    def __post_init__(self) -> None:
        if not 8 <= self.short_side <= 8192:
            raise ValueError(f"--short-side: {self.short_side}. Give 8 to 8192 pixels.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality: {self.quality}. Give 1 to 100.")


def pack(splits: Splits, folder: Path, settings: Settings, workers: int = 0, care: Care = PLAIN_CARE,
         shard_bytes: int = SHARD_BYTES) -> Generator[Member, None, None]:
    """Write ``splits`` into ``folder``; each image as it is done, those of an earlier start aside.

    The index comes last. Raises ValueError if ``folder`` holds something else, or another set or other settings, and
    NotPacked where the disk fails: what is written is good, and the same call goes on.
    """
    images = Joined(splits)
    plan = _plan(images, settings, shard_bytes)
    if is_done(folder, plan):
        return
    names = member_names([split.keys for split in images.splits], ".npy" if settings.raw else ".jpg")
    writer = Writer(folder, plan, names)
    with closing(writer):
        if is_done(folder, plan):               # since we looked, by another process
            return
        writer.begin()
        left = range(writer.done, len(images))
        for member in each(images, Packer(images, settings), left, workers, care, _lost):
            writer.add(member)
            yield member
        writer.finish(images)


def _lost(number: int, reason: str) -> Member:
    return Member(number, reason=reason)


class Joined(Images):
    """Both splits as one set, read as the source has them: grey stays grey."""

    def __init__(self, splits: Splits):
        self.splits = [split for split in splits if split is not None]
        train = splits.train
        labels = torch.cat([split.labels for split in self.splits])
        super().__init__(train.name, [key for split in self.splits for key in split.keys], labels, train.classes, None)
        self.channels = train.channels

    def place(self, i: int) -> tuple[Images, int]:
        split = self.splits[0] if i < len(self.splits[0]) else self.splits[1]
        return split, i - (0 if split is self.splits[0] else len(self.splits[0]))

    def path(self, i: int) -> str:
        split, j = self.place(i)
        return split.path(j)


@dataclass(frozen=True)
class Packer:
    """What a worker does: reads images, makes them small, encodes them."""

    images: Joined
    settings: Settings

    def __call__(self, wanted: Sequence[int], out: Tensor, note: Note) -> list[Member]:
        return [self._member(i, note) for i in wanted]

    def _member(self, i: int, note: Note) -> Member:
        note(i)
        try:
            data, shape = self._packed(*self.images.place(i))
        except UnreadableImage as error:
            return Member(i, reason=printable(str(error)))
        except (OSError, ValueError) as error:          # what JPEG cannot hold
            return Member(i, reason=printable(f"cannot be packed: {error}", 200))
        if len(data) > LARGEST:
            return Member(i, reason=f"cannot be packed: takes {len(data):,} bytes, more than {LARGEST:,}")
        return Member(i, data, shape, hashlib.sha256(data).digest())

    def _packed(self, images: Images, j: int) -> tuple[bytes, tuple[int, ...]]:
        if not isinstance(images, FileImages):
            return self._encoded(images.read(j))
        path, channels = images.path(j), None if images.channels in (1, 3) else images.channels
        data = None if self.settings.raw else upright_jpeg(path, self.settings.short_side, _COPIED)
        if data is not None:
            return data, tuple(read_bytes(memoryview(data), path, None, images.max_pixels).shape)
        return self._encoded(read_image(path, channels, images.max_pixels))

    def _encoded(self, image_cHW: Tensor) -> tuple[bytes, tuple[int, ...]]:
        pixels = shrunk(image_cHW.permute(1, 2, 0).numpy(), self.settings.short_side)
        height, width, channels = pixels.shape
        buffer = io.BytesIO()
        if self.settings.raw:
            np.save(buffer, np.ascontiguousarray(pixels))
            assert buffer.tell() == NPY_HEADER + pixels.size
        else:
            _picture(pixels).save(buffer, "JPEG", quality=self.settings.quality, subsampling="4:2:0")
        return buffer.getvalue(), (channels, height, width)


def shrunk(pixels_HWc: np.ndarray, short_side: int) -> np.ndarray:
    """With its shorter side of ``short_side`` pixels, never enlarged. Lanczos: see docs/data.md for why."""
    height, width, channels = pixels_HWc.shape
    if min(height, width) <= short_side:
        return pixels_HWc
    size = tuple(short_side * side // min(height, width) for side in (width, height))
    planes = [pixels_HWc] if channels in (1, 3) else np.split(pixels_HWc, channels, axis=2)
    small = [np.asarray(_picture(plane).resize(size, Image.Resampling.LANCZOS)) for plane in planes]
    return np.concatenate([plane if plane.ndim == 3 else plane[..., None] for plane in small], axis=2)


def _picture(pixels_HWc: np.ndarray) -> Image.Image:
    if (channels := pixels_HWc.shape[2]) not in (1, 3):
        raise ValueError(f"has {channels} channels, and a JPEG holds 1 or 3; --raw packs any number")
    return Image.fromarray(np.ascontiguousarray(pixels_HWc if channels == 3 else pixels_HWc[..., 0]))


def _plan(images: Joined, settings: Settings, shard_bytes: int) -> dict[str, Any]:
    """What decides about each byte that is written."""
    if bad := next((name for name in (*images.keys, *images.classes) if "\0" in name), None):
        raise ValueError(f"--data: {printable(bad)} holds a zero byte, and a name cannot.")
    if not settings.raw and images.channels not in (1, 3):
        raise ValueError(f"--data: the images have {images.channels} channels, and a JPEG holds 1 or 3. Give --raw.")
    num_train = len(images.splits[0])
    facts = [images.fingerprint(), images.classes, num_train, *(s.contents for s in images.splits if s.contents)]
    source = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    of_jpeg = {"quality": settings.quality, "encoder": f"libjpeg-turbo {features.version('libjpeg_turbo')}"}
    return {"format": FORMAT, "kind": "raw" if settings.raw else "jpeg", "short_side": settings.short_side,
            "pillow": PIL.__version__, **({} if settings.raw else of_jpeg), "shard_bytes": shard_bytes,
            "max_pixels": getattr(images.splits[0], "max_pixels", None), "train": num_train,
            "test": len(images) - num_train if len(images.splits) == 2 else None, "source": source}

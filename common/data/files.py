"""Sets of image files, decoded one by one, or all at once into memory where they are small and of one size."""

import os
import re
import statistics
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.data.datasets import Images, Splits, spread
from common.data.images import UnreadableImage, image_size, read_image
from common.printable import printable

InMemory = bool | Literal["auto"]
_SMALL = 96                 # pixels a side
_MEMORY = 2**30             # bytes a set


class Listing(NamedTuple):
    """Files below ``root`` by relative path, with the name of the class of each, or None."""

    name: str
    root: Path
    keys: list[str]
    class_names: list[str | None]


class FileImages(Images):
    """The files of ``listing``; ``array`` is None unless ``in_memory`` (see ``common.data.folder``)."""

    def __init__(self, listing: Listing, classes: list[str], channels: int | None, max_pixels: int,
                 in_memory: InMemory):
        number: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number.get(name, -1) for name in listing.class_names], dtype=torch.int64)
        super().__init__(listing.name, listing.keys, labels, classes, None)
        self.root, self.max_pixels = str(listing.root), max_pixels
        sizes = self._probe(channels)
        self.size = int(statistics.median(min(size) for size in sizes))
        if in_memory is True or (in_memory == "auto" and fits_memory(self, sizes)):
            load(self, must=in_memory is True)

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.keys[i])

    def read(self, i: int) -> Tensor:
        return read_image(self.path(i), self.channels, self.max_pixels) if self.array is None else super().read(i)

    def _probe(self, channels: int | None) -> list[tuple[int, int]]:
        """Sizes of some images spread over the set, by their headers; one is decoded, for ``channels``."""
        sizes: list[tuple[int, int]] = []
        failures: list[str] = []
        decoded = False
        for i in spread(len(self)):
            try:
                size = image_size(self.path(i), self.max_pixels)
                if not decoded:
                    self.channels, decoded = len(read_image(self.path(i), channels, self.max_pixels)), True
                sizes.append(size)
            except UnreadableImage as error:
                failures.append(f"{printable(error.path)}: {error}")
        if not decoded:
            raise ValueError(f"{self.name}: none of the {len(failures)} images tried, of {len(self)}, can be read:\n  "
                             + "\n  ".join(failures[:3]))
        return sizes


def fits_memory(images: Images, sizes: list[tuple[int, int]]) -> bool:
    """Whether ``images``, of which these sizes (H, W) are known, are held in memory if nobody decides."""
    height, width = sizes[0]
    fits = max(height, width) <= _SMALL and len(images) * images.channels * height * width < _MEMORY
    return fits and len(set(sizes)) == 1


def load(images: Images, must: bool) -> None:
    """Read all into ``array`` (about 0.2 ms each at 32 pixels); give up at a second size, unless ``must``.

    And where they are more than fits: what their headers or an index say may be wrong.
    """
    array: Tensor | None = None
    bad: dict[int, str] = {}
    for i in range(len(images)):
        try:
            image = images.read(i)
        except UnreadableImage as error:
            bad[i] = str(error)
            continue
        if array is None:
            if not must and len(images) * image.numel() >= _MEMORY:
                return
            array = torch.zeros(len(images), *image.shape, dtype=torch.uint8)
        if image.shape != array.shape[1:]:
            if must:
                raise ValueError(f"in_memory: {printable(images.path(i))} is {list(image.shape[1:])} pixels, "
                                 f"others are {list(array.shape[2:])}; only images of one size go into memory. "
                                 "Give false.")
            return
        array[i] = image
    images.array, images.bad = array, bad


def file_splits(train: Listing, test: Listing | None, channels: int | None, max_pixels: int,
                in_memory: InMemory) -> Splits:
    """Both splits with one list of classes: those of ``train`` in natural order, then those that only ``test`` has."""
    classes = _sorted_names(train.class_names)
    if test is not None:
        known = set(classes)
        classes = classes + [name for name in _sorted_names(test.class_names) if name not in known]
    images = FileImages(train, classes, channels, max_pixels, in_memory)
    if test is None:
        return Splits(images)
    return Splits(images, FileImages(test, classes, images.channels, max_pixels, in_memory))


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key by which "img2" comes before "img10"."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))], name


def _sorted_names(class_names: list[str | None]) -> list[str]:
    return sorted({name for name in class_names if name is not None}, key=natural)

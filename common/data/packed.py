"""A set that ``tools/pack.py`` has written: tar shards and an index of what lies where.

An image is read with one call from a shard that stays open: no search for a file, no header of the archive. It is read
and not mapped, which costs 0.02 ms of raw pixels and nothing that can be measured of a JPEG: a mapping of a file that
is cut, or of a disk that fails, kills the process, and a read is an error of one image.
"""

import hashlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from common.data.datasets import Images, Splits
from common.data.files import InMemory, fits_memory, load
from common.data.images import MAX_PIXELS, UnreadableImage, as_channels, read_bytes
from common.data.pack_index import INDEX, NPY_HEADER, UNFINISHED, Index, open_regular, read_index

_OPEN = 128             # shards open at a time
_SPARE = 2**25          # bytes of a JPEG for what is not pixels
_NO_ROOT = """root: no packed images given.
  Write them with tools/pack.py, and say where they are: data.root=/path/to/store."""


class Shards:
    """The files of a store's images, opened when first needed. Forked processes share what is open."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self.names = folder, names
        self._files: dict[int, BinaryIO] = {}
        weakref.finalize(self, _close, self._files)

    def read(self, shard: int, offset: int, length: int) -> np.ndarray:
        """uint8 [length]. Raises OSError, and ValueError where the shard ends before."""
        data = np.empty(length, np.uint8)
        view, done = data.data, 0
        while done < length:
            if not (got := os.preadv(self._file(shard), [view[done:]], offset + done)):
                raise ValueError(f"its shard {self.names[shard]} ends before it does")
            done += got
        return data

    def size(self, shard: int) -> int:
        return os.fstat(self._file(shard)).st_size

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = open_regular(self.folder / self.names[shard])
        return self._files[shard].fileno()

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.folder, self.names)


class PackedImages(Images):
    """One split of a store: images ``first`` .. ``stop`` - 1 of its index, with the keys and labels of its source.

    ``bad`` are those that could not be read when it was packed. ``channels`` and ``max_pixels`` as in ``read_image``.
    """

    def __init__(self, index: Index, shards: Shards, first: int, stop: int, channels: int | None, max_pixels: int):
        columns = {name: column[first:stop].copy() for name, column in index.columns.items() if name != "sha256"}
        labels = torch.from_numpy(columns.pop("label"))
        super().__init__(f"packed {shards.folder}", index.keys[first:stop], labels, index.classes, None)
        self.bad = {i - first: reason for i, reason in index.bad.items() if first <= i < stop}
        self._columns, self._shards, self._raw, self.max_pixels = columns, shards, index.raw, max_pixels
        self.contents = hashlib.sha256(index.columns["sha256"][first:stop].tobytes()).hexdigest()
        good = columns["length"] > 0
        if not good.any():
            raise ValueError(f"root: none of the {len(self)} images of {shards.folder} could be read when it was "
                             "packed.")
        self.channels = int(columns["channels"][good.argmax()]) if channels is None else channels
        self.size = int(np.median(np.minimum(columns["height"], columns["width"])[good]))

    def path(self, i: int) -> str:
        """The shard, if it is in one, and the image's key, which is its path in the source."""
        shard = "" if i in self.bad else self._shards.names[int(self._columns["shard"][i])]
        return f"{self._shards.folder / shard}:{self.keys[i]}"

    def read(self, i: int) -> Tensor:
        if self.array is not None:
            return super().read(i)
        if i in self.bad:
            raise UnreadableImage(self.path(i), self.bad[i])
        if not self._raw:
            if (count := int(self._columns["length"][i])) > (most := 4 * self.max_pixels + _SPARE):
                raise UnreadableImage(self.path(i), f"{count:,} bytes, more than {most:,}")
            return read_bytes(self._bytes(i).data, self.path(i), self.channels, self.max_pixels)
        height, width, channels = (int(self._columns[name][i]) for name in ("height", "width", "channels"))
        if height * width > self.max_pixels:
            raise UnreadableImage(self.path(i), f"{width} x {height} pixels, more than max_pixels = "
                                                f"{self.max_pixels:,}")
        pixels = torch.from_numpy(self._bytes(i, NPY_HEADER).reshape(height, width, channels))
        try:
            return as_channels(pixels.permute(2, 0, 1), self.channels)
        except ValueError as error:
            raise UnreadableImage(self.path(i), str(error)) from error

    def sizes(self) -> list[tuple[int, int]]:
        """The smallest and the largest H and W of readable images."""
        heights, widths = (self._columns[name][self._columns["length"] > 0] for name in ("height", "width"))
        return [(int(heights.min()), int(widths.min())), (int(heights.max()), int(widths.max()))]

    def _bytes(self, i: int, skip: int = 0) -> np.ndarray:
        shard, offset, length = (int(self._columns[name][i]) for name in ("shard", "offset", "length"))
        try:
            return self._shards.read(shard, offset + skip, length - skip)
        except (OSError, ValueError) as error:
            raise UnreadableImage(self.path(i), getattr(error, "strerror", None) or str(error)) from error


def packed(
    root: Path | None = None,
    channels: int | None = 3,
    max_pixels: int = MAX_PIXELS,
    in_memory: InMemory = "auto",
) -> Splits:
    """What ``tools/pack.py`` wrote into the folder ``root``, with the splits, keys, labels and order of its source.

    Other arguments as in ``common.data.folder``. Raises ValueError where there is no finished store, where its index is
    damaged or leads out of its shards, and where a shard is missing, cut or replaced by another.
    """
    if root is None:
        raise ValueError(_NO_ROOT)
    _check_store(Path(root))
    index, shards = open_store(Path(root))
    n, num_train = len(index.keys), index.facts["train"]
    train = _loaded(PackedImages(index, shards, 0, num_train, channels, max_pixels), in_memory)
    if num_train == n:
        return Splits(train)
    return Splits(train, _loaded(PackedImages(index, shards, num_train, n, train.channels, max_pixels), in_memory))


def open_store(root: Path) -> tuple[Index, Shards]:
    """Index and shards, the shards' sizes compared with the index, and their last images with their SHA-256."""
    _check_store(root)
    folder = Path(os.path.abspath(root.expanduser()))
    index = read_index(folder)
    shards = Shards(folder, [shard["name"] for shard in index.facts["shards"]])
    good = np.flatnonzero(index.columns["length"])
    for number, shard in enumerate(index.facts["shards"]):
        place = int(np.searchsorted(index.columns["shard"][good], number, side="right")) - 1
        _require_shard(index, shards, number, shard["bytes"], int(good[place]))
    return index, shards


def damaged(index: Index, shards: Shards) -> Iterator[tuple[int, str]]:
    """Every image read: its number, and what is wrong with it, or nothing."""
    for i in np.flatnonzero(index.columns["length"]):
        yield int(i), _fault(index, shards, int(i))


def _loaded(images: PackedImages, in_memory: InMemory) -> PackedImages:
    if in_memory is True or (in_memory == "auto" and fits_memory(images, images.sizes())):
        load(images, must=in_memory is True)
    return images


def _fault(index: Index, shards: Shards, i: int) -> str:
    shard, offset, length = (int(index.columns[name][i]) for name in ("shard", "offset", "length"))
    try:
        found = hashlib.sha256(shards.read(shard, offset, length).data).digest()
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return "" if found == index.columns["sha256"][i].tobytes() else "its bytes are not those that were packed"


def _require_shard(index: Index, shards: Shards, number: int, size: int, last: int) -> None:
    name = shards.folder / shards.names[number]
    try:
        found = shards.size(number)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"root: cannot open the shard {name}: {reason}. Copy the store again, whole.") from error
    if found != size:
        raise ValueError(f"root: the shard {name} has {found:,} bytes, and the index says {size:,}: it was cut or "
                         "replaced. Copy the store again, or pack it again.")
    if (fault := _fault(index, shards, last)):
        raise ValueError(f"root: the shard {name} is not the one that was packed: of image {last}, {fault}. Copy the "
                         "store again, or pack it again; tools/pack.py --verify names all that is damaged.")


def _check_store(root: Path) -> None:
    folder = Path(os.path.abspath(root.expanduser()))
    if not folder.is_dir():
        raise ValueError(f"root: there is no folder {folder}. Give the folder that tools/pack.py wrote.")
    if not (folder / INDEX).exists() and (folder / UNFINISHED).is_dir():
        raise ValueError(f"root: {folder} is not finished. Run the command of tools/pack.py that began it again: it "
                         "goes on.")
    if not (folder / INDEX).exists():
        raise ValueError(f"root: {folder} holds no packed images (no {INDEX}). Give the folder that tools/pack.py "
                         "wrote; a folder of images is read by common.data.folder.")


def _close(files: dict[int, BinaryIO]) -> None:
    for file in files.values():
        file.close()

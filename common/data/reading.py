"""What a worker does with a list of images: reads them, replaces or leaves out the unreadable ones, cuts uint8 views.

Axes: V views, B images of a batch, c channels, S pixels of a view's side. Crops lie in memory with their channels last,
as decoders give pixels and as torch resizes them fastest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common import counter
from common.data.datasets import Images
from common.data.images import UnreadableImage
from common.data.views import Views
from common.data.worker import Note

ATTEMPTS = 20       # images tried for one place of a batch: all fail only if most of the set cannot be read


@dataclass(frozen=True)
class Unreadable:
    """Image ``index`` of the set cannot be read, for this reason."""

    index: int
    path: str
    reason: str


@dataclass(frozen=True)
class Read:
    """What became of a request: the images in the rows that were filled, and those that were tried in vain."""

    epoch: int
    index: list[int]
    failures: list[Unreadable]


def candidates(n: int, seed: int, epoch: int, index: int) -> list[int]:
    """Image ``index`` of ``n``, then those to take in its place: the same ones for any number of workers."""
    attempt = torch.arange(1, ATTEMPTS)
    return [index, *counter.integers(n, seed, counter.stream("substitute"), epoch, index, attempt).tolist()]


@dataclass(frozen=True)
class TrainingCrops:
    """V crops of each image; an unreadable image is replaced by the first of its candidates that can be read."""

    images: Images
    views: Views
    seed: int

    def __call__(self, request: tuple[int, Sequence[int]], out_VBSSc: Tensor, note: Note) -> Read:
        """For (epoch, B images). Fewer than B come back when none of the candidates could be read."""
        epoch, wanted = request
        read = Read(epoch, [], [])
        shares_B = self._shares(epoch, wanted)
        for place, shares_V, out_VcSS in zip(wanted, shares_B, out_VBSSc.permute(1, 0, 4, 2, 3)):
            found = self._first(place, read, note)
            if found is None:
                break
            if read.index[-1] != place:
                (shares_V,) = self._shares(epoch, read.index[-1:])
            self.views.crops(found, shares_V, out_VcSS)
        return read

    def _shares(self, epoch: int, index: Sequence[int]) -> list[tuple[list[float], ...]]:
        return self.views.shares(self.seed, epoch, torch.tensor(index))

    def _first(self, place: int, read: Read, note: Note) -> Tensor | None:
        image = _try(self.images, place, read, note)
        if image is None:
            others = candidates(len(self.images), self.seed, read.epoch, place)[1:]
            image = next((found for i in others if (found := _try(self.images, i, read, note)) is not None), None)
        return image


@dataclass(frozen=True)
class EvaluationCrops:
    """One fixed crop of each image; an unreadable image gets no row."""

    images: Images
    views: Views

    def __call__(self, wanted: Iterable[int], out_BSSc: Tensor, note: Note) -> Read:
        read = Read(0, [], [])
        for i in wanted:
            image = _try(self.images, i, read, note)
            if image is not None:
                out_BSSc[len(read.index) - 1] = self.views.evaluation(image).permute(1, 2, 0)
        return read


def _try(images: Images, i: int, read: Read, note: Note) -> Tensor | None:
    """Image ``i`` or None, written down in ``read`` either way."""
    note(i)
    try:
        image = images.read(i)
    except UnreadableImage as error:
        read.failures.append(Unreadable(i, images.path(i), str(error)))
        return None
    read.index.append(i)
    return image

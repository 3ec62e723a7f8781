"""A set of images, as the loader and the evaluators see it.

Axes: n images, c channels, H height, W width.
"""

import hashlib
from typing import NamedTuple

from torch import Tensor

from common.data.images import UnreadableImage


class Images:
    """n images in memory, labels where known. Can be pickled; holds no random state and no transformation.

    ``keys`` names each image for as long as the set lives (a relative path, or "digits/12"). ``labels`` is int64 [n],
    -1 where there is none, and counts into ``classes``, which both splits share. ``array`` is uint8 [n, c, H, W], or
    None in a set whose images are read one by one. ``size`` is the typical short side in pixels. ``bad`` holds the
    reason for each image in memory that could not be read; its row of ``array`` is zero. ``contents``: a SHA-256 of
    what the images hold, where it is known without reading them. ``together`` neighbours go through the same step of a
    training: 2 in a list of pairs.
    """

    channels: int
    size: int
    contents = ""
    together = 1

    def __init__(self, name: str, keys: list[str], labels: Tensor, classes: list[str], array: Tensor | None):
        self.name, self.keys, self.labels, self.classes, self.array = name, keys, labels, classes, array
        self.bad: dict[int, str] = {}
        if array is not None:
            self.channels, self.size = array.shape[1], min(array.shape[2:])

    def __len__(self) -> int:
        return len(self.keys)

    def path(self, i: int) -> str:
        """What to call image ``i`` in a message."""
        return self.keys[i]

    def read(self, i: int) -> Tensor:
        """Image ``i``, uint8 [c, H, W]; not to be written into. Raises UnreadableImage."""
        assert self.array is not None
        if i in self.bad:
            raise UnreadableImage(self.path(i), self.bad[i])
        return self.array[i]

    def fingerprint(self) -> str:
        """SHA-256 over keys and labels in order, by which a resumed run refuses another list.

        The bank of InstDisc belongs to positions in this list. What the files hold is not looked at.
        """
        digest = hashlib.sha256(self.labels.numpy().astype("<i8").tobytes())
        for key in self.keys:
            digest.update(key.encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()


class Splits(NamedTuple):
    """What a builder gives: images to train on, and others to measure on."""

    train: Images
    test: Images | None = None


def spread(n: int, count: int = 64) -> list[int]:
    """At most ``count`` positions, evenly over 0 .. n-1."""
    return [i * n // min(n, count) for i in range(min(n, count))]

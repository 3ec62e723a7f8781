"""Pairs of images to verify: read from lists, or drawn from images with labels.

Axes: P pairs, n images.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common import counter
from common.data.datasets import Images
from common.data.files import FileImages, Listing
from common.data.images import MAX_PIXELS, SUFFIXES
from common.data.pairs import read_pairs
from common.data.subset import Subset
from common.printable import printable


class Pairs(NamedTuple):
    """Pair p is of images ``first_P[p]`` and ``second_P[p]`` of ``images``, each of which is in some pair."""

    images: Images
    first_P: Tensor
    second_P: Tensor
    same_P: Tensor                      # bool


def listed(files: Sequence[Path], root: Path | None, channels: int, what: str = "--pairs") -> Pairs:
    """Of one list with two paths and a mark for each pair, or of two with a path and a mark, whose lines i are a pair.

    1: the same, 0: different. ``what`` names them in messages. Lines, paths and errors are those of
    ``common.data.pair_list``.
    """
    if len(files) not in (1, 2):
        raise ValueError(f"{what}: {len(files)} files given; give one of three columns, or two of two.")
    folder, pairs = read_pairs(what, files[0], files[1] if len(files) == 2 else None, root)
    number: dict[str, int] = {}
    first = [number.setdefault(pair.first.key, len(number)) for pair in pairs]
    second = [number.setdefault(pair.second.key, len(number)) for pair in pairs]
    images = _images(f"pair list {files[0]}", folder, list(number), channels)
    return Pairs(images, torch.tensor(first), torch.tensor(second), torch.tensor([pair.similar for pair in pairs]))


def given(paths: Sequence[Path], channels: int) -> Images:
    """The image files ``paths``, of a folder all below it. Raises ValueError where one is not there."""
    files = [file for path in paths for file in (_below(path) if path.is_dir() else [path])]
    keys = [os.path.abspath(file) for file in files]
    if missing := [key for key in keys if not os.path.isfile(key)]:
        raise ValueError(f"{printable(missing[0])}: no such file, as {len(missing)} of {len(keys)} images given on the "
                         "command line. Give files that are there, or folders.")
    return _images("images given", Path("/"), keys, channels)


def drawn(images: Images, count: int, classes: Sequence[str] = (), seed: int = 0) -> Pairs:
    """``count`` pairs of labelled images, every other one of the same class; a function of the labels and ``seed``.

    The first image is any that has a partner; the second any other of its class, or any of another class. A pair may
    come twice. ``classes``: of these alone. Raises ValueError where there are fewer than two classes, or no class of
    two images, or ``classes`` names one that is not there, and for a list of pairs, whose labels are no classes.
    """
    if images.together == 2:
        raise ValueError(f"{images.name} is a list of pairs, and others are not drawn by its labels: they are no "
                         "classes. Give a list to verify (--pairs FILE), or images with classes (--data PATH).")
    rows_n = _of_classes(images, classes)
    label_n, order_n = images.labels[rows_n].sort(stable=True)
    _, place_n, counts = label_n.unique_consecutive(return_inverse=True, return_counts=True)
    if len(counts) < 2 or int(counts.max()) < 2:
        raise ValueError(f"{images.name}: {len(rows_n)} labelled images of {len(counts)} class"
                         f"{'es' * (len(counts) != 1)}; pairs need two classes, and one of them two images. Give more "
                         "(--data, --split, --classes), or a list (--pairs FILE).")
    start_n, count_n = (counts.cumsum(0) - counts)[place_n], counts[place_n]
    same_P, pair_P = torch.arange(count) % 2 == 0, torch.arange(count)
    paired = (count_n > 1).nonzero()[:, 0]
    draw = counter.stream("verification pairs")
    any_P = counter.integers(len(rows_n), draw, seed, 0, pair_P)
    first_P = torch.where(same_P, paired[counter.integers(len(paired), draw, seed, 0, pair_P)], any_P)
    bits_P = counter.bits(draw, seed, 1, pair_P) & (2**63 - 1)
    start_P, size_P = start_n[first_P], count_n[first_P]
    fellow_P = start_P + (first_P - start_P + 1 + bits_P % (size_P - 1).clamp(min=1)) % size_P
    stranger_P = (start_P + size_P + bits_P % (len(rows_n) - size_P)) % len(rows_n)
    chosen_P2 = rows_n[order_n][torch.stack([first_P, torch.where(same_P, fellow_P, stranger_P)], dim=1)]
    used, chosen_P2 = chosen_P2.unique(return_inverse=True)
    return Pairs(Subset(images, used), chosen_P2[:, 0], chosen_P2[:, 1], same_P)


def _of_classes(images: Images, classes: Sequence[str]) -> Tensor:
    if unknown := [name for name in classes if name not in images.classes]:
        raise ValueError(f"--classes: {images.name} has no {', '.join(map(printable, unknown))}; it has "
                         f"{printable(', '.join(images.classes), 400)}.")
    wanted = [images.classes.index(name) for name in classes] or list(range(len(images.classes)))
    return torch.isin(images.labels, torch.tensor(wanted)).nonzero()[:, 0]


def _below(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: holds no images (looked for {' '.join(SUFFIXES)} in it and below).")
    return files


def _images(name: str, folder: Path, keys: list[str], channels: int) -> Images:
    """Under one label: what has none would not be embedded."""
    return FileImages(Listing(name, folder, keys, ["image"] * len(keys)), ["image"], channels, MAX_PIXELS, "auto")

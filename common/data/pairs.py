"""Lists of pairs of images: which two are similar, which are not."""

import os
from pathlib import Path
from typing import NamedTuple

from common.data.datasets import Splits
from common.data.files import FileImages, InMemory, Listing
from common.data.images import MAX_PIXELS
from common.data.lists import Row, check_list, path_and_label, read_list, root_of
from common.printable import printable


class Pair(NamedTuple):
    """Two paths as they stand in the lists, whether they are similar, and the line, from 1."""

    first: Row
    second: Row
    similar: bool


class PairImages(FileImages):
    """2P images, of which 2i and 2i + 1 are pair i: of equal label if they are similar, of two labels if not.

    The labels of two pairs are never equal: nothing is known of images from different lines. So a pair has no label in
    which the loader has put an image of another pair in the place of one that cannot be read.
    """

    together = 2


def pair_list(
    train: Path,
    train_second: Path | None = None,
    test: Path | None = None,
    test_second: Path | None = None,
    root: Path | None = None,
    channels: int | None = 3,
    max_pixels: int = MAX_PIXELS,
    in_memory: InMemory = "auto",
) -> Splits:
    """The pairs that ``train`` lists, both images of each in the same step, and those of ``test``.

    Two lists, ``train`` and ``train_second``, hold a path and a label in each line, and line i of both is a pair; one
    list holds two paths and a label. The label is 1 for a similar pair, 0 for a dissimilar one. Lines are written as in
    ``common.data.file_list``, and so are the other arguments. P pairs count as 2P images: one
    that stands in several lines is read as often.

    Raises ValueError, before any image is decoded, for a list that is missing or unclear, lists of unequal length or
    with different labels, one list given twice, a label other than 0 and 1, pairs of one kind only, paths that lead out
    of ``root``, and files that are not there.
    """
    check_list("train", Path(train))
    if test is None and test_second is not None:
        raise ValueError("test_second: given without test. Give both, or a test of two paths and a label in each line.")
    listing = _listing("train", train, train_second, root)
    if test is None:
        return Splits(PairImages(listing, _classes(listing), channels, max_pixels, in_memory))
    other = _listing("test", test, test_second, root)
    classes = _classes(listing, other)
    images = PairImages(listing, classes, channels, max_pixels, in_memory)
    return Splits(images, PairImages(other, classes, images.channels, max_pixels, in_memory))


def read_pairs(what: str, path: Path, second: Path | None = None, root: Path | None = None) -> tuple[Path, list[Pair]]:
    """The pairs of one list or of two, and the folder where their paths start; ``what`` names them in messages.

    Raises ValueError for all that ``pair_list`` refuses. No image is opened.
    """
    path, second = Path(path), None if second is None else Path(second)
    pairs = _paired(what, path, second)
    folder = root_of(path, root, [pair.first for pair in pairs])
    if root_of(second or path, root, [pair.second for pair in pairs]) != folder:
        raise ValueError(f"root: {path} and {second} lie in two folders. Give the folder where their paths start.")
    _require_there(path, folder, [pair.first for pair in pairs])
    _require_there(second or path, folder, [pair.second for pair in pairs])
    return folder, pairs


def _paired(what: str, path: Path, second: Path | None) -> list[Pair]:
    rows = read_list(what, path)
    if second is None:
        pairs = [_of_line(row, path) for row in rows]
    else:
        where = what if what.startswith("--") else f"{what}_second"     # an option of a command takes both
        if os.path.realpath(path.expanduser()) == os.path.realpath(second.expanduser()):
            raise ValueError(f"{where}: {second} is the first list, too, and each image would be paired with itself. "
                             "Give the list of the second images.")
        others = read_list(where, second)
        if len(others) != len(rows):
            raise ValueError(f"{where}: {second} lists {len(others)} images, and {path} {len(rows)}. Line i of "
                             "both is a pair: give as many in each.")
        pairs = [_of_two(row, other, path, second) for row, other in zip(rows, others, strict=True)]
    if len({pair.similar for pair in pairs}) == 1:
        kind = "similar (1)" if pairs[0].similar else "dissimilar (0)"
        raise ValueError(f"{what}: all {len(pairs)} pairs of {path} are {kind}. Give pairs of both kinds.")
    return pairs


def _of_line(row: Row, path: Path) -> Pair:
    try:
        key, label = path_and_label(row.label, "")
    except ValueError:
        raise ValueError(f"{path}:{row.line}: holds no second path after {printable(row.key)!r}. Give two paths and a "
                         "label in each line, or a second list, whose line i is paired with line i.") from None
    return Pair(row, Row(key, label, row.line), _similar(label, path, row.line))


def _of_two(row: Row, other: Row, path: Path, second: Path) -> Pair:
    similar = _similar(row.label, path, row.line)
    if _similar(other.label, second, other.line) != similar:
        raise ValueError(f"{second}:{other.line}: label {other.label}, but {row.label} in {path}:{row.line}. Both are "
                         "of one pair: give the same label.")
    return Pair(row, other, similar)


def _similar(label: str, path: Path, line: int) -> bool:
    if label not in ("0", "1"):
        raise ValueError(f"{path}:{line}: label {printable(label)!r} of a pair. Give 1 for a similar pair, 0 for a "
                         "dissimilar one; classes of images are read by common.data.file_list.")
    return label == "1"


def _listing(what: str, path: Path, second: Path | None, root: Path | None) -> Listing:
    """The images of the pairs, one after another, with a name for each label."""
    folder, pairs = read_pairs(what, path, second, root)
    keys = [row.key for pair in pairs for row in pair[:2]]
    names: list[str | None] = []
    for i, pair in enumerate(pairs):
        names += [f"{what} pair {i}", f"{what} pair {i}" if pair.similar else f"{what} pair {i}, second"]
    return Listing(f"pair list {path}", folder, keys, names)


def _require_there(path: Path, folder: Path, rows: list[Row]) -> None:
    lines = {row.key: row.line for row in reversed(rows)}
    missing = sorted((line, key) for key, line in lines.items() if not os.path.isfile(os.path.join(folder, key)))
    if missing:
        named = ", ".join(f"{printable(key)} (line {line})" for line, key in missing[:3])
        raise ValueError(f"{path}: {len(missing)} of its files {'is' if len(missing) == 1 else 'are'} not below "
                         f"{folder}: {named}{', ...' * (len(missing) > 3)}. Repair the list, or give another root.")


def _classes(*listings: Listing) -> list[str]:
    """Names of the labels, in order, each once."""
    return list(dict.fromkeys(name for listing in listings for name in listing.class_names if name is not None))

"""A folder of images, with or without classes."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from common.data.datasets import Splits
from common.data.files import InMemory, Listing, file_splits, natural
from common.data.images import MAX_PIXELS, SUFFIXES
from common.data.pack_index import INDEX
from common.printable import printable

_TEST_NAMES = ("test", "val", "valid", "validation")
_NO_ROOT = """root: no images given.
  To train on yours, say where they are: data.root=/path/to/folder (any folder of images, with or without classes).
  To try without any: --config demo.yaml, which trains on handwritten digits that come with scikit-learn."""


def folder(
    root: Path | None = None,
    train: str = "auto",
    test: str | None = "auto",
    labels: Literal["auto", "folders", "none"] = "auto",
    channels: int | None = 3,
    max_pixels: int = MAX_PIXELS,
    in_memory: InMemory = "auto",
) -> Splits:
    """All image files below ``root``, in natural order of their paths; hidden ones are left out.

    ``train``, ``test``: folders in ``root``. "auto" is ``root/train`` and the first of ``root/test``, ``val``,
    ``valid`` and ``validation`` beside it; without ``root/train``, all of ``root`` is for training and nothing for
    testing. ``test`` None is no test set. A test folder below the training folder is not trained on.

    ``labels``: "folders" takes the first folder below the split's as the class (-1 for files beside the folders);
    "auto" does so where all files are in folders, two at least; "none" leaves all at -1.
    ``channels``, ``max_pixels``: as in ``read_image``; ``channels`` None is what the first readable image has.
    ``in_memory``: whether all are decoded at once; "auto" does so where 64 of them have one size of at most 96 pixels
    a side and all together less than 1 GiB.

    Raises ValueError where a folder is missing or holds no images, or none of 64 can be read.
    """
    if root is None:
        raise ValueError(_NO_ROOT)
    _check_folder("root", Path(root))
    train_folder, test_folder = _split_folders(_existing("root", Path(root)), train, test)
    return file_splits(
        _listing(train_folder, labels, apart=None if test_folder == train_folder else test_folder),
        None if test_folder is None else _listing(test_folder, labels),
        channels, max_pixels, in_memory,
    )


def _existing(what: str, path: Path) -> Path:
    _check_folder(what, path)
    return Path(os.path.abspath(path.expanduser()))


def _check_folder(what: str, path: Path) -> None:
    path = Path(os.path.abspath(path.expanduser()))
    if path.is_file():
        raise ValueError(f"{what}: {path} is a file, not a folder; a list of files is read by common.data.file_list.")
    if not path.is_dir():
        raise ValueError(f"{what}: there is no folder {path}. Give the folder that holds the images.")
    if (path / INDEX).exists():
        raise ValueError(f"{what}: {path} is a packed set. Give data.name=common.data.packed.")


def _split_folders(root: Path, train: str, test: str | None) -> tuple[Path, Path | None]:
    whole = train == "auto" and not (root / "train").is_dir()
    train_folder = root if whole else _existing("train", root / ("train" if train == "auto" else train))
    if test == "auto":
        found = [] if whole else [root / name for name in _TEST_NAMES if (root / name).is_dir()]
        return train_folder, next((path for path in found if path != train_folder), None)
    return train_folder, None if test is None else _existing("test", root / test)


def _listing(path: Path, labels: str, apart: Path | None = None) -> Listing:
    files = list(_files(str(path), "", () if apart is None else (_identity(str(apart)),)))
    keys = [file for file in files if _suffix(file) in SUFFIXES]
    if not keys:
        most = Counter(map(_suffix, files)).most_common(3)
        others = ", ".join(f"{n} {printable(suffix) or 'without suffix'}" for suffix, n in most)
        raise ValueError(f"root: {path} holds no images (looked for {' '.join(SUFFIXES)} in it and below, found "
                         f"{len(files)} other files{': ' * bool(others)}{others}). Give the folder that holds them.")
    return Listing(f"folder {path}", path, keys, _class_names(keys, labels))


def _files(folder: str, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Relative paths, with "/", in natural order. Links are followed, but not into one of the folders ``above``."""
    identity = _identity(folder)
    if identity in above:
        return
    try:
        with os.scandir(folder) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: natural(e.name))
    except OSError as error:                # forbidden, too long a path, a disk that fails
        raise ValueError(f"root: cannot list {printable(folder)}: {error.strerror}. Change its permissions, or move it "
                         "away.") from None
    for entry in visible:
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
            yield from _files(entry.path, f"{below}{entry.name}/", (*above, identity))
        else:
            yield below + entry.name


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _class_names(keys: list[str], labels: str) -> list[str | None]:
    names = [key.split("/", 1)[0] if "/" in key else None for key in keys]
    if labels == "folders" or (labels == "auto" and None not in names and len(set(names)) >= 2):
        return names
    return [None] * len(keys)

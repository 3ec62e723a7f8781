"""The members of a tar shard: their names, and the header before each."""

import os
import tarfile
from collections.abc import Sequence

from common.data.images import SUFFIXES

BLOCK = 512             # bytes: what a tar file is made of
END = bytes(2 * BLOCK)


def member_names(splits: Sequence[Sequence[str]], suffix: str) -> list[str]:
    """The name of each image of the splits: its key, with the ``suffix`` of what it becomes.

    Those of two splits are below train/ and test/: unpacked, they are the source's folder again. None leads
    out of the folder where it is unpacked, and none stands there twice.
    """
    used: dict[str, int] = {}
    prefixes = ["train/", "test/"] if len(splits) == 2 else [""]
    return [_free(prefix + _inside(key), suffix, used) for prefix, keys in zip(prefixes, splits) for key in keys]


def _inside(key: str) -> str:
    parts = ["__" if part == ".." else part for part in key.split("/") if part not in ("", ".")]
    return "/".join(parts) or "image"


def _free(name: str, suffix: str, used: dict[str, int]) -> str:
    stem, found = os.path.splitext(name)
    if found.lower() in (".jpg", ".jpeg") and suffix == ".jpg":
        suffix = found
    elif found.lower() not in SUFFIXES:
        stem = name
    name = stem + suffix
    while name in used:
        used[name] += 1
        name = f"{stem}-{used[name]}{suffix}"
    used[name] = 1
    return name


def tar_header(name: str, size: int) -> bytes:
    """Of a plain file that is nobody's and of no time; a long or odd name stands in a pax header before it."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padded(size: int) -> int:
    """Whole blocks."""
    return -(-size // BLOCK) * BLOCK

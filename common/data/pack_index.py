"""The index of a packed set: where each image lies in the shards, its size, label, key and SHA-256.

It is a safetensors file (8 bytes of length, a JSON header, the columns): it holds no code, and others can read it. What
it says is checked before it is used: it may come from a stranger.

Axes: n images, those for training first, then those for testing.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from common.atomic import replace_file
from common.printable import printable

INDEX = "index.safetensors"
UNFINISHED = "packing"                  # a folder that is there until the index is
SHARD = r"[0-9]{5,9}\.tar"
FORMAT = 1
LARGEST = 2**30                         # bytes of an image
_JPEG_SIDE = 2**16 - 1                  # pixels
NPY_HEADER = 128                        # bytes before the pixels in a .npy file of three axes
_TYPES = {"I64": "<i8", "I32": "<i4", "U8": "u1"}
_COLUMNS = {"offset": "I64", "length": "I64", "label": "I64", "shard": "I32", "channels": "I32", "height": "I32",
            "width": "I32", "sha256": "U8", "keys": "U8", "classes": "U8"}
_LARGEST_INDEX = 2**32
_TEXTS = ("keys", "classes")            # names in UTF-8, each ended by a zero byte


class Index(NamedTuple):
    """``facts``: JSON, see ``facts_of``; ``columns``: int64 or int32 [n], ``sha256`` uint8 [n, 32]; keys [n].

    ``offset`` and ``length`` are bytes of the image's file within shard number ``shard``. An image that could not be
    read when the set was packed has length 0, and its reason in ``bad``.
    """

    facts: dict[str, Any]
    columns: dict[str, np.ndarray]
    keys: list[str]
    classes: list[str]

    @property
    def raw(self) -> bool:
        return self.facts["kind"] == "raw"

    @property
    def bad(self) -> dict[int, str]:
        return {int(number): printable(reason) for number, reason in self.facts["bad"].items()}


def write_index(folder: Path, index: Index) -> int:
    """Put the index into ``folder``, whole or not at all; its size in bytes."""
    columns = {**index.columns, **{name: np.frombuffer(_joined(names), np.uint8)
                                   for name, names in zip(_TEXTS, (index.keys, index.classes))}}
    parts = {name: np.ascontiguousarray(columns[name], _TYPES[dtype]) for name, dtype in _COLUMNS.items()}
    body = b"".join(part.tobytes() for part in parts.values())
    facts = json.dumps(index.facts, sort_keys=True)
    header: dict[str, Any] = {"__metadata__": {"store": facts, "sha256": _digest(facts, body)}}
    stop = 0
    for name, part in parts.items():
        start, stop = stop, stop + part.nbytes
        header[name] = {"dtype": _COLUMNS[name], "shape": list(part.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return replace_file(folder / INDEX, lambda file: file.write(len(text).to_bytes(8, "little") + text + body))


def read_index(folder: Path) -> Index:
    """The index in ``folder``. Raises ValueError if it is damaged, or says what cannot be."""
    try:
        with open_regular(folder / INDEX) as file:
            if (size := os.fstat(file.fileno()).st_size) > _LARGEST_INDEX:
                raise ValueError(f"it has {size:,} bytes, more than {_LARGEST_INDEX:,}")
            data = file.read()
        index = _parsed(data)
        _require_sound(index)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        said = printable(str(error), 300) if type(error) is ValueError else f"malformed ({type(error).__name__})"
        raise ValueError(f"root: {folder / INDEX} cannot be used: {said}. Pack the set again, or copy it again from "
                         "where it is whole.") from error
    return index


def open_regular(path: Path) -> BinaryIO:
    """The file, unbuffered. Raises OSError, or ValueError for a link, a pipe and whatever else is no regular file."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if path.is_symlink() or not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError(f"{path.name} is not a regular file")
    return open(file, "rb", buffering=0)


def _joined(names: Iterable[str]) -> bytes:
    return "".join(f"{name}\0" for name in names).encode(errors="surrogateescape")


def _names(blob: np.ndarray) -> list[str]:
    *names, rest = blob.tobytes().decode(errors="surrogateescape").split("\0")
    if rest:
        raise ValueError("its names do not end")
    return names


def _digest(facts: str, body: bytes | memoryview) -> str:
    digest = hashlib.sha256(facts.encode())
    digest.update(body)
    return digest.hexdigest()


def _parsed(data: bytes) -> Index:
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError("it ends early")
    header, body = json.loads(data[8:start]), memoryview(data)[start:]
    facts = header["__metadata__"]["store"]
    if header["__metadata__"]["sha256"] != _digest(facts, body):
        raise ValueError("its SHA-256 is another: it was damaged or changed")
    columns = {name: _column(name, header[name], body) for name in _COLUMNS}
    keys, classes = (_names(columns.pop(name)) for name in _TEXTS)
    return Index(json.loads(facts), columns, keys, classes)


def _column(name: str, entry: dict[str, Any], body: memoryview) -> np.ndarray:
    dtype, (start, stop) = _COLUMNS[name], entry["data_offsets"]
    if entry["dtype"] != dtype or not 0 <= start <= stop <= len(body):
        raise ValueError(f"its column {name} does not lie in it")
    column = np.frombuffer(body[start:stop], _TYPES[dtype])
    return column.reshape(-1, 32) if name == "sha256" else column


def _require_sound(index: Index) -> None:
    """Raises ValueError if a number of the index leads out of what there is."""
    facts, columns = index.facts, index.columns
    if facts["format"] != FORMAT:
        raise ValueError(f"it is of format {facts['format']}, and format {FORMAT} is read here")
    n = len(index.keys)
    num_train, num_test = facts["train"], facts["test"] or 0
    if any(len(column) != n for column in columns.values()) or n != num_train + num_test:
        raise ValueError("its columns differ in length")
    if {type(num_train), type(num_test)} != {int} or not 1 <= num_train <= n or facts["kind"] not in ("jpeg", "raw"):
        raise ValueError("it holds no images for training, or of an unknown kind")
    if not all(re.fullmatch(SHARD, shard["name"]) and type(shard["bytes"]) is int
               for shard in facts["shards"]):
        raise ValueError("its shards are not named 00000.tar, 00001.tar, ...")
    label = columns["label"]
    if label.min() < -1 or label.max() >= len(index.classes):
        raise ValueError(f"its labels are not numbers of its {len(index.classes)} classes")
    if not all(type(text) is str for text in facts["bad"].values()):
        raise ValueError("its reasons of unreadable images are no text")
    good = columns["length"] != 0
    if sorted(index.bad) != np.flatnonzero(~good).tolist():
        raise ValueError("its list of unreadable images is of others")
    _require_all(columns["shard"][good], len(facts["shards"]))
    if good.any():
        _require_inside({name: column[good] for name, column in columns.items()}, facts["shards"], index.raw)


def _require_all(shard: np.ndarray, count: int) -> None:
    """Raises ValueError unless the images lie in 0, 1, ... ``count`` - 1, in this order and in each of them."""
    if len(shard) and (shard.min() < 0 or shard.max() >= count):
        raise ValueError("it names a shard that it does not list")
    if np.flatnonzero(np.diff(shard, prepend=-1)).size != count or (np.diff(shard) < 0).any():
        raise ValueError("its images are not in the order of its shards, or a shard holds none")


def _require_inside(columns: dict[str, np.ndarray], shards: list[dict[str, Any]], raw: bool) -> None:
    shard, offset, length = (columns[name] for name in ("shard", "offset", "length"))
    height, width, channels = (columns[name].astype(np.int64) for name in ("height", "width", "channels"))
    end = np.array([entry["bytes"] for entry in shards], np.int64)[shard]
    if offset.min() < 0 or length.min() < 1 or (offset > end - length).any() or length.max() > LARGEST:
        raise ValueError("one of its images does not lie in its shard")
    if min(height.min(), width.min(), channels.min()) < 1:
        raise ValueError("one of its images has no pixels")
    if not raw and (max(height.max(), width.max()) > _JPEG_SIDE or not np.isin(channels, (1, 3)).all()):
        raise ValueError("one of its images has pixels or channels that a JPEG cannot have")
    if raw:
        pixels = height * width                                 # of two int32: no overflow, and below with channels
        fits = (pixels <= length) & (channels <= length // pixels)
        if not fits.all() or (pixels * channels != length - NPY_HEADER).any():
            raise ValueError("one of its images has another size than its bytes")

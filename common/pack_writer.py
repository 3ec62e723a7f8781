"""A packed set on the disk while it is written: shards, records, reasons; and at last the index.

Beside the shards stands the folder ``packing`` until the index does: the plan (what decides about each byte), a record
of 64 bytes for each image done, and the reasons of the unreadable ones.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from common import lock
from common.atomic import replace_file
from common.data.datasets import Images
from common.data.pack_index import INDEX, SHARD, UNFINISHED, Index, read_index, write_index
from common.pack_tar import END, padded, tar_header

_PLAN = "plan.json"
_RECORD = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("length", "<i8"), ("channels", "<i4"), ("height", "<i4"),
                    ("width", "<i4"), ("sha256", "u1", 32)])


class NotPacked(OSError):
    """The disk did not take it; ``code`` is the process's exit status: EX_IOERR."""

    code = 74


class Member(NamedTuple):
    """An image as it goes into a shard: its bytes, shape (c, H, W) and their SHA-256; or the reason why it does not."""

    number: int
    data: bytes = b""
    shape: tuple[int, ...] = (0, 0, 0)
    sha256: bytes = bytes(32)
    reason: str = ""


class Writer:
    """Shards and records on the disk, in the order of the images; from ``__init__`` to ``close`` no other process's.

    An image's bytes go to the disk before its record. What a kill or a power cut leaves is taken up to the last image
    whose bytes are those of its record.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], names: list[str]):
        self.folder, self.work, self.plan, self.names = folder, folder / UNFINISHED, plan, names
        self.done = self.shard = self.size = 0
        self._files: dict[Path, int] = {}
        with self._disk():
            self.work.mkdir(parents=True, exist_ok=True)
        if owner := lock.take(self.work):
            raise ValueError(f"--out: {folder} is being written by another process ({owner}). Wait for it, or give "
                             "another folder.")

    def begin(self) -> None:
        """Write the plan down, or take up what was begun with it."""
        with self._disk():
            _agree(self.work / _PLAN, self.plan)
            self._restore()

    def add(self, member: Member) -> None:
        """The next image, after ``done`` of them."""
        assert member.number == self.done
        header = b"" if member.reason else tar_header(self.names[member.number], len(member.data))
        with self._disk():
            if self.size and self.size + len(header) + padded(len(member.data)) > self.plan["shard_bytes"]:
                self._end_shard()
            if member.reason:
                said = json.dumps({"number": member.number, "reason": member.reason}) + "\n"
                self._append(self.work / "bad.jsonl", said.encode())
            else:
                filler = bytes(padded(len(member.data)) - len(member.data))
                self._append(self._shard_path(self.shard), b"".join([header, member.data, filler]))
            place = self.shard, self.size + len(header), len(member.data)
            record = np.array((*place, *member.shape, np.frombuffer(member.sha256, np.uint8)), _RECORD)
            self._append(self.work / "records", record.tobytes())
        self.size += len(header) + padded(len(member.data))
        self.done += 1

    def finish(self, images: Images) -> None:
        """The index, once all images are done; the folder of work goes."""
        with self._disk():
            if self.size:
                self._end_shard()
            records = np.fromfile(self.work / "records", _RECORD)
            columns = {name: records[name] for name in _RECORD.names or ()}
            names = [f"{shard:05}.tar" for shard in range(self.shard)]
            shards = [{"name": name, "bytes": (self.folder / name).stat().st_size} for name in names]
            bad = {str(number): reason for number, reason in _reasons(self.work / "bad.jsonl").items()}
            write_index(self.folder, Index({**self.plan, "shards": shards, "bad": bad},
                                           {**columns, "label": images.labels.numpy()}, images.keys, images.classes))
        self.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}
        lock.release(self.work)

    def _restore(self) -> None:
        """Take up what an earlier start has left, and cut off what is not whole."""
        path, bad = self.work / "records", _reasons(self.work / "bad.jsonl")
        records = np.fromfile(path, _RECORD) if path.exists() else np.empty(0, _RECORD)
        known = np.isin(np.arange(len(records)), list(bad)) | (records["length"] > 0)
        follows = np.isin(np.diff(records["shard"], prepend=0), (0, 1))
        records = records[: int(np.argmin([*(known & follows), False]))]    # a power cut leaves zeros
        last = int(records["shard"].max(initial=0))
        for number in range(last):
            self._require_closed(number, records[records["shard"] == number])
        first = int(np.searchsorted(records["shard"], last))
        self.done, self.shard = first + self._whole(records, first, bad), last
        if self.done > first:
            record = records[self.done - 1]
            self.size = padded(int(record["offset"] + record["length"]))
        said = [json.dumps({"number": i, "reason": reason}) + "\n" for i, reason in bad.items() if i < self.done]
        replace_file(self.work / "bad.jsonl", lambda file: file.write("".join(said).encode()))
        for name, size in ((path, self.done * _RECORD.itemsize), (self._shard_path(last), self.size)):
            if name.exists():
                os.truncate(name, size)
        for shard in self.folder.iterdir():
            if re.fullmatch(SHARD, shard.name) and int(shard.stem) > last:
                shard.unlink()

    def _whole(self, records: np.ndarray, first: int, bad: dict[int, str]) -> int:
        """How many of ``records`` from ``first`` on have their bytes, or a reason."""
        path = self._shard_path(int(records["shard"].max(initial=0)))
        if not path.exists():
            return 0
        with open(path, "rb") as file:
            for i, record in enumerate(records[first:], start=first):
                if i not in bad and not self._is_whole(file, i, record):
                    return i - first
        return len(records) - first

    def _is_whole(self, file: BinaryIO, i: int, record: np.void) -> bool:
        length = int(record["length"])
        header = tar_header(self.names[i], length)
        file.seek(max(int(record["offset"]) - len(header), 0))
        found, data = file.read(len(header)), file.read(padded(length))[:length]
        return found == header and hashlib.sha256(data).digest() == record["sha256"].tobytes()

    def _require_closed(self, number: int, records: np.ndarray) -> None:
        path = self._shard_path(number)
        wanted = padded(int((records["offset"] + records["length"]).max())) + len(END)
        found = path.stat().st_size if path.exists() else 0
        if found != wanted:
            raise ValueError(f"--out: {path} had {wanted:,} bytes when it was done, and has {found:,}. Delete "
                             f"{self.folder}, and start anew.")

    def _end_shard(self) -> None:
        """On the disk for good, before anything is written that counts on it."""
        path = self._shard_path(self.shard)
        self._append(path, END)
        file = self._files.pop(path)
        for written in (file, self._files.get(self.work / "bad.jsonl"), self._files.get(self.work / "records")):
            if written is not None:
                os.fsync(written)
        os.close(file)
        self.shard, self.size = self.shard + 1, 0

    def _append(self, path: Path, data: bytes) -> None:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        view = memoryview(data)
        while view:
            view = view[os.write(self._files[path], view):]

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"{number:05}.tar"

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NotPacked(f"{self.folder}: {error.strerror or error}, after {self.done:,} of "
                            f"{len(self.names):,} images. Nothing of them is lost: make room or repair it, and run the "
                            "same command again.") from error


def is_done(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether ``folder`` holds just this already. Raises ValueError where it holds anything else."""
    if not folder.exists():
        return False
    ours = (folder / INDEX).exists() or (folder / UNFINISHED / _PLAN).exists()
    if not ours and not (folder.is_dir() and _is_empty(folder)):
        raise ValueError(f"--out: {folder} holds something else. Give a folder that is empty, or not yet there.")
    if (folder / INDEX).exists():
        _require_same({name: read_index(folder).facts.get(name) for name in plan}, plan, folder)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        return True
    return False


def _is_empty(folder: Path) -> bool:
    """Or holds no more than a start leaves that is killed before it has written its plan."""
    left = {folder / UNFINISHED / name for name in ("", lock.NAME, f"{_PLAN}.tmp")}
    return all(path in left for path in folder.rglob("*"))


def _agree(path: Path, plan: dict[str, Any]) -> None:
    """Write the plan down, or compare it with the one that is there."""
    if path.exists():
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"--out: {path} is damaged. Delete {path.parent.parent}, and start anew.") from error
        _require_same(before, plan, path.parent.parent)
    else:
        replace_file(path, lambda file: file.write(json.dumps(plan).encode()))


def _require_same(before: dict[str, Any], plan: dict[str, Any], folder: Path) -> None:
    changed = [name for name in plan if plan[name] != before.get(name)]
    said = [f"{name} was {before.get(name)!r} and is {plan[name]!r}" if name != "source" else
            "the list of images, their labels or classes have changed" for name in changed]
    if said:
        raise ValueError(f"--out: {folder} was begun with other settings or images: {'; '.join(said)}. Give what it "
                         "was begun with, or another folder.")


def _reasons(path: Path) -> dict[int, str]:
    """Of the unreadable images, by number, up to the first line that is not whole: a power cut leaves zeros."""
    found: dict[int, str] = {}
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        found[entry["number"]] = entry["reason"]
    return found

"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into lost work.

A file is written beside its name, synced to the disk and renamed, so that a name only ever holds a whole checkpoint; a
digest of every value inside says on loading whether it still is what was saved. The content is tensors, numbers,
strings, lists, tuples and dicts, and is read with ``weights_only=True``: loading a stranger's file runs no code.
"""

import errno
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.atomic import replace_file
from common.container import Refused, check_container
from common.tree import check_extent, digest, num_bytes, plain

_FORMAT = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = re.compile(r"step-(\d{8,})(-kept)?\.pt")
_log = logging.getLogger(__name__)


class DamagedCheckpoint(ValueError):
    """A file that is not, or no longer, what ``save`` wrote; the message names the file and the reason."""


class NotSaved(OSError):
    """The disk did not take a checkpoint. ``code`` is the process's exit status where this ends a run: EX_IOERR."""

    code = 74

    def __init__(self, text: str, number: int | None = None):
        super().__init__(text)
        self.errno = number

    @property
    def for_want_of_room(self) -> bool:
        """Whether it may go well next time without anybody doing anything: the disk, or a quota of it, is full."""
        return self.errno in _NO_ROOM


def save(path: str | Path, state: dict[str, Any]) -> int:
    """Write ``state`` to ``path``, whole or not at all; returns the file's size in bytes.

    Tensors may lie on any device and are saved without their gradient. Raises ValueError, naming the place in
    ``state``, for what ``load`` would refuse (NumPy values, paths, objects), and NotSaved when the disk does not take
    the file: what was at ``path`` before is then still there.
    """
    path, state = Path(path), plain(state)
    payload = {"format": _FORMAT, "sha256": digest(state), "state": state}
    try:
        return replace_file(path, lambda file: torch.save(payload, file))
    except (OSError, RuntimeError) as error:        # torch reports a failed write as its own RuntimeError
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise NotSaved(f"{path}: not saved: {reason} ({_room(path.parent, num_bytes(state))}). The checkpoints saved "
                       "before it are untouched.", getattr(reason, "errno", None)) from error


def load(path: str | Path) -> dict[str, Any]:
    """What ``save`` wrote to ``path``, on the CPU. Raises DamagedCheckpoint for anything else, and runs none of it."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DamagedCheckpoint(f"{path}: not a checkpoint: it is not a regular file.")
    with open(path, "rb") as file:
        try:
            size = check_container(file)
            payload = torch.load(file, map_location="cpu", weights_only=True)
            check_extent(payload, size)
            return _state_of(payload)
        except (OSError, MemoryError):              # of the disk or the machine: the file may be sound
            raise
        except Exception as error:                  # a damaged pickle can raise nearly everything
            if "allocate memory" in str(error):
                raise MemoryError(f"{path}: {error}") from error
            raise DamagedCheckpoint(f"{path}: {_reason(error)}") from error


class Folder:
    """The checkpoints of one run, ``step-00001234.pt``: the newest ``keep`` of them, and all that end in ``-kept``.

    Main process only. ``files``, ``newest`` change nothing, and may be called on a run that is going on elsewhere.
    """

    def __init__(self, path: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"checkpoint.keep: {keep} given. It is how many of the newest ones stay: 1 or more.")
        self.path, self.keep = Path(path), keep
        self._prepared = False

    def prepare(self) -> None:
        """Make the folder and clear what a killed save left in it. Raises NotSaved if it cannot be written to.

        Call it before the first step, so that hours of work do not end at a folder like that; else the first ``save``
        does. Later ones make no folder: one that has vanished was on a disk that has.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.glob("*.tmp"):
                leftover.unlink()
            (self.path / "probe.tmp").touch()
            (self.path / "probe.tmp").unlink()
        except OSError as error:
            raise NotSaved(f"{self.path}: checkpoints cannot be saved here: {error.strerror}. Make the folder "
                           "writable, or give another one (run.dir).", error.errno) from error
        self._prepared = True

    def save(self, step: int, state: dict[str, Any], keep_always: bool = False) -> Path:
        """Save the state after ``step`` steps, then delete what is no longer to be kept; raises as ``save`` does.

        So the disk holds one more than is kept for a moment: none goes before the new one is whole.
        """
        if not self._prepared:
            self.prepare()
        path = self.file(step, keep_always)
        save(path, state)
        self._prune(step)
        return path

    def file(self, step: int, keep_always: bool = False) -> Path:
        """The path of the checkpoint of ``step``, there or not."""
        return self.path / f"step-{step:08d}{'-kept' if keep_always else ''}.pt"

    def files(self) -> list[tuple[int, Path]]:
        """Step and path of each checkpoint, newest first, sound or not."""
        return _files(self.path)

    def newest(self, accept: Callable[[dict[str, Any]], bool] = bool) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest checkpoint that loads and is accepted; None if there is none at all.

        Each damaged one on the way is named in a warning. Raises DamagedCheckpoint if there are some and none loads:
        a run must not start over, and over its own remains, unasked.
        """
        damaged, sound = [], False
        for step, path in self.files():
            try:
                state, sound = load(path), True
                if accept(state):
                    return step, state
            except DamagedCheckpoint as error:
                damaged.append(str(error))
                _log.warning("%s %s", error, self._before(path))
        if damaged and not sound:
            raise DamagedCheckpoint(f"{self.path}: none of the {len(damaged)} checkpoints in it can be used. "
                                    f"{damaged[0]} To start from the beginning, move the folder away.")
        return None

    def _before(self, damaged: Path) -> str:
        names = [path.name for _, path in self.files()]
        older = names[names.index(damaged.name) + 1:]
        return f"Trying the one before it, {older[0]}." if older else "There is none before it."

    def drop_after(self, step: int) -> None:
        """Delete what was saved after ``step``, also what was to be kept: the run has gone back to there."""
        for at, path in self.files():
            if at > step:
                path.unlink()

    def _prune(self, step: int) -> None:
        """Later steps than ``step`` go, too: a run gets here with them only if it could not load them."""
        passing = [(at, path) for at, path in _files(self.path) if not path.stem.endswith("-kept")]
        later = [path for at, path in passing if at > step]
        for path in later + [path for at, path in passing if at <= step][self.keep:]:
            path.unlink(missing_ok=True)


def _files(folder: Path) -> list[tuple[int, Path]]:
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*.pt")]
    return sorted(((int(name[1]), path) for name, path in found if name), reverse=True)


_FOREIGN = ("not a checkpoint of this project. If another one wrote these weights, take them over: python "
            "tools/import_weights.py FILE")


def _state_of(payload: Any) -> dict[str, Any]:
    if not isinstance(payload, dict) or set(payload) != {"format", "sha256", "state"}:
        raise DamagedCheckpoint(_FOREIGN)
    if type(payload["format"]) is not int or not isinstance(payload["state"], dict):
        raise DamagedCheckpoint(_FOREIGN)
    if payload["format"] != _FORMAT:
        raise DamagedCheckpoint(f"written in format {payload['format']}; this version reads {_FORMAT}.")
    if payload["sha256"] != digest(payload["state"]):
        raise DamagedCheckpoint("damaged: its content does not match its checksum.")
    return payload["state"]


def _reason(error: Exception) -> str:
    if isinstance(error, (DamagedCheckpoint, Refused)):
        return str(error)
    return f"damaged, or not a checkpoint of this project: {type(error).__name__}: {str(error).partition('. ')[0]}."


def _room(folder: Path, needed: int) -> str:
    free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free there" if folder.is_dir() else "no such folder"
    return f"{needed / 1e6:,.1f} MB needed, {free}"

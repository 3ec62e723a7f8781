"""What a run writes down while it goes: metrics.jsonl, summary.json and bad_images.jsonl, and a copy on wandb.

The files are the truth and wandb is a mirror. A disk that is slow or full does not hold up training: lines wait in
memory until it takes them.
"""

import contextlib
import json
import logging
import math
import os
import secrets
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from common.atomic import replace_file
from common.background import Background
from common.mirror import Mirror

_FILES = ("metrics.jsonl", "bad_images.jsonl", "nonfinite.jsonl")
_SILENCE = 600.0            # seconds between warnings that the disk takes no records
_log = logging.getLogger(__name__)


class Records:
    """The records of one run in the folder ``path``, written by ``disk`` in the order given. Main process only.

    ``run_id`` is wandb's name for the run: give back, after a resume, the one that the attribute ``run_id`` had.
    """

    def __init__(self, path: str | Path, wandb: Literal["off", "offline", "online"] = "off", *, project: str = "",
                 run_id: str | None = None, name: str | None = None, config: Mapping[str, Any] | None = None,
                 disk: Background | None = None):
        self.path, self.run_id = Path(path), run_id or secrets.token_hex(4)
        self.path.mkdir(parents=True, exist_ok=True)
        self._disk = disk or Background("disk")
        self._lines: dict[str, list[bytes]] = {name: [] for name in _FILES}     # not yet on the disk
        self._summary = b""
        self._warned_at = -math.inf
        self.rewind(math.inf)
        self._mirror = Mirror(self.path, wandb, project=project, run_id=self.run_id, name=name,
                              config=_plain(config or {})) if wandb != "off" else None

    @property
    def url(self) -> str | None:
        """The run's page on wandb."""
        return self._mirror.url if self._mirror else None

    def write(self, kind: Literal["train", "eval", "health", "event"], step: int, epoch: float, **values: Any) -> None:
        """Append one record, a line of JSON. Values: numbers (0-d tensors too), strings, None, lists and dicts of them.

        What is not finite becomes a string that ``float`` reads back: "nan", "inf", "-inf".
        """
        self.append("metrics.jsonl", {"step": step, "epoch": epoch, "kind": kind, **values})
        if self._mirror:
            self._mirror.log(kind, step, epoch, values)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a line of JSON to a file."""
        self._lines[name].append(_json(record).encode() + b"\n")
        self._disk.submit(self._write_out)

    def rewind(self, step: float) -> None:
        """Drop the records of steps after ``step``, as after a resume from there, and lines that a kill cut off."""
        self._disk.submit(lambda: self._rewind(step)).result()

    def summary(self, **values: Any) -> None:
        """Write summary.json anew with these values, in one step."""
        self._summary = _json(values, indent=2).encode() + b"\n"
        self._disk.submit(self._write_out)
        if self._mirror:
            self._mirror.summary(_plain(values))

    def flush(self) -> int:
        """Wait until the disk has taken everything; gives how many lines and summaries it would not take."""
        self._disk.submit(self._write_out).result()
        return sum(map(len, self._lines.values())) + bool(self._summary)

    def close(self) -> None:
        """Write out what is left, and end the copy on wandb, which may take up to a minute to send the rest."""
        if left := self.flush():
            _log.warning("%s: the last %d records could not be written%s.", self.path, left, self._elsewhere())
        if self._mirror:
            self._mirror.close()

    def _elsewhere(self) -> str:
        """Put what the disk has refused into the folder for temporary files, and say what is to be done with it."""
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{self.path.absolute().name}-records-"))
            for name, lines in self._lines.items():
                _append(folder / name, lines)
            if self._summary:
                (folder / "summary.json").write_bytes(self._summary)
        except OSError:
            return ", and are lost"
        return f"; they are in {folder}, to be added to the files of the same names"

    def _write_out(self) -> None:
        try:
            for name, lines in self._lines.items():
                _append(self.path / name, lines)
            if text := self._summary:
                replace_file(self.path / "summary.json", lambda file: file.write(text))
                self._summary = b"" if self._summary is text else self._summary
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if time.monotonic() - self._warned_at > _SILENCE:
            self._warned_at = time.monotonic()
            _log.warning("%s: records cannot be written: %s. They wait in memory, and training goes on: make room.",
                         self.path, error)

    def _rewind(self, step: float) -> None:
        metrics, waiting = self.path / "metrics.jsonl", self._lines["metrics.jsonl"]
        lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
        kept = _until(step, lines)
        if kept == lines[:len(kept)]:
            _shorten(metrics, sum(map(len, kept)))              # needs no room on the disk
        else:
            replace_file(metrics, lambda file: file.writelines(kept))
        waiting[:] = _until(step, waiting)
        for name in _FILES[1:]:
            if (path := self.path / name).exists():
                _shorten(path, path.read_bytes().rfind(b"\n") + 1)


def _shorten(path: Path, size: int) -> None:
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def _append(path: Path, lines: list[bytes]) -> None:
    """Move ``lines`` to the end of a file: all of them, or none and raise OSError. More may come in meanwhile."""
    count = len(lines)
    if not count:
        return
    rest = memoryview(b"".join(lines[:count]))
    with open(path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            while rest:
                rest = rest[file.write(rest):]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), size)           # no torn line
            raise
    del lines[:count]


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _until(step: float, lines: list[bytes]) -> list[bytes]:
    return [line for line in lines if (at := _step(line)) is not None and at <= step]


def _step(line: bytes) -> float | None:
    """The step of one line of metrics.jsonl, or None if it is not a whole record."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None

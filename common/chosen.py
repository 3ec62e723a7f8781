"""Which of a run's checkpoints is meant: the last, the best that was measured, or that of an epoch."""

import contextlib
import json
from pathlib import Path
from typing import Any, Literal

from common.checkpoint import Folder
from common.config import ConfigError

Epoch = int | Literal["last", "best"]


def choose(path: Path, epoch: Epoch) -> tuple[Path, str]:
    """The checkpoint's file, and the words for how it was chosen: "last", "best of 5 by ...", "epoch 10", "this file".

    ``path``: a run's folder, or a file, which leaves no choice. Raises ConfigError where there is none, and
    DamagedCheckpoint where none loads.
    """
    if path.is_file():
        if epoch != "last":
            raise ConfigError(f"{path}: --epoch {epoch} chooses among the checkpoints of a run's folder; this is one "
                              "file. Give the folder.")
        return path, "this file"
    files = Folder(path / "checkpoints").files() if path.is_dir() else []
    if not files:
        raise ConfigError(f"{path}: no run with a checkpoint. Give a run's folder, such as runs/demo, or a checkpoint "
                          "in it.")
    if epoch == "last":
        newest = Folder(path / "checkpoints").newest()
        assert newest
        return dict(files)[newest[0]], "last"
    if epoch == "best":
        return _best(path, dict(files))
    return _of_epoch(path, dict(files), epoch)


def _records(path: Path) -> list[dict[str, Any]]:
    """What the run wrote down, but for a line that a kill cut off, wherever it did."""
    file, found = path / "metrics.jsonl", []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict) and {"kind", "step", "epoch"} <= record.keys()]


def _best(path: Path, files: dict[int, Path]) -> tuple[Path, str]:
    found = [record for record in _records(path) if record["kind"] == "eval" and record["step"] in files]
    if not found:
        raise ConfigError(f"{path}: --epoch best: none of its {len(files)} checkpoints was measured by the run. Give "
                          "--epoch last, or the number of an epoch.")
    same = [record for record in found if record["label"] == found[0]["label"]]
    best = max(same, key=lambda record: record["value"])
    return files[best["step"]], f"best of {len(same)} by {best['label']}"


def _of_epoch(path: Path, files: dict[int, Path], epoch: int) -> tuple[Path, str]:
    records = [record for record in _records(path) if record["epoch"] > 0]
    steps = records[0]["step"] / records[0]["epoch"] if records else 1
    known = {step / steps: file for step, file in files.items()}
    nearest = min(known, key=lambda found: abs(found - epoch))
    if abs(nearest - epoch) > 1e-6:
        raise ConfigError(f"{path}: --epoch {epoch}: no checkpoint of it. There are those of epochs "
                          f"{', '.join(f'{found:g}' for found in sorted(known))}; checkpoint.every keeps more.")
    return known[nearest], f"epoch {epoch}"

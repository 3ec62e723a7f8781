"""crash.json: what a failure of the program leaves in the run's folder, for whoever is to find the fault."""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.atomic import replace_file
from common.environment import commit, versions

NAME = "crash.json"
PACKAGES = ("common", "moco", "instdisc", "metric_learning", "tools")
_BEGAN = time.time()
_ROOT = Path(__file__).resolve().parents[1]


class Scene(NamedTuple):
    """What is known of the run that this process trains: its folder, config and last records (host numbers only)."""

    folder: Path | None = None
    config: str = ""
    records: Iterable[Mapping[str, Any]] = ()


scene = Scene()


def remember(folder: Path, config: str, records: Iterable[Mapping[str, Any]]) -> None:
    """From here on, a failure is one of this run. ``records`` is read when it comes to that."""
    global scene
    scene = Scene(folder, config, records)


def write(message: str, stacks: Mapping[int, str], **more: Any) -> str | None:
    """Write crash.json where it can be written - the run's folder, the current one, the one for temporary files.

    ``stacks``: of the main thread of each rank that could still tell. What another rank of this job has written stays,
    since it failed first. Returns the path; None if nothing can be written.
    """
    report = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "message": message, **more,
              "command": sys.argv, "versions": versions(), "commit": commit(), "config": scene.config,
              "records": list(scene.records), "stacks": {f"rank {rank}": text for rank, text in sorted(stacks.items())}}
    text = json.dumps(report, indent=2, default=str).encode() + b"\n"
    folders = [scene.folder] if scene.folder and scene.folder.is_dir() else []
    for folder in (*folders, Path(), Path(tempfile.gettempdir())):
        try:
            if not _of_this_job(folder / NAME):
                replace_file(folder / NAME, lambda file: file.write(text))
        except OSError:
            continue
        return str(folder / NAME)
    return None


def _of_this_job(path: Path) -> bool:
    return path.is_file() and path.stat().st_mtime > _BEGAN


def is_ours(error: BaseException) -> bool:
    """Whether it was raised in this project's own source."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(Path(frames[-1].filename).is_relative_to(_ROOT / name) for name in PACKAGES)


def place(error: BaseException) -> str:
    """file:line and function where it came up: the innermost of ours, if any."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_ROOT)]
    if not frames:
        return "nowhere"
    frame = (ours or frames)[-1]
    return f"{os.path.relpath(frame.filename, _ROOT) if ours else frame.filename}:{frame.lineno}, in {frame.name}"


def trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))

"""What a process holds of the machine, sampled over a long run, and whether that grows."""

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Held(NamedTuple):
    """By this process: memory in MB, and counts."""

    memory: float           # resident and its own: no file's pages, such as the libraries'
    files: int
    threads: int
    children: int
    shared: int             # mappings of, and files in, /dev/shm
    temporary: int          # files and folders in the folder for temporary files


def held() -> Held:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024
    children = sum(len(task.joinpath("children").read_text().split()) for task in Path("/proc/self/task").iterdir())
    mapped = sum("/dev/shm" in line for line in Path("/proc/self/maps").read_text().splitlines())
    ours = sum(str(os.getpid()) in path.name for path in Path("/dev/shm").iterdir())
    return Held(memory, len(os.listdir("/proc/self/fd")), int(status["Threads"]), children, mapped + ours,
                len(list(Path(tempfile.gettempdir()).rglob("*"))))


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares: the slope of y over x, and the half width of its interval of 95 %."""
    n, mean_x, mean_y = len(x), sum(x) / len(x), sum(y) / len(y)
    spread = sum((xi - mean_x) ** 2 for xi in x)
    b = sum((xi - mean_x) * (yi - mean_y) for xi, yi in zip(x, y, strict=True)) / spread
    left = sum((yi - mean_y - b * (xi - mean_x)) ** 2 for xi, yi in zip(x, y, strict=True))
    return b, 1.96 * math.sqrt(left / (n - 2) / spread)

"""All benchmarks, each in a process of its own, and a summary of the goals.

    python -m benchmarks                      those that need no GPU (make bench, which says how to give data)
    python -m benchmarks --device cuda        those for a GPU, in slices of under 9 minutes (make bench-gpu)
    python -m benchmarks loader views         some of them
    python -m benchmarks --list               the command of each, to run it alone
    python -m benchmarks --summary            the goals again, of what build/bench holds
    python -m benchmarks --tables             all of that as tables of Markdown

Figures go to build/bench/NAME.json as they come, so a slice that is stopped keeps what it has. A goal that is missed is
no error; the exit status is 1 where a benchmark fails or takes too long.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import FOLDER, WIDTH, Figure, number
from benchmarks.tables import markdown

LIMIT = 540.0           # seconds of a slice


class Slice(NamedTuple):
    """``benchmarks/NAME.py`` with ``options``; those in ``takes`` are handed on from this command where they are given.

    ``part`` tells two slices of one benchmark apart.
    """

    name: str
    takes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    part: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} {self.part}".strip()

    def file(self, folder: Path) -> Path:
        return folder / self.part / f"{self.name}.json"


SLICES = {
    "cpu": [
        Slice("noise"),
        Slice("loader", takes=("images",)),
        Slice("views", takes=("images",)),
        Slice("step"),
        Slice("losses"),
        Slice("crossover"),
        Slice("growth"),
        Slice("knn"),
        Slice("time_to_result", takes=("root",), options=("--points=4",)),      # each measures CIFAR-10 twice, 26 s
        Slice("save_stall"),
        Slice("metric_table", options=("--data=digits", "--configs=contrastive")),      # others take an hour: by hand
    ],
    "cuda": [
        Slice("views", takes=("images",)),
        Slice("step", options=("--only=resnet18",), part="resnet18"),
        Slice("step", options=("--only=resnet50",), part="resnet50"),
        Slice("losses"),
        Slice("crossover"),
        Slice("knn"),
        Slice("time_to_result", takes=("root",)),
        Slice("save_stall"),
    ],
}


def main() -> int:
    options = parse()
    folder = FOLDER / ("quick" if options.quick else "cuda" if options.device == "cuda" else "")
    slices = [s for s in SLICES[options.device] if not options.names or s.name in options.names]
    if options.list:
        print("\n".join(shlex.join(["python", *command(s, options, folder)]) for s in slices))
        return 0
    if options.summary:
        summary(slices, folder)
        return 0
    if options.tables:
        found = {s.label: figures_of(s, folder) for s in slices}
        print("\n\n".join(f"## {label}\n\n{markdown(figures)}" for label, figures in found.items() if figures))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: torch sees no CUDA device here. make bench runs those that need none.", file=sys.stderr)
        return 1
    failed = [s.label for s in slices if not run(s, options, folder)]
    summary(slices, folder)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({s.name for slices in SLICES.values() for s in slices})
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all, if none is given")
    parser.add_argument("--device", choices=SLICES, default="cpu")
    parser.add_argument("--images", default="", help="a folder of photos; without it, some are drawn")
    parser.add_argument("--root", default="", help="CIFAR-10, for the time to a result; without it, digits")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: do they run?")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"{', '.join(unknown)}: no such benchmark. There are {', '.join(names)}.")
    for name in ("images", "root"):             # now, not after the minutes of those that need none
        if (folder := getattr(options, name)) and not Path(folder).is_dir():
            parser.error(f"--{name}: there is no folder {folder}.")
    return options


def command(s: Slice, options: argparse.Namespace, folder: Path) -> list[str]:
    """What comes after ``python``."""
    given = [f"--{name}={getattr(options, name)}" for name in s.takes if getattr(options, name)]
    device = [f"--device={options.device}"] if options.device != "cpu" else []
    quick = ["--quick"] if options.quick else []
    return ["-m", f"benchmarks.{s.name}", *s.options, *given, *device, *quick, f"--out={s.file(folder).parent}"]


def run(s: Slice, options: argparse.Namespace, folder: Path) -> bool:
    """Whether the slice came to its end in time."""
    print("=" * WIDTH, flush=True)
    began = time.monotonic()
    try:
        done = subprocess.run([sys.executable, *command(s, options, folder)], timeout=LIMIT, check=False,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{s.label} is stopped after {LIMIT:.0f} s; what it had measured is kept.", file=sys.stderr)
        done = False
    print(f"\n{s.label}: {time.monotonic() - began:.0f} s", flush=True)
    return done


def summary(slices: list[Slice], folder: Path) -> None:
    """Print every goal of the figures that ``slices`` left in ``folder``, and how many are met."""
    found = [(s.label, f) for s in slices for f in figures_of(s, folder)]
    judged = [(label, f) for label, f in found if f.met is not None]
    print("=" * WIDTH)
    for label, f in judged:
        what = textwrap.shorten(f"{f.what}: {f.side}", 54, placeholder=" ...")
        print(f"{label:15} {what:54} {number(f.value):>6} {f.unit:3} {'met' if f.met else 'MISSED':6} {f.goal}")
    met = sum(bool(f.met) for _, f in judged)
    print(f"{len(judged)} goals: {met} met, {len(judged) - met} missed. {len(found)} figures in {folder}")


def figures_of(s: Slice, folder: Path) -> list[Figure]:
    """What the slice has left in ``folder``."""
    path = s.file(folder)
    return [Figure(**f) for f in json.loads(path.read_text())["figures"]] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())

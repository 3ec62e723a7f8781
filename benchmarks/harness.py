"""What every benchmark shares: sides taken in turn, ratios to a named baseline, memory, and the report.

The sides of a comparison run in one process, one thread, one after the other in every round, and a ratio is of the two
sides of the same round: so what else the machine does falls on both. Time is the CPU time of the process, all its
threads included; on a GPU it is wall-clock time with the device waited for. The process is not pinned to a core: on the
machine of docs/performance.md that changed neither a ratio nor its spread.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import textwrap
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata, util
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common.atomic import replace_file
from common.environment import commit, versions

ROUNDS = 9
FOLDER = Path("build/bench")
PEERS = ("lightly", "kornia", "triton")         # what a side may be built on, beside what a run needs
WIDTH = 100
Side = Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """One measured value: the median over ``n`` rounds, and the lowest and the highest.

    ``goal``: what it is to be, as text to read ("at least 4", "at most 40"); ``met`` whether it is.
    """

    what: str
    side: str
    value: float
    unit: str
    low: float
    high: float
    n: int
    baseline: str = ""
    goal: str = ""
    met: bool | None = None


@dataclass
class Report:
    """Figures of one benchmark, printed as they come and written to ``folder``/NAME.json after each.

    ``quick``: the figures come of sizes that say nothing, so none is held to its goal.
    """

    name: str
    quick: bool = False
    folder: Path = FOLDER
    figures: list[Figure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._machine = machine()
        print(heading(self.name, self._machine, self.quick), flush=True)

    def add(self, figure: Figure) -> None:
        """Keep a figure that stands alone, and print it."""
        self._title(figure.what)
        self._keep(figure)
        print(row(self.figures[-1]), flush=True)

    def _title(self, what: str) -> None:
        if not self.figures or self.figures[-1].what != what:
            print(f"\n{what}")

    def _keep(self, figure: Figure) -> None:
        self.figures.append(replace(figure, goal="", met=None) if self.quick else figure)
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {"benchmark": self.name, "quick": self.quick, **self._machine, "peak_rss_mb": _peak_rss(),
                 "figures": [asdict(f) for f in self.figures]}
        replace_file(self.folder / f"{self.name}.json", lambda file: file.write(json.dumps(found, indent=1).encode()))

    def compare(self, what: str, sides: Mapping[str, Side], *, rounds: int, at_least: Mapping[str, float] | None = None,
                per: float = 1.0, unit: str = "ms", device: str = "cpu") -> dict[str, list[float]]:
        """Seconds of each side and round. The first side is the baseline; each other is "x times" as fast as it.

        ``per``: what a call's time is divided by (images, steps). ``at_least``: goals for the ratios.
        """
        seconds = interleaved(sides, rounds, device)
        baseline = next(iter(sides))
        scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit] / per
        self._title(what)
        for side, values in seconds.items():
            self._keep(figure(what, side, [scale * value for value in values], unit))
            own = self.figures[-1]
            if side != baseline:
                ratios = [base / mine for base, mine in zip(seconds[baseline], values)]
                self._keep(figure(what, side, ratios, "x", baseline=baseline, at_least=(at_least or {}).get(side)))
            print(row(own, self.figures[-1] if side != baseline else None), flush=True)
        return seconds


def figure(what: str, side: str, values: list[float], unit: str, baseline: str = "", at_least: float | None = None,
           at_most: float | None = None) -> Figure:
    """The figure of some rounds' values."""
    value = median(values)
    goal, met = "", None
    if at_least is not None:
        goal, met = f"at least {at_least:g}", value >= at_least
    elif at_most is not None:
        goal, met = f"at most {at_most:g}", value <= at_most
    return Figure(what, side, value, unit, min(values), max(values), len(values), baseline, goal, met)


def interleaved(sides: Mapping[str, Side], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each side, by round; the order within a round turns. A first round, to warm up, does not count."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(-1, rounds):
        for name in names[number % len(names):] + names[:number % len(names)]:
            seconds = timed(sides[name], device)
            if number >= 0:
                found[name].append(seconds)
    return found


def timed(call: Side, device: str = "cpu") -> float:
    """Seconds of one call: CPU time of this process; on a GPU wall-clock time until the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    call()
    return time.process_time() - began


def peak_megabytes(call: Side, first: Side = lambda: None) -> float:
    """By how much ``call`` raises the memory of a process at its highest, in MB. It runs in a fork; Linux only.

    ``first`` runs there before: a small call of the same kind brings in the code of libraries, which is no memory of
    the call (20 MB for a loss and its gradient). Raises RuntimeError if one fails there; its traceback is printed.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            first()
            _give_back()
            Path("/proc/self/clear_refs").write_text("5")           # the highest so far is forgotten
            before = _status("VmRSS")
            call()
            os.write(write, f"{(_status('VmHWM') - before) / 1024}".encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)             # what the parent was about to do is not ours to do
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("the call whose memory is measured failed in its process")
    return float(text)


def machine() -> dict[str, object]:
    """Where and with what the figures are taken."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"date": time.strftime("%Y-%m-%d"), "cpu": _cpu(), "cores": os.cpu_count(), "gpu": device,
            "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "versions": versions() | _peers(),
            "commit": commit()}


def arguments(doc: str | None, quick: Mapping[str, object] | None = None, in_rounds: bool = True,
              **defaults: object) -> argparse.Namespace:
    """The options of a benchmark: ``--rounds``, ``--quick``, ``--out``, and one for each of ``defaults``, of its type.

    One that is not ``in_rounds`` has no ``--rounds``. A default of False makes a flag. ``--quick`` takes one round and
    the values of ``quick`` in place of the defaults: it shows that the benchmark runs, and measures nothing. One thread
    is set.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if in_rounds:
        parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="one round of tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder of the figures")
    for name, value in defaults.items():
        kind = {"action": "store_true"} if value is False else {"type": type(value), "default": value}
        parser.add_argument("--" + name.replace("_", "-"), **kind)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(rounds=1, **(quick or {}))
    torch.set_num_threads(1)
    options = parser.parse_args()
    if in_rounds and options.rounds < 1:
        parser.error(f"--rounds: {options.rounds}; give 1 or more.")
    if getattr(options, "picture", "") and not util.find_spec("matplotlib"):        # said before the minutes, not after
        parser.error("--picture: matplotlib, which draws it, is not installed: pip install -e '.[bench]'")
    return options


def heading(name: str, machine: Mapping[str, Any], quick: bool = False) -> str:
    """What is measured, and where, in lines of at most 100 columns."""
    note = ": QUICK, tiny sizes whose figures say nothing" if quick else ""
    packages = ", ".join(f"{package}\N{NO-BREAK SPACE}{version}" for package, version in machine["versions"].items())
    place = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    where = f"{place}{gpu}; load {machine['load']:.1f}; {machine['date']}. {packages}"
    return f"{name}{note}\n{textwrap.fill(where, WIDTH)}".replace("\N{NO-BREAK SPACE}", " ")


def row(own: Figure, ratio: Figure | None = None) -> str:
    """A side in 100 columns: median, lowest to highest, the same of the ratio, goal. A long name has its own line."""
    judged = ratio or own
    value = f"{number(own.value)}x {own.baseline}" if own.unit == "x" else f"{number(own.value)} {own.unit}"
    spread = f"({number(own.low)} to {number(own.high)})" if own.n > 1 else ""
    times = f"{number(ratio.value)}x ({number(ratio.low)} to {number(ratio.high)})" if ratio else ""
    goal = judged.goal.replace("at least", ">=").replace("at most", "<=")
    verdict = {True: f"met {goal}", False: f"MISSED {goal}", None: ""}[judged.met]
    name = f"  {own.side:32}" if len(own.side) <= 32 else f"  {own.side}\n{'':34}"
    return f"{name} {value:>11} {spread:18} {times:20} {verdict}".rstrip()


def number(value: float) -> str:
    """With three digits, and all of those before the point."""
    return f"{value:,.{3 if abs(value) < 0.1 else max(0, 3 - len(str(int(abs(value)))))}f}"


def _peers() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _give_back() -> None:
    """Memory that this process holds and does not use; a call that took it up again would seem to need none."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _status(key: str) -> int:
    """Of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""What every benchmark shares: sides taken in turn, ratios to a named baseline, memory, and the report.

The sides of a comparison run in one process, one thread, one after the other in every round, and a ratio is of the two
sides of the same round: so what else the machine does falls on both. Time is the CPU time of the process, all its
threads included; on a GPU it is wall-clock time with the device waited for.
"""

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch

from common.atomic import replace_file
from common.environment import commit, versions

ROUNDS = 9
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
    """Figures of one benchmark, printed as they come and written to ``build/bench/NAME.json`` after each."""

    name: str
    folder: Path = Path("build/bench")
    figures: list[Figure] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        print(_line(figure), flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"benchmark": self.name, **machine(), "figures": [asdict(f) for f in self.figures]}, indent=1)
        replace_file(self.folder / f"{self.name}.json", lambda file: file.write(text.encode()))

    def compare(self, what: str, sides: Mapping[str, Side], *, rounds: int, at_least: Mapping[str, float] | None = None,
                per: float = 1.0, unit: str = "ms", device: str = "cpu") -> dict[str, list[float]]:
        """Seconds of each side and round. The first side is the baseline; each other is "x times" as fast as it.

        ``per``: what a call's time is divided by (images, steps). ``at_least``: goals for the ratios.
        """
        seconds = interleaved(sides, rounds, device)
        baseline, *others = sides
        scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit] / per
        for side, values in seconds.items():
            self.add(figure(what, side, [scale * value for value in values], unit))
        for side in others:
            ratios = [base / own for base, own in zip(seconds[baseline], seconds[side])]
            self.add(figure(what, side, ratios, "x", baseline=baseline, at_least=(at_least or {}).get(side)))
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


def peak_megabytes(call: Side) -> float:
    """By how much ``call`` raises the memory of a process at its highest, in MB. It runs in a fork; Linux only."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        Path("/proc/self/clear_refs").write_text("5")           # the highest so far is forgotten
        before = _status("VmRSS")
        call()
        os.write(write, f"{(_status('VmHWM') - before) / 1024}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("the call whose memory is measured failed in its process")
    return float(text)


def machine() -> dict[str, object]:
    """Where and with what the figures were taken."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"date": time.strftime("%Y-%m-%d"), "cpu": _cpu(), "cores": os.cpu_count(), "gpu": device,
            "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "versions": versions(), "commit": commit(),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def arguments(doc: str | None, **defaults: object) -> argparse.Namespace:
    """The options of a benchmark: ``--rounds``, and one for each of ``defaults``, of its type. One thread is set."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    for name, value in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    torch.set_num_threads(1)
    return parser.parse_args()


def _line(f: Figure) -> str:
    against = f" as fast as {f.baseline}" if f.unit == "x" else ""
    goal = f"   goal: {f.goal}, {'met' if f.met else 'MISSED'}" if f.goal else ""
    return (f"{f.what:32} {f.side:32} {f.value:10.3f} {f.unit}{against}   ({f.low:.3f} to {f.high:.3f}, "
            f"n = {f.n}){goal}")


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

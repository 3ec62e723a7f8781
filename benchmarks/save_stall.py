"""How long saving holds up training: python -m benchmarks.save_stall --megabytes 200

Each round saves the same state twice: as ``Folder`` does, which returns when the file is on the disk, and as ``Saver``
does, which returns when the state is copied. Steps of a fixed size are timed with and without a save going on behind
them. Wall-clock time, for a disk is waited for.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness import Report, arguments, figure
from common.background import Background
from common.checkpoint import Folder
from common.saving import Saver

SIZE = 768              # of the matrices of a step


def main() -> None:
    options = arguments(__doc__, quick={"megabytes": 4}, megabytes=200, device="cpu")
    state = {f"layer{i}": torch.randn(250_000, device=options.device) for i in range(options.megabytes)}
    with tempfile.TemporaryDirectory() as place:
        found = measure(state, Path(place), options.rounds)
    report = Report("save_stall", options.quick, options.out)
    what = f"a save of {options.megabytes} MB, on {options.device}"
    for side, seconds in found.items():
        report.add(figure(what, side, [1e3 * value for value in seconds], "ms"))
    ratios = [at_once / copied for at_once, copied in zip(found["saved at once"], found["copied"])]
    report.add(figure("training is held up so much shorter", "copied", ratios, "x", baseline="saved at once"))


def measure(state: dict, place: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds, of each round."""
    before, now = Folder(place / "before"), Saver(place / "now", keep=2, disk=Background("disk"))
    x = torch.randn(SIZE, SIZE, device=state["layer0"].device)
    found: dict[str, list[float]] = {"saved at once": [], "copied": [], "written behind": [], "step": [],
                                     "step during a save": []}
    for number in range(rounds + 1):                    # the first one makes the memory for the copies
        seconds = {"saved at once": timed(partial(before.save, number, state))}
        seconds["step"] = median(timed(lambda: step(x)) for _ in range(10))
        began = time.perf_counter()
        seconds["copied"] = timed(partial(now.save, number, state))
        during = [timed(lambda: step(x))]
        while now.busy:
            during.append(timed(lambda: step(x)))
        seconds |= {"written behind": time.perf_counter() - began, "step during a save": sum(during) / len(during)}
        if (error := now.error()) is not None:
            raise error
        for name, value in seconds.items():
            found[name] += [value] * (number > 0)
    return found


def step(x: torch.Tensor) -> float:
    return float((x @ x).sum())


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

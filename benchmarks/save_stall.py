"""How long saving holds up training: python -m benchmarks.save_stall --megabytes 200 --rounds 9

Each round saves the same state twice: as ``Folder`` does, which returns when the file is on the disk, and as ``Saver``
does, which returns when the state is copied. Steps of a fixed size are timed with and without a save going on behind
them. Figures: the median over rounds, and the lowest and the highest.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from common.background import Background
from common.checkpoint import Folder
from common.saving import Saver

SIZE = 768              # of the matrices of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = {f"layer{i}": torch.randn(250_000, device=options.device) for i in range(options.megabytes)}
    with tempfile.TemporaryDirectory() as place:
        report(measure(state, Path(place), options.rounds), options)


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


def report(found: dict[str, list[float]], options: argparse.Namespace) -> None:
    print(f"{options.megabytes} MB on {options.device}, {options.rounds} rounds, torch {torch.__version__}")
    for name, values in found.items():
        print(f"{name:20} {1e3 * median(values):9.1f} ms  ({1e3 * min(values):.1f} to {1e3 * max(values):.1f})")
    ratios = [at_once / copied for at_once, copied in zip(found["saved at once"], found["copied"])]
    print(f"training is held up  {median(ratios):9.1f} times shorter  ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()

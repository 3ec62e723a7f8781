"""How the time and memory of a training step grow: python -m benchmarks.growth --full --picture FILE

With the queue, the bank, the batch and the processes, all else fixed: 32 images of 8 x 8 pixels, 128 features, and a
network so small that what grows can be seen. A step is forward, backward, optimizer and ``after_step``. A slope is that
of the last three sizes on logarithmic axes: 1 where cost is in proportion, 0 where it stays. Memory is what making the
method and two steps add to a process, measured in a fork. ``--full`` adds banks of 3 and of 10 million rows. Time is
CPU time; of several processes (gloo, on this machine) the sum of all, beside the wall-clock time.
"""

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import linear_regression, median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.harness import Report, Side, arguments, figure, peak_megabytes, timed
from benchmarks.picture import Line, Panel, Point, draw
from common.backbones import encoder
from common.dictionary import Bank, Queue
from common.encoder import Encoder
from common.method import Batch, Method
from common.train import _KEEP_BUFFERS
from instdisc import InstDisc
from moco import MoCo
from moco.key_batchnorm import KeyBatchNorm

DIM, SIDE, BATCH, NEGATIVES = 128, 8, 32, 4096
QUEUES = (4_096, 16_384, 65_536, 262_144, 1_048_576)
BANKS, LARGE_BANKS = (50_000, 200_000, 1_000_000), (3_000_000, 10_000_000)
BATCHES, PROCESSES = (8, 16, 32, 64, 128), (1, 2, 4)
LINEAR, FLAT = 1.15, 0.4        # slopes to stay below; not 0, since the rows of a large bank lie in no cache
PATIENCE = 120                  # seconds


class Growth(NamedTuple):
    """Milliseconds of a step and MB of a process, each beside the size."""

    ms: list[Point]
    mb: list[Point]


def main() -> None:
    options = arguments(__doc__, quick={"shrink": 1000}, shrink=1, full=False, picture="")
    report, rounds, shrink = Report("growth", options.quick, options.out), options.rounds, options.shrink
    last = 2 if options.quick else None
    queues = [size // shrink for size in QUEUES][:last]
    banks = [size // shrink for size in (*BANKS, *(LARGE_BANKS if options.full else ()))][:last]
    queue = grow(report, rounds, "queue, keys", queues, moco, LINEAR)
    exact = grow(report, rounds, "bank, full softmax, rows", banks, instdisc, LINEAR)
    nce = grow(report, rounds, f"bank, NCE with {NEGATIVES:,} negatives, rows", banks,
               lambda size: instdisc(size, NEGATIVES // shrink), FLAT)
    size = queues[len(queues) // 2]
    grow(report, rounds, f"batch, images, queue of {size:,}", BATCHES[:last], lambda batch: moco(size, batch), LINEAR)
    processes(report, size, PROCESSES[:last], rounds)
    if options.picture:
        picture(options.picture, queue, exact, nce)


def moco(size: int, batch: int = BATCH, groups: int = 1) -> Side:
    """``groups`` of BatchNorm; as many as there are processes, or more, need nothing of each other."""
    key_bn: KeyBatchNorm = "split" if groups > 1 else "sync"
    return stepper(MoCo(network(), Queue(size, DIM), key_bn=key_bn, bn_groups=groups), batch)


def instdisc(size: int, negatives: int | None = None) -> Side:
    return stepper(InstDisc(network(), Bank(size, DIM, negatives), loss="nce" if negatives else "full_softmax"), BATCH)


def network() -> Encoder:
    return encoder("w4s1", dim=DIM, channels=1, image_size=SIDE)


def stepper(method: Method, batch: int) -> Side:
    """A training step on ``batch`` images, of this process."""
    optimizer = torch.optim.SGD(method.encoder.parameters(), lr=0.01)
    model = nn.parallel.DistributedDataParallel(method, **_KEEP_BUFFERS) if dist.is_initialized() else method
    some = Batch([torch.randn(batch, 1, SIDE, SIDE) for _ in range(2)], torch.arange(batch), torch.zeros(batch))

    def step():
        output = model(some)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step([some], [output], 0.5)
    return step


def grow(report: Report, rounds: int, what: str, sizes: Sequence[int], make: Callable[[int], Side],
         at_most: float) -> Growth:
    """Time and memory at each size that this machine can hold, one after the other, and their slopes."""
    found = Growth([], [])
    for size in sizes:
        if (needed := 1.2e-6 * 4 * DIM * size) > (free := available()):
            print(f"  {size:,} left out: {needed:,.0f} MB are needed, {free:,.0f} MB are free")
            continue
        megabytes = peak_megabytes(partial(run, make, size), partial(run, make, sizes[0]))
        step = make(size)
        seconds = [timed(step) for _ in range(rounds + 1)][1:]
        report.add(figure(what, f"{size:,}: time of a step", [1e3 * value for value in seconds], "ms"))
        report.add(figure(what, f"{size:,}: memory", [megabytes], "MB"))
        found.ms.append((size, 1e3 * median(seconds)))
        found.mb.append((size, megabytes))
    if len(found.ms) > 1:
        report.add(figure(what, f"slope of time, to be {1 if at_most == LINEAR else 0}", [slope(found.ms)], "",
                          at_most=at_most))
    return found


def run(make: Callable[[int], Side], size: int) -> None:
    step = make(size)
    step()
    step()


def slope(points: Sequence[Point]) -> float:
    """Of the last three, on logarithmic axes."""
    return linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in points[-3:]), strict=True)).slope


def available() -> float:
    """MB of memory that this machine can give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e3


def processes(report: Report, size: int, counts: Sequence[int], rounds: int) -> None:
    """The same global batch on more processes."""
    what = f"processes, a batch of {4 * BATCH} in all, queue of {size:,}"
    for count in counts:
        cpu, wall = together(count, size, rounds)
        report.add(figure(what, f"{count}: CPU time of all", [1e3 * value for value in cpu], "ms"))
        report.add(figure(what, f"{count}: wall-clock time", [1e3 * value for value in wall], "ms"))


def together(count: int, size: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each step: CPU time summed over ``count`` processes, wall-clock time of the slowest."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        ranks = [context.Process(target=rank_main, args=(rank, count, meeting, size, rounds, answers))
                 for rank in range(count)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(PATIENCE)
            if rank.exitcode != 0:
                rank.kill()
                raise RuntimeError(f"one of {count} processes ended with {rank.exitcode}, or not at all")
    seconds = [answers.get() for _ in ranks]
    return ([sum(cpu for cpu, _ in step) for step in zip(*seconds, strict=True)],
            [max(wall for _, wall in step) for step in zip(*seconds, strict=True)])


def rank_main(rank: int, count: int, meeting: str, size: int, rounds: int, answers: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    step = moco(size, 4 * BATCH // count, max(PROCESSES))
    seconds = []
    for _ in range(2 + rounds):
        dist.barrier()
        began, began_cpu = time.perf_counter(), time.process_time()
        step()
        seconds.append((time.process_time() - began_cpu, time.perf_counter() - began))
    answers.put(seconds[2:])
    dist.destroy_process_group()


def picture(file: str, queue: Growth, exact: Growth, nce: Growth) -> None:
    rows = [(size, 4 * DIM * size / 2**20) for size, _ in (queue.mb[0], exact.mb[-1])]
    blue, red, grey, x = "#1f6fb4", "#c1272d", "#6b6b6b", "keys of the queue, rows of the bank"
    draw(file,
         Panel(x, "a step: ms of one core", [Line(queue.ms, "queue", blue, 1, (-34, 6)),
                                             Line(exact.ms, "bank, all rows", red, 1, (8, -14)),
                                             Line(nce.ms, "bank, NCE", grey, 2, (-26, -24))]),
         Panel(x, "memory: MB", [Line(rows, "512 bytes a row", grey, 1, (-110, -20), "-"),
                                 Line(queue.mb, "queue", blue, 2, (-40, 6), "o"),
                                 Line(exact.mb, "bank", red, 1, (8, -12), "o")]))


if __name__ == "__main__":
    main()

"""Work done ahead by other processes, its results handed over in order; a worker that dies or hangs is replaced."""

import atexit
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.data.transfer import page_locked
from common.data.worker import Task, Worker, shared
from common.printable import printable

AHEAD = 2                   # answers that each worker may have ready
LOSSES, WITHIN = 3, 100     # so many workers may be lost within so many answers
_TICK = 1.0                 # seconds between two looks at a worker that is waited for
_PATIENCE = 5.0             # seconds without an answer that are not worth a word


class Care(NamedTuple):
    """What is told of workers, and when one counts as hung.

    ``timeout``: seconds for which a worker that is waited for may do nothing, not begin to read another image.
    ``lost`` is called with what became of a worker when it is replaced, ``waiting`` about every second with how many
    seconds an answer has been waited for, and what the worker is at.
    """

    timeout: float = 300.0
    lost: Callable[[str], None] = logging.getLogger(__name__).warning
    waiting: Callable[[float, str], None] = lambda seconds, what: None


PLAIN_CARE = Care()


class LostWorker(ChildProcessError):
    """``image`` has cost two workers, or -1: too many were lost; ``how`` the last one ended."""

    def __init__(self, message: str, image: int, how: str):
        super().__init__(message)
        self.image, self.how = image, how


def in_order(task: Task, requests: Iterable[Any], workers: int, shape: tuple[int, ...], *,
             name: Callable[[int], str] = str, care: Care = PLAIN_CARE,
             locked: bool = False) -> Generator[tuple[Any, Tensor], None, None]:
    """``task(request, out, note)`` and ``out``, uint8 of ``shape``, for each request.

    It is called in ``workers`` processes, or in this one if there are none; is a function of the request; and calls
    ``note`` with the number of each image before it reads it: ``name`` says what to call that. ``out`` is overwritten
    after the next answer is asked for; ``locked``: it is page-locked for CUDA. Closing the generator ends the workers.
    A worker that dies or hangs is replaced, and the new one is asked the same, so the answers are the same.

    Raises ChildProcessError when a task fails (with its traceback); LostWorker when one request has cost two workers,
    and when more than ``LOSSES`` are lost within ``WITHIN`` answers (with the signal and the image).
    """
    if not workers:
        out = torch.empty(shape, dtype=torch.uint8)
        with page_locked(out) if locked else nullcontext():
            for request in requests:
                yield task(request, out, lambda image: None), out
    else:
        slots = shared(AHEAD * workers + 1, *shape)                 # one more: the answer that is being used
        with page_locked(slots) if locked else nullcontext(), _Workers(task, workers, slots, name, care) as processes:
            yield from processes.answers(requests)


class _Workers:
    """``count`` processes that take turns: request number i goes to worker i mod count, and its answer to slot i."""

    def __init__(self, task: Task, count: int, slots: Tensor, name: Callable[[int], str], care: Care):
        self._slots, self._name, self._care = slots, name, care
        self._lost: list[int] = []                                  # requests whose worker was lost, by number
        self._workers: list[Worker] = []
        atexit.register(self.close)         # before the hook of multiprocessing, which waits for children to end
        for _ in range(count):
            worker = Worker(task, self._slots)
            worker.start([other.pipe for other in self._workers])
            self._workers.append(worker)

    def answers(self, requests: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
        asked = answered = 0
        for request in requests:
            self._workers[asked % len(self._workers)].ask(asked % len(self._slots), request)
            asked += 1
            if asked - answered == len(self._slots):
                yield self._answer(answered)
                answered += 1
        for number in range(answered, asked):
            yield self._answer(number)

    def _answer(self, number: int) -> tuple[Any, Tensor]:
        worker = number % len(self._workers)
        while True:
            self._await(worker)
            try:
                answer, failure = self._workers[worker].receive()
                break
            except (EOFError, OSError):
                self._replace(worker, number)
        if failure:
            raise ChildProcessError(f"data worker {worker} failed:\n{failure}")
        return answer, self._slots[number % len(self._slots)]

    def _await(self, number: int) -> None:
        """Until the worker has answered, or is dead; killed it is if it does nothing for too long."""
        worker = self._workers[number]
        began = moved = time.monotonic()
        note = worker.note()
        while not worker.pipe.poll(_TICK):
            now = time.monotonic()
            if (latest := worker.note()) != note:
                note, moved = latest, now
            if now - moved > self._care.timeout:
                worker.kill(hung=now - moved)
                return
            if now - began > _PATIENCE:
                self._care.waiting(now - began, f"worker {number} {self._at(note[1], 'reads', 'gets ready')}")

    def _at(self, image: int, reads: str, otherwise: str) -> str:
        return otherwise if image < 0 else f"{reads} {printable(self._name(image))}"

    def _replace(self, number: int, request: int) -> None:
        """Start a dead worker again, unless that has not helped, or would go on for ever."""
        worker = self._workers[number]
        image = worker.note()[1]
        how = worker.end()
        at = self._at(image, ", reading", " between two images")
        what = f"data worker {number} of {len(self._workers)} (process {worker.process.pid}) {how}{at}"
        self._lost = [lost for lost in self._lost if lost > request - WITHIN]
        if request in self._lost or len(self._lost) == LOSSES:
            twice = request in self._lost
            raise LostWorker(f"{what}. {self._advice(how, twice)}", image if twice else -1, how)
        self._lost.append(request)
        self._care.lost(f"{what}; another takes its place")
        worker.start([other.pipe for other in self._workers if other is not worker])

    def _advice(self, how: str, twice: bool) -> str:
        often = "It is the second over the same images" if twice else \
            f"It is number {LOSSES + 1} within {WITHIN} batches"
        if "did nothing" in how:
            return f"{often}. If the disk is that slow, raise train.worker_timeout ({self._care.timeout:g} s)."
        if "SIGKILL" in how:
            return f"{often}. If nobody killed it, the machine has most likely run out of memory: use fewer workers " \
                "or a smaller batch."
        return f"{often}. If the image is at fault, put an empty file in its place: that is skipped, and named."

    def close(self) -> None:
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

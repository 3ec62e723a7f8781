"""Work done ahead in other processes, its results handed over in order.

Processes are forked, so nothing is copied or pickled to start them, and what they make is written straight into
memory that both sides see: an anonymous mapping, not /dev/shm, which containers keep small. A worker keeps one thread,
because a forked child that uses two OpenMP threads hangs when its parent has used them.

Workers hold nothing that must be put in order, so they are ended by SIGKILL. Signals that ask the run to stop
(Ctrl-C, and SIGTERM, which torchrun and Slurm send to every process) do not reach them: the main process decides when
it has had its last batch. When that process is gone, however it went, so are its workers.
"""

import atexit
import gc
import math
import mmap
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

Task = Callable[[Any, Tensor], Any]         # (request, memory to write to) -> the rest of the answer

AHEAD = 2                                   # answers that each worker may have ready
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}


def in_order(task: Task, requests: Iterable[Any], workers: int,
             shape: tuple[int, ...]) -> Generator[tuple[Any, Tensor], None, None]:
    """``task(request, out)`` and ``out``, uint8 of ``shape``, for each request: by ``workers`` processes, or here if 0.

    ``out`` is overwritten after the next answer is asked for. Closing the generator ends the workers. Raises
    ChildProcessError when a worker fails (with its traceback) or dies (with the signal).
    """
    if not workers:
        out = torch.empty(shape, dtype=torch.uint8)
        for request in requests:
            yield task(request, out), out
    else:
        with _Workers(task, workers, shape) as processes:
            yield from processes.answers(requests)


class _Workers:
    """``count`` processes that take turns: request number i goes to worker i mod count, and its answer to slot i."""

    def __init__(self, task: Task, count: int, shape: tuple[int, ...]):
        self._slots = shared(AHEAD * count + 1, *shape)             # one more: the answer that is being used
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        atexit.register(self.close)         # before the hook of multiprocessing, which waits for children to end
        handled = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            for _ in range(count):
                self._start(task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, handled)

    def _start(self, task: Task) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        self._pipes.append(ours)
        process = context.Process(target=_serve, args=(task, theirs, self._slots, list(self._pipes)), daemon=True)
        process.start()
        self._processes.append(process)
        theirs.close()

    def answers(self, requests: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
        asked = answered = 0
        for request in requests:
            self._ask(asked, request)
            asked += 1
            if asked - answered == len(self._slots):
                yield self._answer(answered)
                answered += 1
        for number in range(answered, asked):
            yield self._answer(number)

    def _ask(self, number: int, request: Any) -> None:
        try:
            self._pipes[number % len(self._pipes)].send((number % len(self._slots), request))
        except OSError:
            raise self._death(number % len(self._pipes)) from None

    def _answer(self, number: int) -> tuple[Any, Tensor]:
        worker = number % len(self._pipes)
        try:
            answer, failure = self._pipes[worker].recv()
        except (EOFError, OSError):
            raise self._death(worker) from None
        if failure:
            raise ChildProcessError(f"data worker {worker} failed:\n{failure}")
        return answer, self._slots[number % len(self._slots)]

    def _death(self, worker: int) -> ChildProcessError:
        process = self._processes[worker]
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ChildProcessError(
            f"data worker {worker} of {len(self._processes)} (process {process.pid}) {how}. If nobody killed it, the "
            "machine has most likely run out of memory: use fewer workers or a smaller batch."
        )

    def close(self) -> None:
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()


def shared(*shape: int) -> Tensor:
    """Zeros, uint8 of ``shape``, in memory that children forked later share."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)


def _serve(task: Task, pipe: Connection, slots: Tensor, ends_of_parent: list[Connection]) -> None:
    """A worker's life: answers until the main process is gone, which it sees once no child holds that end of a pipe."""
    for end in ends_of_parent:
        end.close()
    gc.freeze()                         # what the parent left is not ours to free: a CUDA tensor, a page it shares
    torch.set_num_threads(1)
    try:
        while True:
            slot, request = pipe.recv()
            pipe.send(_attempt(task, request, slots[slot]))
    except (EOFError, OSError):
        pass


def _attempt(task: Task, request: Any, out: Tensor) -> tuple[Any, str]:
    try:
        return task(request, out), ""
    except Exception:
        return None, traceback.format_exc()

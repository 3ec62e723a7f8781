"""One process that does work for another: how it starts, what it is at, how it ends.

It is forked, so nothing is copied or pickled to start it, and keeps one thread, because a forked child that uses two
OpenMP threads hangs when its parent has used them. Signals that ask the run to stop (Ctrl-C, and SIGTERM, which
torchrun and Slurm send to every process) do not reach it: the main process decides when it has had its last batch. When
that process is gone, however it went, so is the worker. It holds nothing that must be put in order: SIGKILL ends it.
"""

import gc
import math
import mmap
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

Note = Callable[[int], None]                # the number of the image that is about to be read
Task = Callable[[Any, Tensor, Note], Any]   # (request, memory to write to, note) -> the rest of the answer

_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
_PATIENCE = 10.0                            # seconds for a killed process to be gone: a disk may hold it back


class Worker:
    """Answers requests in their order, into ``slots``. ``open`` are those that it has not answered: (slot, request).

    A worker that has died is started again, and asked all that is open: the same request gets the same answer.
    """

    def __init__(self, task: Task, slots: Tensor):
        self.open: deque[tuple[int, Any]] = deque()
        self._task, self._slots = task, slots
        self._note_2 = shared(16).view(torch.int64)             # images begun, and the one that is being read, or -1
        self._hung = 0.0

    def start(self, pipes: Iterable[Connection] = ()) -> None:
        """Fork. ``pipes`` are the main process's ends to other workers, which the child must not hold open."""
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self._note_2[1], self._hung = -1, 0.0
        handled = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self.process = context.Process(target=_serve, daemon=True, args=(
                self._task, theirs, self._slots, self._note_2, [self.pipe, *pipes]))
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, handled)
        theirs.close()
        for asked in self.open:
            self._send(asked)

    def ask(self, slot: int, request: Any) -> None:
        self.open.append((slot, request))
        self._send((slot, request))

    def _send(self, asked: tuple[int, Any]) -> None:
        with suppress(OSError):             # it is dead: seen when its answer does not come, and asked again
            self.pipe.send(asked)

    def receive(self) -> tuple[Any, str]:
        """The next answer, and the traceback if there is none. Raises EOFError or OSError once the process is dead."""
        answer = self.pipe.recv()
        self.open.popleft()
        return answer

    def note(self) -> tuple[int, int]:
        """How many images it has begun to read, and the one that it is reading, or -1."""
        begun, image = self._note_2.tolist()
        return begun, image

    def kill(self, hung: float = 0.0) -> None:
        """End it; ``hung`` is for how many seconds it has done nothing, if that is why."""
        self._hung = hung
        self.process.kill()

    def end(self) -> str:
        """Wait until the process is gone; how it went."""
        self.pipe.close()
        self.process.join(_PATIENCE)
        code = self.process.exitcode
        if self._hung:
            return f"did nothing for {self._hung:.0f} s and was killed"
        if code is None:
            return "does not answer"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def shared(*shape: int) -> Tensor:
    """Zeros, uint8 of ``shape``, in memory that children forked later share.

    An anonymous mapping, not /dev/shm, which containers keep small.
    """
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)


def _serve(task: Task, pipe: Connection, slots: Tensor, note_2: Tensor, ends_of_parent: list[Connection]) -> None:
    """A worker's life: answers until the main process is gone, which it sees once no child holds that end of a pipe.

    Another thread of the main process may have held any lock when this one was forked; so nothing is printed or logged.
    """
    for end in ends_of_parent:
        end.close()
    gc.freeze()                         # what the parent left is not ours to free: a CUDA tensor, a page it shares
    torch.set_num_threads(1)

    def note(image: int) -> None:
        note_2[1] = image
        note_2[0] += 1

    with suppress(EOFError, OSError):
        while True:
            slot, request = pipe.recv()
            answer = _attempt(task, request, slots[slot], note)
            note_2[1] = -1
            pipe.send(answer)
    os._exit(0)                         # what the parent was about to print is not ours to print


def _attempt(task: Task, request: Any, out: Tensor, note: Note) -> tuple[Any, str]:
    try:
        return task(request, out, note), ""
    except Exception:
        return None, traceback.format_exc()

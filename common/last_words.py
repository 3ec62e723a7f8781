"""Who speaks when a job of several ranks fails: the first that failed, alone; the others show it their stacks."""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from torch.distributed import Store  # type: ignore[attr-defined]

STACKS = 3.0            # seconds for the others to show their stacks, and to hear what was said
WRITING = 60.0          # for a checkpoint that is being written
SPEAKING = 4.0          # to find the words: a launcher ends all when the first process ends, so none ends before


class LastWords:
    """Of this rank, by a ``store`` that all share. Without an answer from the store, every rank speaks for itself.

    The others hear of a failure within ``interval`` seconds. ``written`` waits so many seconds for what is being
    written, and says whether all is: no process ends before the main one has it on the disk.
    """

    def __init__(self, store: Store, rank: int, world: int, interval: float, written: Callable[[float], bool]):
        self.store, self.rank, self.world, self.written = store, rank, world, written
        self.patience = max(STACKS, 2 * interval)

    def first(self, code: int) -> bool:
        """Claim to have failed before all others, with this exit status; whether it is so."""
        claim = json.dumps({"rank": self.rank, "code": code, "thread": threading.get_ident()})
        try:
            return self.store.compare_set("failure", "", claim).decode() == claim
        except RuntimeError:
            return True

    def another(self) -> bool:
        """Whether another rank has failed. Raises RuntimeError if the store does not answer."""
        return self.store.check(["failure"]) and json.loads(self.store.get("failure"))["rank"] != self.rank

    def stacks(self) -> dict[int, str]:
        """Where the main threads of the other ranks are; of those that can still tell."""
        others: list[int] = [rank for rank in range(self.world) if rank != self.rank]
        with contextlib.suppress(RuntimeError):
            _until(lambda: self.store.check([f"stack{rank}" for rank in others]), self.patience)
            return {rank: self.store.get(f"stack{rank}").decode() for rank in others
                    if self.store.check([f"stack{rank}"])}
        return {}

    def tell(self, hosts: bool) -> None:
        """All is said, and written: the others may end. One that ``hosts`` the store stays until they have heard it."""
        with contextlib.suppress(RuntimeError):
            self._finish_writing()
            self._until_it_is_there("ready0", self.patience)
            self.store.set("told", "")
            others = [f"heard{rank}" for rank in range(self.world) if rank != self.rank]
            if hosts:
                _until(lambda: self.store.check(others), self.patience)

    def wait(self) -> int:
        """Show this rank's stack and wait until the one that failed first has spoken; its exit status."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"stack{self.rank}", main_stack())
        try:
            self._finish_writing()
            self._until_it_is_there("told", 2 * self.patience + SPEAKING)
            code = json.loads(self.store.get("failure"))["code"]
            self.store.set(f"heard{self.rank}", "")
            return code
        except RuntimeError:
            return 1

    def _finish_writing(self) -> None:
        with contextlib.suppress(RuntimeError):
            if not self.written(0):
                self.store.set("writing", "")
        self.written(WRITING)
        self.store.set(f"ready{self.rank}", "")

    def _until_it_is_there(self, key: str, seconds: float) -> None:
        """For longer if a rank has said that it is writing."""
        _until(lambda: self.store.check([key]), seconds)
        if self.store.check(["writing"]):
            _until(lambda: self.store.check([key]), WRITING)


def main_stack() -> str:
    """Where the main thread of this process is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame else ""


def say(text: str) -> None:
    """To standard error, if that takes it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def leave(code: int) -> None:
    """End this process at once, whatever its main thread waits for."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:                            # of no use where standard output is broken
        os._exit(code)


def _until(done: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.1)

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
PATIENCE = 8.0          # and for the one that speaks to have spoken: a launcher ends all when the first one ends


class LastWords:
    """Of this rank, by a ``store`` that all share. Without an answer from the store, every rank speaks for itself."""

    def __init__(self, store: Store, rank: int, world: int):
        self.store, self.rank, self.world = store, rank, world

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
            _until(lambda: self.store.check([f"stack{rank}" for rank in others]), STACKS)
            return {rank: self.store.get(f"stack{rank}").decode() for rank in others
                    if self.store.check([f"stack{rank}"])}
        return {}

    def tell(self, hosts: bool) -> None:
        """All is said: the others may end. A process that ``hosts`` the store stays until they have heard it."""
        with contextlib.suppress(RuntimeError):
            self.store.set("told", "")
            if hosts:
                _until(lambda: self.store.check([f"heard{rank}" for rank in range(self.world) if rank != self.rank]),
                       STACKS)

    def wait(self) -> int:
        """Show this rank's stack and wait until the one that failed first has spoken; its exit status."""
        try:
            self.store.set(f"stack{self.rank}", main_stack())
            _until(lambda: self.store.check(["told"]), PATIENCE)
            code = json.loads(self.store.get("failure"))["code"]
            self.store.set(f"heard{self.rank}", "")
            return code
        except RuntimeError:
            return 1


def main_stack() -> str:
    """Where the main thread of this process is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame else ""


def leave(code: int) -> None:
    """End this process at once, whatever its main thread waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _until(done: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.1)

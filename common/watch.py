"""Each rank's watch over the others: which of them died or hangs, and where it was.

The main thread marks where it is (``beat``: an assignment). A thread tells the others about once a second, by way of
the store where the processes met, and hears what they tell. A rank that gives no sign of life for ``train.timeout``
seconds, or stays that long at one place of a step while the others wait for it, ends the job: one rank says which it
is and leaves crash.json, and all end by themselves, since their main threads sit in a collective that never returns.
Waiting for data, saving and measuring are no hangs, however long they take.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.distributed import Store  # type: ignore[attr-defined]

from common import crash, distributed
from common.last_words import WRITING, LastWords, leave, main_stack, say
from common.signals import Stopped

INTERVAL = 1.0                          # seconds between two signs of life
STILL = 4.0                             # so long without one is death, where a connection has broken
FIRST = 4                               # a session's first step, which may compile, may take so many times as long
COMPILING = 21                          # and so may so many steps where it does: one that looks at the features, too
IN_STEP = ("forward", "backward")
OUT = "exit"                            # the phase of a rank that an exception took out of the training
BROKEN = re.compile(r"gloo|nccl|connection|peer|timed? ?out|broken pipe", re.IGNORECASE)


class Mark(NamedTuple):
    """Where a rank's main thread is: after ``step`` steps, in ``phase``, since ``at``; ``marks`` were made."""

    step: int
    phase: str
    marks: int
    at: float
    first: int | None                   # the step of the session's first forward pass


_mark = Mark(0, "start", 0, 0.0, None)
_watch: "Watch | None" = None
_number = 0                             # of the watches of this process: none hears what was said to an earlier one


def beat(step: int, phase: str) -> None:
    """The main thread is here: in a step ("forward", "backward"), or where it may take as long as it likes."""
    global _mark
    first = step if _mark.first is None and phase in IN_STEP else _mark.first
    _mark = Mark(step, phase, _mark.marks + 1, time.monotonic(), first)


def start(timeout: float, compiling: bool, written: Callable[[float], bool]) -> None:
    """Watch the others from now on; all ranks together. In a single process there is nobody to watch.

    ``written`` waits so many seconds for what is being written, and says whether all is: see LastWords.
    """
    global _mark, _number, _watch
    stop()
    _mark, _number = Mark(0, "start", 0, time.monotonic(), None), _number + 1
    if found := distributed.store(f"watch{_number}"):
        _watch = Watch(*found, timeout, COMPILING if compiling else 1, written)
        distributed.at_stop(stop)


def stop() -> None:
    """This rank is done, or watches anew."""
    global _watch
    watch, _watch = _watch, None
    if watch:
        watch.stop()


@contextlib.contextmanager
def until_the_end() -> Iterator[None]:
    """No watch longer than the training: what the process does then is its own affair.

    After an exception the others must still hear of it if this rank goes on alone, or ends by ``announce.failure``.
    """
    try:
        yield
    except Stopped:
        stop()
        raise
    except BaseException:
        beat(_mark.step, OUT)
        raise
    stop()


def current() -> "Watch | None":
    return _watch


class Watch:
    """Of this rank over the others, by ``store``; ``hosts``: the store ends with this process."""

    def __init__(self, store: Store, hosts: bool, timeout: float, first_steps: int, written: Callable[[float], bool]):
        self.store, self.hosts, self.timeout, self.first_steps = store, hosts, timeout, first_steps
        self.rank, self.world = distributed.rank(), distributed.world()
        self.heard: list[tuple[dict[str, Any], float]] = []      # of each rank: its last sign, and when it came
        self.interval, self.still = rhythm(self.world, timeout)
        self.words = LastWords(self.store, self.rank, self.world, self.interval, written)
        self.failing = False            # the process ends by announce.failure
        self._signs, self._down_since, self._stopping = 0, 0.0, threading.Event()
        self._looked = self._woke = time.monotonic()
        self._give_sign()
        distributed.barrier()           # every rank has given one
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more watching; the rank that holds the store waits a little until the others do not need it."""
        self._stopping.set()
        self._thread.join(2 * self.still)
        until = time.monotonic() + self.still
        try:
            self._give_sign(left=True)
            while self.hosts and time.monotonic() < until and not all(sign["left"] for sign, _ in self._hear()):
                time.sleep(0.05)
        except RuntimeError:
            pass                        # the store has ended before

    def gone(self, error: BaseException) -> str:
        """The ranks that are gone, by name, if that is why a collective raised ``error``; empty otherwise."""
        until = time.monotonic() + 2 * self.still
        while BROKEN.search(f"{type(error).__name__}: {error}") and time.monotonic() < until:
            if self._down_since and not self.hosts:
                return self._names([0])
            if silent := self._silent(self.still):
                return self._names(silent)
            if self.failed_elsewhere():
                break
            time.sleep(0.2)
        return ""

    def failed_elsewhere(self) -> bool:
        try:
            return self.words.another()
        except RuntimeError:
            return False

    def _run(self) -> None:
        while not self._stopping.wait(self.interval):
            try:
                self._look()
                self._down_since = 0.0
            except Exception as error:      # RuntimeError: the store does not answer; else a fault of the watch itself
                self._down_since = self._down_since or time.monotonic()
                if _mark.phase in ("end", OUT) or (self.heard and self.heard[0][0]["left"]):
                    return                                          # the main process is done, and so is this one
                if time.monotonic() - self._down_since > self.still and not self._stopping.is_set():
                    gone = isinstance(error, RuntimeError)
                    self._end(f"{self._names([0])} is gone" if gone else
                              f"the watch of rank {self.rank} over the others failed ({error!r})")

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked > self.interval + self.still:       # stopped, suspended or held up by a busy machine
            self._woke = now
        self._looked = now
        self._give_sign()
        self.heard = self._hear()
        out = _mark.phase == OUT
        if (self.failing or not out) and self.words.another():
            leave(self.words.wait())
        elif not (self.failing or out) and (verdict := self._verdict()):
            self._end(verdict)

    def _give_sign(self, left: bool = False) -> None:
        self._signs += 1
        mark = _mark
        self.store.set(f"sign{self.rank}", json.dumps({
            "sign": self._signs, "left": left, "step": mark.step, "phase": mark.phase, "first": self._is_first(mark),
            "place": [mark.marks, distributed.entered], "for": time.monotonic() - max(mark.at, self._woke),
            "host": socket.gethostname(), "process": os.getpid()}))

    def _is_first(self, mark: Mark) -> bool:
        return mark.first is not None and mark.step < mark.first + self.first_steps

    def _hear(self) -> list[tuple[dict[str, Any], float]]:
        signs = [json.loads(text) for text in self.store.multi_get([f"sign{rank}" for rank in range(self.world)])]
        now, before = time.monotonic(), self.heard or [({"sign": 0}, 0.0)] * self.world
        return [(sign, now if sign["sign"] != old["sign"] else at) for sign, (old, at) in zip(signs, before)]

    def _silent(self, seconds: float) -> list[int]:
        """No sign of life for so long, while this rank listened."""
        now = time.monotonic()
        return [rank for rank, (sign, at) in enumerate(self.heard)
                if now - max(at, self._woke) > seconds and not sign["left"]]

    def _verdict(self) -> str:
        """Who hangs: the silent ones, else those furthest behind, if they are too long in a step. Empty: nobody."""
        if silent := self._silent(self.timeout):
            return f"{self._names(silent)} gave no sign of life for {self.timeout:g} s"
        there = {rank: sign for rank, (sign, _) in enumerate(self.heard) if not sign["left"]}
        if out := [rank for rank, sign in there.items() if sign["phase"] == OUT]:
            late = [rank for rank in out if there[rank]["for"] > self.timeout + WRITING]
            return f"{self._names(late)} left the training by an exception; the others wait" if late else ""
        furthest = min((sign["place"] for sign in there.values()), default=None)
        behind = {rank: sign for rank, sign in there.items() if sign["place"] == furthest}
        limit = self.timeout * (FIRST if any(sign["first"] for sign in behind.values()) else 1)
        if not behind or any(sign["phase"] not in IN_STEP or sign["for"] < limit for sign in behind.values()):
            return ""
        others = "none is ahead of the others" if len(behind) == self.world else "the others wait"
        return f"{self._names(list(behind))} did not get on for {limit:g} s; {others}"

    def _names(self, ranks: list[int]) -> str:
        """``rank 1 (host, process 123; last heard of after step 17, in forward)``, and so on."""
        signs = [sign for sign, _ in self.heard] or [{}] * self.world
        return " and ".join(f"rank {rank} ({_described(signs[rank])})" for rank in ranks)

    def _end(self, verdict: str) -> None:
        """Say it, if no other rank does, and end, whatever fails on the way: the main thread cannot."""
        try:
            if not self.words.first(1):
                leave(self.words.wait())
            stacks = {**self.words.stacks(), self.rank: main_stack()}
            say(f"\n{said(verdict, crash.write(verdict, stacks, kind='hang'))}")
            self.words.tell(self.hosts)
        finally:
            leave(1)


def rhythm(world: int, timeout: float) -> tuple[float, float]:
    """The seconds between two signs of life: more with many ranks; and those without one that are death."""
    interval = min(max(INTERVAL, world / 64), timeout / 5)
    return interval, max(STILL, 3 * interval)


def _described(sign: dict[str, Any]) -> str:
    if not sign:
        return "never heard of"
    return (f"{sign['host']}, process {sign['process']}; last heard of after step {sign['step']:,}, "
            f"in {sign['phase']}")


def said(verdict: str, path: str | None) -> str:
    """One screen about ranks that are gone or hang."""
    more = f" {path} holds the stack of every rank that could still tell." if path else ""
    return (f"error: {verdict}. All processes end.{more} The last checkpoint is good: the same command goes on from "
            "it, as does a restart by torchrun (--max-restarts). If ranks are only slow, raise train.timeout.")

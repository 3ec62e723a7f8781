"""Asked to stop: SIGTERM, SIGINT and SIGUSR1 set a flag, which the loop reads between two steps."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from common.atomic import replace_file

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
PATIENCE = 2.0          # seconds: a launcher forwards a signal that the terminal has sent too
TRY_AGAIN = 75          # sysexits.h, EX_TEMPFAIL: what a script that puts jobs into the queue again tests for
MARKER = "PREEMPTED"    # torchrun turns every exit status into 1, so the run's folder says it as well


class Stopped(Exception):
    """The run was asked to stop, and has saved its state. ``code`` is the process's exit status.

    130 after Ctrl-C, as everywhere; 75 after SIGTERM and SIGUSR1, by which a scheduler takes the machine away.
    """

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.number, self.step = number, step
        self.code = 128 + number if number == signal.SIGINT else TRY_AGAIN

    def mark(self, folder: Path) -> None:
        """Leave word in the run's folder that the run wants to go on; not after a Ctrl-C."""
        said = {"step": self.step, "signal": signal.Signals(self.number).name,
                "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        if self.code == TRY_AGAIN:
            with contextlib.suppress(OSError):          # a full disk does not keep a saved run from ending
                replace_file(folder / MARKER, lambda file: file.write(json.dumps(said).encode() + b"\n"))


def ignore() -> None:
    """For a process that ends: a signal that comes again would only spoil its exit status."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def say_preempted(folder: Path | None = None) -> None:
    """Before there is a run to stop: SIGTERM and SIGUSR1 end the process with 75, and the marker in ``folder``."""
    def leave(number: int, frame: FrameType | None) -> None:
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
            Stopped(number, 0).mark(folder)
        os._exit(TRY_AGAIN)

    for number in SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, leave)


class StopRequest:
    """While it is entered, signals ask instead of kill. A second Ctrl-C, not at once, interrupts like always."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._saving = False
        self._nothing_to_save: Callable[[int], Stopped] | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Meanwhile no Ctrl-C interrupts, the second neither: it would cost what is being saved."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    @contextlib.contextmanager
    def at_once(self, stopped: Callable[[int], Stopped]) -> Iterator[None]:
        """Meanwhile there is nothing to save, and a signal does not wait for the next step: it raises what it gives."""
        self._nothing_to_save = stopped
        try:
            if self.number:                             # it came before
                raise stopped(self.number)
            yield
        finally:
            self._nothing_to_save = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again = bool(self.number) and number == signal.SIGINT and time.monotonic() - self._since > PATIENCE
        if again and self._saving:
            os.write(2, b"\nThe checkpoint is being saved; the run ends after it.\n")
        elif again:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if self._nothing_to_save:
                raise self._nothing_to_save(number)

"""Asked to stop: SIGTERM, SIGINT and SIGUSR1 set a flag, which the loop reads between two steps."""

import signal
import time
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
PATIENCE = 2.0          # seconds: a launcher forwards a signal that the terminal has sent too


class Stopped(Exception):
    """The run was asked to stop, and has saved its state. ``code`` is the process's exit status: 128 + signal."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.code = 128 + number


class StopRequest:
    """While it is entered, signals ask instead of kill. A second Ctrl-C, not at once, interrupts like always."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT and time.monotonic() - self._since > PATIENCE:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._since = number, time.monotonic()

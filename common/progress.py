"""The line that says how training goes: rewritten in place on a terminal, a plain line now and then in a log file."""

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

_NAMES = {"chance": "loss", "pos": "pos, neg", "d_pos": "d+, d-", "active": "active", "top1": "top1", "queue": "queue",
          "data_wait": "data wait"}
_LEGEND = {
    "chance": "compare it with chance, the loss of a network that learned nothing",
    "pos": "similarity of two views of one image, and of different images",
    "d_pos": "mean distance of images of one class, and of different classes",
    "active": "share of pairs or triplets that still have a loss",
    "top1": "how often the nearest other image is the right one, or of the class",
    "queue": "how much of the dictionary of earlier images is filled",
    "data_wait": "share of the time spent on getting the next views ready"}


FIRST_WORD = 10.0       # seconds of waiting before a log file gets a line of it


class Speed:
    """Images a second, and the share of the time spent waiting for data, since they were last read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._images, self._waited, self._since = 0, 0.0, clock()

    def add(self, images: int, waited: float) -> None:
        """One step is done, with so many images (of all ranks), after waiting so many seconds for them."""
        self._images += images
        self._waited += waited

    def pause(self, seconds: float) -> None:
        """So many seconds until now were spent on something else."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        """``images_per_second`` and ``data_wait`` (0 to 1) as values for ``Progress.show``; starts anew."""
        now = self._clock()
        seconds = max(now - self._since, 1e-9)
        speed = {"images_per_second": self._images / seconds, "data_wait": min(self._waited / seconds, 1.0)}
        self._images, self._waited, self._since = 0, 0.0, now
        return speed


class Progress:
    """The progress line of a run of ``steps`` steps, of which ``start`` are done. Main process only.

    On a terminal ``show`` rewrites the line, and leaves out what does not fit its width; elsewhere (``stream`` is a
    file or a pipe) it adds a line each ``every`` steps and at the last one. ``stream`` is standard output if not given.
    ``legend``: what values mean for a method, where it is not the usual (``Method.legend``).
    What it does not take is not shown: training goes on, and the records hold it all.
    """

    def __init__(self, steps: int, steps_per_epoch: int, *, start: int = 0, every: int = 50,
                 stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
                 legend: Mapping[str, str] | None = None):
        self._legend = {**_LEGEND, **(legend or {})}
        self.steps, self.steps_per_epoch, self.start, self.every = steps, steps_per_epoch, start, every
        self._stream, self._clock, self._since = stream or sys.stdout, clock, clock()
        self._in_place = self._stream is not None and self._stream.isatty()         # None where a launcher closed it
        self._explained = self._line_is_open = False
        self._next_word = FIRST_WORD

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show those of the values after ``step`` steps that it knows.

        They are loss, chance, pos, neg, d_pos, d_neg, lr, images_per_second, and, as fractions, active, top1, queue
        and data_wait.
        """
        self._next_word = FIRST_WORD
        if not self._in_place and step % self.every and step != self.steps:
            return
        if not self._explained:
            self._write("".join(f"{name:<11}{self._legend[key]}\n" for key, name in _NAMES.items() if key in values))
            self._explained = True
        fields = self._fields(step, values)
        if self._in_place:
            line = _fit(fields, shutil.get_terminal_size().columns - 1)
            self._write(f"\r{line}\x1b[K")          # erase what a longer line left
            self._line_is_open = True
        else:
            self._write(_fit(fields, sys.maxsize) + "\n")

    def waiting(self, seconds: float, what: str) -> None:
        """Nothing to show for so long, since ``what``: in place on a terminal, elsewhere after 10, 20, 40 ... s."""
        text = f"waiting for data for {duration(seconds)} ({what})"
        if self._in_place:
            self._write(f"\r{text[:shutil.get_terminal_size().columns - 1]}\x1b[K")
            self._line_is_open = True
        elif seconds >= self._next_word:
            self._write(f"{text}\n")
            self._next_word = 2 * seconds

    def note(self, text: str) -> None:
        """A line of its own, such as a result, that stays above the progress line."""
        self._write(f"\r\x1b[K{text}\n" if self._line_is_open else f"{text}\n")
        self._line_is_open = False

    def close(self) -> None:
        """Leave the last line standing; call it also when the run ends early."""
        if self._line_is_open:
            self._write("\n")
            self._line_is_open = False

    def _write(self, text: str) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):      # a full disk, a terminal that is gone, a closed file
                self._stream.write(text)
                self._stream.flush()

    def _fields(self, step: int, values: Mapping[str, float]) -> list[tuple[int, str]]:
        """(rank, text) in the order shown; where space is short, the highest rank goes first."""
        epoch, epochs = math.ceil(step / self.steps_per_epoch), math.ceil(self.steps / self.steps_per_epoch)
        chance = " (chance {chance:.3f})" if "chance" in values else ""
        texts = [(4, f"epoch {_of(epoch, epochs)}", ()),
                 (1, f"step {_of(step, self.steps)}", ()),
                 (2, "loss {loss:.3f}" + chance, ("loss",)),
                 (6, "pos {pos:.2f} neg {neg:.2f}", ("pos", "neg")),
                 (6, "d+ {d_pos:.2f} d- {d_neg:.2f}", ("d_pos", "d_neg")),
                 (10, "active {active:.0%}", ("active",)),
                 (6, "top1 {top1:.0%}", ("top1",)),
                 (9, "queue {queue:.0%}", ("queue",)),
                 (8, "lr {lr:.3g}", ("lr",)),
                 (5, "{images_per_second:,.0f} img/s", ("images_per_second",)),
                 (7, "data wait {data_wait:.0%}", ("data_wait",)),
                 (3, self._left(step), ())]
        return [(rank, text.format(**values)) for rank, text, keys in texts if all(key in values for key in keys)]

    def _left(self, step: int) -> str:
        """From the mean time of a step so far, with all that came between: evaluation, checkpoints."""
        if step == self.steps:
            return f"done in {duration(self._clock() - self._since)}"
        seconds = (self._clock() - self._since) / max(step - self.start, 1) * (self.steps - step)
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """For a person: "18 s", "5 min", "2 h 05 min", "3 d 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _of(count: int, total: int) -> str:
    """As wide for the first as for the last, so that what follows stays in its column."""
    return f"{count:{len(f'{total:,}')},}/{total:,}"


def _fit(fields: list[tuple[int, str]], width: int) -> str:
    """The fields in one line of at most ``width`` characters."""
    while len(line := "  ".join(text for _, text in fields)) > width and len(fields) > 1:
        fields = [field for field in fields if field != max(fields)]
    return line[:width]

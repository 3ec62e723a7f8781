"""How far something has come that takes more than a few seconds: a bar on a terminal, a line now and then in a file."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from common import distributed
from common.progress import duration

T = TypeVar("T")
Watch = Callable[[Iterable[T], int, str], Iterable[T]]      # items, how many, what is done with them

SILENCE, BETWEEN = 3.0, 10.0        # seconds before the first word, and between lines of a file


def silent(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """The items, without a word."""
    return items


def bar(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items one by one; meanwhile standard error says how many of ``total`` are done, and how long the rest takes.

    Main process only; the others are silent. Nothing is said of what takes less than a few seconds.
    """
    if not distributed.is_main() or sys.stderr is None:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, delay=SILENCE, leave=False, dynamic_ncols=True)
    else:
        yield from _lines(items, total, what)


def _lines(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    began, spoke = time.monotonic(), time.monotonic() + SILENCE - BETWEEN
    for done, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) - spoke >= BETWEEN and done < total:
            spoke, left = now, (now - began) / done * (total - done)
            print(f"{what}: {done:,} of {total:,}, {duration(left)} left", file=sys.stderr, flush=True)

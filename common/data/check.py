"""Every image of a set read once, as training would: what sizes they have, which cannot be read, and why."""

import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import Tensor

from common.data.datasets import Images
from common.data.images import UnreadableImage
from common.data.reading import Unreadable
from common.data.worker import Note
from common.data.workers import PLAIN_CARE, Care, LostWorker, in_order
from common.printable import printable

_TOGETHER = 16          # images of a request
_EXAMPLES = 3           # names of files with one reason
T = TypeVar("T")


class Found(NamedTuple):
    """An image by its number: its shape (c, H, W), or the reason why there is none."""

    number: int
    shape: tuple[int, ...]
    reason: str


@dataclass
class Summary:
    """What is known of a set so far."""

    read: int = 0
    channels: Counter[int] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)            # the shorter one, in pixels
    bad: list[Unreadable] = field(default_factory=list)

    def add(self, images: Images, found: Found) -> None:
        if found.reason:
            self.bad.append(Unreadable(found.number, images.path(found.number), found.reason))
        else:
            self.read += 1
            self.channels[found.shape[0]] += 1
            self.sides[min(found.shape[1:])] += 1

    def reasons(self) -> list[tuple[str, list[Unreadable]]]:
        """The bad ones by their reason, numbers in it aside; the most frequent first."""
        groups: dict[str, list[Unreadable]] = {}
        for image in self.bad:
            groups.setdefault(re.sub(r"\d[\d,.]*", "N", image.reason), []).append(image)
        return sorted(groups.items(), key=lambda group: -len(group[1]))


def check(images: Images, workers: int, care: Care = PLAIN_CARE) -> Generator[Found, None, None]:
    """Every image of ``images`` in its order. One that costs two workers their lives counts as unreadable."""
    yield from each(images, _Reading(images), range(len(images)), workers, care, _lost)


def each(images: Images, task: Callable[[Sequence[int], Tensor, Note], list[T]], wanted: Sequence[int], workers: int,
         care: Care, lost: Callable[[int, str], T]) -> Generator[T, None, None]:
    """What ``task`` makes of each image of ``wanted``, in order; ``lost`` of one that costs two workers their lives.

    ``task`` gives one answer for each image of a request.
    """
    done, deadly = 0, dict[int, str]()
    while done < len(wanted):
        parts = [wanted[i : i + _TOGETHER] for i in range(done, len(wanted), _TOGETHER)]
        requests = ([i for i in part if i not in deadly] for part in parts)
        try:
            with closing(in_order(task, requests, workers, (1,), name=images.path, care=care)) as answers:
                for part, (answer, _) in zip(parts, answers):
                    found = iter(answer)
                    yield from [lost(i, deadly[i]) if i in deadly else next(found) for i in part]
                    done += len(part)
        except LostWorker as error:
            if error.image < 0 or error.image in deadly:
                raise
            deadly[error.image] = f"its reader {error.how}, twice"


def _lost(number: int, reason: str) -> Found:
    return Found(number, (), reason)


@dataclass(frozen=True)
class _Reading:
    images: Images

    def __call__(self, wanted: Sequence[int], out: Tensor, note: Note) -> list[Found]:
        return [self._read(i, note) for i in wanted]

    def _read(self, i: int, note: Note) -> Found:
        note(i)
        try:
            return Found(i, tuple(self.images.read(i).shape), "")
        except UnreadableImage as error:
            return Found(i, (), str(error))


def report(images: Images, summary: Summary) -> str:
    """A few lines for a person."""
    lines = [f"{images.name}: {summary.read:,} of {len(images):,} images can be read"]
    if summary.read:
        lines += [f"  short side  {_sides(summary.sides)}", f"  channels    {_counts(summary.channels)}"]
    return "\n".join([*lines, *bad_table(summary)])


def bad_table(summary: Summary) -> list[str]:
    """A line for each reason, with how many images have it and the first of their names."""
    lines = [f"  {'count':>7}  reason"] if summary.bad else []
    for reason, group in summary.reasons():
        names = [f"{'':>11}{printable(image.path)}" for image in group[:_EXAMPLES]]
        more = [f"{'':>11}and {len(group) - _EXAMPLES:,} more"] if len(group) > _EXAMPLES else []
        lines += [f"  {len(group):>7,}  {reason}", *names, *more]
    return lines


def _counts(counter: Counter[int]) -> str:
    return ", ".join(f"{value} ({count:,})" for value, count in sorted(counter.items()))


def _sides(sides: Counter[int]) -> str:
    """Smallest, median and largest; and how many there are between powers of two."""
    ordered = sorted(sides.elements())
    ranges = Counter(side.bit_length() for side in ordered)
    shares = ", ".join(f"{2 ** (bits - 1)}..{2**bits - 1} ({count:,})" for bits, count in sorted(ranges.items()))
    return f"{ordered[0]} to {ordered[-1]} pixels, median {ordered[len(ordered) // 2]}: {shares}"

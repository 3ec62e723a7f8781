"""Accuracy against seconds: curves that are compared at equal times, and their picture."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np

COLOURS = ("#1f5fa8", "#c2571a")
CLOCKS = {"cpu": "CPU seconds of training", "wall": "wall-clock seconds of training"}


class Mark(NamedTuple):
    """After so many images: the seconds that training took, and what was measured then, in percent."""

    images: int
    cpu: float
    wall: float
    knn: float = float("nan")


def at(marks: Sequence[Mark], seconds: np.ndarray, clock: str) -> np.ndarray:
    """The best accuracy so far at each of ``seconds``, between marks in a straight line."""
    best = np.maximum.accumulate([mark.knn for mark in marks])
    return np.interp(seconds, [getattr(mark, clock) for mark in marks], best)


def smallest_lead(own: Sequence[Mark], other: Sequence[Mark], clock: str) -> float:
    """By how many points ``own`` is ahead where it is least so, while both train.

    From ``own``'s first mark after the start, where both have the same weights, to the earlier end of the two.
    """
    seconds = np.linspace(getattr(own[1], clock), min(getattr(own[-1], clock), getattr(other[-1], clock)), 1000)
    return float(np.min(at(own, seconds, clock) - at(other, seconds, clock)))


def seconds_to(marks: Sequence[Mark], accuracy: float, clock: str) -> float | None:
    """When a curve first reaches ``accuracy``; None if never."""
    seconds = np.linspace(getattr(marks[0], clock), getattr(marks[-1], clock), 10_000)
    reached = at(marks, seconds, clock) >= accuracy
    return float(seconds[reached.argmax()]) if reached.any() else None


def draw(curves: Mapping[str, Sequence[Mark]], what: str, path: Path) -> None:
    """Two panels, CPU seconds and wall-clock, each line named at its end; a PNG. Needs matplotlib."""
    plot = import_module("matplotlib.pyplot")
    picture, panels = plot.subplots(1, len(CLOCKS), figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, (clock, label) in zip(panels, CLOCKS.items()):
        for colour, (name, marks) in zip(COLOURS, curves.items()):
            seconds = [getattr(mark, clock) for mark in marks]
            panel.plot(seconds, [mark.knn for mark in marks], color=colour, marker="o", markersize=3)
            panel.annotate(name, (seconds[-1], marks[-1].knn), xytext=(6, 0), textcoords="offset points", color=colour,
                           va="center")
        panel.set_xlabel(label)
        panel.set_xlim(0, 1.15 * panel.get_xlim()[1])
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("kNN accuracy, %")
    images = next(iter(curves.values()))[-1].images
    picture.suptitle(f"{what}: {images:,} images seen by each side", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=150)
    plot.close(picture)


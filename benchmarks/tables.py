"""Figures as tables of Markdown: what docs/performance.md is written from (python -m benchmarks --tables)."""

from collections.abc import Iterable
from itertools import groupby

from benchmarks.harness import Figure, number

HEAD = "| side | measured | lowest to highest | n | times the baseline | goal |\n|---|---|---|---|---|---|"


def markdown(figures: Iterable[Figure]) -> str:
    """A table for each comparison; the ratio of a side stands in the row of its time."""
    return "\n\n".join(f"**{what}**\n\n{HEAD}\n{_rows(list(group))}"
                       for what, group in groupby(figures, key=lambda f: f.what))


def _rows(figures: list[Figure]) -> str:
    ratios = {f.side: f for f in figures if f.unit == "x"}
    own = [f for f in figures if f.unit != "x"]
    alone = [f for f in ratios.values() if f.side not in {f.side for f in own}]
    return "\n".join([*(_row(f, ratios.get(f.side)) for f in own), *(_row(None, f) for f in alone)])


def _row(own: Figure | None, ratio: Figure | None) -> str:
    judged = ratio or own
    assert judged is not None
    measured = [f"{number(own.value)} {own.unit}", _spread(own)] if own else ["", ""]
    times = f"{number(ratio.value)} ({_spread(ratio)})".replace(" ()", "") if ratio else ""
    goal = f"{judged.goal}: {'met' if judged.met else 'missed'}" if judged.goal else ""
    return f"| {judged.side} | {' | '.join(measured)} | {judged.n} | {times} | {goal} |"


def _spread(f: Figure) -> str:
    return f"{number(f.low)} to {number(f.high)}" if f.n > 1 else ""

"""Lines on logarithmic axes, each with its name beside it; 700 pixels wide. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Point = tuple[float, float]


class Line(NamedTuple):
    """The name stands beside the ``at``-th point, ``shift`` points of type to the right and up."""

    points: Sequence[Point]
    name: str
    colour: str
    at: int = 0
    shift: Point = (0, 8)
    style: str = "o-"


class Panel(NamedTuple):
    """``marks``: points with their first coordinate written beside them."""

    x: str
    y: str
    lines: Sequence[Line]
    marks: Sequence[Point] = ()


def draw(file: str, *panels: Panel) -> None:
    """The panels side by side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(1, len(panels), figsize=(7, 3.9), layout="constrained", squeeze=False)
    for place, panel in zip(axes[0], panels, strict=True):
        _fill(place, panel)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(file, dpi=100)


def _fill(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for line in panel.lines:
        axes.loglog(*zip(*line.points, strict=True), line.style, color=line.colour, markersize=3.5, linewidth=1.8)
        at = line.points[min(line.at, len(line.points) - 1)]
        axes.annotate(line.name, at, line.shift, textcoords="offset points", color=line.colour, fontsize=9)
    for at in panel.marks:
        axes.plot(*at, "o", markersize=11, markerfacecolor="none", markeredgecolor="black", zorder=5)
        axes.annotate(f"n = {float(f'{at[0]:.2g}'):,.0f}", at, (10, -14), textcoords="offset points", fontsize=9)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def short(value: float) -> str:
    """1000000 is 1M, 20000 is 20k."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,g}"

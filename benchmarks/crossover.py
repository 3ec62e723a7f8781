"""At which n the exact softmax costs more than its approximations: python -m benchmarks.crossover --picture FILE

256 queries of 128 features against a bank of n rows, with the gradient and the update of the bank. The exact softmax
goes through all rows, so its time grows with n; NCE takes 4,096 rows, whatever n is: own ones for each query, by the
authors' operations or through one buffer, or one set that all queries share. Between two sizes the lines are straight
on logarithmic axes; where two of them meet is the figure. Three rounds for each nine of ``--rounds``.
``--device cuda``: on a GPU.
"""

import math
from collections.abc import Sequence
from statistics import median

from benchmarks.harness import Report, arguments, figure
from benchmarks.losses import instdisc_sides
from benchmarks.picture import Line, Panel, draw

EXACT = "full softmax, one pass"
NAMES = {           # of a side: its words in the picture, colour, and where they stand
    "official NCE": ("NCE by the authors' operations", "#6b6b6b", 0, (0, 12)),
    "NCE, one buffer": ("NCE here, own negatives", "#1f6fb4", 0, (0, 26)),
    "NCE, shared negatives": ("NCE here, negatives shared by the batch", "#2e8b57", 3, (0, -17)),
    EXACT: ("exact softmax over all n rows", "#c1272d", -1, (-182, -4))}
SIZES = (4_000, 8_000, 16_000, 32_000, 64_000, 128_000, 256_000, 512_000, 1_281_167)


def main() -> None:
    options = arguments(__doc__, quick={"batch": 4, "negatives": 16, "largest": 8_000}, batch=256, negatives=4096,
                        largest=SIZES[-1], device="cpu", picture="")
    report = Report("crossover", options.quick, options.out)
    sizes = [size for size in SIZES if size <= options.largest]
    times: dict[str, list[float]] = {side: [] for side in NAMES}
    for size in sizes:
        sides = instdisc_sides(options.batch, size, options.negatives, 0.1, options.device)
        found = report.compare(f"n = {size:,}", {side: sides[side] for side in NAMES},
                               rounds=math.ceil(options.rounds / 3), device=options.device)
        for side, seconds in found.items():
            times[side].append(1e3 * median(seconds))
    meet = {side: crossing(sizes, times[EXACT], times[side]) for side in NAMES if side != EXACT}
    for side, at in meet.items():
        if at is not None:
            report.add(figure("the exact softmax is cheaper up to n", side, [at[0]], "rows"))
    if options.picture:
        lines = [Line(list(zip(sizes, times[side], strict=True)), *NAMES[side]) for side in NAMES]
        clock = "ms of one core" if options.device == "cpu" else "ms"
        draw(options.picture, Panel("n, rows of the bank", f"loss, gradient, update: {clock}", lines,
                                    [at for at in meet.values() if at is not None]))


def crossing(sizes: Sequence[int], own: Sequence[float], other: Sequence[float]) -> tuple[float, float] | None:
    """Size and time at which ``own`` overtakes ``other``; None if it does not between the first and the last size."""
    gap = [math.log(mine / their) for mine, their in zip(own, other, strict=True)]
    for i in range(1, len(sizes)):
        if gap[i - 1] < 0 <= gap[i]:
            share = gap[i - 1] / (gap[i - 1] - gap[i])
            return sizes[i - 1] * (sizes[i] / sizes[i - 1]) ** share, own[i - 1] * (own[i] / own[i - 1]) ** share
    return None


if __name__ == "__main__":
    main()

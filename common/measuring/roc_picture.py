"""The curve of verification, and how the scores of both kinds of pairs lie: a picture.

Axes: P pairs, T thresholds, N bins.
"""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.atomic import replace_file
from common.data.show import INK
from common.evaluate.verification import Roc
from common.measuring.panel import BELOW, LEFT, TOP, WHITE, Panel

SIDE, GAP = 420, 48                     # pixels
GREY = (120, 120, 120)
SAME, DIFFERENT = (0, 100, 160), (208, 60, 20)
BINS = 60


def draw(path: Path, curve: Roc, score_P: Tensor, same_P: Tensor, threshold: float) -> None:
    """Write TAR over FAR, FAR on a logarithmic axis, beside the shares of scores. Raises OSError where it cannot."""
    sheet = Image.new("RGB", (2 * (LEFT + SIDE) + GAP, TOP + SIDE + BELOW), WHITE)
    pen = ImageDraw.Draw(sheet)
    _curve(Panel(pen, LEFT, SIDE), curve)
    _scores(Panel(pen, 2 * LEFT + SIDE + GAP // 2, SIDE), score_P, same_P, threshold)
    replace_file(path, lambda file: sheet.save(file, format="PNG"))


def _curve(panel: Panel, curve: Roc) -> None:
    """From the smallest rate that can occur on; what lies below it stands at the left edge."""
    lowest = curve.far_T[curve.far_T > 0].min().item()
    decades = max(1, math.ceil(-math.log10(lowest)))
    panel.frame("same pairs accepted (TAR)", "different pairs accepted (FAR)",
                {1 - k / decades: f"{10.0**-k:g}" for k in range(decades + 1)},
                {y / 5: f"{y / 5:g}" for y in range(6)})
    chance = [(x / BINS, 10.0 ** (decades * (x / BINS - 1))) for x in range(BINS + 1)]     # TAR = FAR
    panel.pen.line([panel.at(*point) for point in chance], GREY)
    panel.pen.text((panel.left + 300, TOP // 2), "grey: by chance", GREY, ImageFont.load_default(14), anchor="lm")
    x_T = 1 + curve.far_T.clamp(min=10.0**-decades).log10() / decades
    x, y = x_T.tolist(), curve.tar_T.tolist()
    steps = [panel.at(x[i], y[j]) for i in range(len(x)) for j in (max(0, i - 1), i)]      # rates are of whole pairs
    panel.pen.line(steps, SAME, 2)


def _scores(panel: Panel, score_P: Tensor, same_P: Tensor, threshold: float) -> None:
    low, high = score_P.min().item(), score_P.max().item()
    width = high - low or 1.0
    share_2N = torch.stack([torch.histc(score_P[kind_P].double(), BINS, low, low + width) / kind_P.sum()
                            for kind_P in (same_P, ~same_P)])
    panel.frame("share of pairs by score:", "score", round_ticks(low, low + width),
                round_ticks(0, share_2N.max().item()))
    font = ImageFont.load_default(14)
    for share_N, colour, name, x in zip(share_2N / share_2N.max(), (SAME, DIFFERENT), ("same", "different"), (168, 214),
                                        strict=True):
        steps = [panel.at(n / BINS, share) for i, share in enumerate(share_N.tolist()) for n in (i, i + 1)]
        panel.pen.line(steps, colour, 2)
        panel.pen.text((panel.left + x, TOP // 2), name, colour, font, anchor="lm")
    place = min(1.0, max(0.0, (threshold - low) / width))
    panel.pen.line([panel.at(place, 0), panel.at(place, 1)], INK)
    panel.pen.text((panel.left + 290, TOP // 2), f"| threshold {threshold:.3g}", INK, font, anchor="lm")


def round_ticks(low: float, high: float) -> dict[float, str]:
    """Places, as shares of the way from ``low`` to ``high``, of the multiples of 1, 2 or 5 times a power of ten: three
    to seven of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / 2.5))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 6)
    first, last = math.ceil(low / step), math.floor(high / step)
    return {(n * step - low) / (high - low): f"{n * step:.6g}" for n in range(first, last + 1)}

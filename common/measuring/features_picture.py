"""Features of two dimensions in a plane, coloured by class: a panel for each run, the classes named below.

Axes: m images, C classes.
"""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.atomic import replace_file
from common.data.datasets import spread
from common.data.show import INK
from common.measuring.panel import BELOW, LEFT, TOP, WHITE, Panel

SIDE, COLUMNS, RIGHT, LINE = 260, 3, 20, 22             # pixels; panels in a row, at most
FINE = 4                # points are drawn so many times larger, and made smaller: round, where pixels are square
POINT, MEAN = 1.5, 4    # radius in pixels
COLOURS = [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75),
           (227, 119, 194), (90, 90, 90), (188, 189, 34), (23, 190, 207)]


class Cloud(NamedTuple):
    """The features of m images, [m, 2], and what stands above and below them."""

    x_mD: Tensor
    label_m: Tensor
    classes: list[str]
    title: str
    below: str


def draw(path: Path, clouds: Sequence[Cloud], num_images: int) -> None:
    """Write the picture; of each cloud ``num_images`` points, evenly spread, and each class's mean, of all.

    Each panel has its own scale, the same on both axes. Raises OSError where ``path`` cannot be written.
    """
    rows, step = math.ceil(len(clouds) / COLUMNS), (LEFT + SIDE + RIGHT, TOP + SIDE + BELOW)
    columns = math.ceil(len(clouds) / rows)
    height, width = rows * step[1], columns * step[0]
    names = {label: clouds[0].classes[label] for cloud in clouds for label in cloud.label_m.unique().tolist()}
    per_line = max(1, (width - LEFT) // (max(_length(name) for name in names.values()) + 30))
    sheet = Image.new("RGB", (width, height + math.ceil(len(names) / per_line) * LINE + LINE // 2), WHITE)
    for i, cloud in enumerate(clouds):
        row, column = divmod(i, columns)
        _panel(sheet, Panel(ImageDraw.Draw(sheet), column * step[0] + LEFT, SIDE, row * step[1] + TOP), cloud,
               num_images)
    _legend(ImageDraw.Draw(sheet), height, dict(sorted(names.items())), per_line, (width - LEFT) // per_line)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = sheet.quantize(128, dither=Image.Dither.NONE)
    replace_file(path, lambda file: small.save(file, format="PNG", optimize=True))


def _panel(sheet: Image.Image, panel: Panel, cloud: Cloud, num_images: int) -> None:
    middle, reach = _bounds(cloud.x_mD)
    ticks_x, ticks_y = (_ticks(float(value), reach) for value in middle)
    panel.frame(cloud.title, cloud.below, ticks_x, ticks_y)
    place_mD = (cloud.x_mD - middle) / (2 * reach) + 0.5
    points = Image.new("RGBA", (FINE * SIDE, FINE * SIDE), (*WHITE, 0))
    pen = ImageDraw.Draw(points)
    for i in spread(len(place_mD), num_images):
        _dot(pen, place_mD[i], POINT, colour(int(cloud.label_m[i])))
    for label in cloud.label_m.unique().tolist():
        _dot(pen, place_mD[cloud.label_m == label].mean(dim=0), MEAN, WHITE, outline=INK)
    points = points.resize((SIDE, SIDE), Image.Resampling.BOX)
    sheet.paste(points, (panel.left, panel.top), points)


def _dot(pen: ImageDraw.ImageDraw, place_D: Tensor, radius: float, fill: tuple, outline: tuple | None = None) -> None:
    x, y = FINE * SIDE * float(place_D[0]), FINE * SIDE * (1 - float(place_D[1]))
    pen.ellipse((x - FINE * radius, y - FINE * radius, x + FINE * radius, y + FINE * radius), fill, outline, FINE)


def _bounds(x_mD: Tensor) -> tuple[Tensor, float]:
    """The middle of all points, and how far they reach from it along either axis, with a margin."""
    low_D, high_D = x_mD.amin(dim=0), x_mD.amax(dim=0)
    return (low_D + high_D) / 2, 1.05 * float((high_D - low_D).amax()) / 2 or 1.0


def _ticks(middle: float, reach: float) -> dict[float, str]:
    """Round numbers from ``middle`` - ``reach`` to ``middle`` + ``reach``, by their places from 0 to 1."""
    digit = 10.0 ** math.floor(math.log10(reach))
    step = next(digit * factor for factor in (0.5, 1, 2, 5) if 2 * reach / (digit * factor) <= 5)
    first, last = math.ceil((middle - reach) / step), math.floor((middle + reach) / step)
    return {(k * step - middle) / (2 * reach) + 0.5: f"{k * step:g}" for k in range(first, last + 1)}


def _legend(pen: ImageDraw.ImageDraw, top: int, names: dict[int, str], per_line: int, width: int) -> None:
    font = ImageFont.load_default(13)
    for i, (label, name) in enumerate(names.items()):
        x, y = LEFT + i % per_line * width, top + i // per_line * LINE + LINE // 2
        pen.ellipse((x, y - 5, x + 10, y + 5), colour(label))
        pen.text((x + 16, y), name, INK, font, anchor="lm")


def _length(name: str) -> int:
    return math.ceil(ImageFont.load_default(13).getlength(name))


def colour(label: int) -> tuple[int, int, int]:
    """Of a class: the first ten are told apart best."""
    if label < len(COLOURS):
        return COLOURS[label]
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618 % 1, 0.8, 0.75)
    return int(255 * red), int(255 * green), int(255 * blue)

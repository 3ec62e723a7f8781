"""A square with axes, in a picture."""

from typing import NamedTuple

from PIL import ImageDraw, ImageFont

from common.data.show import INK

LEFT, TOP, BELOW = 64, 40, 52           # pixels around the square: what stands beside it needs so much
WHITE, GRID = (255, 255, 255), (221, 221, 221)


class Panel(NamedTuple):
    """``side`` pixels wide and high; coordinates inside run from 0 to 1, to the right and up."""

    pen: ImageDraw.ImageDraw
    left: int
    side: int
    top: int = TOP

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.left + x * self.side, self.top + (1 - y) * self.side

    def frame(self, title: str, below: str, ticks_x: dict[float, str], ticks_y: dict[float, str]) -> None:
        font = ImageFont.load_default(13)
        for x, name in ticks_x.items():
            self.pen.line([self.at(x, 0), self.at(x, 1)], GRID)
            self.pen.text((self.at(x, 0)[0], self.at(x, 0)[1] + 12), name, INK, font, anchor="mm")
        for y, name in ticks_y.items():
            self.pen.line([self.at(0, y), self.at(1, y)], GRID)
            self.pen.text((self.left - 8, self.at(0, y)[1]), name, INK, font, anchor="rm")
        self.pen.rectangle((*self.at(0, 1), *self.at(1, 0)), outline=INK)
        self.pen.text((self.left, self.top - TOP // 2), title, INK, ImageFont.load_default(14), anchor="lm")
        self.pen.text((self.left + self.side // 2, self.at(0, 0)[1] + 36), below, INK, font, anchor="mm")

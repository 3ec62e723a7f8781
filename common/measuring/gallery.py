"""A picture of queries beside what is nearest to them, right and wrong framed.

Axes: m queries in all, k neighbours; c channels, H W pixels.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.atomic import replace_file
from common.data.datasets import Images, spread
from common.data.images import UnreadableImage
from common.data.show import INK, PAPER, tile
from common.evaluate.retrieval import Query, nearest
from common.printable import printable

NEIGHBOURS, ANY, WRONG = 8, 6, 4        # of a query; queries of any kind, and of those whose nearest is wrong
SIDE, FRAME, GAP, CAPTION, TITLE = 112, 6, 8, 20, 34        # pixels
COLOUR = {True: (0, 145, 95), False: (208, 60, 20)}         # a green and a red that differ in brightness, too


class Shown(NamedTuple):
    """A query's image, and its neighbours' with the similarity of each: numbers into their sets."""

    query: int
    neighbours: list[tuple[int, float]]


def draw(query: Query, queries: Images, gallery: Images, path: Path) -> None:
    """Write a picture of some queries with their ``NEIGHBOURS`` nearest images, class and similarity below each.

    First queries evenly spread over all, then some of those whose nearest image is of another class. Raises OSError
    where ``path`` cannot be written.
    """
    nearest_m = nearest(query, torch.arange(len(query.row_m)), 1)[1][:, 0]
    wrong_m = query.gallery_label_n[nearest_m] != query.label_m
    some_q = torch.tensor(spread(len(query.row_m), ANY))
    wrong_m[some_q] = False
    others_m = wrong_m.nonzero()[:, 0]
    wrong_q = others_m[spread(len(others_m), WRONG)]
    parts = {f"{len(some_q)} of {len(query.row_m):,} queries, evenly spread": some_q,
             f"{len(wrong_q)} of {len(others_m):,} others whose nearest is of another class": wrong_q}
    sections = {title: _shown(query, chosen_q, queries, gallery) for title, chosen_q in parts.items() if len(chosen_q)}
    sheet = _sheet(sections, queries, gallery)
    replace_file(path, lambda file: sheet.save(file, format="PNG"))


def image_of_row(images: Images, num_rows: int) -> Tensor:
    """The image of each row of features: those that have a label, without those that cannot be read."""
    labelled = (images.labels >= 0).nonzero()[:, 0]
    if len(labelled) != num_rows:
        labelled = torch.tensor([i for i in labelled.tolist() if _read(images, i) is not None], dtype=torch.int64)
    assert len(labelled) == num_rows, f"{images.name}: {num_rows} features of {len(labelled)} images"
    return labelled


def _shown(query: Query, chosen_q: Tensor, queries: Images, gallery: Images) -> list[Shown]:
    similarity_qk, row_qk = nearest(query, chosen_q, NEIGHBOURS)
    image_n = image_of_row(gallery, len(query.gallery_nD))
    image_m = image_n if query.leave_one_out else image_of_row(queries, query.num_images)
    return [Shown(i, list(zip(image_n[row_k].tolist(), similarity_k.tolist(), strict=True)))
            for i, row_k, similarity_k in zip(image_m[query.row_m[chosen_q]].tolist(), row_qk, similarity_qk,
                                              strict=True)]


def _sheet(sections: dict[str, list[Shown]], queries: Images, gallery: Images) -> Image.Image:
    columns = max(len(shown.neighbours) for rows in sections.values() for shown in rows)
    step, height = SIDE + 2 * FRAME + GAP, SIDE + 2 * FRAME + CAPTION + GAP
    size = 3 * GAP + (1 + columns) * step, sum(TITLE + height * len(rows) for rows in sections.values()) + GAP
    sheet = Image.new("RGB", size, PAPER)
    top = 0
    for title, rows in sections.items():
        ImageDraw.Draw(sheet).text((GAP, top + TITLE // 2), title, INK, ImageFont.load_default(14), anchor="lm")
        top += TITLE
        for shown in rows:
            _row(sheet, top, shown, queries, gallery)
            top += height
    return sheet


def _row(sheet: Image.Image, top: int, shown: Shown, queries: Images, gallery: Images) -> None:
    """The query, a line, and its neighbours from the nearest on."""
    step, label = SIDE + 2 * FRAME + GAP, queries.labels[shown.query]
    _place(sheet, GAP, top, queries, shown.query, INK, queries.classes[label])
    line = 3 * GAP // 2 + step
    ImageDraw.Draw(sheet).line((line, top, line, top + SIDE + 2 * FRAME), INK, 2)
    for column, (image, similarity) in enumerate(shown.neighbours, 1):
        left, right = 3 * GAP + column * step, bool(gallery.labels[image] == label)
        _place(sheet, left, top, gallery, image, COLOUR[right], gallery.classes[gallery.labels[image]],
               f"  {similarity:.2f}")
        _mark(sheet, left, top, right)


def _place(sheet: Image.Image, left: int, top: int, images: Images, index: int, colour: tuple[int, int, int],
           name: str, value: str = "") -> None:
    """An image in its frame, and below it its class, cut short where it is too long, and a value."""
    pen, font, whole = ImageDraw.Draw(sheet), ImageFont.load_default(12), SIDE + 2 * FRAME
    pen.rectangle((left, top, left + whole - 1, top + whole - 1), colour)
    picture = _read(images, index)
    square = Image.new("RGB", (SIDE, SIDE), PAPER) if picture is None else tile(picture, SIDE)
    sheet.paste(square, (left + FRAME, top + FRAME))
    name = printable(name, 100)
    while pen.textlength(name + value, font) > whole and len(name) > 2:
        name = f"{name[:-2]}…"
    pen.text((left + whole // 2, top + whole + CAPTION // 2), name + value, INK, font, anchor="mm")


def _mark(sheet: Image.Image, left: int, top: int, right: bool) -> None:
    """A tick or a cross in the corner, for those who cannot tell the colours apart."""
    pen, size = ImageDraw.Draw(sheet), 22
    pen.rectangle((left, top, left + size - 1, top + size - 1), COLOUR[right])
    strokes = [[(5, 12), (9, 16), (17, 6)]] if right else [[(6, 6), (16, 16)], [(6, 16), (16, 6)]]
    for stroke in strokes:
        pen.line([(left + x, top + y) for x, y in stroke], (255, 255, 255), 3, joint="curve")


def _read(images: Images, index: int) -> Tensor | None:
    try:
        return images.read(index)
    except UnreadableImage:
        return None

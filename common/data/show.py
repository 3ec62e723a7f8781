"""A picture of what the network sees: images beside their views.

Axes: B images, c channels, H W pixels, S pixels of a view's side.
"""

import os
from collections.abc import Iterator

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.data.datasets import Images, spread
from common.data.images import UnreadableImage
from common.data.views import Views

_EPOCHS = 3             # each image is shown with its views of this many epochs
_TILE = 128             # smallest side of a tile, in pixels
_GAP, _HEADER = 6, 22
PAPER, INK = (236, 236, 236), (40, 40, 40)


def show_views(images: Images, views: Views, seed: int, path: str | os.PathLike[str], num_images: int = 8) -> None:
    """Writes a picture: a row for each of ``num_images`` images spread over the set, with its views of three epochs.

    Views are shown as the network gets them, normalisation undone. Of images with neither one nor three channels the
    first is shown, in grey. Unreadable images are left out.
    """
    side = max(_TILE, views.size)
    names = [f"epoch {epoch} view {view + 1}" for epoch in range(_EPOCHS) for view in range(views.num_views)]
    rows = [_row(image, i, views, seed, side) for i, image in _readable(images, num_images)]
    if not rows:
        raise ValueError(f"{images.name}: none of the images to be shown could be read.")
    step = side + _GAP
    sheet = Image.new("RGB", (step * (1 + len(names)) + _GAP, step * len(rows) + _HEADER + _GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for x, name in enumerate(["image", *names]):
        draw.text((_GAP + x * step + side // 2, _HEADER // 2 + 2), name, INK, font, anchor="mm")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (_GAP + x * step, _HEADER + y * step))
    sheet.save(path, format="PNG")


def _readable(images: Images, num_images: int) -> Iterator[tuple[int, Tensor]]:
    """Up to ``num_images`` readable images at even distances, with their numbers."""
    for i in spread(len(images), num_images):
        try:
            yield i, images.read(i)
        except UnreadableImage:
            continue


def _row(image_cHW: Tensor, index: int, views: Views, seed: int, side: int) -> list[Image.Image]:
    index_1 = torch.tensor([index])
    std_c11, mean_c11 = torch.tensor(views.std).view(-1, 1, 1), torch.tensor(views.mean).view(-1, 1, 1)
    row = [tile(image_cHW, side)]
    for epoch in range(_EPOCHS):
        for view in range(views.num_views):
            crop_cSS = views.crop(image_cHW, seed, epoch, index, view)
            x_cSS = views.finish(crop_cSS.unsqueeze(0), seed, epoch, index_1, view)[0]
            row.append(tile(((x_cSS * std_c11 + mean_c11) * 255).round().clamp(0, 255).byte(), side))
    return row


def tile(image_cHW: Tensor, side: int) -> Image.Image:
    """The whole image in a square: pixels of small ones stay visible, large ones are made smaller."""
    if image_cHW.shape[0] != 3:
        image_cHW = image_cHW[:1].expand(3, -1, -1)
    picture = Image.fromarray(image_cHW.permute(1, 2, 0).contiguous().numpy())
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    way = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), PAPER)
    square.paste(picture.resize((width, height), way), ((side - width) // 2, (side - height) // 2))
    return square

"""The images on which an export is proven: real ones of the run's data, and generated ones that may be published."""

from typing import NamedTuple

import torch
from torch import Tensor

from common.data.datasets import Images, spread
from common.data.images import UnreadableImage
from common.data.views import Views
from common.exchange.public import named
from common.trained import Trained

COUNT = 8
FILE = "proof.safetensors"      # {"images", "features"}: generated images and what the trainer made of them


class Real(NamedTuple):
    """A handful of images, [B, c, S, S] normalised, if any; words for them that may be published; and why there are
    none, which may name places."""

    images_BcSS: Tensor | None
    words: str
    why: str = ""


def real(trained: Trained, given: str | None) -> Real:
    """Of the images that the encoder was trained on, or of those that the user named by --data: ``given``.

    Errors about those are raised. Others are not: an encoder may be handed on where its images no longer are.
    """
    try:
        train = trained.splits().train
        images_BcSS = _read(train, trained.views)
    except (ValueError, OSError) as error:
        if given:
            raise
        return Real(None, "generated images only", str(error))
    return Real(images_BcSS, f"{len(images_BcSS)} images of {named(train.name)}, {trained.views.size} pixels wide")


def _read(images: Images, views: Views) -> Tensor:
    found: list[Tensor] = []
    for i in spread(len(images), 8 * COUNT):
        try:
            found.append(views.evaluation(images.read(i)))
        except UnreadableImage:
            continue
    if not found:
        raise ValueError(f"{images.name}: none of {8 * COUNT} images can be read.")
    return views.normalize(torch.stack(found[::max(1, len(found) // COUNT)][:COUNT]).float())


def generated(views: Views, count: int = 4) -> Tensor:
    """Coloured clouds with noise on them, [count, c, S, S], normalised: nobody's images, and the same ones always."""
    draw = torch.Generator().manual_seed(0)
    cloud_Bc44 = torch.rand(count, len(views.mean), 4, 4, generator=draw)
    cloud_BcSS = torch.nn.functional.interpolate(cloud_Bc44, (views.size, views.size), mode="bilinear")
    noise_BcSS = torch.rand(cloud_BcSS.shape, generator=draw)
    return views.normalize((255 * (0.8 * cloud_BcSS + 0.2 * noise_BcSS)).round())

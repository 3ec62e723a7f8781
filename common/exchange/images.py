"""The images on which an export is proven: real ones of the run's data, and generated ones that may be published."""

import torch
from torch import Tensor

from common.data.datasets import Images, spread
from common.data.images import UnreadableImage
from common.data.views import Views
from common.trained import Trained

COUNT = 8
FILE = "proof.safetensors"      # {"images", "features"}: generated images and what the trainer made of them


def real(trained: Trained, given: str | None) -> tuple[Tensor | None, str]:
    """A handful of images, [B, c, S, S] normalised, with the words for whose they are; (None, why) without any.

    ``given``: what the user named by --data; the errors about it are raised, those about the config's own data are not:
    an encoder may be handed on where its images no longer are.
    """
    try:
        train = trained.splits().train
        images_BcSS = _read(train, trained.views)
    except (ValueError, OSError) as error:
        if given:
            raise
        return None, f"generated images only: {error}"
    return images_BcSS, f"{len(images_BcSS)} images of {train.name}, {generated(trained.views, 1).shape[-1]} pixels"


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

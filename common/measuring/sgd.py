"""The published linear probes: a linear classifier on a frozen backbone, trained by SGD on augmented images.

Four protocols give four numbers, so each has its name, and whatever is set otherwise stands beside it.

Axes: B images, D features.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common import distributed
from common.data.datasets import Images, Splits
from common.data.loader import plain_batches
from common.evaluate.features import evaluating
from common.evaluate.result import Result, Setting, accuracy
from common.measuring.classifier import Classifier, linear
from common.measuring.frozen import untouched
from common.measuring.labelled import CROP_MIN, augmentation, augmented, labelled
from common.measuring.teaching import Teaching, batch_for, predict, teach, teaching
from common.optim import sgd
from common.schedule import Schedule, cosine, step
from common.trained import Trained

SEED = 0                # of order, crops and the first weights: the same for every encoder

logger = logging.getLogger(__name__)


def _steps(epochs: int) -> Schedule:
    """x 0.1 at epochs 60 and 80 of 100, or at the same shares of another number."""
    return step([round(0.6 * epochs), round(0.8 * epochs)])


def _by_epoch(epochs: int) -> Schedule:
    return cosine(epochs, by="epoch")


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum 0.9 and no weight decay; ``lr`` is for ``batch`` images, and follows another size of it.

    ``std``: of the first weights, which are drawn from a normal distribution around 0; None: torch's own start.
    """

    name: str
    lr: float
    batch: int
    epochs: int
    decay: str
    schedule: Callable[[int], Schedule]
    std: float | None = 0.01
    crop_min: float = CROP_MIN

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"--epochs, --batch-size: {self.epochs} and {self.batch} given. Give 1 or more of each.")
        if not 0 < self.lr < math.inf or not 0 < self.crop_min <= 1:
            raise ValueError(f"--lr, --crop-min: {self.lr} and {self.crop_min} given. Give a rate above 0, and a share "
                             "in (0, 1].")

    def changed(self, *, epochs: int | None = None, batch: int | None = None, lr: float | None = None,
                crop_min: float | None = None) -> "Recipe":
        """With other settings where these are given. Another batch takes the learning rate along, in proportion."""
        size = self.batch if batch is None else batch
        return dataclasses.replace(self, epochs=self.epochs if epochs is None else epochs, batch=size,
                                   crop_min=self.crop_min if crop_min is None else crop_min,
                                   lr=self.lr * size / self.batch if lr is None else lr)

    def protocol(self) -> dict[str, Setting]:
        """Its settings, and, where they are not those that were published, which."""
        published = RECIPES[self.name]
        other = [key for key in ("lr", "batch", "epochs", "crop_min") if getattr(self, key) != getattr(published, key)]
        return {"recipe": self.name, **({"changed": " ".join(other)} if other else {}), "lr": self.lr,
                "batch": self.batch, "epochs": self.epochs, "schedule": self.decay}


RECIPES = {recipe.name: recipe for recipe in (
    Recipe("moco", 30.0, 256, 100, "x0.1 at 0.6 0.8", _steps),                  # v1 and v2: main_lincls.py
    Recipe("moco_v3", 0.4, 1024, 90, "cosine by epoch", _by_epoch),             # 0.1 per 256 images
    Recipe("moco_v3_vit", 12.0, 1024, 90, "cosine by epoch", _by_epoch),        # 3 per 256 images
    Recipe("lightly", 0.1, 256, 90, "cosine", cosine, std=None),                # its ImageNet benchmark
)}


class Probe(NamedTuple):
    """What came of a probe."""

    result: Result
    norm: float                         # mean length of the features of some training images
    loss: float                         # mean of the last epoch
    tensors: int                        # of the backbone: each of them found as it was before


def probe(trained: Trained, splits: Splits, recipe: Recipe, layer: Literal["backbone", "head"] = "backbone") -> Probe:
    """Accuracy, after the last epoch, of a linear classifier on frozen features. All ranks together.

    The trunk is in evaluation mode throughout. Raises RuntimeError, naming the tensor, if anything of it has moved,
    ConfigError where the images have no labels, and ValueError where the features or the loss are not finite.
    """
    trained.check_layer(layer)
    data = labelled(splits)
    recipe = recipe.changed(batch=batch_for(len(data.train), recipe.batch))
    how = teaching(trained, augmented(trained.views, recipe.crop_min), recipe.epochs, recipe.batch)
    trunk: nn.Module = (trained.encoder if layer == "head" else trained.encoder.backbone).requires_grad_(False).eval()
    norm, width = _look(trunk, data.train, how)
    classifier = Classifier(trunk, linear(width, data.num_classes, recipe.std, SEED)).to(trained.device)
    optimizer = sgd(classifier, recipe.batch, lr=recipe.lr)
    with untouched(trunk) as frozen:
        loss = teach(classifier, optimizer, recipe.schedule(recipe.epochs), data.train, how, SEED,
                     f"linear probe ({recipe.name})")
        predicted_m, label_m = predict(classifier, data.test, how, "test images")
    protocol: dict[str, Setting] = {"layer": layer, **recipe.protocol(), "labels": "all",
                                    "views": augmentation(trained.views, recipe.crop_min), **data.split,
                                    "train": len(data.train), "test": len(label_m)}
    _warn(loss, len(data.train.labels.unique()), norm, recipe)
    return Probe(accuracy("linear", predicted_m, label_m, protocol), norm, loss, len(frozen))


@torch.no_grad()
def _look(trunk: nn.Module, images: Images, how: Teaching) -> tuple[float, int]:
    """Mean length and width of the features of the first training images, the same ones on every rank."""
    batches = plain_batches(images, how.evaluation, how.batch_size, 0, how.device, rank=0, world=1)
    with evaluating(trunk):
        x_BD: Tensor = trunk(next(batches)[1]).float()
    batches.close()
    if not x_BD.isfinite().all():
        raise ValueError("evaluate: the features are not finite: the encoder's weights or statistics are broken. Go "
                         "back to an older checkpoint.")
    return x_BD.norm(dim=1).mean().item(), x_BD.shape[1]


def _warn(loss: float, classes: int, norm: float, recipe: Recipe) -> None:
    """Say it where the classifier has not learned its training images: its number is then hardly the features' own."""
    if loss < math.log(classes) or not distributed.is_main():
        return
    how = "not finite" if not math.isfinite(loss) else f"{loss:.3g}, no better than chance ({math.log(classes):.3g})"
    logger.warning("warning: the loss of the last epoch is %s. The accuracy may be far below what the features are "
                   "worth: a learning rate of %g is too high for features of mean length %.3g, or the training crops "
                   "show too little. Give another --lr, --protocol or --crop-min, and compare with knn, which trains "
                   "nothing.", how, recipe.lr, norm)

"""Fine-tuning: a backbone and a linear classifier on it are trained on labels, all layers or the last ones."""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from common.backbones import feature_width
from common.batchnorm import group_batchnorm
from common.data.subset import Subset
from common.evaluate.draws import Labels, check_labels, draw_labels
from common.evaluate.result import Setting
from common.measuring.classifier import Classifier, linear
from common.measuring.frozen import untouched
from common.measuring.labelled import CROP_MIN, Labelled, augmentation, augmented
from common.measuring.layers import first_trained, freeze, layer_groups, parameter_groups
from common.measuring.teaching import Answers, batch_for, predict, teach, teaching
from common.rng import seed_all
from common.schedule import cosine
from common.sections import SECTIONS
from common.trained import Trained

STEPS = 1000            # at least, where --epochs is not given: a few labels need as many as many do
EPOCHS = 50             # at least
DEFAULTS = {"sgd": (0.05, 1e-4), "adamw": (1e-3, 0.05)}         # learning rate and weight decay


@dataclass(frozen=True)
class Tuning:
    """Settings of a fine-tuning: half a cosine by step, after a tenth of the epochs of linear rise.

    ``epochs`` None: 50, or as many as make 1,000 steps. ``lr`` is the classifier's, for the batch as it is.
    """

    labels: Labels
    layers: str = "all"
    layer_decay: float = 1.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float | None = None
    weight_decay: float | None = None
    epochs: int | None = None
    batch: int = 64
    crop_min: float = CROP_MIN
    precision: Literal["float32", "bf16", "fp16"] = "float32"

    def __post_init__(self) -> None:
        check_labels(self.labels)
        if self.batch < 1 or (self.epochs is not None and self.epochs < 1):
            raise ValueError(f"--epochs, --batch-size: {self.epochs} and {self.batch} given. Give 1 or more of each.")
        if not 0 < self.layer_decay <= 1 or not 0 < self.crop_min <= 1:
            raise ValueError(f"--layer-decay, --crop-min: {self.layer_decay} and {self.crop_min} given. Both lie in "
                             "(0, 1].")
        lr, weight_decay = self.rates
        if not 0 < lr < math.inf or not 0 <= weight_decay < math.inf:
            raise ValueError(f"--lr, --weight-decay: {lr} and {weight_decay} given. Give a rate above 0, and a decay "
                             "of 0 or more.")

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rate and weight decay, the optimizer's usual ones where none are given."""
        lr, weight_decay = DEFAULTS[self.optimizer]
        return (lr if self.lr is None else self.lr), (weight_decay if self.weight_decay is None else self.weight_decay)

    def extent(self, images: int) -> tuple[int, int]:
        """Epochs, and images of a step, for so many labelled images."""
        batch = batch_for(images, self.batch)
        return (self.epochs or max(EPOCHS, -(-STEPS // (images // batch)))), batch

    def protocol(self, trained: Trained, data: Labelled, images: int, draws: int) -> dict[str, Setting]:
        epochs, batch = self.extent(images)
        lr, weight_decay = self.rates
        return {"layer": "backbone", "labels": self.labels, "draws": draws, "layers": self.layers,
                "layer_decay": self.layer_decay, "optimizer": self.optimizer, "lr": lr, "weight_decay": weight_decay,
                "batch": batch, "epochs": epochs, "views": augmentation(trained.views, self.crop_min),
                "precision": self.precision, **data.split, "train": images, "test": len(data.test)}


class Tuned(NamedTuple):
    """A draw's classifier, and what it says of the test images; the same on every rank."""

    backbone: nn.Module
    answers: Answers


def tune(trained: Trained, data: Labelled, tuning: Tuning, draw: int, scratch: bool, what: str) -> Tuned:
    """Train on the labels of ``draw`` from the trained backbone, or from random weights. All ranks together.

    ``draw`` decides labels, order, crops and first weights: both starts have all of them in common. BatchNorm
    normalises each batch as a whole, over all processes; where it is not trained, by its running statistics.
    """
    train = Subset(data.train, draw_labels(data.train.labels, tuning.labels, draw))
    epochs, batch = tuning.extent(len(train))
    backbone = group_batchnorm(untrained(trained, draw) if scratch else copy.deepcopy(trained.encoder.backbone), 1)
    groups = layer_groups(backbone)
    freeze(backbone, groups, first_trained(groups, tuning.layers))
    head = linear(feature_width(backbone), data.num_classes, 0.01, draw)
    classifier = Classifier(backbone, head).to(trained.device)
    how = teaching(trained, augmented(trained.views, tuning.crop_min), epochs, batch, tuning.precision)
    seed_all(draw)                                          # of a dropout in the backbone
    with untouched(backbone):
        teach(classifier, optimizer(classifier, tuning), cosine(epochs, warmup=epochs / 10), train, how, draw, what)
    return Tuned(backbone, predict(classifier, data.test, how, "test images"))


def optimizer(classifier: Classifier, tuning: Tuning) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW, each group of layers at its own rate."""
    lr, weight_decay = tuning.rates
    backbone = classifier.encoder.backbone
    groups = parameter_groups(backbone, classifier.encoder.head, layer_groups(backbone), lr, weight_decay,
                              tuning.layer_decay)
    fused: dict[str, Any] = {"fused": groups[0]["params"][0].device.type in ("cpu", "cuda")}
    return torch.optim.SGD(groups, momentum=0.9, **fused) if tuning.optimizer == "sgd" else \
        torch.optim.AdamW(groups, **fused)


def untrained(trained: Trained, seed: int) -> nn.Module:
    """A backbone like the trained one, from random weights."""
    seed_all(trained.seed, 1 + seed)
    return trained.config.build("method", SECTIONS["method"], seed=trained.seed, image_size=trained.views.size,
                                **trained.facts).encoder.backbone

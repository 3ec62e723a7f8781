"""Training a classifier on labelled images, and asking it for the classes of others; on all processes together.

Axes: B images of a batch, m images that are classified, c channels, S pixels of a side.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common import distributed
from common.bar import bar
from common.config import ConfigError
from common.data.datasets import Images
from common.data.loader import Loader, plain_batches
from common.data.views import Views
from common.data.workers import Care
from common.diagnosis import NonFinite
from common.evaluate.features import evaluating
from common.measuring.classifier import Classifier
from common.schedule import Schedule
from common.settings import EvaluateSettings, TrainSettings
from common.train import Trainer
from common.trained import Trained

SHARES = 8              # processes that a batch smaller than asked for can still be shared by


class Teaching(NamedTuple):
    """On what, and how, a classifier is trained and tested: what the checkpoint's config says, and the choices."""

    settings: TrainSettings
    views: Views                        # of the training
    evaluation: Views
    device: torch.device
    batch_size: int                     # of the test


def teaching(trained: Trained, views: Views, epochs: int, batch_size: int,
             precision: Literal["float32", "bf16", "fp16"] = "float32") -> Teaching:
    """Workers, patience with them and unreadable images as in the run; nothing else of its training counts here."""
    run: TrainSettings = trained.config.build("train", TrainSettings)
    settings = dataclasses.replace(run, epochs=epochs, batch_size=batch_size, accumulate=1, precision=precision,
                                   clip=None, compile=False)
    evaluation: EvaluateSettings = trained.config.build("evaluate", EvaluateSettings)
    return Teaching(settings, views, trained.views, trained.device, evaluation.batch_size)


def batch_for(images: int, wanted: int) -> int:
    """``wanted`` images a step, or, where there are fewer, as many as there are: down to a multiple of 8 from 8 on,
    so that any usual number of processes takes the same steps."""
    if images >= wanted:
        return wanted
    return images // SHARES * SHARES if images >= SHARES else images


def teach(classifier: Classifier, optimizer: torch.optim.Optimizer, schedule: Schedule, images: Images,
          how: Teaching, seed: int, what: str) -> float:
    """Train ``classifier`` on ``images`` to the end; returns the mean loss of the last epoch. All ranks together.

    Order and crops are functions of ``seed``; what is left over at the end of an epoch is dropped. Raises ValueError
    where loss or gradient are not finite for several steps in a row.
    """
    settings = how.settings
    loader = Loader(images, how.views, batch_size=settings.batch_size, seed=seed, workers=settings.workers,
                    device=how.device, max_unreadable=settings.max_unreadable, care=Care(settings.worker_timeout))
    trainer = Trainer(classifier, loader, optimizer, schedule, settings, how.device)
    try:
        losses = [step.loss for step in bar(trainer.steps(), trainer.total_steps, what)]
    except NonFinite as error:
        raise ValueError(f"{what}: the loss was not finite for {error.skipped} steps in a row, up to step {error.step} "
                         f"of {trainer.total_steps}: the learning rate is too high for these features, or the weights "
                         "are broken. Give a lower --lr.") from error
    last = losses[-loader.steps_per_epoch:]
    return sum(last) / len(last)


class Answers(NamedTuple):
    """What a classifier says of the images that could be read, on every rank."""

    predicted_m: Tensor
    label_m: Tensor


@torch.no_grad()
def predict(classifier: Classifier, images: Images, how: Teaching, what: str) -> Answers:
    """The most probable class of each image under the evaluation transform; all ranks together.

    Images that cannot be read are left out. Raises ConfigError where none can.
    """
    index: list[int] = []
    predicted: list[Tensor] = []
    share = -(-len(images) // how.batch_size // distributed.world())
    with evaluating(classifier):
        batches = plain_batches(images, how.evaluation, how.batch_size, how.settings.workers, how.device,
                                care=Care(how.settings.worker_timeout))
        for index_B, x_BcSS in bar(batches, share, what):
            index += index_B.tolist()
            predicted.append(classifier.encoder.project(x_BcSS).argmax(dim=1))
    found = distributed.gather_objects((index, torch.cat(predicted).tolist() if predicted else []))
    places = [place for rows, _ in found for place in rows]
    if not places:
        raise ConfigError(f"data: none of the {len(images)} labelled test images of {images.name} can be read. "
                          "tools/check_data.py says why.")
    return Answers(torch.tensor([label for _, labels in found for label in labels]), images.labels[places])

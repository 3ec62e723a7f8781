"""What takes part in a comparison, by its word on the command line: a checkpoint, ``pixels``, ``untrained``,
``timm:NAME`` or ``timm:NAME=FILE``."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from common import distributed
from common.config import ConfigError
from common.data.datasets import Splits
from common.data.loader import Loader
from common.encoder import Encoder
from common.evaluate.evaluator import Evaluator, Protocol
from common.evaluate.features import untrained
from common.evaluate.result import Result
from common.measuring import records
from common.measuring.pretrained import pretrained
from common.measuring.shared import is_override
from common.method import Method
from common.rng import seed_all
from common.sections import SECTIONS
from common.settings import TrainSettings
from common.trained import Trained, load_trained

CALIBRATION = 20        # batches that give an untrained encoder its BatchNorm statistics, as at the end of a run


class Entrant(NamedTuple):
    """What one word stands for; ``of`` is what its records say of the checkpoint."""

    name: str
    measure: Callable[[Sequence[Protocol]], list[Result]]
    of: dict[str, Any]


class Field(NamedTuple):
    """All that take part, the images that all are measured on, and the checkpoint that has named these."""

    entrants: list[Entrant]
    first: Trained


def field(options: argparse.Namespace) -> Field:
    """What ``options.words`` name. Raises ConfigError where a checkpoint is of other images than the first one."""
    words = [word for word in options.entrants if not is_override(word)]
    overrides = [word for word in (*options.entrants, *options.overrides) if is_override(word)]
    opened = {word: _opened(word, overrides, options) for word in dict.fromkeys(words) if _is_file(word)}
    if not opened:
        raise ConfigError(f"compare {' '.join(words)}: none of these is a checkpoint, whose config would say which "
                          "images to measure on and how to show them. Give one, such as runs/demo.")
    first, *others = opened.values()
    splits = first.splits()
    for other in others:
        _check_same(first, splits, other, other.splits() if other.config.get("data") != first.config.get("data")
                    else splits)
    entrants = [_entrant(name, word, opened, splits, options) for name, word in zip(names(words), words, strict=True)]
    return Field(entrants, first)


def names(words: Sequence[str]) -> list[str]:
    """What each is called: as few of the last parts of its path as tell it from the others, the same word by number."""
    parts = [_parts(word) for word in words]
    found = []
    for i, own in enumerate(parts):
        others = [other for other in parts if other != own]
        short = 2 if Path(words[i]).parent.name == "checkpoints" else 1         # a step's number is no name
        long = next((n for n in range(short, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        again = parts[:i].count(own)
        found.append("/".join(own[-long:]) + (f" ({again + 1})" if again else ""))
    return found


def _parts(word: str) -> list[str]:
    name, equals, file = word.partition("=")
    if word.startswith("timm:"):
        return [*Path(file).absolute().parts[1:], name] if equals else [name]
    if not _is_file(word):
        return [word]
    path = Path(word).absolute()
    return [part for part in (*path.parts[1:-1], path.name.removesuffix(".pt")) if part != "checkpoints"]


def _is_file(word: str) -> bool:
    return word not in ("pixels", "untrained") and not word.startswith("timm:")


def _opened(word: str, overrides: Sequence[str], options: argparse.Namespace) -> Trained:
    return load_trained(word, overrides, options.trust, data=options.data,
                        epoch=options.epoch if Path(word).is_dir() else "last")


def _check_same(first: Trained, splits: Splits, other: Trained, others: Splits) -> None:
    """A figure is of its images: two that are to stand side by side are of the same ones, in the same order."""
    for which, one, two in zip(("training", "test"), splits, others, strict=True):
        seen = [(images.fingerprint(), images.classes, images.contents) if images else None for images in (one, two)]
        if seen[0] != seen[1]:
            sizes = " and ".join(f"{len(images):,} of {images.name}" if images else "none" for images in (one, two))
            raise ConfigError(f"compare: {first.path} and {other.path} have other {which} images or classes ({sizes}): "
                              "their figures would not be comparable. Give --data PATH, the images to measure all on.")


def _entrant(name: str, word: str, opened: dict[str, Trained], splits: Splits,
             options: argparse.Namespace) -> Entrant:
    first = next(iter(opened.values()))
    if word in opened:
        return _of(name, opened[word], splits, options)
    if word == "pixels":
        return Entrant(name, lambda judges: first.evaluator(splits, judges).measure_pixels(), records.about(first))
    if word == "untrained":
        start = dataclasses.replace(first, encoder=as_before_training(first, splits), step=0, epoch=0.0,
                                    chosen="untrained")
        return _of(name, start, splits, options)
    if options.layer != "backbone":
        raise ConfigError(f"{word}: --layer {options.layer}: timm's backbones have no head. Give --layer backbone.")
    arch, _, file = word.removeprefix("timm:").partition("=")
    encoder, views, place = pretrained(arch, splits.train.channels, file, options.download)
    theirs = dataclasses.replace(first, encoder=encoder.to(first.device), views=views)
    of = {"checkpoint": str(place), "chosen": f"timm:{arch}", "weights": theirs.sha256(),
          "data": first.config.get("data")}
    return _of(name, theirs, splits, options)._replace(of=of)


def _of(name: str, trained: Trained, splits: Splits, options: argparse.Namespace) -> Entrant:
    def measure(judges: Sequence[Protocol]) -> list[Result]:
        evaluator: Evaluator = trained.evaluator(splits, judges, options.layer)
        return evaluator.measure(trained.encoder)

    return Entrant(name, measure, records.about(trained))


def as_before_training(trained: Trained, splits: Splits) -> Encoder:
    """The encoder with the weights of its seed, and BatchNorm statistics of its first training batches."""
    seed_all(trained.seed)
    method: Method = trained.config.build("method", SECTIONS["method"], seed=trained.seed,
                                          image_size=trained.views.size, **trained.facts)
    return untrained(method.encoder.to(trained.device), _first_views(trained, splits), CALIBRATION)


def _first_views(trained: Trained, splits: Splits) -> Iterator[Tensor]:
    """As a run on these images would see them first."""
    settings = trained.config.build("train", TrainSettings)
    parts = settings.accumulate * distributed.world()
    size = min(settings.batch_size, len(splits.train) // parts * parts)
    loader = Loader(splits.train, trained.views, batch_size=size, seed=trained.seed, accumulate=settings.accumulate,
                    workers=settings.workers, device=trained.device, report=None)
    with closing(loader.stream(0, min(CALIBRATION, settings.epochs * loader.steps_per_epoch))) as steps:
        for _, batches, _ in steps:
            yield batches[0].views[0]

"""``evaluate.py classify``: the accuracy of the classifier that a method has trained with its encoder.

Axes: B images of a batch, m test images.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.config import ConfigError
from common.data.datasets import Images, Splits
from common.data.subset import Subset
from common.evaluate.evaluator import Protocol
from common.evaluate.result import Result, Setting, accuracy
from common.measuring.labelled import known
from common.measuring.shared import add_checkpoint, add_command, collected, opened, report
from common.trained import Trained


def add(parsers: Any) -> None:
    parser = add_command(parsers, "classify", "the classifier that was trained with it: nothing is trained", run,
                         protocols)
    add_checkpoint(parser, layer=False, pixels=False)


def protocols(options: argparse.Namespace) -> list[Protocol]:
    """None: there are no features to compare."""
    return []


def run(options: argparse.Namespace) -> None:
    trained, splits = opened(options)
    images = tested(trained, splits)
    seen_m = torch.isin(images.labels, splits.train.labels)
    if not seen_m.any():
        raise ConfigError(f"data: no test image of {splits.test and splits.test.name} is of a class that has training "
                          "images, and a classifier knows no others. Verify those: tools/verify.py --classes.")
    found = measure(trained, images if seen_m.all() else Subset(images, seen_m.nonzero()[:, 0]))
    if unseen := int((~seen_m).sum()):
        found = found._replace(protocol=found.protocol | {"of_other_classes_left_out": unseen})
    report({"trained classifier": [found]}, trained, options)


def tested(trained: Trained, splits: Splits) -> Images:
    """The labelled test images. Raises ConfigError where there are none, and where they are of other classes."""
    if splits.test is None or not (splits.test.labels >= 0).any():
        raise ConfigError(f"{trained.path}: {splits.train.name} has no labelled test images, and a classifier is not "
                          "measured on those that it was trained on. Give images with a test split (--data PATH).")
    if (given := len(splits.test.classes)) != (own := trained.facts.get("num_classes", given)):
        raise ConfigError(f"data: {given} classes in {splits.test.name}, and {trained.path} was trained on {own}. Give "
                          "images of the same classes.")
    return known(splits.test)


def measure(trained: Trained, images: Images) -> Result:
    """Top-1 accuracy; the same on all processes, which call together. Raises ConfigError where no image can be read."""
    class_m, row_m = predicted(trained, images)
    if not distributed.from_main(len(row_m)):
        raise ConfigError(f"data: none of the {len(images)} labelled test images of {images.name} can be read. "
                          "tools/check_data.py says why.")
    result = distributed.from_main(_accuracy(trained, images, class_m, row_m) if distributed.is_main() else None)
    assert result is not None
    return result


def _accuracy(trained: Trained, images: Images, class_m: Tensor, row_m: Tensor) -> Result:
    protocol: dict[str, Setting] = {"layer": "classifier", "classes": len(images.classes),
                                    "train": trained.facts["num_samples"], "test": len(row_m)}
    return accuracy("classify", class_m, images.labels[row_m], protocol)


def predicted(trained: Trained, images: Images) -> tuple[Tensor, Tensor]:
    """The most probable class of each image that can be read, and which these are; complete on the main process only.

    Raises ConfigError where no classifier was trained.
    """
    name = trained.config.get("method.name")
    if trained.origin is not None:
        raise ConfigError(f"{trained.path}: imported weights come without the classifier of {name}. Give a run's "
                          "checkpoint, or measure by knn or linear.")

    def classes(image_BcSS: Tensor) -> Tensor:
        logits_BC = trained.method.logits(image_BcSS)
        if logits_BC is None:
            raise ConfigError(f"{trained.path}: {name} trains no classifier. Measure its features: knn or linear.")
        return logits_BC.argmax(dim=1, keepdim=True)

    class_m1, row_m = collected(trained, images, classes, "classes", torch.int64)
    return class_m1[:, 0], row_m

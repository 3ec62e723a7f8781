"""The labelled images of a data set, and how a classifier sees those that it is trained on."""

from typing import NamedTuple

from common.config import ConfigError
from common.data.datasets import Images, Splits
from common.data.geometry import HorizontalFlip, RandomResizedCrop
from common.data.subset import Subset
from common.data.views import View, Views
from common.evaluate.features import held_out
from common.evaluate.result import Setting

CROP_MIN = 0.08         # of an image's area: ImageNet's usual augmentation, and that of the published probes


class Labelled(NamedTuple):
    """Images to train and to test a classifier on: each has a label, and none is known to be unreadable."""

    train: Images
    test: Images
    num_classes: int                    # one more than the largest label of either: some may be missing
    split: dict[str, Setting]           # for the protocol


def labelled(splits: Splits) -> Labelled:
    """The labelled images of both splits; without labelled test images a fifth of the training images is held out.

    It is the fifth that the probes on features hold out. Raises ConfigError where fewer than two training images of two
    classes have a label.
    """
    train = known(splits.train)
    if len(train) < 2 or len(train.labels.unique()) < 2:
        raise ConfigError(f"data: {len(train)} of the {len(splits.train)} training images of {splits.train.name} have "
                          f"a label, of {len(train.labels.unique())} classes; a classifier needs two images of two "
                          "classes at least. Give labelled data (--data PATH).")
    test = None if splits.test is None else known(splits.test)
    split: dict[str, Setting] = {}
    if test is None or not len(test):
        train_n, test_m = held_out(len(train))
        train, test, split = Subset(train, train_n), Subset(train, test_m), {"split": "fifth-held-out"}
    num_classes = 1 + int(max(train.labels.max(), test.labels.max()))
    return Labelled(train, test, num_classes, split)


def known(images: Images) -> Images:
    """Those that have a label and can, as far as is known, be read; the set itself where these are all."""
    known_n = images.labels >= 0
    known_n[list(images.bad)] = False
    return images if known_n.all() else Subset(images, known_n.nonzero()[:, 0])


def augmented(views: Views, crop_min: float = CROP_MIN) -> Views:
    """Random crops of at least the share ``crop_min`` of an image, of the run's size and normalisation.

    Mirrored half the time if the run's views are: where they are not, a mirrored image may be of another class.
    """
    flip = (HorizontalFlip(),) if mirrored(views) else ()
    return Views(views.size, [View(RandomResizedCrop((crop_min, 1.0)), flip)], views.mean, views.std)


def mirrored(views: Views) -> bool:
    return any(isinstance(op, HorizontalFlip) for view in views.views for op in view.ops)


def augmentation(views: Views, crop_min: float) -> str:
    """``augmented`` in words, for the protocol."""
    return f"crop {crop_min:g}-1{', flip' if mirrored(views) else ''}"

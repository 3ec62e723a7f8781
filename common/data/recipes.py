"""The published recipes of views, one function each, in the order in which the authors' code applies the operations.

``mean`` and ``std`` (of 0..1 values, one per channel) default to those of the data set that the recipe is for; to their
average where the images have another number of ``channels``.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.data.augment import Op
from common.data.filters import GaussianBlur, Grayscale, Solarize
from common.data.geometry import HorizontalFlip, RandomResizedCrop, Rotate
from common.data.jitter import ColorJitter
from common.data.views import View, Views

if TYPE_CHECKING:
    from torchvision.transforms import Compose

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
DIGITS = (0.305,), (0.376,)             # of all 1,797 images
FASHION = (0.286,), (0.353,)            # of the 60,000 training images

Stats = Sequence[float] | None


def moco_v1(size: int = 224, mean: Stats = None, std: Stats = None, channels: int = 3) -> Views:
    """MoCo v1 (He et al. 2020, Sec. 3.3; the order is that of the authors' main_moco.py)."""
    _check(size, mean, std, channels)
    return _bind(size, 2 * [_instdisc_view()], mean, std, channels)


def instdisc(size: int = 224, mean: Stats = None, std: Stats = None, channels: int = 3) -> Views:
    """InstDisc (Wu et al. 2018; the authors' main.py): the operations of MoCo v1, one view."""
    _check(size, mean, std, channels)
    return _bind(size, [_instdisc_view()], mean, std, channels)


def _instdisc_view() -> View:
    return _view((0.2, 1.0), Grayscale(0.2), ColorJitter(0.4, 0.4, 0.4, 0.4), HorizontalFlip())


def moco_v2(size: int = 224, mean: Stats = None, std: Stats = None, channels: int = 3) -> Views:
    """MoCo v2 (Chen et al. 2020, "aug+"): weaker hue, not always; blur."""
    _check(size, mean, std, channels)
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    view = _view((0.2, 1.0), jitter, Grayscale(0.2), GaussianBlur((0.1, 2.0), 0.5), HorizontalFlip())
    return _bind(size, [view, view], mean, std, channels)


def moco_v3(
    size: int = 224, crop_min: float = 0.2, mean: Stats = None, std: Stats = None, channels: int = 3
) -> Views:
    """MoCo v3 (Chen et al. 2021): two different views, BYOL's. ``crop_min`` is 0.2 for ResNets and 0.08 for ViTs."""
    _check(size, mean, std, channels, crop_min)
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8)
    scale, sigma = (crop_min, 1.0), (0.1, 2.0)
    first = _view(scale, jitter, Grayscale(0.2), GaussianBlur(sigma, 1.0), HorizontalFlip())
    second = _view(scale, jitter, Grayscale(0.2), GaussianBlur(sigma, 0.1), Solarize(0.2), HorizontalFlip())
    return _bind(size, [first, second], mean, std, channels)


def moco_cifar10(size: int = 32, mean: Stats = None, std: Stats = None, channels: int = 3) -> Views:
    """CIFAR-10 as in the MoCo authors' notebook: crops down to 8 % of the image, no blur."""
    _check(size, mean, std, channels)
    view = _view((0.08, 1.0), HorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(0.2))
    return _bind(size, [view, view], mean, std, channels, CIFAR)


def instdisc_cifar10(size: int = 32, mean: Stats = None, std: Stats = None, channels: int = 3) -> Views:
    """CIFAR-10 as in the InstDisc authors' cifar.py: one view, no flip."""
    _check(size, mean, std, channels)
    view = _view((0.2, 1.0), ColorJitter(0.4, 0.4, 0.4, 0.4), Grayscale(0.2))
    return _bind(size, [view], mean, std, channels, CIFAR)


def small_color(
    size: int = 32, crop_min: float = 0.25, num_views: int = 2,
    mean: Stats = None, std: Stats = None, channels: int = 3,
) -> Views:
    """Ours, for small networks and short runs on small colour images: milder crops, colour always jittered."""
    _check(size, mean, std, channels, crop_min, num_views=num_views)
    view = _view((crop_min, 1.0), HorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.1), Grayscale(0.2))
    return _bind(size, num_views * [view], mean, std, channels, CIFAR)


def digits(
    size: int = 8, crop_min: float = 0.4, num_views: int = 2,
    mean: Stats = None, std: Stats = None, channels: int = 1,
) -> Views:
    """Ours, for handwritten digits: a mirrored digit is another sign, so they are turned instead of flipped."""
    _check(size, mean, std, channels, crop_min, num_views=num_views)
    view = _view((crop_min, 1.0), Rotate(15), ColorJitter(0.4, 0.4))
    return _bind(size, num_views * [view], mean, std, channels, DIGITS)


def fashion(
    size: int = 28, crop_min: float = 0.3, num_views: int = 2,
    mean: Stats = None, std: Stats = None, channels: int = 1,
) -> Views:
    """Ours, for Fashion-MNIST: garments are worn both ways round."""
    _check(size, mean, std, channels, crop_min, num_views=num_views)
    view = _view((crop_min, 1.0), HorizontalFlip(), ColorJitter(0.4, 0.4))
    return _bind(size, num_views * [view], mean, std, channels, FASHION)


def torchvision_moco_v2(size: int = 224) -> "Compose":
    """MoCo v2's view as torchvision transforms of a PIL image, one image at a time and random by global state.

    For comparison: ``moco_v2`` is held against it in the tests.
    """
    from torchvision import transforms

    mean, std = IMAGENET
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ])


def _view(scale: tuple[float, float], *ops: Op) -> View:
    return View(RandomResizedCrop(scale), ops)


def _bind(
    size: int, views: Sequence[View], mean: Stats, std: Stats, channels: int,
    default: tuple[Sequence[float], Sequence[float]] = IMAGENET,
) -> Views:
    usual_mean, usual_std = (_spread(values, channels) for values in default)
    return Views(size, views, mean or usual_mean, std or usual_std)


def _check(size: int, mean: Stats, std: Stats, channels: int, crop_min: float = 1.0, num_views: int = 1) -> None:
    """What every recipe opens with."""
    if size < 1:
        raise ValueError(f"size: {size}; a view has at least one pixel.")
    if not 0 < crop_min <= 1:
        raise ValueError(f"crop_min: {crop_min} is no share of an image. Give more than 0, and at most 1.")
    if not 1 <= num_views <= 100:
        raise ValueError(f"num_views: {num_views}. Give 2 for MoCo, 1 for InstDisc.")
    if not all(map(math.isfinite, (*(mean or ()), *(std or ())))):
        raise ValueError("mean, std: each value is a finite number.")
    if std and min(std) <= 0:
        raise ValueError(f"std: {list(std)}; give one value per channel, std above 0.")
    for key, values in (("mean", mean), ("std", std)):
        if values and len(values) != channels:
            raise ValueError(f"{key}: {len(values)} values for images of {channels} channels; give one per channel.")


def _spread(values: Sequence[float], channels: int) -> Sequence[float]:
    return values if len(values) == channels else (sum(values) / len(values),) * channels

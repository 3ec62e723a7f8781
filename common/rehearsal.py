"""A run's parts made without data, device and memory: what cannot be built is said before any of them is touched."""

import math
import os
import warnings
from typing import Any

import torch

from common.batchnorm import GroupBatchNorm
from common.config import TRUSTED, Config, ConfigError
from common.method import Method
from common.sections import SECTIONS
from common.settings import TrainSettings

UNKNOWN = 2**40         # training images, before these are counted: a bank of so many rows is not added up
CLASSES = 1000          # before they are counted


def rehearse(config: Config, facts: dict[str, int] | None = None) -> None:
    """Build views, method, optimizer and schedule of a complete ``config`` on torch's meta device.

    Raises ConfigError for what a constructor refuses, and for what this machine's memory cannot hold. What cannot be
    built so is left for later. ``facts`` of the images (how many, how many channels) where they are known.
    """
    facts = facts or {"num_samples": UNKNOWN, "channels": _channels(config), "num_classes": CLASSES}
    train = config.build("train", TrainSettings)
    views = config.build("views", SECTIONS["views"], channels=facts["channels"])
    share = train.batch_size // train.accumulate // int(os.environ.get("WORLD_SIZE", 1))
    _check_room(config, "views", 4 * share * len(views.views) * facts["channels"] * views.size**2, "a batch of views")
    if str(config.get("method.name")).partition(".")[0] not in TRUSTED:
        return                          # a user's own may do with the number of images what it likes
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            method = config.build("method", SECTIONS["method"], seed=config.get("run.seed"), image_size=views.size,
                                  **facts)
            config.build("optimizer", SECTIONS["optimizer"], method=method, batch_size=train.batch_size)
    except (RuntimeError, TypeError, ArithmeticError, MemoryError, LookupError, AttributeError) as error:
        if "overflow" in str(error).lower():
            _check_room(config, "method", math.inf, "its weights and memories")
    else:
        _check_room(config, "method", _bytes(method), "its weights and memories")
        _check_company(config, method, views.num_views, train.batch_size // train.accumulate)
        _check_width(config, method, facts["channels"], views.size)
    _check_schedule(config, train)


def _channels(config: Config) -> int:
    given, mean = config.get("data.channels"), config.get("views.mean")
    return given if type(given) is int and given > 0 else len(mean) if isinstance(mean, list) and mean else 3


def _bytes(method: torch.nn.Module) -> int:
    """Weights, gradient and an average or two of the trained ones, and all that is only kept."""
    trained = sum(4 * parameter.nbytes for parameter in method.parameters() if parameter.requires_grad)
    kept = [*method.buffers(), *(parameter for parameter in method.parameters() if not parameter.requires_grad)]
    return trained + sum(tensor.nbytes for tensor in kept if tensor.shape[:1] != (UNKNOWN,))


def _check_room(config: Config, where: str, needed: float, what: str) -> None:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        size = f"{needed / 1e9:,.1f} GB" if needed < 1e18 else "more than 10^18 bytes"
        raise _mistake(config, where, f"{what} would take {size}, and this machine has {there / 1e9:,.1f} GB of "
                       "memory. Give smaller sizes.")


def _check_company(config: Config, method: Method, num_views: int, images: int) -> None:
    """Whether there are views enough for the method, and images enough in a micro-batch for its BatchNorm groups."""
    if num_views < method.num_views:
        raise _mistake(config, "views", f"gives {num_views} view of an image, and {config.get('method.name')} takes "
                                        f"{method.num_views}. Give num_views 2, or a recipe of two views.")
    first, second = method.towers()
    if first is not second:
        images //= 2                    # each tower sees its own
    groups = max((module.groups for module in method.modules() if isinstance(module, GroupBatchNorm)), default=1)
    if 2 * groups > images:
        raise _mistake(config, "method.bn_groups", f"{images} images cannot be normalised in {groups} groups of at "
                       "least 2. Give a larger train.batch_size or fewer method.bn_groups.")


def _check_width(config: Config, method: Method, channels: int, size: int) -> None:
    """Whether the encoder takes such images, and gives as many features as the dictionary holds."""
    try:
        dim = method.encoder.eval()(torch.empty(2, channels, size, size, device="meta")).shape[1]
    except (RuntimeError, AssertionError, ValueError) as error:
        if "meta" in str(error).lower():            # an encoder of one's own may compute what this device cannot
            return
        reason = str(error).strip().partition("\n")[0]
        raise _mistake(config, "method.encoder", f"cannot take views of {size} pixels: {reason[:200]}.") from error
    except NotImplementedError:
        return
    width = getattr(getattr(method, "dictionary", None), "dim", None)
    if width not in (None, dim):
        raise _mistake(config, "method.dictionary.dim", f"is {width}, and the encoder gives {dim} features. Give both "
                       "alike.")


def _mistake(config: Config, where: str, message: str) -> ConfigError:
    section = where.partition(".")[0]
    return ConfigError(f"{config.origin.get(where) or config.origin.get(section, config.source)}: {where}: {message}")


def _check_schedule(config: Config, train: TrainSettings) -> None:
    schedule: Any = config.build("schedule", SECTIONS["schedule"], epochs=train.epochs)
    try:
        factor = float(schedule(0.0))
    except Exception as error:
        raise _mistake(config, "schedule", f"gives no factor for epoch 0: {error}.") from error
    if not math.isfinite(factor):
        raise _mistake(config, "schedule", f"its factor for epoch 0 is {factor}.")

"""Tensors of a file put into a backbone, one by one: all of them, or none."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common import backbones
from common.architectures import check_arch, check_arch_args
from common.config import ConfigError
from common.exchange.architecture import Architecture
from common.exchange.foreign import Foreign
from common.exchange.layouts import NAMES
from common.printable import printable

_SHOWN = 4                      # names in a list of them


def empty(network: Architecture) -> nn.Module:
    """The backbone to be filled, all of it NaN: what is not filled would show. Made without drawing first values."""
    check_arch(network.arch)
    check_arch_args(network.arch, network.arch_args)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")                             # torchvision's, of first values
        trunk = backbones.backbone(network.arch, stem=network.stem, channels=network.channels,
                                   image_size=network.image_size or 224, arch_args=network.arch_args)
    trunk.to_empty(device="cpu")
    for tensor in trunk.state_dict().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    return trunk


def fill(trunk: nn.Module, given: dict[str, Tensor], arch: str, layout: str, file: Foreign) -> int:
    """Copy the tensors in, in float32; how many. Raises ConfigError unless they are the backbone's, one by one.

    Counters of BatchNorm's batches may be missing: no evaluation reads them.
    """
    wanted = trunk.state_dict()
    matched = [name for name in given if name in wanted]
    if not matched:
        raise ConfigError(f"{file.path}: 0 names matched. {arch} has {listed(wanted)}; the file, read as layout "
                          f"{layout!r}, has {listed(file.tensors)}. Give the --arch or the --layout that it is of; "
                          f"layouts are {', '.join(NAMES)}.")
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    odd = [name for name in given if name not in wanted]
    shapes = [f"{name} {list(given[name].shape)} where {list(wanted[name].shape)} belongs" for name in matched
              if given[name].shape != wanted[name].shape]
    faults = [f"{len(names)} {what} ({some(names)})" for names, what in
              ((missing, "missing"), (odd, "unexpected"), (shapes, "of another shape")) if names]
    if faults:
        raise ConfigError(f"{file.path}: fits {arch} in part only: {len(matched)} of {len(wanted)} names matched; "
                          f"{'; '.join(faults)}. Nothing was written: give the --arch that it is of.")
    for name in matched:
        wanted[name].copy_(given[name])
    return len(matched)


def check_values(weights: dict[str, Tensor], file: Foreign) -> None:
    """Raises ConfigError for what no training leaves behind."""
    odd = [name for name, tensor in weights.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if odd:
        raise ConfigError(f"{file.path}: {len(odd)} tensors hold values that are not finite ({some(odd)}). The "
                          "training that they are from went wrong, or the file is damaged.")
    matrices = {name: tensor for name, tensor in weights.items() if tensor.dim() >= 2 and name.endswith("weight")}
    zero = [name for name, tensor in matrices.items() if not tensor.any()]
    if zero:
        raise ConfigError(f"{file.path}: {len(zero)} of {len(matrices)} weights are zero throughout ({some(zero)}): "
                          "they were never trained, or never filled.")


def listed(names: Iterable[str]) -> str:
    """How many there are, and the first of them."""
    names = list(names)
    return f"{len(names):,} names ({some(names)})"


def some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(printable(str(name))[:100] for name in names[:_SHOWN])
    return shown + ", ..." * (len(names) > _SHOWN)

"""The config that imported weights get: one of configs/, with the network that was found in the place of its own."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from common import automatic
from common.batchnorm import has_batchnorm
from common.config import TRUSTED, Config
from common.exchange.architecture import Architecture

IMAGENET = 1_281_167            # images: what ``auto`` in a config is chosen for


def config(name: str, network: Architecture, kind: str, head: dict[str, Tensor], trunk: nn.Module,
           overrides: Sequence[str]) -> Config:
    """The config ``name`` with ``network``, and a head of ``kind`` with the sizes of ``head``'s tensors, if any."""
    made = Config.load(name, (), TRUSTED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        automatic.choose(made, IMAGENET, network.image_size or 224, accelerated=True)
    encoder = _encoder(made.get("method.encoder") or {}, network, kind, head)
    changes: dict[str, Any] = {"method.encoder": encoder, "views.size": network.image_size}
    if made.has("method.dictionary.dim"):
        changes["method.dictionary.dim"] = encoder.get("dim", 128)
    if made.has("method.key_bn") and not has_batchnorm(trunk):
        changes["method.key_bn"] = "none"
    if network.channels != 3 and made.get("data.name") in ("common.data.folder", "common.data.file_list"):
        changes["data.channels"] = network.channels
    for where, value in changes.items():
        if value is not None:
            made.set(where, value, "imported")
    return Config.parse(made.text(), name, overrides, TRUSTED)


def num_samples(made: Config) -> int:
    """Images enough for the queue or the draws of the config: how many there were is in no file."""
    sizes = [made.get(f"method.dictionary.{key}") for key in ("size", "negatives")]
    return 4 * max([1, *(size for size in sizes if type(size) is int)])


def _encoder(old: dict[str, Any], network: Architecture, kind: str, head: dict[str, Tensor]) -> dict[str, Any]:
    """The section ``method.encoder``; a head that did not come stays as it was."""
    made: dict[str, Any] = {"name": "common.backbones.encoder", "arch": network.arch, "stem": network.stem}
    if network.arch_args:
        made["arch_args"] = dict(network.arch_args)
    if kind == "linear":
        return made | {"head": "linear", "dim": len(head["weight"])}
    if kind == "mlp":
        return made | {"head": "mlp", "hidden": len(head["0.weight"]), "dim": len(head["2.weight"])}
    return made | {key: old[key] for key in ("head", "dim", "hidden") if key in old}

"""What is handed on: one network out of a trained method, free of what only training needs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.backbones import feature_width
from common.config import ConfigError
from common.encoder import Encoder
from common.exchange.facts import Facts, Stem, What
from common.method import Method
from common.state import fitting
from common.trained import Trained

ENCODER = "common.backbones.encoder"            # whose keys say what an architecture is called


@dataclass(frozen=True)
class Handed(Facts):
    """The network itself: ``module`` in evaluation mode on the CPU, float32, with ordinary BatchNorm.

    Of a backbone ``module`` maps [B, c, H, W] to [B, D]; of an encoder it is an ``Encoder``. ``license`` is what the
    user says it may be used under.
    """

    module: nn.Module
    trained: Trained
    license: str | None = None

    @property
    def state(self) -> dict[str, Tensor]:
        """Of a backbone its own names; of an encoder ``backbone.*`` and ``head.*``."""
        return self.module.state_dict()

    @property
    def backbone(self) -> nn.Module:
        return self.module.backbone if isinstance(self.module, Encoder) else self.module


def hand(trained: Trained, what: What = "backbone", license: str | None = None) -> Handed:
    """The plain network of ``trained``. Raises ConfigError for a part that it does not have."""
    source = source_of(trained, what)
    encoder: Encoder = _plain(trained)
    module = encoder if what == "encoder" else encoder.backbone
    with fitting(str(trained.file)):
        module.load_state_dict(source.state_dict())
    module = module.float().eval().requires_grad_(False)
    with torch.inference_mode():
        dim = module(torch.zeros(1, trained.facts["channels"], *2 * (trained.views.size,))).shape[1]
    return Handed(**_facts(trained, what, encoder, dim), module=module, trained=trained, license=license)


def source_of(trained: Trained, what: What) -> nn.Module:
    """The trainer's own network, as it is: the features of every export are compared with this one's."""
    if what == "backbone":
        return trained.encoder.backbone
    if what == "encoder":
        if "head" not in trained.parts:
            raise ConfigError(f"{trained.file}: --what encoder: these weights came without a head, and one of random "
                              "numbers is not handed on. Give --what backbone.")
        return trained.encoder
    if what == "second_backbone":
        return second_tower(trained.method, trained).backbone
    return key_encoder(trained.method, trained).backbone


def second_tower(method: Method, trained: Trained) -> Encoder:
    first, second = method.towers()
    if first is second or trained.origin is not None:
        why = "imported weights are of one encoder" if trained.origin is not None else \
            f"{type(method).__name__} has one tower"
        raise ConfigError(f"{trained.file}: --what second_backbone: {why}. Give --what backbone.")
    return second


def key_encoder(method: Method, trained: Trained) -> Encoder:
    found = getattr(method, "key_encoder", None)
    if not isinstance(found, Encoder) or trained.origin is not None:
        why = "imported weights are of one encoder" if trained.origin is not None else \
            f"{type(method).__name__} has no second encoder for keys"
        raise ConfigError(f"{trained.file}: --what key_backbone: {why}. Give --what backbone.")
    return found


def _plain(trained: Trained) -> Encoder:
    """The encoder as the config builds it, before a method puts its own BatchNorm into it."""
    with torch.random.fork_rng(devices=[]):
        encoder: Encoder = trained.config.build("method.encoder", "common.encoder.Encoder", **trained.facts,
                                                image_size=trained.views.size)
    return encoder


def _facts(trained: Trained, what: What, encoder: Encoder, dim: int) -> dict[str, Any]:
    ours = trained.config.get("method.encoder.name") == ENCODER
    width = feature_width(encoder.backbone)
    head = head_widths(encoder.head) if what == "encoder" and ours else ()
    arch, arch_args = (trained.config.get(f"method.encoder.{key}") if ours else None for key in ("arch", "arch_args"))
    return {"what": what, "arch": arch, "arch_args": arch_args or {}, "stem": stem_of(encoder.backbone),
            "channels": trained.facts["channels"], "image_size": trained.views.size, "width": width, "head": head,
            "dim": dim, "unit": what == "encoder" and encoder.unit,
            "mean": trained.views.mean, "std": trained.views.std}


def stem_of(backbone: nn.Module) -> Stem:
    if not isinstance(getattr(backbone, "maxpool", None), nn.Identity):
        return "imagenet"
    conv: Any = backbone.conv1
    return "small" if conv.padding == (1, 1) else "small_padded"


def head_widths(head: nn.Module) -> tuple[int, ...]:
    """(C,) of a linear head, (hidden, C) of one with a hidden layer."""
    return tuple(layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear))

"""What is handed on: one network out of a trained method, free of what only training needs."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from common.architectures import check_arch, check_arch_args
from common.backbones import feature_width
from common.config import ConfigError
from common.encoder import Encoder
from common.method import Method
from common.state import fitting
from common.trained import Trained

What = Literal["backbone", "encoder", "key_backbone"]
Stem = Literal["imagenet", "small", "small_padded"]
WHAT, STEMS = get_args(What), get_args(Stem)
ENCODER = "common.backbones.encoder"            # whose keys say what an architecture is called


@dataclass(frozen=True)
class Facts:
    """What a file in an export says of the network; raises ValueError for what could not be one.

    ``arch`` is as in a config; None where the run's encoder is built by something else than ``common.backbones``.
    ``stem``: "small" for a ResNet whose first convolution is 3x3 without max-pooling, "small_padded" where its border
    is 2. ``head``: the widths of its linear layers, () without one. The features are [B, ``dim``]: the backbone's, or
    of an encoder those of unit length.
    """

    what: What
    arch: str | None
    arch_args: Mapping[str, int]                # other sizes of a ViT
    stem: Stem
    channels: int
    image_size: int                             # pixels of a side of the images that it was trained on
    width: int                                  # D of the backbone
    head: tuple[int, ...]
    dim: int
    mean: tuple[float, ...]                     # of values 0..1, one per channel
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (self.channels, self.image_size, self.width, self.dim, *self.head)
        if self.what not in WHAT or self.stem not in STEMS or len(self.head) > 2:
            raise ValueError(f"what: {self.what!r}, stem: {self.stem!r}: no such network is handed on.")
        if any(type(number) is not int or number < 1 for number in numbers):
            raise ValueError(f"channels, image_size, width, dim, head: {numbers}: each is a whole number above 0.")
        if self.arch is not None:
            if not re.fullmatch(r"[\w./]+", self.arch):
                raise ValueError(f"arch: {self.arch!r} is no name of a network.")
            check_arch(self.arch)
            check_arch_args(self.arch, self.arch_args)

    @property
    def name(self) -> str:
        """The name in its library: no ``torchvision/``, ``timm/`` or tag of pretrained weights."""
        return (self.arch or "").rpartition("/")[2].partition(".")[0]

    def as_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Facts)}

    @classmethod
    def of_json(cls, found: Any) -> "Facts":
        """Raises ValueError for anything but what ``as_json`` gave."""
        names = {field.name for field in dataclasses.fields(Facts)}
        if not isinstance(found, dict) or set(found) != names:
            raise ValueError(f"the facts of a network are {', '.join(sorted(names))}; found {found!r:.200}.")
        lists = {name: tuple(found[name]) for name in ("head", "mean", "std")}
        return cls(**{**found, **lists})


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
    return key_encoder(trained.method, trained).backbone


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
            "dim": dim, "mean": trained.views.mean, "std": trained.views.std}


def stem_of(backbone: nn.Module) -> Stem:
    if not isinstance(getattr(backbone, "maxpool", None), nn.Identity):
        return "imagenet"
    conv: Any = backbone.conv1
    return "small" if conv.padding == (1, 1) else "small_padded"


def head_widths(head: nn.Module) -> tuple[int, ...]:
    """(C,) of a linear head, (hidden, C) of one with a hidden layer."""
    return tuple(layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear))

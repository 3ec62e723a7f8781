"""What files say of a network that is handed on, and all that its loader is written from."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from common.architectures import check_arch, check_arch_args

What = Literal["backbone", "encoder", "key_backbone", "second_backbone"]
Stem = Literal["imagenet", "small", "small_padded"]
WHAT, STEMS = get_args(What), get_args(Stem)


@dataclass(frozen=True)
class Facts:
    """What a file in an export says of the network; raises ValueError for what could not be one.

    ``arch`` is as in a config; None where the run's encoder is built by something else than ``common.backbones``.
    ``stem``: "small" for a ResNet whose first convolution is 3x3 without max-pooling, "small_padded" where its border
    is 2. ``head``: the widths of its linear layers, () without one. The features are [B, ``dim``]: the backbone's, or
    an encoder's, of length 1 if they are ``unit``.
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
    unit: bool
    mean: tuple[float, ...]                     # of values 0..1, one per channel
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (self.channels, self.image_size, self.width, self.dim, *self.head)
        if self.what not in WHAT or self.stem not in STEMS or len(self.head) > 2:
            raise ValueError(f"what: {self.what!r}, stem: {self.stem!r}: no such network is handed on.")
        if type(self.unit) is not bool:
            raise ValueError(f"unit: {self.unit!r}: true, or false.")
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
        found = {"unit": True, **found} if isinstance(found, dict) else found       # exports of before have it not
        if not isinstance(found, dict) or set(found) != names:
            raise ValueError(f"the facts of a network are {', '.join(sorted(names))}; found {found!r:.200}.")
        lists = {name: tuple(found[name]) for name in ("head", "mean", "std")}
        return cls(**{**found, **lists})

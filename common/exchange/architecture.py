"""Which network tensors are of, from their names and shapes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import backbones
from common.architectures import check_arch
from common.config import ConfigError

_DEPTHS: dict[tuple[str | int, ...], str] = {
    ("basic", 2, 2, 2, 2): "18", ("basic", 3, 4, 6, 3): "34", ("bottleneck", 3, 4, 6, 3): "50",
    ("bottleneck", 3, 4, 23, 3): "101", ("bottleneck", 3, 8, 36, 3): "152"}
_KINDS: dict[tuple[int, ...], str] = {                  # outputs and inputs of the first 3x3 of layer1
    (64, 64): "resnet{}", (128, 128): "wide_resnet{}_2", (128, 4): "resnext{}_32x4d", (256, 8): "resnext{}_32x8d",
    (256, 4): "resnext{}_64x4d"}
_VITS = {192: ("tiny", 12), 384: ("small", 12), 768: ("base", 12), 1024: ("large", 24), 1280: ("huge", 32)}
_TORCHVISION_VITS = {(768, 16): "vit_b_16", (768, 32): "vit_b_32", (1024, 16): "vit_l_16", (1024, 32): "vit_l_32",
                     (1280, 14): "vit_h_14"}
_PATCHES = {"tiny": (16,), "small": (16, 32, 8), "base": (16, 32, 8), "large": (16, 32, 14), "huge": (14,)}
SMALL_VIEW = 32                     # pixels of CIFAR, which 3x3 stems are for


class Architecture(NamedTuple):
    """Arguments of ``common.backbones.encoder``; ``image_size`` None: any. ``notes``: what the names cannot tell."""

    arch: str
    stem: str = "imagenet"
    channels: int = 3
    image_size: int | None = None
    arch_args: dict[str, int] | None = None
    notes: tuple[str, ...] = ()


def recognise(tensors: dict[str, Tensor], layout: str, padded: bool) -> Architecture | None:
    """None for a network that shapes do not tell. ``padded``: the layout's 3x3 stems have a border of 2."""
    if "conv1.weight" in tensors and tensors["conv1.weight"].dim() == 4:
        return _resnet(tensors, padded)
    if "patch_embed.proj.weight" in tensors and "pos_embed" in tensors:
        return _vit(tensors, layout)
    if "conv_proj.weight" in tensors and "encoder.pos_embedding" in tensors:
        return _torchvision_vit(tensors)
    return None


def named(arch: str, tensors: dict[str, Tensor], padded: bool) -> Architecture:
    """What the names and shapes add to an architecture that the user, or a config beside the file, has named."""
    stem, size = "imagenet", None
    if (conv := tensors.get("conv1.weight")) is not None and conv.dim() == 4 and "resne" in arch:
        stem = _stem(conv, padded)
    for patch, position in (("patch_embed.proj.weight", "pos_embed"), ("conv_proj.weight", "encoder.pos_embedding")):
        if patch in tensors and position in tensors:
            size = _image_size(tensors[patch], tensors[position])
    return Architecture(arch, stem, _channels(arch, size, tensors), size)


def _channels(arch: str, size: int | None, tensors: dict[str, Tensor]) -> int:
    """What the network's first convolution takes."""
    check_arch(arch)
    with torch.device("meta"):
        trunk = backbones.backbone(arch, stem="imagenet", image_size=size or 224)
    name = next((name for name, module in trunk.named_modules() if isinstance(module, nn.Conv2d)), "")
    conv = tensors.get(f"{name}.weight")
    return 3 if conv is None or conv.dim() != 4 else conv.shape[1]


def _stem(conv: Tensor, padded: bool) -> str:
    return ("small_padded" if padded else "small") if conv.shape[2] == 3 else "imagenet"


def _resnet(tensors: dict[str, Tensor], padded: bool) -> Architecture | None:
    conv = tensors["conv1.weight"]
    if "layer1.conv1.weight" in tensors:
        return _small_resnet(conv)
    block = "bottleneck" if "layer1.0.conv3.weight" in tensors else "basic"
    counts = [len({key.split(".")[1] for key in tensors if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)]
    depth, inner = _DEPTHS.get((block, *counts)), tensors.get("layer1.0.conv2.weight")
    kind = None if inner is None else _KINDS.get(tuple(inner.shape[:2]))
    if depth is None or kind is None:
        return None
    return Architecture(f"torchvision/{kind.format(depth)}", _stem(conv, padded), conv.shape[1],
                        SMALL_VIEW if conv.shape[2] == 3 else None)


def _small_resnet(conv: Tensor) -> Architecture | None:
    """This project's; a stem of 3x3 may have any stride, and no shape tells it."""
    width, channels, kernel = conv.shape[:3]
    return Architecture(f"w{width}p{kernel - 1}", channels=channels) if kernel > 3 else None


def _vit(tensors: dict[str, Tensor], layout: str) -> Architecture | None:
    """One of timm's. Of the number of heads there is no trace: timm's by width, and 12 for MoCo v3's ViT-S."""
    proj, pos = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
    width, channels, patch = proj.shape[:3]
    depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    if width not in _VITS:
        return None
    size, usual = _VITS[width]
    args = {"depth": depth} if depth != usual else {}
    if patch not in _PATCHES[size]:
        args["patch_size"] = patch
    fixed = not pos[0, 0].any()                 # MoCo v3's table of sines has zeros for the class token
    if width == 384 and layout == "moco_v3":
        args["num_heads"] = 12                  # moco-v3, vits.py
    note = ("its positions are a fixed table: if it is MoCo v3's ViT-S, it has 12 heads and not timm's 6. Then give "
            "method.encoder.arch_args.num_heads=12",) if fixed and width == 384 and layout != "moco_v3" else ()
    name = f"vit_{size}_patch{patch if patch in _PATCHES[size] else _PATCHES[size][0]}_224"
    return Architecture(name, "auto", channels, _image_size(proj, pos), args or None, note)


def _torchvision_vit(tensors: dict[str, Tensor]) -> Architecture | None:
    proj, pos = tensors["conv_proj.weight"], tensors["encoder.pos_embedding"]
    name = _TORCHVISION_VITS.get((proj.shape[0], proj.shape[2]))
    return Architecture(f"torchvision/{name}", "auto", proj.shape[1], _image_size(proj, pos)) if name else None


def _image_size(proj: Tensor, pos: Tensor) -> int:
    """Patches of a side x pixels of a patch; one position more is the class token's."""
    side = math.isqrt(pos.shape[1])
    if side * side not in (pos.shape[1], pos.shape[1] - 1):
        raise ConfigError(f"positions: {pos.shape[1]} of them are no square of patches, with or without a class token. "
                          "Only square images are known here.")
    return side * proj.shape[2]

"""Backbones by name (timm, torchvision, a small ResNet of our own) and the heads that pretraining puts on them.

A backbone maps images [B, c, H, W] to features [B, D], D = ``num_features``; it knows nothing of heads or of
normalisation.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torchvision
from torch import Tensor, nn

from common.architectures import check_arch, check_arch_args, small_resnet_sizes, unknown
from common.encoder import Encoder

_SIZED = ("vit_", "deit", "beit", "eva", "swin", "cait", "mixer")           # timm's that are built for one image size
SMALL_IMAGE = 64        # pixels: up to here ImageNet's stem, which divides the size by 4 at once, leaves too little


def encoder(arch: str, head: Literal["linear", "mlp"] = "linear", dim: int = 128, hidden: int | None = None,
            stem: Literal["auto", "imagenet", "small", "small_padded"] = "auto", channels: int = 3,
            image_size: int = 224, arch_args: dict[str, int] | None = None, unit: bool = True) -> Encoder:
    """Backbone ``arch`` with a projection head to ``dim`` features.

    ``arch``: ``torchvision/NAME`` (what the papers used), ``timm/NAME`` or a bare timm name, or ``wWsS`` / ``wWpP``: a
    small ResNet of width W with a 3x3 stem of stride S, or a stem that cuts the image in patches of P pixels.
    ``head``: "linear" (MoCo v1, InstDisc) or "mlp" (MoCo v2): Linear-ReLU-Linear with ``hidden`` units, by default as
    many as the backbone has features. ``stem``: "small" is a 3x3 convolution of stride 1 without max-pooling, and what
    "auto" takes up to 64 pixels; "small_padded" has a border of 2 in place of 1 (solo-learn's networks for CIFAR).
    ``arch_args``: other sizes of a ViT of timm's (``common.architectures.VIT_SIZES``), such as MoCo v3's ViT-S of 12
    heads. ``unit``: features are scaled to length 1. Raises ValueError for a name that neither library has.
    """
    if dim < 1 or (hidden is not None and hidden < 1):
        raise ValueError(f"{'dim' if dim < 1 else 'hidden'}: {dim if dim < 1 else hidden} units. Give 1 or more.")
    check_arch(arch)
    check_arch_args(arch, arch_args)
    trunk = backbone(arch, stem=stem, channels=channels, image_size=image_size, arch_args=arch_args)
    return Encoder(trunk, projection(head, feature_width(trunk), dim, hidden), unit)


def projection(kind: str, width: int, dim: int, hidden: int | None = None) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, dim)
    hidden = hidden or width
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))


def backbone(arch: str, *, stem: str = "auto", channels: int = 3, image_size: int = 224,
             arch_args: Mapping[str, int] | None = None) -> nn.Module:
    """The backbone alone, with ``num_features``; see ``encoder``."""
    small = stem.startswith("small") or (stem == "auto" and image_size <= SMALL_IMAGE)
    if (sizes := small_resnet_sizes(arch)) is not None:
        width, stride, patch = sizes
        return SmallResNet(width, stride, patch, channels)
    if arch.startswith("torchvision/"):
        trunk = _torchvision(arch.removeprefix("torchvision/"), image_size)
    else:
        trunk = _timm(arch.removeprefix("timm/"), channels, image_size, arch_args or {})
    if isinstance(getattr(trunk, "conv1", None), nn.Conv2d) and hasattr(trunk, "maxpool"):
        _fit_stem(trunk, channels, small, padding=2 if stem == "small_padded" else 1)
    elif stem.startswith("small"):
        raise ValueError(f"stem: {stem!r} is known for ResNets with one first convolution, not for {arch!r}. "
                         "Give 'auto', or a ResNet such as 'resnet18'.")
    elif arch.startswith("torchvision/") and channels != 3:
        raise ValueError(f"arch: {arch!r} takes 3 channels and the images have {channels}. "
                         f"Give timm's {arch.removeprefix('torchvision/')!r}, which takes any number.")
    return trunk


class SmallResNet(nn.Module):
    """Three stages of one basic block, widths W, 2W, 4W; D = 4W. For small images on small machines.

    The stem is a 3x3 convolution of stride ``stride``, or, with ``patch``, a (P+1)x(P+1) one of stride P.
    """

    def __init__(self, width: int, stride: int = 1, patch: int | None = None, channels: int = 3):
        super().__init__()
        block = torchvision.models.resnet.BasicBlock
        size, stride, padding = (patch + 1, patch, patch // 2) if patch else (3, stride, 1)
        self.conv1 = nn.Conv2d(channels, width, size, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = block(width, width)
        self.layer2 = block(width, 2 * width, 2, _shortcut(width, 2 * width))
        self.layer3 = block(2 * width, 4 * width, 2, _shortcut(2 * width, 4 * width))
        self.num_features = 4 * width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image_BcHW: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(image_BcHW)))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))


def _shortcut(width, wider):
    return nn.Sequential(nn.Conv2d(width, wider, 1, 2, bias=False), nn.BatchNorm2d(wider))


def _torchvision(name, image_size):
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(unknown(f"torchvision/{name}", [f"torchvision/{other}" for other in known], "torchvision"))
    sized = {"image_size": image_size} if name.startswith("vit_") else {}
    trunk = torchvision.models.get_model(name, weights=None, **sized)
    for classifier in ("fc", "classifier", "heads", "head"):
        if hasattr(trunk, classifier) and not getattr(trunk, "aux_logits", False):
            *before, linear = _up_to_linear(getattr(trunk, classifier))
            if isinstance(linear, nn.Linear):
                trunk.num_features = linear.in_features
                setattr(trunk, classifier, nn.Sequential(*before))
                return trunk
    raise ValueError(f"arch: torchvision/{name} has no classifier that this project knows. Give one of timm's names.")


def _up_to_linear(classifier):
    """A classifier's layers up to its first linear one; what stands before (a norm, a pooling) is the backbone's."""
    layers = [classifier] if isinstance(classifier, nn.Linear) else list(classifier)
    count = next((i for i, layer in enumerate(layers, 1) if isinstance(layer, nn.Linear)), len(layers))
    return [layer for layer in layers[:count] if not isinstance(layer, nn.Dropout)]


def _timm(name, channels, image_size, arch_args):
    import timm  # half a second that `torchvision/` and `w16s1` need not wait

    if not timm.is_model(name.split(".")[0]):
        raise ValueError(unknown(name, timm.list_models(), "timm"))
    options: dict[str, Any] = {"img_size": image_size} if name.startswith(_SIZED) else {}
    if name.startswith("resnet"):
        options["zero_init_last"] = False                                        # as in MoCo's own code
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels, **options, **arch_args)
    except AssertionError as error:             # "dim should be divisible by num_heads"
        if not arch_args:
            raise
        raise ValueError(f"arch_args: {dict(arch_args)} for {name!r}: {error}.") from error


def _fit_stem(trunk, channels, small, padding):
    """A stem for other channels or small images."""
    conv = trunk.conv1
    if conv.in_channels == channels and not small:
        return
    size, stride, border = (3, 1, padding) if small else (conv.kernel_size[0], conv.stride[0], conv.kernel_size[0] // 2)
    trunk.conv1 = nn.Conv2d(channels, conv.out_channels, size, stride, border, bias=conv.bias is not None)
    nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small:
        trunk.maxpool = nn.Identity()


def trainable_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def feature_width(trunk: nn.Module) -> int:
    """D, asked of the backbone and never probed: a probe would move BatchNorm and guess the channels."""
    width: Any = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    return width

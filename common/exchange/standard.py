"""Networks that other libraries know by name, and the lines of code that build them from torchvision alone."""

import textwrap
from collections.abc import Iterable
from typing import NamedTuple

import torchvision
from torch import Tensor, nn

from common.architectures import small_resnet_sizes
from common.config import ConfigError
from common.exchange.facts import Facts

# ResNets that torchvision and timm build alike: same names, same keys, same arithmetic.
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
           "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
STEM_WIDTH = 64             # of all of them
_WIDER = """
def wider(width):
    shortcut = nn.Sequential(conv1x1(width, 2 * width, 2), nn.BatchNorm2d(2 * width))
    return BasicBlock(width, 2 * width, 2, shortcut)

"""
_STEMS = {"imagenet": "7, 2, 3", "small": "3, 1, 1", "small_padded": "3, 1, 2"}         # size, stride, border


def is_resnet(facts: Facts) -> bool:
    return facts.name in RESNETS and not facts.arch_args


def refused(facts: Facts, name: str, why: str, others: Iterable[str]) -> ConfigError:
    """The error about a network that format ``name`` cannot hold, with those that can."""
    what = facts.arch or "an encoder that common.backbones did not build"
    return ConfigError(f"--format {name}: {what}: {why}. Give --format {' or '.join(others)}.")


class Construction(NamedTuple):
    """Python that makes ``model``, with random weights, from torchvision's parts; the head, if any, is its ``fc``."""

    lines: list[str]
    standard: tuple[str, ...] = ()                          # imports, and what stands below them
    others: tuple[str, ...] = ("import torchvision", "from torch import nn")
    below: str = ""

    def file(self, load: str, *standard: str) -> str:
        """The text of a loader: ``def build()``, which returns the model, above ``load``."""
        body = textwrap.indent("\n".join([*self.lines, "return model"]), "    ")
        imports = "\n".join([*standard, *self.standard, "", "import torch", *self.others])
        return f"{imports}\n\n{self.below}\ndef build():\n{body}\n\n\n{load}"


def construction(facts: Facts, name: str) -> Construction:
    """Raises ConfigError, as format ``name``, for a network that torchvision has no parts for."""
    if facts.arch is None:
        raise refused(facts, name, "its parts are not known by name", ["torch_export", "onnx"])
    if small_resnet_sizes(facts.arch) is not None:
        return _small_resnet(facts)
    if is_resnet(facts):
        return _resnet(facts)
    if not facts.arch.startswith("torchvision/"):
        raise refused(facts, name, "torchvision has no such network", ["timm", "safetensors"])
    if facts.head:
        raise refused(facts, name, "a head is held for ResNets only", ["safetensors"])
    return Construction([_model(facts), _without_classifier(facts.name)])


def _small_resnet(facts: Facts) -> Construction:
    """``common.backbones.SmallResNet``, part by part."""
    sizes = small_resnet_sizes(facts.arch or "")
    assert sizes is not None
    W, stride, patch = sizes
    size, stride, border = (patch + 1, patch, patch // 2) if patch else (3, stride, 1)
    fc = f",\n    fc={_head(facts)}" if facts.head else ""
    return Construction([
        "model = nn.Sequential(OrderedDict(",
        f"    conv1=nn.Conv2d({facts.channels}, {W}, {size}, {stride}, {border}, bias=False), bn1=nn.BatchNorm2d({W}),",
        f"    act1=nn.ReLU(), layer1=BasicBlock({W}, {W}), layer2=wider({W}), layer3=wider({2 * W}),",
        f"    pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(){fc}))"],
        ("from collections import OrderedDict",),
        ("from torch import nn", "from torchvision.models.resnet import BasicBlock, conv1x1"), _WIDER)


def _resnet(facts: Facts) -> Construction:
    lines = [_model(facts), f"model.fc = {_head(facts)}"]
    if facts.stem != "imagenet" or facts.channels != 3:
        stem = f"{facts.channels}, {STEM_WIDTH}, {_STEMS[facts.stem]}"
        lines.append(f"model.conv1 = nn.Conv2d({stem}, bias=False)")
    if facts.stem != "imagenet":
        lines.append("model.maxpool = nn.Identity()")
    return Construction(lines)


def _model(facts: Facts) -> str:
    sized = f", image_size={facts.image_size}" if facts.name.startswith("vit_") else ""
    return f'model = torchvision.models.get_model("{facts.name}", weights=None{sized})'


def _without_classifier(name: str) -> str:
    """The line that leaves of a classifier what stands before its first linear layer, as in ``common.backbones``."""
    model = torchvision.models.get_model(name, weights=None)        # not on "meta": RegNet computes its widths
    part = next(part for part in ("fc", "classifier", "heads", "head") if hasattr(model, part))
    found = getattr(model, part)
    layers = [found] if isinstance(found, nn.Linear) else list(found)
    before = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    kept = not all(isinstance(layer, nn.Dropout) for layer in layers[:before])
    return f"model.{part} = " + (f"model.{part}[:{before}]" if kept else "nn.Identity()")


def _head(facts: Facts) -> str:
    """The head that ``common.backbones.projection`` makes; nothing for a backbone."""
    if not facts.head:
        return "nn.Identity()"
    *hidden, dim = facts.head
    if not hidden:
        return f"nn.Linear({facts.width}, {dim})"
    return f"nn.Sequential(nn.Linear({facts.width}, {hidden[0]}), nn.ReLU(), nn.Linear({hidden[0]}, {dim}))"


def with_fc(state: dict[str, Tensor], facts: Facts) -> dict[str, Tensor]:
    """Of an encoder the state with the head as ``fc.*``; a backbone's as it is, with the versions of its modules."""
    if not facts.head:
        return state
    return {name.removeprefix("backbone.") if name.startswith("backbone.") else f"fc.{name.removeprefix('head.')}": x
            for name, x in state.items()}


def features(facts: Facts) -> str:
    """What ``load`` gives back for ``model``: it, or what brings an encoder's features to unit length, too."""
    return "lambda images: nn.functional.normalize(model(images))" if facts.head and facts.unit else "model"

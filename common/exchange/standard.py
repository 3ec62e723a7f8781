"""Networks that other libraries know by name, and the lines of code that build them from those libraries alone."""

from collections.abc import Iterable

import torchvision

from common.architectures import small_resnet_sizes
from common.config import ConfigError
from common.exchange.handed import Facts

# ResNets that torchvision and timm build alike: same names, same keys, same arithmetic.
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
           "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")


def is_resnet(facts: Facts) -> bool:
    return facts.name in RESNETS


def is_torchvisions(facts: Facts) -> bool:
    return (facts.arch or "").startswith("torchvision/") or is_resnet(facts)


def refused(facts: Facts, name: str, why: str, others: Iterable[str]) -> ConfigError:
    """The error about a network that format ``name`` cannot hold, with those that can."""
    what = facts.arch or "an encoder that is not of common.backbones"
    return ConfigError(f"--format {name}: {what}: {why}. Give --format {' or '.join(others)}.")


def construction(facts: Facts, name: str) -> str:
    """Lines that make ``model``, with random weights, from torchvision's parts; the head, if any, is its ``fc``.

    Raises ConfigError, as format ``name``, for a network that torchvision has no parts for.
    """
    if small_resnet_sizes(facts.arch or "") is not None:
        return _small_resnet(facts)
    if not is_torchvisions(facts):
        raise refused(facts, name, "torchvision has no such network", ["timm", "safetensors"])
    return _named(facts, name)


def _small_resnet(facts: Facts) -> str:
    sizes = small_resnet_sizes(facts.arch or "")
    assert sizes is not None
    W, stride, patch = sizes
    size, stride, padding = (patch + 1, patch, patch // 2) if patch else (3, stride, 1)
    fc = f",\n    fc={_head(facts)}" if facts.head else ""
    return f"""\
from collections import OrderedDict

from torchvision.models.resnet import BasicBlock, conv1x1


def wider(width):
    shortcut = nn.Sequential(conv1x1(width, 2 * width, 2), nn.BatchNorm2d(2 * width))
    return BasicBlock(width, 2 * width, 2, shortcut)


model = nn.Sequential(OrderedDict(
    conv1=nn.Conv2d({facts.channels}, {W}, {size}, {stride}, {padding}, bias=False), bn1=nn.BatchNorm2d({W}),
    act1=nn.ReLU(), layer1=BasicBlock({W}, {W}), layer2=wider({W}), layer3=wider({2 * W}),
    pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(){fc}))
"""


def _named(facts: Facts, name: str) -> str:
    sized = f", image_size={facts.image_size}" if facts.name.startswith("vit_") else ""
    lines = ["import torchvision", "", f'model = torchvision.models.get_model("{facts.name}", weights=None{sized})']
    if is_resnet(facts):
        width = 64
        if facts.stem == "small":
            lines += [f"model.conv1 = nn.Conv2d({facts.channels}, {width}, 3, 1, 1, bias=False)",
                      "model.maxpool = nn.Identity()"]
        elif facts.channels != 3:
            lines += [f"model.conv1 = nn.Conv2d({facts.channels}, {width}, 7, 2, 3, bias=False)"]
        lines += [f"model.fc = {_head(facts)}"]
    elif facts.head:
        raise refused(facts, name, "a head is held for ResNets only", ["safetensors"])
    else:
        lines += [_without_classifier(facts.name)]
    return "\n".join(lines) + "\n"


def _without_classifier(name: str) -> str:
    """The line that leaves of a classifier what stands before its first linear layer (``backbones._torchvision``)."""
    import torch

    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    for part in ("classifier", "heads", "head"):
        if (found := getattr(model, part, None)) is not None:
            layers = [found] if isinstance(found, torch.nn.Linear) else list(found)
            before = next(i for i, layer in enumerate(layers) if isinstance(layer, torch.nn.Linear))
            kept = not all(isinstance(layer, torch.nn.Dropout) for layer in layers[:before])
            return f"model.{part} = " + (f"model.{part}[:{before}]" if kept else "nn.Identity()")
    return "model.fc = nn.Identity()"


def _head(facts: Facts) -> str:
    """The head that ``common.backbones.projection`` makes; nothing for a backbone."""
    if not facts.head:
        return "nn.Identity()"
    if len(facts.head) == 1:
        return f"nn.Linear({facts.width}, {facts.head[0]})"
    hidden, dim = facts.head
    return f"nn.Sequential(nn.Linear({facts.width}, {hidden}), nn.ReLU(), nn.Linear({hidden}, {dim}))"


def state_with_fc(state, facts: Facts):
    """Of an encoder the state with the head as ``fc.*``; a backbone's as it is."""
    if not facts.head:
        return dict(state)
    return {name.removeprefix("backbone.") if name.startswith("backbone.") else f"fc.{name.removeprefix('head.')}": x
            for name, x in state.items()}


def unit(facts: Facts) -> str:
    """Python that turns ``model(images)`` into the features: those of an encoder have unit length."""
    return "lambda images: nn.functional.normalize(model(images))" if facts.head else "model"

"""How projects name the tensors of an encoder, recognised from the names alone.

A layout says under which prefix the backbone is, where its head is, and whose the copy is that follows slowly. Checked
against the public code of each project: facebookresearch/moco (main_moco.py, the CIFAR-10 notebook), moco-v3
(moco/builder.py), zhirongw/lemniscate.pytorch (models/), lightly-ai/lightly (models/, benchmarks/), vturrisi/solo-learn
(solo/methods/base.py), facebookresearch/vissl (extra_scripts/convert_vissl_to_torchvision.py).
"""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from torch import Tensor

from common.config import ConfigError

Part = Literal["query", "key"]
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")      # DataParallel and DDP, torch.compile, FSDP
WHOLE = ("model", "net", "network")                             # names that everything in a file may stand under
INNER = ("fc.", "linear.", "head.", "heads.head.", "classifier.")       # a network's own last layer


class Layout(NamedTuple):
    """``told`` by prefixes that are all there. ``head``: "" where it is the network's own last layer."""

    name: str
    told: tuple[str, ...]
    query: str = ""
    key: str | None = None
    head: str = ""
    key_head: str = ""
    config: str = "moco_v2"
    projects: bool = True           # whether the last layer is a projection head, and not a classifier
    padded: bool = False            # whether a 3x3 stem has a border of 2


LAYOUTS = (
    Layout("moco_cifar10", ("encoder_q.net.",), "encoder_q.net.", "encoder_k.net.", config="moco_cifar10"),
    Layout("moco", ("encoder_q.",), "encoder_q.", "encoder_k."),
    Layout("moco_v3", ("base_encoder.",), "base_encoder.", "momentum_encoder."),
    Layout("vissl", ("trunk._feature_blocks.",), "trunk._feature_blocks.", head="heads.0.clf."),
    Layout("lightly_benchmark", ("query_backbone.", "backbone."), "query_backbone.", "backbone.",
           "query_projection_head.layers.", "projection_head.layers."),
    Layout("lightly", ("backbone.", "projection_head."), "backbone.", "backbone_momentum.",
           "projection_head.layers.", "projection_head_momentum.layers."),
    Layout("solo_learn", ("backbone.", "projector."), "backbone.", "momentum_backbone.", "projector.",
           "momentum_projector.", padded=True),
    Layout("solo_learn_old", ("encoder.", "projector."), "encoder.", "momentum_encoder.", "projector.",
           "momentum_projector.", padded=True),
    Layout("own_encoder", ("backbone.", "head."), "backbone.", head="head."),
    Layout("backbone", ("backbone.",), "backbone.", projects=False),
    Layout("instdisc", (), config="instdisc"),
    Layout("own", ("layer1.conv1.",), projects=False),
    Layout("torchvision", ("layer1.",), projects=False),
    Layout("torchvision", ("conv_proj.",), projects=False),
    Layout("timm", (), projects=False),
)
NAMES = tuple(dict.fromkeys(layout.name for layout in LAYOUTS))


class Sorted(NamedTuple):
    """An encoder's tensors under the names that torchvision and timm have: ``backbone``, and a ``head``'s own names.

    The backbone may still hold a last layer of its own. ``aside`` are the names of all else.
    """

    layout: Layout
    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    aside: list[str]


def sort(tensors: dict[str, Tensor], name: str | None = None, part: Part = "query") -> Sorted:
    """Find the encoder among ``tensors``, by the layout ``name`` or the one that the names tell.

    Raises ConfigError for a layout that is not known, and for a key encoder where the layout has none.
    """
    tensors = unwrapped(tensors)
    layout = _named(name, tensors) if name else recognise(tensors)
    prefix, head_prefix = (layout.query, layout.head) if part == "query" else (layout.key, layout.key_head)
    if prefix is None:
        raise ConfigError(f"--part key: the layout {layout.name!r} keeps no key encoder. Give --part query.")
    found, head = _below(tensors, prefix), _below(tensors, head_prefix) if head_prefix else {}
    taken = [prefix, *([head_prefix] if head_prefix else [])]
    aside = [key for key in tensors if not key.startswith(tuple(taken))]
    return Sorted(layout, _renamed(found), head, aside)


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the names that wrappers put in, wherever they stand. Raises ConfigError where two would become one."""
    parts = {key: [part for part in key.split(".") if part not in WRAPPERS] for key in tensors}
    while len({names[0] for names in parts.values()}) == 1 and all(
            len(names) > 1 and names[0] in WHOLE for names in parts.values()):
        parts = {key: names[1:] for key, names in parts.items()}
    found = {".".join(names): tensors[key] for key, names in parts.items()}
    if len(found) < len(tensors):
        raise ConfigError(f"names: {len(tensors) - len(found)} tensors would have the name of another one without "
                          f"{', '.join(WRAPPERS)}. Save the weights of one network alone.")
    return found


def recognise(tensors: dict[str, Tensor]) -> Layout:
    """The first layout whose prefixes are there; the last, which asks for none, where no other is."""
    return next(layout for layout in LAYOUTS if _told(layout, tensors))


def _told(layout: Layout, tensors: dict[str, Tensor]) -> bool:
    if layout.name == "instdisc":                           # a ResNet with 128 outputs: no classifier of ImageNet
        last = tensors.get("fc.weight", tensors.get("linear.weight"))
        return "conv1.weight" in tensors and last is not None and len(last) == 128
    return all(any(key.startswith(prefix) for key in tensors) for prefix in layout.told)


def _named(name: str, tensors: dict[str, Tensor]) -> Layout:
    same = [layout for layout in LAYOUTS if layout.name == name]
    if not same:
        raise ConfigError(f"--layout: {name!r} is not known. Allowed: {', '.join(NAMES)}.")
    return next((layout for layout in same if _told(layout, tensors)), same[0])


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's names where a Sequential has numbered it, and where its shortcuts have another name."""
    if tensors and all(key.partition(".")[0].isdigit() for key in tensors):
        children = _children(tensors)
        tensors = {f"{children[key.partition('.')[0]]}.{key.partition('.')[2]}": value
                   for key, value in tensors.items()}
    return {re.sub(r"(^|\.)shortcut\.", r"\1downsample.", key): value for key, value in tensors.items()}


def _children(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The names of a numbered ResNet's children: a convolution, a norm, the stages in order, a last layer."""
    names: dict[str, str] = {}
    for number in _in_order(key.partition(".")[0] for key in tensors):
        own = _below(tensors, f"{number}.")
        if any(key.partition(".")[0].isdigit() for key in own):
            names[number] = f"layer{1 + sum(name.startswith('layer') for name in names.values())}"
        elif "running_mean" in own:
            names[number] = "bn1"
        else:
            names[number] = "fc" if own.get("weight", next(iter(own.values()))).dim() == 2 else "conv1"
    return names


def _in_order(numbers: Iterable[str]) -> list[str]:
    return sorted(set(numbers), key=int)


def split_last(names: Iterable[str], wanted: Iterable[str]) -> tuple[list[str], str]:
    """Names of a network's last layer, which ``wanted``, the names of its backbone, have not; and their prefix."""
    known = set(wanted)
    extra = [name for name in names if name not in known and name.startswith(INNER)]
    prefix = next((inner for inner in INNER if extra and all(name.startswith(inner) for name in extra)), "")
    return extra, prefix

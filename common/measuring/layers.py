"""The layers of a backbone in groups, from the image on: which of them are trained, and at which learning rate.

Layer-wise decay of the learning rate as in BEiT (Bao et al. 2022, Appendix) and ELECTRA (Clark et al. 2020): the group
at distance d from the classifier learns at ``layer_decay`` ** d times its rate.
"""

import itertools
import re
from typing import Any, NamedTuple

from torch import nn

from common.config import ConfigError

STEM = "stem"           # what stands before the first group that has a name
STAGES = r"layer\d+(?=\.)", r"encoder\.layers\.encoder_layer_\d+(?=\.)"         # of ResNets; of torchvision's ViTs
LISTS = r"(?:blocks|layers|stages|features)\.[^.]+(?=\.)", r"[^.]+(?=\.)"       # of others: entries, or all parts


class Group(NamedTuple):
    """Layers that are trained, or not, together."""

    name: str
    parameters: list[str]               # their names in the backbone


def layer_groups(backbone: nn.Module) -> list[Group]:
    """All parameters in groups in the order of the forward pass.

    Stem and stages of a ResNet, patch embedding and blocks of a ViT; of other networks of timm what timm groups, and of
    the rest the entries of their list of blocks, or their parts.
    """
    names = [name for name, _ in backbone.named_parameters()]
    skip = len(_shared(names))
    for pattern in STAGES:
        if any(re.match(pattern, name[skip:]) for name in names):
            return _by_name(names, pattern, skip)
    if hasattr(backbone, "group_matcher"):
        return _by_timm(backbone)
    pattern = next((pattern for pattern in LISTS if any(re.match(pattern, name[skip:]) for name in names)), LISTS[-1])
    return _by_name(names, pattern, skip)


def _shared(names: list[str]) -> str:
    """What all names begin with, up to a dot: the whole network is then one part of another."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{part[0]}." for part in itertools.takewhile(lambda part: len(set(part)) == 1, parts))


def _by_name(names: list[str], pattern: str, skip: int) -> list[Group]:
    """One group for each text that matches; what does not match belongs to the group before it."""
    groups: dict[str, list[str]] = {}
    group = STEM
    for name in names:
        found = re.match(pattern, name[skip:])
        group = name[:skip] + found[0] if found else group
        groups.setdefault(group, []).append(name)
    return [Group(*item) for item in groups.items()]


def _by_timm(backbone: Any) -> list[Group]:
    from timm.models import group_parameters  # half a second that ResNets need not wait

    groups = sorted(group_parameters(backbone, backbone.group_matcher(coarse=False)).items())
    return [Group(_name(names) if number else STEM, names) for number, names in groups]


def _name(names: list[str]) -> str:
    """What the group's names begin with, but for a last norm that stands elsewhere."""
    first = names[0].partition(".")[0]
    return _shared([name for name in names if name.partition(".")[0] == first]).rstrip(".")


def first_trained(groups: list[Group], layers: str) -> int:
    """The number of the first group that is trained; all after it are, too.

    ``layers``: "all"; "head": the classifier alone; how many of the last groups (what is a number counts them); or the
    name of the first of them. Raises ConfigError for anything else.
    """
    names = [group.name for group in groups]
    known = {"all": 0, "head": len(groups)} | {name: place for place, name in enumerate(names)}
    known |= {str(count): len(groups) - count for count in range(1, len(groups) + 1)}
    if layers not in known:
        raise ConfigError(f"--layers {layers}: the backbone has no such layers. Give all, head, how many of its last "
                          f"{len(groups)} groups of layers to train, or the first of them by name: {', '.join(names)}.")
    return known[layers]


def freeze(backbone: nn.Module, groups: list[Group], first: int) -> None:
    """Only the groups from ``first`` on get a gradient."""
    for place, group in enumerate(groups):
        for name in group.parameters:
            backbone.get_parameter(name).requires_grad_(place >= first)


def rates(groups: list[Group], layer_decay: float) -> list[float]:
    """The factor on the learning rate of each group; the classifier's is 1."""
    return [layer_decay ** (len(groups) - place) for place in range(len(groups))]


def parameter_groups(backbone: nn.Module, head: nn.Module, groups: list[Group], lr: float, weight_decay: float,
                     layer_decay: float) -> list[dict[str, Any]]:
    """For an optimizer: the classifier first, then the trained layers; parameters of one axis have no weight decay."""
    layers = [(1.0, list(head.parameters()))]
    layers += [(rate, [backbone.get_parameter(name) for name in group.parameters])
               for rate, group in zip(rates(groups, layer_decay), groups, strict=True)]
    return [{"params": chosen, "lr": lr * rate, "weight_decay": decay}
            for rate, parameters in layers for decay, flat in ((weight_decay, False), (0.0, True))
            if (chosen := [p for p in parameters if p.requires_grad and (p.ndim <= 1) == flat])]

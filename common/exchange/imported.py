"""Weights of another project as a checkpoint that every tool here reads: whole, or not at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from common import checkpoint
from common.backbones import feature_width
from common.config import ConfigError
from common.exchange import architecture, foreign, layouts, matching, template
from common.exchange.architecture import Architecture
from common.exchange.foreign import Foreign
from common.exchange.layouts import Layout, Part, Sorted
from common.exchange.matching import listed, some
from common.trained import load_trained

_HEADS: dict[tuple[str, ...], str] = {
    ("bias", "weight"): "linear", ("0.bias", "0.weight", "2.bias", "2.weight"): "mlp"}
_NO_COUNTERS = "no num_batches_tracked in the file: taken as 0, which evaluation never reads"


class Head(NamedTuple):
    """A projection head of ``common.backbones.projection``, or none, and ``said``: that, or why not, in words."""

    kind: str
    tensors: dict[str, Tensor]
    said: str


class Imported(NamedTuple):
    """``state`` is what the checkpoint holds; ``matched`` of the backbone's ``total`` tensors came from the file."""

    layout: str
    network: Architecture
    matched: int
    total: int
    head: str
    aside: list[str]
    notes: list[str]
    state: dict[str, Any]


def take(path: Path, *, arch: str | None = None, config: str | None = None, layout: str | None = None,
         part: Part = "query", overrides: Sequence[str] = ()) -> Imported:
    """Read ``path`` and find the encoder in it. ``arch`` where its shapes do not tell; ``overrides`` of the config.

    Raises ConfigError unless every tensor of the backbone is in the file, with its shape, and nothing of it is over.
    """
    file = foreign.read(path)
    found = layouts.sort(file.tensors, layout, part)
    network = _network(file, found, arch)
    trunk = matching.empty(network)
    last, prefix = layouts.split_last(found.backbone, trunk.state_dict())
    given = {name: tensor for name, tensor in found.backbone.items() if name not in last}
    matched = matching.fill(trunk, given, network.arch, found.layout.name, file)
    head = _head(found, prefix, feature_width(trunk))
    aside = [*found.aside, *([] if head.kind else [*last, *found.head]), *file.beside]
    notes = [*network.notes, *([_NO_COUNTERS] if matched < len(trunk.state_dict()) else [])]
    settings = template.config(config or _template(found.layout, head.kind), network, head.kind, head.tensors, trunk,
                               overrides)
    origin = {"layout": found.layout.name, "file": file.path.name, "sha256": file.sha256, "part": part,
              "epoch": file.epoch, "arch": network.arch}
    state = {"config": settings.text(), "weights": _weights(trunk, head, file),
             "facts": {"num_samples": template.num_samples(settings), "channels": network.channels},
             "parts": ["backbone", "head"] if head.kind else ["backbone"], "origin": origin}
    return Imported(found.layout.name, network, matched, len(trunk.state_dict()), head.said, aside, notes, state)


def write(imported: Imported, out: Path) -> None:
    """Save it as ``out``, once it loads again. Raises ConfigError where there is such a file already."""
    if out.exists():
        raise ConfigError(f"--out {out}: there is such a file already. Give another one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{out.name}.unchecked")
    try:
        checkpoint.save(beside, imported.state)
        load_trained(beside)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


def _network(file: Foreign, found: Sorted, arch: str | None) -> Architecture:
    """Named by the user, told by shapes, or named by a config.json beside the file."""
    if not any(tensor.dim() >= 3 for tensor in found.backbone.values()):
        _refuse_without_backbone(file, found)
    padded = found.layout.padded
    if arch is not None:
        return architecture.named(arch, found.backbone, padded)
    known = architecture.recognise(found.backbone, found.layout.name, padded)
    if known is None and file.arch is not None:
        known = architecture.named(file.arch, found.backbone, padded)
    if known is None:
        raise ConfigError(f"{file.path}: the names and shapes of layout {found.layout.name!r} tell no network that is "
                          f"known here.{_below(found.backbone, padded)} The file holds {listed(file.tensors)}. "
                          "Give --arch, such as timm/NAME or torchvision/NAME, or --layout, one of "
                          f"{', '.join(layouts.NAMES)}.")
    return known


def _below(tensors: dict[str, Tensor], padded: bool) -> str:
    """A sentence where the names are those of a known network below a prefix of no layout; else nothing."""
    for first in ("conv1.weight", "patch_embed.proj.weight", "conv_proj.weight"):
        for prefix in [name.removesuffix(first) for name in tensors if name.endswith(f".{first}")]:
            inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if network := architecture.recognise(inner, "", padded):
                names = matching.listed(matching.empty(network).state_dict())
                return (f" Below {prefix!r}, a prefix of no layout, stands what looks like {network.arch}, which has "
                        f"{names}: take the prefix off the names, and import that.")
    return ""


def _refuse_without_backbone(file: Foreign, found: Sorted) -> None:
    if not file.tensors:
        raise ConfigError(f"{file.path}: holds no tensors" + (f", but {listed(file.beside)}." if file.beside else "."))
    if all(tensor.dim() <= 2 for tensor in file.tensors.values()):
        raise ConfigError(f"{file.path}: holds a head or a classifier, and no backbone: no convolution is among its "
                          f"tensors, {listed(file.tensors)}. Give the file that the backbone is in.")
    raise ConfigError(f"{file.path}: 0 tensors of a backbone found. The layout {found.layout.name!r} has them under "
                      f"{found.layout.query!r}; the file holds {listed(file.tensors)}. Give --layout, one of "
                      f"{', '.join(layouts.NAMES)}.")


def _head(found: Sorted, prefix: str, width: int) -> Head:
    """The file's, below its layout's prefix or as the last layer of the network, below ``prefix``."""
    given = found.head or {name.removeprefix(prefix): tensor for name, tensor in found.backbone.items()
                           if prefix and name.startswith(prefix)}
    if not given:
        return Head("", {}, "none in the file")
    if not found.layout.projects:
        return Head("", {}, f"none: {prefix}* is a classifier, which is left aside")
    kind = _HEADS.get(tuple(sorted(given)))
    if kind is None or given["weight" if kind == "linear" else "0.weight"].shape[1:] != (width,):
        return Head("", {}, f"none: the file's is of another kind ({some(given)}), and is left aside")
    dim = len(given["weight" if kind == "linear" else "2.weight"])
    return Head(kind, given, f"{kind}, {dim} features")


def _weights(trunk: nn.Module, head: Head, file: Foreign) -> dict[str, Tensor]:
    weights = {**{f"backbone.{name}": tensor for name, tensor in trunk.state_dict().items()},
               **{f"head.{name}": tensor.float() for name, tensor in head.tensors.items()}}
    matching.check_values(weights, file)
    return weights


def _template(layout: Layout, head: str) -> str:
    return "moco_v1" if layout.name == "moco" and head == "linear" else layout.config

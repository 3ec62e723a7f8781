"""A network as a graph of operators, for batches of any number of images and, where it allows, of any size.

Axes: B images, c channels, H W pixels, D features.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from common.config import ConfigError
from common.exchange.handed import Handed

FILE = "graph.json"             # what the inputs and outputs are called, and which of their axes are free
INPUT, OUTPUT = "images", "features"
_OF_THIS_MACHINE = ("stack_trace", "from_node")         # noted of a node: files and lines of whoever traced it
_AXES = {0: "batch", 2: "height", 3: "width"}


class _Named(nn.Module):
    """The network with the argument's name that the graph's input gets."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class Graph(NamedTuple):
    """``program`` with the axes of its input that are ``free``, by number and name: {0: "batch", ...}."""

    program: ExportedProgram
    free: dict[int, str]

    def axes(self) -> list[str | int]:
        """The input's axes: a name where any length will do."""
        node = next(node for node in self.program.graph.nodes if node.name in self.program.graph_signature.user_inputs)
        return [self.free.get(axis, length) for axis, length in enumerate(map(_length, node.meta["val"].shape))]

    def describe(self, folder: Path, dim: int, **more: Any) -> None:
        """Write graph.json: the axes of input and output, and ``more`` of the format."""
        text = json.dumps({INPUT: self.axes(), OUTPUT: ["batch", dim], "dtype": "float32", **more}, indent=2)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")


def notes(folder: Path) -> list[str]:
    """Of an export that is a graph: a sentence on what it takes."""
    if not (folder / FILE).is_file():
        return []
    *_, height, width = json.loads((folder / FILE).read_text(encoding="utf-8"))[INPUT]
    size = f"images of this size alone, {height} x {width}" if isinstance(height, int) else "any height and width"
    return [f"The graph takes any number of images at a time, and {size}."]


def trace(handed: Handed) -> Graph:
    """The graph of ``handed.module``, free in B, H and W, or in B alone where the network is of one size (a ViT).

    What is said to be free is tried: with other numbers of images and other sizes the graph gives the network's own
    features, or it is not free. Raises ConfigError for a network that torch.export cannot trace.
    """
    network = _Named(handed.module).eval()
    images_BcHW = _images(2, handed)
    for free in _freedoms(handed):
        try:
            program = _traced(network, images_BcHW, free)
        except Exception as error:              # torch.export raises nearly anything about what it cannot trace
            refusal = error
            continue
        if all(_same(program, network, other_BcHW) for other_BcHW in _others(handed, free)):
            return Graph(program, free)
    raise ConfigError(f"{handed.arch or 'the encoder'}: torch.export cannot trace it for any number of images. Give "
                      "another format.") from refusal


def _freedoms(handed: Handed) -> Iterator[dict[int, str]]:
    """Padding that goes by the size (TensorFlow's "same") is more than the tracer comes to an end with: one size."""
    if not any("Same" in type(module).__name__ for module in handed.module.modules()):
        yield dict(_AXES)
    yield {0: _AXES[0]}


def _traced(network: nn.Module, images_BcHW: Tensor, free: dict[int, str]) -> ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (images_BcHW,),
                                      dynamic_shapes={INPUT: dict.fromkeys(free, Dim.DYNAMIC)})
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                for name in _OF_THIS_MACHINE:
                    node.meta.pop(name, None)
    return program


def _others(handed: Handed, free: dict[int, str]) -> Iterator[Tensor]:
    """Images in other numbers and, where those are free, of other sizes than the graph was traced with."""
    yield from (_images(count, handed) for count in (1, 3))
    if len(free) == len(_AXES):
        yield _images(2, handed, higher=32)
        yield _images(1, handed, higher=16, wider=48)


def _images(count: int, handed: Handed, higher: int = 0, wider: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(count)
    side = handed.image_size
    return torch.randn(count, handed.channels, side + higher, side + wider, generator=draw)


@torch.inference_mode()
def _same(program: ExportedProgram, network: nn.Module, images_BcHW: Tensor) -> bool:
    try:
        found_BD = program.module()(images_BcHW)
    except (RuntimeError, AssertionError, ValueError):
        return False
    return torch.allclose(found_BD, network(images_BcHW), rtol=1e-4, atol=1e-5)


def _length(length: Any) -> int:
    """Of a free axis the example's."""
    return length if isinstance(length, int) else 0

"""A graph in ONNX, for onnxruntime and whatever else reads it."""

import contextlib
import importlib.util
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.config import ConfigError
from common.exchange.facts import Facts
from common.exchange.format import Format, quoted
from common.exchange.graph import INPUT, OUTPUT, Graph, trace
from common.exchange.handed import Handed

if TYPE_CHECKING:
    from onnx import ModelProto

FILE = "model.onnx"
OPSET = 18              # the operators that PyTorch's exporter is written in; any later runtime takes them
MAX_PARAMETERS = 2**29  # float32, 2 GiB: all that one file of ONNX can hold
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def write(folder: Path, handed: Handed) -> None:
    """One file, checked by ONNX's own rules. Raises ConfigError for a network that one file cannot hold."""
    import onnx

    if (count := sum(parameter.numel() for parameter in handed.module.parameters())) >= MAX_PARAMETERS:
        raise ConfigError(f"--format onnx: {handed.arch}: {count:,} parameters are more than the 2 GiB that a file of "
                          "ONNX holds. Give --format torch_export.")
    graph = trace(handed)
    model = _converted(graph)
    _strip(model)
    _name_axes(model, graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / FILE)
    graph.describe(folder, handed.dim, opset=model.opset_import[0].version, ir_version=model.ir_version)


def _converted(graph: Graph) -> "ModelProto":
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(graph.program, kwargs={}, dynamo=True, opset_version=OPSET, input_names=[INPUT],
                                    output_names=[OUTPUT], verbose=False)
    assert program is not None                  # without dynamo=True it would be
    return program.model_proto


def _strip(model: "ModelProto") -> None:
    """Without what the exporter notes of whoever's machine traced it: files and lines."""
    nodes = [node for function in model.functions for node in function.node]
    graph = model.graph
    for part in [graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer, *nodes]:
        del part.metadata_props[:]


def _name_axes(model: "ModelProto", graph: Graph) -> None:
    """``batch``, ``height``, ``width`` for the symbols of the tracer, wherever one of those stands alone."""
    lengths = model.graph.input[0].type.tensor_type.shape.dim
    names = {lengths[axis].dim_param: name for axis, name in graph.free.items()}
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for length in value.type.tensor_type.shape.dim:
            if length.dim_param in names:
                length.dim_param = names[length.dim_param]


def loader(facts: Facts) -> str:
    if absent := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"--format onnx: {', '.join(absent)} not installed. pip install {' '.join(absent)}, or the "
                          "project with its extra: pip install '.[export]'.")
    return f"""\
from pathlib import Path

import onnxruntime
import torch


def load(folder):
    session = onnxruntime.InferenceSession(Path(folder) / "{FILE}", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {{"{INPUT}": images.numpy()}})[0])
"""


def lines(facts: Facts, folder: str) -> str:
    return ("import onnxruntime\n"
            f"session = onnxruntime.InferenceSession({quoted(folder, FILE)})\n"
            f'features, = session.run(None, {{"{INPUT}": images}})             # NumPy arrays, float32')


FORMAT = Format("onnx", "a graph for onnxruntime", write, loader, lines)

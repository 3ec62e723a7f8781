"""A graph for PyTorch alone: ``torch.export.load`` needs neither the network's code nor its library."""

from pathlib import Path

import torch

from common.exchange.facts import Facts
from common.exchange.format import Format, quoted
from common.exchange.graph import trace
from common.exchange.handed import Handed

FILE = "model.pt2"


def write(folder: Path, handed: Handed) -> None:
    graph = trace(handed)
    torch.export.save(graph.program, folder / FILE)
    graph.describe(folder, handed.dim)


def loader(facts: Facts) -> str:
    return f"""\
from pathlib import Path

import torch


def load(folder):
    return torch.export.load(Path(folder) / "{FILE}").module()
"""


def lines(facts: Facts, folder: str) -> str:
    return ("import torch\n"
            f"model = torch.export.load({quoted(folder, FILE)}).module()\n"
            "features = model(images)")


FORMAT = Format("torch_export", "a graph that torch.export.load loads", write, loader, lines, runs=FILE)

"""A state dict that loads, strictly, into torchvision's network of that name."""

from pathlib import Path

import torch

from common.exchange.format import Format
from common.exchange.handed import Facts, Handed
from common.exchange.standard import construction, state_with_fc, unit

FILE = "weights.pth"


def write(folder: Path, handed: Handed) -> None:
    torch.save(state_with_fc(handed.state, handed), folder / FILE)


def loader(facts: Facts) -> str:
    return f"""\
from pathlib import Path

import torch
from torch import nn
{construction(facts, "torchvision")}

def load(folder):
    model.load_state_dict(torch.load(Path(folder) / "{FILE}", weights_only=True))
    model.eval()
    return {unit(facts)}
"""


FORMAT = Format("torchvision", "a state dict for torchvision.models", write, loader)

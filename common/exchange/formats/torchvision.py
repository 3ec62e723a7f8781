"""A state dict that loads, strictly, into torchvision's network of that name."""

from pathlib import Path

import torch

from common.architectures import small_resnet_sizes
from common.exchange.facts import Facts
from common.exchange.format import Format, by_loader, quoted
from common.exchange.handed import Handed
from common.exchange.standard import construction, features, with_fc

FILE = "weights.pth"


def write(folder: Path, handed: Handed) -> None:
    torch.save(with_fc(handed.state, handed), folder / FILE)


def loader(facts: Facts) -> str:
    return construction(facts, "torchvision").file(f"""\
def load(folder):
    model = build()
    model.load_state_dict(torch.load(Path(folder) / "{FILE}", weights_only=True))
    model.eval()
    return {features(facts)}
""", "from pathlib import Path")


def lines(facts: Facts, folder: str) -> str:
    if small_resnet_sizes(facts.arch or "") is not None:
        return by_loader(facts, folder)                 # torchvision has its parts, but no name for it
    return "\n".join(["import torch, torchvision", "from torch import nn", *construction(facts, "torchvision").lines,
                      f"model.load_state_dict(torch.load({quoted(folder, FILE)}, weights_only=True))", "model.eval()"])


FORMAT = Format("torchvision", "a state dict for torchvision.models", write, loader, lines)

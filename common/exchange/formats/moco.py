"""The layout of the checkpoints of MoCo's official repository: ``module.encoder_q.*``, the head as ``fc``."""

from pathlib import Path

import torch

from common.exchange.facts import Facts
from common.exchange.format import Format
from common.exchange.handed import Handed
from common.exchange.standard import construction, features, with_fc

FILE = "checkpoint.pth.tar"
PREFIX = "module.encoder_q."


def write(folder: Path, handed: Handed) -> None:
    """Whatever is handed on stands as ``encoder_q``: the official scripts read no other."""
    state = {PREFIX + name: x for name, x in with_fc(handed.state, handed).items()}
    torch.save({"epoch": round(handed.trained.epoch), "arch": handed.name, "state_dict": state}, folder / FILE)


def loader(facts: Facts) -> str:
    return construction(facts, "moco").file(f"""\
def load(folder):
    state = torch.load(Path(folder) / "{FILE}", map_location="cpu", weights_only=True)["state_dict"]
    model = build()
    model.load_state_dict({{name.removeprefix("{PREFIX}"): x for name, x in state.items()}})
    model.eval()
    return {features(facts)}
""", "from pathlib import Path")


FORMAT = Format("moco", "a checkpoint as MoCo's official repository writes it", write, loader)

"""The format of our own, for every encoder of ``common.backbones``: safetensors and the config to build it by."""

import json
from pathlib import Path

from safetensors.torch import save_file

from common.exchange.facts import Facts
from common.exchange.format import Format, quoted
from common.exchange.handed import Handed
from common.exchange.own import CONFIG, WEIGHTS
from common.exchange.standard import refused


def write(folder: Path, handed: Handed) -> None:
    save_file({name: x.contiguous() for name, x in handed.state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(handed.as_json(), indent=2) + "\n", encoding="utf-8")


def loader(facts: Facts) -> str:
    if facts.arch is None:
        raise refused(facts, "safetensors", "its parts are not known by name", ["torch_export", "onnx"])
    return """\
from common.exchange import load_backbone


def load(folder):
    return load_backbone(folder)
"""


def lines(facts: Facts, folder: str) -> str:
    return ("from common.exchange import load_backbone\n"
            f"model = load_backbone({quoted(folder)})\n"
            "features = model(images)")


FORMAT = Format("safetensors", "weights and config of this project's own", write, loader, lines, ours=True)

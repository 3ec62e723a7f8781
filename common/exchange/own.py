"""The reader of the format of our own."""

import json
import os
from collections import OrderedDict
from typing import Any, cast

from safetensors.torch import load_file
from torch import Tensor, nn

from common import backbones, hub
from common.config import ConfigError
from common.encoder import Encoder
from common.exchange.facts import Facts
from common.state import fitting

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_backbone(folder: str | os.PathLike) -> nn.Module:
    """The network in ``folder``, which ``tools/export.py --format safetensors`` wrote, in evaluation mode.

    Of a backbone it maps images [B, c, H, W] to features [B, D]; of an encoder it is an ``Encoder``. Raises ConfigError
    for a folder that is none. ``folder`` may be ``hf-hub:USER/NAME``, too (``common.hub``).
    """
    folder = hub.local(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: no {name} in it. Give a folder that tools/export.py --format safetensors "
                              "has written.")
    try:
        facts = Facts.of_json(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error
    module = _built(facts)
    with fitting(str(folder / WEIGHTS)):
        module.load_state_dict(_versioned(load_file(folder / WEIGHTS), module))
    return module.eval()


def _versioned(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """With the versions of the modules, which safetensors does not keep and torchvision's MNASNet asks for."""
    found: Any = OrderedDict(state)
    own: Any = module.state_dict()
    found._metadata = own._metadata
    return cast(dict[str, Tensor], found)


def _built(facts: Facts) -> nn.Module:
    assert facts.arch is not None
    trunk = backbones.backbone(facts.arch, stem=facts.stem, channels=facts.channels, image_size=facts.image_size,
                               arch_args=facts.arch_args)
    if not facts.head:
        return trunk
    *hidden, dim = facts.head
    head = backbones.projection("mlp" if hidden else "linear", facts.width, dim, *hidden)
    return Encoder(trunk, head, facts.unit)

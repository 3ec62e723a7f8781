"""The formats by name: each is a module here with one ``FORMAT``."""

import difflib

from common.config import ConfigError
from common.exchange.format import Format
from common.exchange.formats import detectron2, moco, onnx, safetensors, timm, torch_export, torchvision

_MODULES = (torchvision, timm, safetensors, torch_export, onnx, detectron2, moco)
FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in _MODULES}


def by_name(name: str) -> Format:
    """Raises ConfigError for a name that no format has."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--format {name}: there is no such format.{hint} Allowed: {', '.join(FORMATS)}.")
    return FORMATS[name]

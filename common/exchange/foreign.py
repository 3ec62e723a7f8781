"""Files of weights that other projects have written, read without running any code that is in them.

What torch saves is a zip archive since 1.6 and a chain of pickles before (as MoCo's released files); both are read with
``weights_only=True``. A safetensors file holds no code.
"""

import hashlib
import json
import pickle
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from common.config import ConfigError
from common.container import Refused, check_archive
from common.printable import printable
from common.tree import MAX_DEPTH, check_extent

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# What holds the weights of a network among an optimizer, an epoch and the like; VISSL's is three deep.
HOLDERS = ("classy_state_dict", "base_model", "state_dict", "model_state_dict", "model", "network", "net")
_SAFE = re.compile(r"collections (?:OrderedDict|Counter)|torch(?:\.\w+)* \w*Storage|torch\._utils _rebuild_\w+|"
                   r"torch\._tensor _rebuild_\w+|torch (?:Size|device|u?int\d+|b?float\d*|half|double|long|bool)|"
                   r"torch\.nn\.parameter Parameter")


class Foreign(NamedTuple):
    """``tensors`` by dotted name; ``beside`` names what else is in the file; ``arch`` of a config.json beside it."""

    path: Path
    tensors: dict[str, Tensor]
    beside: list[str]
    epoch: int | None
    arch: str | None
    sha256: str


def read(path: Path) -> Foreign:
    """A file of weights, or the folder of an export. Raises ConfigError, with what to do, for what is not loaded."""
    path = path / WEIGHTS if (path / WEIGHTS).is_file() else path
    if not path.is_file():
        what = f"is a folder without {WEIGHTS}" if path.is_dir() else "no such file"
        raise ConfigError(f"{path}: {what}. Give a file of weights (.pth, .pt, .pth.tar, .ckpt, .safetensors).")
    try:
        with open(path, "rb") as file:
            tree = _loaded(file, path.stat().st_size)
            digest = hashlib.file_digest(file, "sha256") if not file.seek(0) else None
    except Refused as error:
        raise ConfigError(f"{path}: {error}") from error
    assert digest
    if {"format", "sha256", "state"} == set(tree):
        raise ConfigError(f"{path}: a checkpoint of this project, which every tool reads as it is.")
    holder, beside = _holder(tree)
    tensors = dict(_flat(holder, path))
    epoch = tree.get("epoch", tree.get("phase_idx"))
    return Foreign(path, tensors, [*beside, *_others(holder)], epoch if type(epoch) is int else None,
                   _arch(path.with_name(CONFIG)) if path.name == WEIGHTS else None, digest.hexdigest())


def _loaded(file: BinaryIO, size: int) -> dict[Any, Any]:
    start = file.read(9)
    file.seek(0)
    if not start:
        raise Refused("damaged: the file is empty.")
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return _safetensors(file)
    if start[:4] == b"PK\x03\x04":
        check_archive(file)
    elif start[:1] != b"\x80":
        tar = "a tar archive, torch's format of before 2017" if tarfile.is_tarfile(file) else "no file of weights"
        raise Refused(f"{tar}. Formats that are read: what torch.save writes, and safetensors.")
    return _torch(file, size)


def _safetensors(file: BinaryIO) -> dict[Any, Any]:
    try:
        return dict(load_safetensors(file.read()))
    except SafetensorError as error:
        raise Refused(f"damaged, or cut off: {error}.") from error


def _torch(file: BinaryIO, size: int) -> dict[Any, Any]:
    file.seek(0)
    try:
        tree = torch.load(file, map_location="cpu", weights_only=True)
        check_extent(tree, size)
    except pickle.UnpicklingError as error:
        file.seek(0)
        raise Refused(_refusal(file)) from error
    except MemoryError:
        raise
    except Exception as error:                      # a damaged pickle can raise nearly everything
        raise Refused(f"damaged, cut off, or no file of weights: {type(error).__name__}: "
                      f"{printable(str(error).partition(chr(10))[0])[:200]}") from error
    if not isinstance(tree, dict):
        raise Refused(f"holds a {type(tree).__name__}, and not weights by name.")
    return tree


def _refusal(file: BinaryIO) -> str:
    """Which objects loading would have to make by code, and how to get the weights without them."""
    names = list(dict.fromkeys(name for name in _globals(file) if not _SAFE.fullmatch(name)))
    shown = ", ".join(printable(name.replace(" ", "."))[:80] for name in names[:4])
    known = " (InstDisc's authors save their memory bank so)" if any("NCEAverage" in name for name in names) else ""
    return (f"refused: it holds more than tensors and plain values: {shown or 'objects'}{known}, and loading them runs "
            "code. If you trust the file, take the weights out where the project that wrote it is installed, and "
            "import those:\n  import torch\n"
            "  whole = torch.load('FILE', map_location='cpu', weights_only=False)\n"
            "  state = whole['state_dict'] if isinstance(whole, dict) else whole.state_dict()\n"
            "  torch.save({'state_dict': state}, 'weights.pth')")


def _globals(file: BinaryIO) -> Iterator[str]:
    """Module and name of all that the pickles of a file ask for, as far as they can be read."""
    strings: list[str] = []
    try:
        for stream in _pickles(file):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    yield str(argument)
                elif opcode.name == "STACK_GLOBAL":
                    yield " ".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, EOFError, IndexError, UnicodeDecodeError):
        return


def _pickles(file: BinaryIO) -> Iterator[Any]:
    if not zipfile.is_zipfile(file):
        file.seek(0)
        yield from 4 * [file]                       # magic number, version, system, and the content
        return
    with zipfile.ZipFile(file) as archive:
        yield from (archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))


def _holder(tree: dict[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """The dict of the network's weights, and the names of what lies beside it on the way there."""
    beside: list[str] = []
    for _ in range(MAX_DEPTH):
        name = next((name for name in HOLDERS if isinstance(tree.get(name), dict)), None)
        if name is None:
            break
        beside += [str(other) for other in tree if other != name]
        tree = tree[name]
    return tree, beside


def _flat(tree: dict[Any, Any], path: Path, above: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of dicts in dicts, by dotted name."""
    for key, value in tree.items():
        if isinstance(value, Tensor):
            if value.is_quantized:
                raise ConfigError(f"{path}: {printable(f'{above}{key}')[:80]} is quantized, which is not read. Give "
                                  "the weights of before.")
            yield f"{above}{key}", value
        elif isinstance(value, dict):
            yield from _flat(value, path, f"{above}{key}.")


def _others(holder: dict[Any, Any]) -> list[str]:
    return [str(key) for key, value in holder.items() if not isinstance(value, Tensor | dict)]


def _arch(config: Path) -> str | None:
    """The network that a config.json of timm, or of this project's exports, names."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        arch = found.get("arch") or found.get("architecture")
    except (OSError, ValueError, AttributeError):
        return None
    return arch if isinstance(arch, str) else None

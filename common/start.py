"""Weights that a run begins with, in place of random ones: imported, or another run's."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from common.checkpoint import DamagedCheckpoint
from common.checkpoint import load as load_checkpoint
from common.config import Config, ConfigError
from common.encoder import Encoder
from common.method import Method
from common.state import check_state, check_weights

WHERE = "run.weights"


class StartWeights(NamedTuple):
    """An encoder's tensors by name (``backbone.*``, ``head.*``), which of its ``parts`` they are, and whose."""

    tensors: dict[str, Tensor]
    parts: tuple[str, ...]
    config: str                     # as YAML: what it was trained by, or is built by
    whose: str


def sha256(file: str | None) -> str | None:
    """Of the file's bytes; "" where no file is named, None where it is not there."""
    if file is None:
        return ""
    if not Path(file).is_file():
        return None
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read(file: str) -> StartWeights:
    """Imported weights, or the encoder of a run's checkpoint. Raises ConfigError where there are none to begin with."""
    if not Path(file).is_file():
        what = "is a folder; give one of the files in it" if Path(file).is_dir() else "no such file"
        raise ConfigError(f"{WHERE}: {file}: {what}. Give a checkpoint of a run, or what "
                          "tools/import_weights.py wrote.")
    state = load_checkpoint(file)
    if "weights" in state:
        check_weights(state, file)
        layout = (state.get("origin") or {}).get("layout", "another project")
        return StartWeights(state["weights"], tuple(state["parts"]), state["config"], f"imported, {layout}")
    check_state(state, file)
    step = state["trainer"]["step"]
    if not step:
        raise ConfigError(f"{WHERE}: {file}: its weights are as random as training found them (step 0). Give a later "
                          "checkpoint.")
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in state["trainer"]["method"].items()
               if name.startswith("encoder.")}
    return StartWeights(tensors, ("backbone", "head"), state["config"], f"a run's, step {step:,}")


def begin_with(method: Method, file: str) -> str:
    """Give the method's encoder the weights in ``file``, and what follows it, too; in words, what was taken.

    The backbone must be the same, name by name; the head is taken where it fits. Raises ConfigError where it is not.
    """
    weights = read(file)
    _take_backbone(method.encoder, weights, file)
    head = _take_head(method.encoder, weights)
    method.follow_encoder()
    return f"{file} ({weights.whose}): {head}; all else starts anew"


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _take_backbone(encoder: Encoder, weights: StartWeights, file: str) -> None:
    given, wanted = _part(weights.tensors, "backbone"), encoder.backbone.state_dict()
    if _shapes(given) != _shapes(wanted):
        raise ConfigError(f"{WHERE}: {file} is of another backbone: {_difference(_shapes(given), _shapes(wanted))}. "
                          f"{_how_built(weights)}")
    encoder.backbone.load_state_dict(given)


def _difference(given: dict[str, list[int]], wanted: dict[str, list[int]]) -> str:
    """The first place where two lists of shapes differ, and how many more there are."""
    odd = [name for name in {**wanted, **given} if given.get(name) != wanted.get(name)]
    name, more = odd[0], f" (and {len(odd) - 1} more)" * (len(odd) > 1)
    return f"{name} is {given.get(name, 'missing')} in the file and {wanted.get(name, 'missing')} in the run{more}"


def _how_built(weights: StartWeights) -> str:
    """What the config would have to say, as far as the file's own does."""
    try:
        config = Config.parse(weights.config, "the file's config")
    except ConfigError as error:
        raise DamagedCheckpoint(str(error)) from error
    keys = [key for key in ("arch", "stem", "channels", "arch_args") if config.get(f"method.encoder.{key}") is not None]
    said = " ".join(f"method.encoder.{key}={config.get(f'method.encoder.{key}')}" for key in keys)
    return f"Its own config has: {said or 'an encoder of its own'}; views.size={config.get('views.size')}."


def _take_head(encoder: Encoder, weights: StartWeights) -> str:
    """The head's weights where they fit; in words, what was taken in all."""
    given, wanted = _part(weights.tensors, "head"), encoder.head.state_dict()
    if "head" not in weights.parts or not given:
        return "the backbone; the file has no head, and the run's is new"
    if _shapes(given) != _shapes(wanted):
        return f"the backbone; the head is new, for {_difference(_shapes(given), _shapes(wanted))}"
    encoder.head.load_state_dict(given)
    return "backbone and head"

"""What a checkpoint of a run holds, checked before it is used: a sound file may still be another program's."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from common.checkpoint import DamagedCheckpoint

MAX_IMAGES = 2**40
_KINDS: dict[str, type] = {"config": str, "digest": str, "data": str, "facts": dict, "trainer": dict, "rng": list,
                           "trainer.step": int, "trainer.skipped": int, "trainer.method": dict,
                           "trainer.optimizer": dict, "trainer.scaler": dict, "facts.num_samples": int,
                           "facts.channels": int}


def check_state(state: dict[str, Any], where: str) -> None:
    """Raises DamagedCheckpoint unless the known places hold what ``Session.save`` put there; ``where`` names it."""
    for name, kind in _KINDS.items():
        section, _, key = name.rpartition(".")
        holder = state[section] if section else state
        if type(holder.get(key)) is not kind:
            raise DamagedCheckpoint(f"{where}: not a run's checkpoint: '{name}' holds "
                                    f"{'nothing' if key not in holder else f'a {type(holder[key]).__name__}'}, where "
                                    f"a {kind.__name__} belongs.")
    for name, kind in _KINDS.items():
        section, _, key = name.rpartition(".")
        number = state[section][key] if kind is int else 1
        if not int(section == "facts") <= number <= MAX_IMAGES:
            raise DamagedCheckpoint(f"{where}: not a run's checkpoint: '{name}' is {number}.")
    classes = state["facts"].get("num_classes", 0)                       # checkpoints of before have it not
    if type(classes) is not int or not 0 <= classes <= MAX_IMAGES:
        raise DamagedCheckpoint(f"{where}: not a run's checkpoint: 'facts.num_classes' is {str(classes)[:80]}.")
    trainer = state["trainer"]
    if type(trainer.get("lr_scale", 1.0)) is not float or type(trainer.get("rollbacks", 0)) is not int:
        raise DamagedCheckpoint(f"{where}: not a run's checkpoint: 'trainer.lr_scale' and 'trainer.rollbacks' are "
                                "numbers.")
    if not all(isinstance(value, Tensor) for value in state["trainer"]["method"].values()):
        raise DamagedCheckpoint(f"{where}: not a run's checkpoint: 'trainer.method' holds more than tensors.")


def check_weights(state: dict[str, Any], where: str) -> None:
    """Raises DamagedCheckpoint unless ``state`` holds an encoder's weights as ``common.exchange`` puts them there."""
    facts, weights, parts = (state.get(name) for name in ("facts", "weights", "parts"))
    if type(state.get("config")) is not str or not isinstance(facts, dict) or not isinstance(weights, dict):
        raise DamagedCheckpoint(f"{where}: not imported weights: 'config', 'facts' or 'weights' is missing.")
    for name in ("num_samples", "channels"):
        if type(facts.get(name)) is not int or not 1 <= facts[name] <= MAX_IMAGES:
            raise DamagedCheckpoint(f"{where}: not imported weights: 'facts.{name}' is {facts.get(name)!r}.")
    if parts not in (["backbone"], ["backbone", "head"]):
        raise DamagedCheckpoint(f"{where}: not imported weights: 'parts' is {str(parts)[:80]}.")
    if not all(isinstance(value, Tensor) and str(name).partition(".")[0] in parts for name, value in weights.items()):
        raise DamagedCheckpoint(f"{where}: not imported weights: 'weights' holds more than tensors of {parts}.")


@contextlib.contextmanager
def fitting(where: str) -> Iterator[None]:
    """Taking over a state: weights or settings that are not this run's are the checkpoint's fault, and said shortly."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        lines = [line.strip() for line in str(error).splitlines() if not line.startswith("Error(s) in loading")]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise DamagedCheckpoint(f"{where} does not fit the method of the config: {''.join(lines[:1])[:300].rstrip('.')}"
                                f"{more}. Leave the settings of the method as the run had them.") from error

"""What is not trained does not move: which tensors these are, and the proof."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import nn


def is_frozen(module: nn.Module) -> bool:
    """Whether it has parameters, and none is trained."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trained) and not any(trained)


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[list[str]]:
    """Gives the names of the parameters and buffers that nobody is to train.

    Raises RuntimeError, naming them, if some are not what they were, to the last bit, when it is left.
    """
    names = _frozen_names(module)
    before = _digests(module, names)
    yield names
    after = _digests(module, names)
    if moved := [name for name in names if before[name] != after[name]]:
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        raise RuntimeError(f"{len(moved)} of {len(names)} tensors that were to stay as they are have moved while the "
                           f"classifier was trained: {', '.join(moved[:3])}{more}. No number of it is reported.")


def _frozen_names(module: nn.Module) -> list[str]:
    """Parameters without gradient, and all buffers of what has no other."""
    parts = [name for name, part in module.named_modules() if is_frozen(part)]
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    held = {f"{part}.{name}".lstrip(".") for part in parts for name, _ in module.get_submodule(part).named_buffers()}
    return sorted(frozen | held)


def _digests(module: nn.Module, names: list[str]) -> dict[str, str]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: hashlib.sha256(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            .hexdigest() for name in names}

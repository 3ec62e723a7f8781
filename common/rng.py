"""The state of the process's random number generators, in a form that a checkpoint holds."""

import random
from typing import Any

import numpy as np
import torch

from common.counter import bits


def rng_state() -> dict[str, Any]:
    """The global generators of torch, NumPy, Python, and of the CUDA or MPS device in use, as tensors and numbers.

    Each rank has its own: a checkpoint of W ranks holds W of them.
    """
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - what others draw from it must go on, too
    version, words, python_gauss = random.getstate()
    state = {"torch": torch.get_rng_state(),
             "numpy": {"kind": numpy["bit_generator"], "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
                       "position": int(numpy["state"]["pos"]), "has_gauss": int(numpy["has_gauss"]),
                       "gauss": float(numpy["gauss"])},
             "python": {"version": version, "words": torch.tensor(words), "gauss": python_gauss}}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what ``rng_state`` gave; that of a kind of device that this machine lacks is left out."""
    torch.set_rng_state(state["torch"])
    numpy, python = state["numpy"], state["python"]
    key = numpy["key"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], key, numpy["position"], numpy["has_gauss"], numpy["gauss"]))  # noqa: NPY002
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def seed_all(*keys: int) -> None:
    """Start all global generators from ``keys``: a start of a run, and of a rank that a checkpoint does not know."""
    seed = int(bits(*keys[:-1], torch.tensor(keys[-1]))) % 2**32
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)

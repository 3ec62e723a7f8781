"""A copy of the state in memory of its own: what is saved is that of the step, though training goes on."""

from typing import Any

import torch
from torch import Tensor

from common.tree import compact, plain


class Snapshot:
    """Takes copies of states, one after another, into the same memory.

    What lies on a CUDA device is copied to pinned memory, in the order of its stream: the host does not wait, and steps
    that are queued later do not change the copy. So the first copy costs the memory, and the others only the copying.
    """

    def __init__(self) -> None:
        self._memory: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None

    def take(self, state: Any) -> Any:
        """``plain(state)`` with its own memory. It is whole after ``wait``, and valid until the next ``take``."""
        before, self._memory = iter(self._memory), []

        def copy(tensor: Tensor, where: str) -> Tensor:
            if tensor.device.type not in ("cpu", "cuda"):
                return compact(tensor, where)                       # no other device writes to the host's memory
            self._memory.append(_room_for(tensor, next(before, None)))
            return self._memory[-1].copy_(tensor, non_blocking=True)

        taken = plain(state, copy=copy)
        self._copied = torch.cuda.Event() if any(tensor.is_pinned() for tensor in self._memory) else None
        if self._copied is not None:
            self._copied.record()
        return taken

    def wait(self) -> None:
        """Until the device has made its copies; called by whoever reads them."""
        if self._copied is not None:
            self._copied.synchronize()


def _room_for(tensor: Tensor, before: Tensor | None) -> Tensor:
    """Memory of the host for a copy of ``tensor``: that of the copy before, if it is alike."""
    if before is not None and _layout(before) == _layout(tensor) and before.is_pinned() == tensor.is_cuda:
        return before
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def _layout(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.stride()

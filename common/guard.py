"""What follows an optimizer step happens only if the step was taken; the device decides, and the host does not wait.

On a GPU the host runs ahead: when it calls ``after_step``, it does not know yet whether loss and gradient were finite.
So nothing may stay changed by a step that turns out not to be. Three things see to it, and a method needs to know of
none: ``ema_`` and ``write_rows_`` ask ``skip`` themselves, and the trainer puts back all other buffers (``Kept``).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_skip: Tensor | None = None


@contextmanager
def skipping(skip: Tensor) -> Iterator[None]:
    """While it is entered, ``ema_`` and ``write_rows_`` change nothing where ``skip`` (float32, 0-d) is 1."""
    global _skip
    _skip = skip
    try:
        yield
    finally:
        _skip = None


def skip() -> Tensor | None:
    """1 where nothing may change, 0 elsewhere, on the device; None where the host knows that the step was taken."""
    return _skip


@torch.no_grad()
def write_rows_(table: Tensor, row_N: Tensor, value_N: Tensor) -> None:
    """table[row] <- value, if the step was taken. A row that is named twice is given the same value twice."""
    if _skip is not None:
        value_N = torch.where(_skip > 0, table[row_N], value_N)
    table[row_N] = value_N


class Kept:
    """Buffers of a module, kept before a step and put back if it was not taken; in a few calls, not one for each.

    BatchNorm's only, which the forward pass changes; or with ``all_but_tables`` all but those that a module names in
    ``tables``: large ones, written by ``write_rows_`` alone. Made anew if a buffer gets another place in memory.
    """

    def __init__(self, module: nn.Module, all_but_tables: bool = False):
        found = {id(buffer): buffer for child in module.modules() if all_but_tables or isinstance(child, _BatchNorm)
                 for name, buffer in child.named_buffers(recurse=False) if name not in getattr(child, "tables", ())}
        whole = [buffer.view(_INTEGER[buffer.element_size()]) for buffer in found.values()]
        self._now = [[x for x in whole if x.dtype == dtype] for dtype in {x.dtype for x in whole}]
        self._kept = [[buffer.clone() for buffer in part] for part in self._now]

    @torch.no_grad()
    def keep(self) -> None:
        for kept, now in zip(self._kept, self._now, strict=True):
            torch._foreach_copy_(kept, now)

    @torch.no_grad()
    def restore(self) -> None:
        for kept, now in zip(self._kept, self._now, strict=True):
            torch._foreach_copy_(now, kept)

    @torch.no_grad()
    def restore_if(self, skip: Tensor) -> None:
        """now + skip * (kept - now), as integers, modulo 2^bits: so a NaN goes, too, and every bit comes back."""
        for kept, now in zip(self._kept, self._now, strict=True):
            change = torch._foreach_sub(kept, now)
            torch._foreach_mul_(change, skip.to(now[0].dtype))
            torch._foreach_add_(now, change)


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

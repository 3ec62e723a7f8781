"""Whether all ranks hold the same: the same config and data at the start, the same weights and memories later.

Legend: n elements of one tensor, in chunks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.config import ConfigError

_CHUNK = 1 << 20                        # elements hashed at once: a bank of a million rows needs no second memory
_GOLDEN = -7046029254386353131          # 2^64 / golden ratio, odd, as int64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Drifted(RuntimeError):
    """Ranks that must hold the same weights and memories do not. Raised on all of them."""


def check_start(digest: str, data: str, num_images: int) -> None:
    """Raise ConfigError, on every rank, unless all have the same config (``digest``) and images (``data``)."""
    seen = distributed.gather_objects((digest, data, num_images))
    odd = [rank for rank, other in enumerate(seen) if other[1] != seen[0][1]]
    if odd:
        raise ConfigError(f"data: rank {odd[0]} sees other training images than rank 0 ({seen[odd[0]][2]:,} against "
                          f"{seen[0][2]:,}): the list of files or of labels differs, or a packed set. Give all "
                          "machines the same data.")
    odd = [rank for rank, other in enumerate(seen) if other[0] != seen[0][0]]
    if odd:
        raise ConfigError(f"config: rank {odd[0]} was started with other settings than rank 0. Give all machines the "
                          "same config and the same command line.")


def check_state(step: int, state: dict[str, Any]) -> None:
    """Raise Drifted, on every rank, unless all hold the same tensors, bit for bit. One wait for the device."""
    names, tensors = zip(*_tensors(state, ""))
    device = tensors[0].device
    hashes = torch.stack([hash64(tensor).to(device, non_blocking=True) for tensor in tensors]).tolist()
    seen = distributed.gather_objects(hashes)
    if all(other == hashes for other in seen):
        return
    differing = [name for name, values in zip(names, zip(*seen)) if len(set(values)) > 1]
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise Drifted(f"step {step:,}: {', '.join(differing[:3])}{more}: not the same on {_apart(seen)}, as it must be. "
                  "Nothing of it was saved: the last checkpoint is good, and the same command goes on from it. If it "
                  "comes again at other steps, suspect the memory or the device of that rank; if at the same one, a "
                  "method that updates its state from its own part of the batch.")


def _apart(seen: list[list[int]]) -> str:
    """Which ranks differ from the largest group of equal ones; with no majority, all are named."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, hashes in enumerate(seen):
        groups.setdefault(tuple(hashes), []).append(rank)
    largest = max(groups.values(), key=len)
    if 2 * len(largest) <= len(seen):
        return f"ranks {', '.join(map(str, range(len(seen))))}"
    odd = [rank for rank in range(len(seen)) if rank not in largest]
    return f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} as on the other {len(largest)}"


def hash64(tensor: Tensor) -> Tensor:
    """A scalar int64 of the bits and their places: sum over n of x_n * m_n modulo 2^64, m_n odd.

    One changed element always changes it, since an odd factor loses no bit. Stays on the device.
    """
    x_n = tensor.detach().contiguous().reshape(-1)
    x_n = x_n.view(_INTEGERS[x_n.element_size()])
    odd_n = torch.arange(min(len(x_n), _CHUNK), device=x_n.device) * _GOLDEN << 1 | 1
    total = torch.zeros((), dtype=torch.int64, device=x_n.device)
    for number, chunk_n in enumerate(x_n.split(_CHUNK)):
        total += (chunk_n * odd_n[:len(chunk_n)]).sum() * (2 * number + 1)
    return total


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dicts and lists, with its dotted name."""
    if isinstance(tree, Tensor):
        yield name.removeprefix("method."), tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        yield from _tensors(value, f"{name}.{key}" if name else str(key))

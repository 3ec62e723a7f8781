"""What images are compared with: those of the step on all ranks, and a memory of the steps before.

Axes: B images of this rank, N of all ranks, K entries of the memory, M = N + K candidates, D feature dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common.dictionary import Queue
from common.distributed import gather, gather_with_grad, rank
from metric_learning.mining import Relation, relation


class Memory(Queue):
    """Cross-batch memory (Wang et al. 2020, arXiv:1912.06798, Algorithm 1): the queue of MoCo, with labels.

    ``size`` features of the last images, as they were when these were seen: the encoder moves on, so they suit a low
    learning rate, or a network that has been trained. Entries have no label, and count for nothing, until they are
    written. Features are kept as they come, of unit length or not.
    """

    tables = (*Queue.tables, "label")
    label: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__(size, dim, mask_own=True)
        self.register_buffer("label", torch.full((size,), -1))

    @torch.no_grad()
    def remember(self, x_BD: Tensor, index_B: Tensor, label_B: Tensor) -> None:
        """Take in the features of this step, the oldest go; every rank ends with the same entries."""
        self._enqueue(keys=gather(x_BD), image=gather(index_B), label=gather(label_B))


class Candidates(NamedTuple):
    """What B images are compared with; image b of this rank is candidate ``first`` + b."""

    x_MD: Tensor            # of the batch with gradient, on whichever rank it was made; of the memory without
    related: Relation       # [B, M]
    first: int
    batch: int              # N: candidates from here on are of the memory


def candidates(x_BD: Tensor, index_B: Tensor, label_B: Tensor, memory: Memory | None = None) -> Candidates:
    """The images of all ranks, and behind them the memory. What the memory holds of an image is no positive of it."""
    x_MD, label_M = gather_with_grad(x_BD), gather(label_B)
    first, batch = rank() * len(x_BD), len(x_MD)
    if memory is None:
        return Candidates(x_MD, relation(label_B, label_M, first), first, batch)
    x_MD = torch.cat([x_MD, memory.keys.to(x_MD.dtype)])
    related = relation(label_B, torch.cat([label_M, memory.label]), first)
    own_BM = torch.cat([torch.full_like(label_M, -1), memory.image]) == index_B[:, None]
    return Candidates(x_MD, Relation(related.positive_BM & ~own_BM, related.negative_BM), first, batch)

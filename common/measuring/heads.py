"""Many linear classifiers of the same features, trained at once by SGD, all on the same mini-batches.

Axes: n rows, b of a mini-batch, D features, G heads on one kind of features, C classes.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import counter
from common.bar import Watch, silent
from common.evaluate.rows import Rows, standardisation

Norm = Literal["none", "l2", "standardised"]
NORMS: tuple[Norm, ...] = ("none", "l2", "standardised")
MOMENTUM = 0.9


class Scaling(NamedTuple):
    """How features [n, D] become a head's input, learned from training rows alone."""

    norm: Norm
    shift_D: Tensor
    scale_D: Tensor

    @classmethod
    def of(cls, norm: Norm, rows: Rows, one_length: bool = True) -> "Scaling":
        """``one_length``: whatever ``norm``, a factor for all features brings the mean squared length to 1.

        A learning rate then means the same for any width and any norm, and a grid of them fits all. Without,
        standardised features have variance 1, as in the other linear probes.
        """
        zero_D = torch.zeros(rows.width)
        if norm == "l2":
            return cls(norm, zero_D, zero_D + 1)
        if norm == "standardised":
            shift_D, scale_D = standardisation(rows)
            length = math.sqrt(max(1, int((scale_D > 0).sum()))) if one_length else 1
            return cls(norm, shift_D, scale_D / length)
        squares = sum(x_bD.square().sum(dtype=torch.float64).item() for x_bD in rows.blocks())
        return cls(norm, zero_D, zero_D + 1 / math.sqrt(max(squares / len(rows), 1e-12)))

    def rows(self, x_nD: Tensor, device: torch.device) -> Rows:
        return Rows(x_nD, self.shift_D, self.scale_D, device, unit=self.norm == "l2")


class Group(NamedTuple):
    """G heads on one input: its rows, and each head's learning rate and weight decay."""

    rows: Rows
    lr_G: Tensor
    decay_G: Tensor


def train(groups: Sequence[Group], label_n: Tensor, indices: Sequence[Tensor], num_classes: int, epochs: int,
          batch_size: int, watch: Watch = silent) -> list[tuple[Tensor, Tensor]]:
    """For each group weights [G, D, C] and biases [G, 1, C], after SGD from zero: an epoch is one pass over the rows
    of one of ``indices``, each in turn.

    Mean cross-entropy of a mini-batch, momentum 0.9, weight decay on the weights, not on the bias; the learning rate
    falls along a cosine, step by step. No head knows of another: each becomes what it would alone, to rounding.
    """
    states = [_State(group, num_classes) for group in groups]
    num_heads = sum(len(group.lr_G) for group in groups)
    step, steps = 0, sum(-(-len(indices[epoch % len(indices)]) // batch_size) for epoch in range(epochs))
    for epoch in watch(range(epochs), epochs, f"epochs of {num_heads} linear classifier{'s' * (num_heads > 1)}"):
        index_n = indices[epoch % len(indices)]
        order_n = index_n[counter.permutation(len(index_n), counter.stream("heads"), epoch)]
        for index_b in order_n.split(batch_size):
            factor = (1 + math.cos(math.pi * step / steps)) / 2
            for state in states:
                state.step_(index_b, label_n[index_b], factor)
            step += 1
    return [(state.w_DGC.transpose(0, 1).contiguous(), state.b_GC[:, None]) for state in states]


class _State:
    """Weights of a group's heads, side by side in one matrix, and their momentum."""

    def __init__(self, group: Group, num_classes: int):
        self.rows, device = group.rows, group.rows.device
        self.lr_G1, self.decay_G1 = group.lr_G[:, None].to(device), group.decay_G[:, None].to(device)
        G = len(group.lr_G)
        self.w_DGC, self.b_GC = (torch.zeros(*shape, dtype=group.rows.dtype, device=device)
                                 for shape in ((group.rows.width, G, num_classes), (G, num_classes)))
        self.m_DGC, self.m_GC = torch.zeros_like(self.w_DGC), torch.zeros_like(self.b_GC)

    def step_(self, index_b: Tensor, label_b: Tensor, factor: float) -> None:
        x_bD = self.rows[index_b]
        logits_bGC = (x_bD @ self.w_DGC.flatten(1)).unflatten(1, self.b_GC.shape) + self.b_GC
        own_bC = F.one_hot(label_b.to(x_bD.device), self.b_GC.shape[1])
        error_bGC = (logits_bGC.softmax(dim=2) - own_bC[:, None]) / len(index_b)        # d loss / d logits
        gradient_DGC = (x_bD.T @ error_bGC.flatten(1)).unflatten(1, self.b_GC.shape)
        gradient_DGC.addcmul_(self.decay_G1, self.w_DGC)
        self.m_DGC.mul_(MOMENTUM).add_(gradient_DGC)
        self.m_GC.mul_(MOMENTUM).add_(error_bGC.sum(dim=0))
        self.w_DGC.addcmul_(self.lr_G1, self.m_DGC, value=-factor)
        self.b_GC.addcmul_(self.lr_G1, self.m_GC, value=-factor)

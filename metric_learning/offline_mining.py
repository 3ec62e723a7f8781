"""Triplets among all images of a pool, by their features. Nothing here has a gradient.

Axes: m images, A anchors among them, R triplets (one for each anchor), b anchors of a block, D feature dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common import counter
from common.data.orders import Classes
from metric_learning import losses

BLOCK = 1 << 22         # distances that are looked at together


class Found(NamedTuple):
    """Triplets that were mined, on the CPU."""

    triplet_R3: Tensor          # rows of the features: anchor, positive, negative
    active_R: Tensor            # bool: with a loss
    hard_R: Tensor              # bool: the negative is nearer than the positive


@torch.no_grad()
def mine_triplets(x_mD: Tensor, label_m: Tensor, negatives: str, margin: float, key: tuple[int, ...]) -> Found:
    """For each image with another of its class a random one of those, and a negative among all of other classes.

    Distances are squared Euclidean ones of unit features ``x_mD``. "hardest": the nearest negative. "semi_hard": any of
    those farther than the positive but inside the margin (Schroff et al. 2015, Eq. 4); where there is none, the nearest
    of those farther; where all are nearer, the farthest. Images with label -1 take no part. ``key`` is that of what is
    drawn. In blocks: there is no [m, m] matrix.
    """
    anchor_A, positive_A = _pairs(label_m, key)
    draw_A = counter.integers(2**62, *key, counter.stream("negative"), anchor_A)
    rows, label_m = max(1, BLOCK // len(x_mD)), label_m.to(x_mD.device)
    chosen, pos, neg = [], [], []
    for anchor_b, positive_b, draw_b in zip(*(x_A.to(x_mD.device).split(rows)
                                              for x_A in (anchor_A, positive_A, draw_A)), strict=True):
        d_bm = 2 - 2 * losses.products(x_mD[anchor_b], x_mD)
        pos.append(d_bm.gather(1, positive_b[:, None]))
        other_bm = (label_m[anchor_b][:, None] != label_m) & (label_m >= 0)
        chosen.append(_nearest(d_bm, other_bm) if negatives == "hardest" else
                      _semi_hard(d_bm, pos[-1], other_bm, margin, draw_b[:, None]))
        neg.append(d_bm.gather(1, chosen[-1]))
    negative_A, pos_A, neg_A = (torch.cat(parts)[:, 0].cpu() for parts in (chosen, pos, neg))
    return Found(torch.stack([anchor_A, positive_A, negative_A], dim=1), pos_A - neg_A + margin > 0, neg_A < pos_A)


def _pairs(label_m: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Anchors, and for each a random other image of its class."""
    classes = Classes.of(label_m)
    place_A = torch.arange(len(classes.member))[classes.count.repeat_interleave(classes.count) > 1]
    start_A, count_A = (x.repeat_interleave(classes.count)[place_A] for x in (classes.start, classes.count))
    anchor_A = classes.member[place_A]
    skip_A = 1 + counter.integers(count_A - 1, *key, anchor_A)
    return anchor_A, classes.member[start_A + (place_A - start_A + skip_A) % count_A]


def _semi_hard(d_bm: Tensor, pos_b1: Tensor, other_bm: Tensor, margin: float, draw_b1: Tensor) -> Tensor:
    """[b, 1]."""
    farther_bm = other_bm & (d_bm > pos_b1)
    inside_bm = farther_bm & (d_bm < pos_b1 + margin)                                               # Eq. 4
    outside_b1 = torch.where(_has(farther_bm), _nearest(d_bm, farther_bm), _nearest(-d_bm, other_bm))
    return torch.where(_has(inside_bm), _any(inside_bm, draw_b1), outside_b1)


def _has(among_bm: Tensor) -> Tensor:
    return among_bm.any(dim=1, keepdim=True)


def _nearest(d_bm: Tensor, among_bm: Tensor) -> Tensor:
    return d_bm.masked_fill(~among_bm, torch.inf).argmin(dim=1, keepdim=True)


def _any(among_bm: Tensor, draw_b1: Tensor) -> Tensor:
    """Of those of each row the one that ``draw_b1`` counts to, modulo their number; [b, 1]."""
    so_far_bm = among_bm.cumsum(dim=1)
    wanted_b1 = 1 + draw_b1 % so_far_bm[:, -1:].clamp(min=1)
    return torch.searchsorted(so_far_bm, wanted_b1).clamp(max=among_bm.shape[1] - 1)

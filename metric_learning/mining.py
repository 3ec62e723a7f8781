"""Which images are compared: the pairs of a batch, and the negatives for them. Nothing here has a gradient.

Axes: B images of this rank, M candidates, P pairs of anchor and positive, T triplets, A anchors of the ranked layer.
Row b of ``d_BM`` is the image of column ``first`` + b: the candidates hold the batch itself (from ``first`` = 0 on, or
behind those of earlier ranks), and perhaps a memory behind it. Draws are hashes of ``key`` (seed and step, say) and of
the columns (common.counter), so they are the same for any number of ranks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common import counter
from metric_learning.losses import ranked_losses


class Relation(NamedTuple):
    """What M candidates are to B images, both bool [B, M]; what is neither takes no part."""

    positive_BM: Tensor         # of the same class, but not the image itself
    negative_BM: Tensor         # of another class


class Pairs(NamedTuple):
    anchor_P: Tensor            # rows: images of the batch
    positive_P: Tensor          # columns: candidates


class Triplets(NamedTuple):
    anchor_T: Tensor            # rows: images of the batch
    positive_T: Tensor          # columns: candidates
    negative_T: Tensor          # columns: candidates


def relation(label_B: Tensor, label_M: Tensor, first: int = 0) -> Relation:
    """Positives and negatives by their labels. An image with label -1 is neither to any, and has none."""
    same_BM, known_BM = label_B[:, None] == label_M, (label_B >= 0)[:, None] & (label_M >= 0)
    own_B, column_M = (torch.arange(n, device=label_B.device) for n in same_BM.shape)
    return Relation(same_BM & known_BM & (column_M != first + own_B[:, None]), ~same_BM & known_BM)


def positive_pairs(related: Relation) -> Pairs:
    """All pairs of an anchor and a positive, both ways round: P * K * (K - 1) of a P x K batch, which may be none."""
    return Pairs(*related.positive_BM.nonzero(as_tuple=True))


def random_negatives(pairs: Pairs, related: Relation, key: Sequence[int], first: int = 0) -> Triplets:
    """A negative for each pair, each of the anchor's equally likely. A pair without one gives no triplet."""
    anchor_P1, positive_P1 = (first + pairs.anchor_P)[:, None], pairs.positive_P[:, None]
    column_M = torch.arange(related.negative_BM.shape[1], device=anchor_P1.device)
    draw_PM = counter.uniform(*key, counter.stream("random negatives"), anchor_P1, positive_P1, column_M)
    return _least(pairs, draw_PM, related.negative_BM[pairs.anchor_P])


@torch.no_grad()
def hardest_negatives(pairs: Pairs, related: Relation, d_BM: Tensor) -> Triplets:
    """The negative nearest to the anchor (Schroff et al. 2015, Section 3.2). A pair without one gives no triplet."""
    return _least(pairs, d_BM[pairs.anchor_P], related.negative_BM[pairs.anchor_P])


@torch.no_grad()
def semi_hard_negatives(pairs: Pairs, related: Relation, d_BM: Tensor, margin: float) -> Triplets:
    """The nearest of the negatives that are farther than the positive, but inside the margin.

    Schroff et al. 2015, Section 3.2, Eq. 4; which one of them, the paper leaves open. A pair without one gives no
    triplet: all its negatives are either nearer than the positive, or far enough.
    """
    d_PM, pos_P1 = d_BM[pairs.anchor_P], d_BM[pairs.anchor_P, pairs.positive_P][:, None]
    inside_PM = (d_PM > pos_P1) & (d_PM < pos_P1 + margin)
    return _least(pairs, d_PM, related.negative_BM[pairs.anchor_P] & inside_PM)


@torch.no_grad()
def ranked_negatives(
    d_BM: Tensor, related: Relation, neg_num: int, pair_size: int, hard_ratio: float, rand_ratio: float, margin: float,
    key: Sequence[int], first: int = 0,
) -> Tensor:
    """The ranked layer's own mix of negatives for the pairs (i, i + 1), i = 0, pair_size, ...; bool [A, M].

    Those with a positive loss against i, if they are at most ``neg_num``. Else ``hard_ratio`` * ``neg_num`` of the
    ``neg_num`` hardest, and ``rand_ratio`` * ``neg_num`` of all that are left, of those hardest, too (both rounded
    down). Two images of a pair that are not of one class have none. Raises ValueError for shares outside 0 to 1.
    """
    num_hard, num_random = _counts(neg_num, hard_ratio, rand_ratio)
    loss_AM = ranked_losses(d_BM, pair_size, margin, first).own_AM
    anchor_A1 = torch.arange(first, first + len(d_BM), pair_size, device=d_BM.device)[:, None]
    is_pair_A1 = related.positive_BM[::pair_size].gather(1, anchor_A1 + 1)
    fits_AM = related.negative_BM[::pair_size] & (loss_AM > 0) & is_pair_A1
    hard_draw_AM, draw_AM = _draws(key, anchor_A1, d_BM.shape[1])
    hard_AM = _smallest(num_hard, hard_draw_AM, _smallest(neg_num, -loss_AM, fits_AM))
    mixed_AM = hard_AM | _smallest(num_random, draw_AM, fits_AM & ~hard_AM)
    return torch.where(fits_AM.sum(dim=1, keepdim=True) > neg_num, mixed_AM, fits_AM)


def _counts(neg_num: int, hard_ratio: float, rand_ratio: float) -> tuple[int, int]:
    """How many are drawn of the hardest, and of what is left."""
    for name, ratio in {"hard_ratio": hard_ratio, "rand_ratio": rand_ratio}.items():
        if not 0 <= ratio <= 1:
            raise ValueError(f"{name}: {ratio} given. Give a share of neg_num, from 0 to 1.")
    hard, rand = (math.floor(neg_num * ratio + 1e-6) for ratio in (hard_ratio, rand_ratio))     # 100 * 0.29 is 29
    if hard + rand == 0:
        raise ValueError(f"neg_num: {neg_num} given, of which hard_ratio {hard_ratio} and rand_ratio {rand_ratio} are "
                         "no negative at all. Give more of one of them.")
    return hard, rand


def _draws(key: Sequence[int], anchor_A1: Tensor, num_candidates: int) -> list[Tensor]:
    column_M = torch.arange(num_candidates, device=anchor_A1.device)
    return [counter.uniform(*key, counter.stream(name), anchor_A1, column_M) for name in ("ranked hard", "ranked rest")]


def _smallest(n: int, score_AM: Tensor, fits_AM: Tensor) -> Tensor:
    """The ``n`` of each row with the smallest score, or fewer, of those that fit; bool [A, M]."""
    place_AM = score_AM.masked_fill(~fits_AM, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return (place_AM < n) & fits_AM


def _least(pairs: Pairs, score_PM: Tensor, fits_PM: Tensor) -> Triplets:
    negative_P, some_P = score_PM.masked_fill(~fits_PM, torch.inf).argmin(dim=1), fits_PM.any(dim=1)
    return Triplets(*(x_P[some_P] for x_P in (*pairs, negative_P)))

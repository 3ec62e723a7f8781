"""Which images are compared: the pairs of a batch, and the negatives for them. Nothing here has a gradient.

Axes: B images of this rank, M candidates, R positives of an image, A anchors of the ranked layer. Shapes are fixed, and
masks say what counts: no device is asked how many there are. Nothing is larger than the distances, [B, M].
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
    """R = K - 1 positives of each image, both [B, R]: all others of its block of K."""

    positive_BR: Tensor         # columns: candidates
    valid_BR: Tensor            # bool: whether it is one; false where an image has no label, or that of another class


class Triplets(NamedTuple):
    """A negative for each pair, all [B, R]; the anchor is the row."""

    positive_BR: Tensor         # columns: candidates
    negative_BR: Tensor         # columns: candidates
    valid_BR: Tensor            # bool: whether it is a triplet


def relation(label_B: Tensor, label_M: Tensor, first: int = 0) -> Relation:
    """Positives and negatives by their labels. An image with label -1 is neither to any, and has none."""
    same_BM, known_BM = label_B[:, None] == label_M, (label_B >= 0)[:, None] & (label_M >= 0)
    own_B, column_M = (torch.arange(n, device=label_B.device) for n in same_BM.shape)
    return Relation(same_BM & known_BM & (column_M != first + own_B[:, None]), ~same_BM & known_BM)


def positive_pairs(related: Relation, per_class: int, first: int = 0) -> Pairs:
    """All pairs of an anchor and a positive, both ways round: P * K * (K - 1) of a P x K batch.

    The images of a class stand side by side, in blocks of K = ``per_class`` (``common.data.orders.Balanced``). One that
    took the place of an image that cannot be read is of another class, and in no pair. Raises ValueError if B is not a
    multiple of K.
    """
    num_images, device = len(related.positive_BM), related.positive_BM.device
    if num_images % per_class:
        raise ValueError(f"per_class: {per_class} given for {num_images} images. Give a divisor of those, that of the "
                         "order in which they come.")
    row_B1 = torch.arange(num_images, device=device)[:, None]
    place_B1, other_R = row_B1 % per_class, torch.arange(1, per_class, device=device)
    positive_BR = first + row_B1 - place_B1 + (place_B1 + other_R) % per_class
    return Pairs(positive_BR, related.positive_BM.gather(1, positive_BR))


def random_negatives(pairs: Pairs, related: Relation, key: Sequence[int | Tensor], first: int = 0) -> Triplets:
    """A negative for each pair, each of the anchor's equally likely. A pair without one gives no triplet."""
    row_B1 = torch.arange(len(pairs.positive_BR), device=pairs.positive_BR.device)[:, None]
    so_far_BM = related.negative_BM.cumsum(dim=1)
    draw_BR = counter.integers(so_far_BM[:, -1:].clamp(min=1), *key, counter.stream("random negatives"),
                               first + row_B1, pairs.positive_BR)
    negative_BR = torch.searchsorted(so_far_BM, draw_BR + 1)                # the first column that counts so many
    return _triplets(pairs, related, negative_BR.clamp(max=so_far_BM.shape[1] - 1))


@torch.no_grad()
def hardest_negatives(pairs: Pairs, related: Relation, d_BM: Tensor) -> Triplets:
    """The negative nearest to the anchor (Schroff et al. 2015, Section 3.2). A pair without one gives no triplet."""
    return _triplets(pairs, related, _least(d_BM, related.negative_BM).expand_as(pairs.positive_BR))


@torch.no_grad()
def semi_hard_negatives(pairs: Pairs, related: Relation, d_BM: Tensor) -> Triplets:
    """The nearest of the negatives that are farther than the positive; where none is, the farthest of all.

    Schroff et al. 2015, Section 3.2, Eq. 4: semi-hard are those farther than the positive but inside the margin. Which
    of them, and what if there is none, the paper leaves open. If the nearest lies outside the margin, it has no loss;
    if all are nearer than the positive, the one taken is the least hard. So each pair has its triplet, and features
    that have become one have the loss of the margin. A pair without a negative gives no triplet.
    """
    farthest_B1 = _least(-d_BM, related.negative_BM)
    chosen = []
    for positive_B in pairs.positive_BR.unbind(dim=1):          # one after the other: [B, M] is large with a memory
        farther_BM = related.negative_BM & (d_BM > d_BM.gather(1, positive_B[:, None]))
        chosen.append(torch.where(farther_BM.any(dim=1, keepdim=True), _least(d_BM, farther_BM), farthest_B1))
    return _triplets(pairs, related, torch.cat(chosen, dim=1))


def ranked_pairs(related: Relation, pair_size: int, first: int = 0) -> Pairs:
    """The ranked layer's pairs (i, i + 1), i = 0, pair_size, ...: of each anchor i one positive, [A, 1]."""
    end = first + len(related.positive_BM)
    partner_A1 = torch.arange(first + 1, end, pair_size, device=related.positive_BM.device)[:, None]
    return Pairs(partner_A1, related.positive_BM[::pair_size].gather(1, partner_A1))


@torch.no_grad()
def ranked_negatives(
    d_BM: Tensor, related: Relation, neg_num: int, pair_size: int, hard_ratio: float, rand_ratio: float, margin: float,
    key: Sequence[int | Tensor], first: int = 0,
) -> Tensor:
    """The ranked layer's own mix of negatives for the pairs (i, i + 1), i = 0, pair_size, ...; bool [A, M].

    Those with a positive loss against i, if they are at most ``neg_num``. Else ``hard_ratio`` * ``neg_num`` of the
    ``neg_num`` hardest, and ``rand_ratio`` * ``neg_num`` of all that are left, of those hardest, too (both rounded
    down). Two images of a pair that are not of one class have none. Raises ValueError for shares outside 0 to 1.
    """
    num_hard, num_random = counts(neg_num, hard_ratio, rand_ratio)
    loss_AM = ranked_losses(d_BM, pair_size, margin, first).own_AM
    partner_A1, is_pair_A1 = ranked_pairs(related, pair_size, first)
    fits_AM = related.negative_BM[::pair_size] & (loss_AM > 0) & is_pair_A1
    hard_draw_AM, draw_AM = _draws(key, partner_A1 - 1, d_BM.shape[1])
    hard_AM = _smallest(num_hard, hard_draw_AM, _smallest(neg_num, -loss_AM, fits_AM))
    mixed_AM = hard_AM | _smallest(num_random, draw_AM, fits_AM & ~hard_AM)
    return torch.where(fits_AM.sum(dim=1, keepdim=True) > neg_num, mixed_AM, fits_AM)


def counts(neg_num: int, hard_ratio: float, rand_ratio: float) -> tuple[int, int]:
    """How many negatives of a pair are drawn of the hardest, and of what is left."""
    for name, ratio in {"hard_ratio": hard_ratio, "rand_ratio": rand_ratio}.items():
        if not 0 <= ratio <= 1:
            raise ValueError(f"{name}: {ratio} given. Give a share of neg_num, from 0 to 1.")
    hard, rand = (math.floor(neg_num * ratio + 1e-6) for ratio in (hard_ratio, rand_ratio))     # 100 * 0.29 is 29
    if hard + rand == 0:
        raise ValueError(f"neg_num: {neg_num} given, of which hard_ratio {hard_ratio} and rand_ratio {rand_ratio} are "
                         "no negative at all. Give more of one of them.")
    return hard, rand


def _draws(key: Sequence[int | Tensor], anchor_A1: Tensor, num_candidates: int) -> list[Tensor]:
    column_M = torch.arange(num_candidates, device=anchor_A1.device)
    return [counter.uniform(*key, counter.stream(name), anchor_A1, column_M) for name in ("ranked hard", "ranked rest")]


def _smallest(n: int, score_AM: Tensor, fits_AM: Tensor) -> Tensor:
    """The ``n`` of each row with the smallest score, or fewer, of those that fit; bool [A, M]."""
    place_AM = score_AM.masked_fill(~fits_AM, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return (place_AM < n) & fits_AM


def _least(score_BM: Tensor, fits_BM: Tensor) -> Tensor:
    """The column with the smallest score of those that fit, [B, 1]; some column where none does."""
    return score_BM.masked_fill(~fits_BM, torch.inf).argmin(dim=1, keepdim=True)


def _triplets(pairs: Pairs, related: Relation, negative_BR: Tensor) -> Triplets:
    return Triplets(pairs.positive_BR, negative_BR, pairs.valid_BR & related.negative_BM.gather(1, negative_BR))

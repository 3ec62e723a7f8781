"""Losses of metric learning with labels: functions of tensors, without state.

Axes: B images of this rank, N of all ranks, M candidates (images of the batch, of other ranks, of a memory), P pairs,
T triplets, A anchors, C classes, D feature dimension. Features are float32; labels are int64, and -1 says that the
label is not known: such an image takes no part. What nothing takes part in is 0, with a gradient of 0. Losses are
means where the papers sum, so the learning rate does not depend on the batch, and lambda is the papers' as it stands;
a mean is over the images of all ranks, and what a rank returns is its share: their average is the loss.

``sim_BM`` and ``d_BM`` come from ``products``, also under autocast; which candidates are positives and negatives of
which image is ``metric_learning.mining.relation``.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed
from common.losses import check_temperature


def mean(x_B: Tensor, counts_B: Tensor) -> Tensor:
    """This rank's share of the mean over all ranks of those that count; 0 where none does.

    The trainer averages over ranks. So an image counts as much as any other, however many of its rank take part.
    """
    total = distributed.mean(counts_B.sum().to(x_B.dtype))                  # of a rank, on average
    return torch.where(counts_B, x_B, 0).sum() / torch.where(total > 0, total, 1)


def products(a_BD: Tensor, b_MD: Tensor) -> Tensor:
    """The inner product of each a with each b, [B, M], in the precision of the features under autocast too."""
    with torch.autocast(a_BD.device.type, enabled=False):
        return a_BD @ b_MD.T


def distance(a_PD: Tensor, b_PD: Tensor) -> Tensor:
    """Euclidean distance of each pair (Hadsell et al. 2006, Eq. 1). Where the two are equal, its gradient is 0."""
    return torch.linalg.vector_norm(a_PD - b_PD, dim=1)


def distances(a_BD: Tensor, b_MD: Tensor) -> Tensor:
    """``distance`` of each a to each b, [B, M]."""
    with torch.autocast(a_BD.device.type, enabled=False):
        return torch.cdist(a_BD, b_MD, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def nearest_is_positive(sim_BM: Tensor, positive_BM: Tensor, negative_BM: Tensor) -> Tensor:
    """Of the images with a positive, the share whose most similar candidate is one; the mean as in ``mean``."""
    best_B1 = sim_BM.masked_fill(~(positive_BM | negative_BM), -torch.inf).argmax(dim=1, keepdim=True)
    return mean(positive_BM.gather(1, best_B1)[:, 0].to(sim_BM.dtype), positive_BM.any(dim=1))


def contrastive(d_P: Tensor, same_P: Tensor, margin: float) -> Tensor:
    """Contrastive loss on P pairs (Hadsell et al. 2006, Eq. 4): pull same pairs, push others past ``margin``.

    ``d_P`` are Euclidean distances, not squared; ``same_P`` is bool (the paper's Y is 0 where it is true). The mean
    over pairs. Raises ValueError if the two differ in length or ``margin`` is not positive.
    """
    if d_P.shape != same_P.shape:
        raise ValueError(f"same_P: {len(same_P)} values for {len(d_P)} distances. Give one for each pair.")
    return mean(pair_losses(d_P, same_P, margin), torch.ones_like(same_P))


class Joint(NamedTuple):
    """A joint loss, which carries the gradient, and its parts before their weights, detached."""

    loss: Tensor
    softmax: Tensor             # the mean of both streams'
    contrastive: Tensor


def softmax_contrastive(
    logits_BC: tuple[Tensor, Tensor], x_BD: tuple[Tensor, Tensor], label_B: tuple[Tensor, Tensor], margin: float,
    softmax_weight: float = 0.5, contrastive_weight: float | Tensor = 0.1,
) -> Joint:
    """Softmax on each of two streams of images, and the contrastive loss on the pairs that they make, y = equal labels.

    Each argument holds one tensor for each stream; ``x_BD`` are the features of the contrastive branch.
    ``softmax_weight`` counts for each stream. A suggestion for ``contrastive_weight`` is the value of the softmax loss
    where training converges.
    """
    each = torch.stack([softmax(*of) for of in zip(logits_BC, label_B, strict=True)])
    known_B = (label_B[0] >= 0) & (label_B[1] >= 0)
    pairs = mean(pair_losses(distance(*x_BD), label_B[0] == label_B[1], margin), known_B)
    return Joint(softmax_weight * each.sum() + contrastive_weight * pairs, each.detach().mean(), pairs.detach())


def softmax(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """Cross-entropy of the labels, the mean over labelled images."""
    return mean(F.cross_entropy(logits_BC, label_B, ignore_index=-1, reduction="none"), label_B >= 0)


def centre(x_BD: Tensor, centre_CD: Tensor, label_B: Tensor) -> Tensor:
    """Centre loss, 1/2 ||x - c_y||^2 (Wen et al. 2016, Eq. 2), the mean over labelled images.

    Times lambda and beside the softmax it is Eq. 5. Its gradient goes to the features alone (Eq. 3); centres follow by
    ``move_centres_``.
    """
    centre_BD = centre_CD.detach()[label_B.clamp(min=0)]
    return mean((x_BD - centre_BD).square().sum(dim=1), label_B >= 0) / 2


@torch.no_grad()
def move_centres_(centre_CD: Tensor, x_ND: Tensor, label_N: Tensor, alpha: float) -> None:
    """c_j <- c_j - alpha * sum_i [y_i = j] (c_j - x_i) / (1 + sum_i [y_i = j]), Wen et al. 2016, Eq. 4; in place.

    All images of a step at once, those of other ranks, too: an image more moves the centre by less. The 1 in the count
    keeps a class still of which there is no image; so a class with one image moves by half of ``alpha`` towards it.
    A product with zeros and ones, which adds in the same order on every rank: scattered sums do not on a GPU.
    """
    check_alpha(alpha)
    member_CN = (label_N == torch.arange(len(centre_CD), device=label_N.device)[:, None]).to(x_ND.dtype)
    count_C1 = member_CN.sum(dim=1, keepdim=True)
    centre_CD -= alpha * (count_C1 * centre_CD - member_CN @ x_ND) / (1 + count_C1)             # Eq. 4


def triplet(pos_T: Tensor, neg_T: Tensor, margin: float) -> Tensor:
    """Triplet loss, [d(a, p) - d(a, n) + margin]_+ (Schroff et al. 2015, Eq. 3), the mean over triplets.

    ``pos_T`` and ``neg_T`` are distances of anchor and positive, and of anchor and negative; the paper's are squared
    Euclidean ones of unit features. Triplets without a loss count in the mean: so a loss that stays at ``margin`` is
    that of features which have become one, and a loss that falls is one of fewer active triplets, too.
    """
    return mean(triplet_losses(pos_T, neg_T, margin), torch.ones_like(pos_T, dtype=torch.bool))


def triplet_losses(pos_T: Tensor, neg_T: Tensor, margin: float) -> Tensor:
    """``triplet`` of each triplet, in whatever shape they come."""
    check_margin(margin)
    return F.relu(pos_T - neg_T + margin)


class Ranked(NamedTuple):
    """Losses of A pairs (i, i + 1) with each of M negatives."""

    own_AM: Tensor              # taken against image i
    partner_AM: Tensor          # taken against image i + 1


def ranked_losses(d_BM: Tensor, pair_size: int, margin: float, first: int = 0) -> Ranked:
    """[d(i, i+1) - d(i, n) + margin]_+ and [d(i, i+1) - d(i+1, n) + margin]_+ for i = 0, pair_size, 2 pair_size, ...

    ``d_BM`` is minus the inner product of unit features. Row b of it is the image of column ``first`` + b. Raises
    ValueError if ``pair_size`` is below 2, or B not a multiple of it.
    """
    check_margin(margin)
    if pair_size < 2 or len(d_BM) % pair_size:
        raise ValueError(f"pair_size: {pair_size} given for {len(d_BM)} images. Give 2 or more, a divisor of those.")
    partner_A1 = torch.arange(first + 1, first + len(d_BM), pair_size, device=d_BM.device)[:, None]
    pos_A1 = d_BM[::pair_size].gather(1, partner_A1)
    return Ranked(*(F.relu(pos_A1 - d_BM[row::pair_size] + margin) for row in (0, 1)))


def ranked(
    d_BM: Tensor, chosen_AM: Tensor, neg_num: int, pair_size: int, margin: float, first: int = 0,
) -> Tensor:
    """The ranked layer's loss (``rank_hard_loss`` of Wang and Gupta 2015): each chosen negative against both of a pair.

    ``chosen_AM`` is from ``metric_learning.mining.ranked_negatives``, with the same arguments. The sum over
    2 * neg_num * B / pair_size, however many were chosen.
    """
    own_AM, partner_AM = ranked_losses(d_BM, pair_size, margin, first)
    return torch.where(chosen_AM, own_AM + partner_AM, 0).sum() / (2 * neg_num * len(d_BM) / pair_size)


def tuplet(pos_B: Tensor, sim_BM: Tensor, negative_BM: Tensor) -> Tensor:
    """(N+1)-tuplet loss, log(1 + sum_n exp(f.f_n - f.f+)) (Sohn 2016, Section 3.1), of each image, [B].

    ``pos_B`` is the inner product with the positive, ``sim_BM`` with each candidate; those count that are true in
    ``negative_BM``. Without a negative it is 0.
    """
    excess_BM = (sim_BM - pos_B[:, None]).masked_fill(~negative_BM, -torch.inf)
    return torch.cat([torch.zeros_like(pos_B)[:, None], excess_BM], dim=1).logsumexp(dim=1)


def n_pair(x_PD: Tensor, other_PD: Tensor, label_P: Tensor, l2: float = 0.0) -> Tensor:
    """Multi-class N-pair loss (Sohn 2016, Section 3.2): P pairs (x, x+), so 2P features, and P tuplets out of them.

    The negatives of x_i are x+_j of the other pairs, of other classes: where a class has two pairs, they are not each
    other's negatives (the paper draws P classes). ``l2`` times the mean squared length of the 2P features is added
    (Section 3.2.2): they are not normalised. The mean over labelled pairs.
    """
    sim_PP, known_P = products(x_PD, other_PD), label_P >= 0
    negative_PP = (label_P[:, None] != label_P) & known_P
    length_P = (x_PD.square().sum(dim=1) + other_PD.square().sum(dim=1)) / 2
    return mean(tuplet(sim_PP.diagonal(), sim_PP, negative_PP) + l2 * length_P, known_P)


def supervised_contrastive(
    sim_BM: Tensor, positive_BM: Tensor, negative_BM: Tensor, temperature: float,
) -> Tensor:
    """Supervised contrastive loss, with the sum over positives outside the log (Khosla et al. 2020, Eq. 2).

    -1/|P(i)| sum_p log exp(z_i.z_p / T) / sum_a exp(z_i.z_a / T), a over positives and negatives, of unit features:
    the mean over images that have a positive. An image is no candidate of its own.
    """
    check_temperature(temperature)
    logit_BM, num_B = sim_BM / temperature, positive_BM.sum(dim=1)
    log_sum_B1 = logit_BM.masked_fill(~(positive_BM | negative_BM), -torch.inf).logsumexp(dim=1, keepdim=True)
    loss_B = torch.where(positive_BM, log_sum_B1 - logit_BM, 0).sum(dim=1) / num_B.clamp(min=1)
    return mean(loss_B, num_B > 0)


def pair_losses(d_P: Tensor, same_P: Tensor, margin: float) -> Tensor:
    """``contrastive`` of each pair, in whatever shape they come."""
    check_margin(margin)
    return torch.where(same_P, d_P, F.relu(margin - d_P)).square() / 2                          # Eq. 4


def check_margin(margin: float) -> None:
    """Raises ValueError for a margin that is not positive and finite."""
    if not 0 < margin < float("inf"):
        raise ValueError(f"margin: {margin} is not a positive number. Distances are in its unit.")


def check_alpha(alpha: float) -> None:
    """Raises ValueError for a rate of the centres that is no share."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha} given. Give a number from 0 (centres stay) to 1; the paper's is 0.5.")


def check_weight(name: str, weight: float) -> None:
    """Raises ValueError for a weight of a loss that is negative or not finite."""
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{name}: {weight} given. Give a weight of 0 or more.")

"""Pairwise contrastive loss: similar images drawn together, others pushed apart as far as a margin.

Axes: B images of this rank, M candidates, P pairs, D feature dimension.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.data.orders import Order
from common.encoder import Encoder
from common.method import Batch, Output
from metric_learning import losses
from metric_learning.citations import HADSELL
from metric_learning.memory import Memory
from metric_learning.method import MetricMethod

DECIDED = {"top1": "how often a pair is rightly called the same, or different"}


class Contrastive(MetricMethod):
    """Hadsell, Chopra & LeCun 2006, Eq. 4, on Euclidean distances.

    ``pairs``: "adjacent", images 2i and 2i + 1 of the batch, as a list of pairs or ``common.data.orders.RandomPairs``
    gives them; or "all" pairs of a batch, of all processes, with those of the ``dictionary`` (``Memory``), if any.
    ``similar`` is the share that similar pairs then have in the loss (there are far fewer of them; None: as they come).
    top1 is that of the nearest image, or of adjacent pairs the share that half the margin decides rightly.
    Features of length 1 (``encoder.unit``) are never farther apart than 2; the paper's are not scaled.
    """

    citation = HADSELL

    def __init__(self, encoder: Encoder, *, order: Order | None = None, margin: float = 1.0,
                 pairs: Literal["adjacent", "all"] = "adjacent", similar: float | None = 0.5,
                 dictionary: Memory | None = None, bn_groups: int = 1):
        losses.check_margin(margin)
        if similar is not None and not 0 < similar < 1:
            raise ValueError(f"similar: {similar} given. Give a share between 0 and 1, or null.")
        if dictionary is not None and pairs == "adjacent":
            raise ValueError("dictionary: a memory with pairs: adjacent, which are compared with nothing else. Give "
                             "pairs: all, or no memory.")
        super().__init__(encoder, order, dictionary, bn_groups)
        self.in_pairs = pairs == "adjacent"
        self.legend: Mapping[str, str] = DECIDED if self.in_pairs else {}
        self.margin, self.similar = margin, similar

    def forward(self, batch: Batch) -> Output:
        x_BD = self.encoder(batch.views[0])
        loss, logs = self._adjacent(x_BD, batch.label) if self.in_pairs else self._all(x_BD, batch)
        return Output(loss, {"loss": loss.detach(), **logs}, {"features": x_BD.detach()})

    def _adjacent(self, x_BD, label_B):
        return of_pairs(losses.distance(x_BD[0::2], x_BD[1::2]), marks(label_B), self.margin)

    def _all(self, x_BD, batch):
        found = self.compared(x_BD, batch)
        d_BM, (positive_BM, negative_BM) = losses.distances(x_BD, found.x_MD), found.related
        loss_BM = losses.pair_losses(d_BM, positive_BM, self.margin)
        if self.similar is None:
            loss = losses.mean(loss_BM, positive_BM | negative_BM)
        else:
            loss = self.similar * losses.mean(loss_BM, positive_BM) + \
                (1 - self.similar) * losses.mean(loss_BM, negative_BM)
        top1 = losses.nearest_is_positive(-d_BM, positive_BM, negative_BM)
        return loss, {**described(d_BM.detach(), positive_BM, negative_BM, self.margin), "top1": top1}


class Marks(NamedTuple):
    """Of pairs of images, bool [P]; where the label of one is not known, neither."""

    same_P: Tensor
    other_P: Tensor


def marks(label_B: Tensor) -> Marks:
    """Of images 2i and 2i + 1, by their labels."""
    known_P, same_P = (label_B[0::2] >= 0) & (label_B[1::2] >= 0), label_B[0::2] == label_B[1::2]
    return Marks(same_P & known_P, ~same_P & known_P)


def of_pairs(d_P: Tensor, of: Marks, margin: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The contrastive loss of pairs; what ``described`` says of them, and how often half the margin decides rightly."""
    loss = losses.mean(losses.pair_losses(d_P, of.same_P, margin), of.same_P | of.other_P)
    d_P = d_P.detach()
    return loss, {**described(d_P, *of, margin), "top1": decided(d_P < margin / 2, of)}


def decided(said_P: Tensor, of: Marks) -> Tensor:
    """The share of pairs of which it is rightly said whether they are the same."""
    return losses.mean((said_P == of.same_P).to(torch.get_default_dtype()), of.same_P | of.other_P)


def described(d: Tensor, similar: Tensor, others: Tensor, margin: float) -> dict[str, Tensor]:
    """Mean distances of similar and of other pairs; the share of other pairs that are inside the margin."""
    return {"d_pos": losses.mean(d, similar), "d_neg": losses.mean(d, others),
            "active": losses.mean((d < margin).to(d.dtype), others)}

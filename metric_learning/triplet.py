"""Triplet loss: an anchor nearer to each of its positives than to a negative, by a margin.

Axes: B images of this rank, M candidates, R positives of an image, D feature dimension.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from common import counter
from common.data.orders import Balanced
from common.encoder import Encoder, require_unit
from common.method import AtChance, Batch, Output
from metric_learning import losses, mining
from metric_learning.citations import SCHROFF
from metric_learning.memory import Candidates, Memory
from metric_learning.method import MetricMethod

SQUARED, PLAIN = ({"d_pos": f"mean{kind} distance of an anchor to its positive, and to its negative"}
                  for kind in (" squared", ""))
COLLAPSED = "the loss has been stuck at the margin for {steps:,} steps: the features have become one point, their " \
            "mean distance is below a tenth of the margin. Hardest negatives from the start do this: begin with " \
            "semi-hard ones, a lower optimizer.lr, more schedule.warmup, or a pretrained backbone (run.weights)."


def stuck(cosine: float) -> AtChance:
    """When triplets are held to have collapsed: ``cosine`` is where a distance is a tenth of the margin.

    The loss alone does not tell: hardest negatives can be as far as the positives while a network learns.
    """
    return AtChance(100, 0.05, cosine, COLLAPSED)


class Triplet(MetricMethod):
    """FaceNet (Schroff et al. 2015, Eq. 3) on unit features: all anchor-positive pairs of a P x K batch.

    ``negatives``: one for each pair, of all processes and of the ``dictionary`` (``Memory``), if any: "random",
    "semi_hard" or "hardest" (``metric_learning.mining``). ``squared``: distances are squared Euclidean ones, as in the
    paper, or Euclidean ones, as Hermans et al. 2017 found more stable. The loss is the mean over all triplets, also
    those without a loss: at ``margin`` the features are one point. ``seed`` is that of the random negatives.
    """

    citation = SCHROFF
    step: Tensor

    def __init__(self, encoder: Encoder, *, order: Balanced | None = None, margin: float = 0.2,
                 negatives: Literal["random", "semi_hard", "hardest"] = "semi_hard", squared: bool = True,
                 dictionary: Memory | None = None, bn_groups: int = 1, seed: int = 0):
        losses.check_margin(margin)
        require_unit(encoder)
        order = Balanced() if order is None else order
        super().__init__(encoder, order, dictionary, bn_groups)
        self.margin, self.negatives, self.squared = margin, negatives, squared
        self.per_class, self.seed = order.per_class, seed
        self.legend = SQUARED if squared else PLAIN
        self.at_chance = stuck(1 - (margin / 10 if squared else (margin / 10) ** 2) / 2)        # |x - y|^2 is 2 - 2 cos
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, batch: Batch) -> Output:
        x_BD = self.encoder(batch.views[0])
        found = self.compared(x_BD, batch)
        d_BM = self._distances(x_BD, found.x_MD)
        chosen = self._triplets(d_BM, found)
        pos_BR, neg_BR = (d_BM.gather(1, column_BR) for column_BR in (chosen.positive_BR, chosen.negative_BR))
        loss_BR = losses.triplet_losses(pos_BR, neg_BR, self.margin)
        loss = losses.mean(loss_BR, chosen.valid_BR)
        everything = torch.ones_like(chosen.valid_BR)
        means = {"active": (loss_BR > 0, chosen.valid_BR), "d_pos": (pos_BR, chosen.valid_BR),
                 "d_neg": (neg_BR, chosen.valid_BR), "valid": (chosen.valid_BR, everything)}
        logs = {name: losses.mean(x_BR.detach().to(loss.dtype), of_BR) for name, (x_BR, of_BR) in means.items()}
        logs |= {"loss": loss.detach(), "top1": losses.nearest_is_positive(-d_BM, *found.related)}
        return Output(loss, logs, {"features": x_BD.detach()})

    def _distances(self, x_BD: Tensor, x_MD: Tensor) -> Tensor:
        """Squared ones by an inner product: of unit features the two are the same, and so are their gradients."""
        return 2 - 2 * losses.products(x_BD, x_MD) if self.squared else losses.distances(x_BD, x_MD)

    def _triplets(self, d_BM: Tensor, found: Candidates) -> mining.Triplets:
        pairs = mining.positive_pairs(found.related, self.per_class, found.first)
        if self.negatives == "hardest":
            return mining.hardest_negatives(pairs, found.related, d_BM)
        if self.negatives == "semi_hard":
            return mining.semi_hard_negatives(pairs, found.related, d_BM)
        return mining.random_negatives(pairs, found.related, (self.seed, counter.stream("triplet"), self.step),
                                       found.first)

    def after_step(self, batches: Sequence[Batch], outputs: Sequence[Output], progress: float) -> None:
        super().after_step(batches, outputs, progress)
        self.step.add_(1)

    def chance(self) -> float:
        """Of features that are one point: every distance is 0."""
        return self.margin

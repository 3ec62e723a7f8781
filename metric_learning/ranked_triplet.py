"""The ranked layer: pairs of images, and for each a mix of hard and of random negatives.

Axes: B images of this rank, M candidates, A pairs, D feature dimension.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common import counter
from common.data.orders import Balanced
from common.encoder import Encoder, require_unit
from common.method import Batch, Output
from metric_learning import losses, mining
from metric_learning.citations import WANG
from metric_learning.memory import Candidates, Memory
from metric_learning.method import MetricMethod
from metric_learning.triplet import stuck


class RankedTriplet(MetricMethod):
    """Triplets as in ``rank_hard_loss`` of Wang and Gupta 2015; the distance is minus the inner product.

    Images i and i + 1, i = 0, ``pair_size``, ..., are a pair; others of a block are only negatives of other classes.
    ``neg_num``, ``hard_ratio``, ``rand_ratio``: how many negatives a pair has and how they are drawn, see
    ``metric_learning.mining.ranked_negatives``; from the images of all processes and of the ``dictionary``
    (``Memory``), if any. Each is taken against both images of the pair. ``seed`` is that of the draws.
    """

    citation = WANG
    legend: Mapping[str, str] = {"d_pos": "mean distance of a pair, and to its negatives: minus the inner product"}
    step: Tensor

    def __init__(self, encoder: Encoder, *, order: Balanced | None = None, neg_num: int = 4, pair_size: int = 2,
                 hard_ratio: float = 0.5, rand_ratio: float = 0.5, margin: float = 0.2,
                 dictionary: Memory | None = None, bn_groups: int = 1, seed: int = 0):
        losses.check_margin(margin)
        require_unit(encoder)
        if pair_size < 2:
            raise ValueError(f"pair_size: {pair_size} given. Give 2 or more: images i and i + 1 are a pair.")
        order = Balanced(pair_size) if order is None else order
        if order.per_class % pair_size:
            raise ValueError(f"pair_size: {pair_size} given, of blocks of {order.per_class} images of a class "
                             "(order.per_class). Give a divisor of those, or the pairs are of two classes.")
        super().__init__(encoder, order, dictionary, bn_groups)
        self.num_hard, self.num_random = mining.counts(neg_num, hard_ratio, rand_ratio)
        self.mix = neg_num, pair_size, hard_ratio, rand_ratio, margin
        self.neg_num, self.pair_size, self.margin, self.seed = neg_num, pair_size, margin, seed
        self.at_chance = stuck(1 - margin / 10)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, batch: Batch) -> Output:
        x_BD = self.encoder(batch.views[0])
        found = self.compared(x_BD, batch)
        d_BM = -losses.products(x_BD, found.x_MD)
        key = self.seed, counter.stream("ranked triplet"), self.step
        chosen_AM = mining.ranked_negatives(d_BM.detach(), found.related, *self.mix, key, found.first)
        loss = losses.ranked(d_BM, chosen_AM, self.neg_num, self.pair_size, self.margin, found.first)
        logs = {"loss": loss.detach(), "top1": losses.nearest_is_positive(-d_BM, *found.related)}
        return Output(loss, logs | self._logs(d_BM.detach(), chosen_AM, found), {"features": x_BD.detach()})

    def _logs(self, d_BM: Tensor, chosen_AM: Tensor, found: Candidates) -> dict[str, Tensor]:
        """Distances of pairs and of all their negatives, the share of these with a loss, how many of neg_num count."""
        pairs, d_AM = mining.ranked_pairs(found.related, self.pair_size, found.first), d_BM[::self.pair_size]
        own_AM, _ = losses.ranked_losses(d_BM, self.pair_size, self.margin, found.first)
        negative_AM = found.related.negative_BM[::self.pair_size] & pairs.valid_BR
        means = {"d_pos": (d_AM.gather(1, pairs.positive_BR), pairs.valid_BR), "d_neg": (d_AM, negative_AM),
                 "active": (own_AM > 0, negative_AM),
                 "chosen": (chosen_AM.sum(dim=1, keepdim=True) / self.neg_num, pairs.valid_BR)}
        return {name: losses.mean(x.to(d_BM.dtype), of) for name, (x, of) in means.items()}

    def after_step(self, batches: Sequence[Batch], outputs: Sequence[Output], progress: float) -> None:
        super().after_step(batches, outputs, progress)
        self.step.add_(1)

    def chance(self) -> float:
        """Of features that are one point, where a pair has more than ``neg_num`` negatives."""
        return self.margin * (self.num_hard + self.num_random) / self.neg_num

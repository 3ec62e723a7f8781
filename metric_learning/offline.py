"""Triplet loss on triplets chosen offline: every so many steps, among many images, by the encoder as it is then.

Axes: n training images, m of a pool, R triplets that were found, T of a batch, B images of this rank, D feature
dimension.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from common import counter, distributed
from common.data.datasets import Images
from common.encoder import Encoder, require_unit
from common.method import Batch, Output
from metric_learning import losses
from metric_learning.citations import SCHROFF
from metric_learning.memory import candidates
from metric_learning.method import MetricMethod
from metric_learning.offline_mining import mine_triplets
from metric_learning.triplet import SQUARED, stuck
from metric_learning.triplet_table import Mined, Table, holds_triplet

DRAWS = 100             # of a pool, until one holds a triplet


class OfflineTriplet(MetricMethod):
    """FaceNet's offline mode (Schroff et al. 2015, Sec. 3.2): triplets by a recent network, on a subset of the data.

    ``every`` so many steps a ``pool`` of labelled images, drawn anew (None: all of them), is embedded without
    augmentation. Each of them that has another of its class beside it becomes an anchor, with one of those, at random,
    and with the pool's "semi_hard" or "hardest" of ``negatives`` (``mine_triplets``). The next steps go through these
    triplets, the active ones first; the loss (Eq. 3, on unit features) is the network's of that very step. Hardest
    negatives may make all features one, the paper warns. ``seed`` is that of pool and positives.
    """

    citation = SCHROFF
    legend = SQUARED

    def __init__(self, encoder: Encoder, num_samples: int, *, every: int = 200, pool: int | None = 4096,
                 negatives: Literal["semi_hard", "hardest"] = "semi_hard", margin: float = 0.2, bn_groups: int = 1,
                 seed: int = 0):
        losses.check_margin(margin)
        require_unit(encoder)
        if every < 1:
            raise ValueError(f"every: {every} given. Give the steps after which triplets are chosen anew, 1 or more.")
        if pool is not None and pool < 3:
            raise ValueError(f"pool: {pool} given. Give 3 images at least, as a triplet has, or null for all.")
        table = Table(num_samples if pool is None else min(pool, num_samples))
        super().__init__(encoder, Mined(table, every), None, bn_groups)
        self.table, self.mine_every, self.pool = table, every, pool
        self.negatives, self.margin, self.seed = negatives, margin, seed
        self.at_chance = stuck(1 - margin / 20)                 # |x - y|^2 is 2 - 2 cos

    def forward(self, batch: Batch) -> Output:
        x_BD = self.encoder(batch.views[0])
        a_T, p_T, n_T = (batch.label[place: len(batch.label) // 3 * 3: 3] for place in range(3))
        whole_T = (a_T == p_T) & (a_T != n_T) & (a_T >= 0) & (n_T >= 0)         # none took an unreadable image's place
        pos_T, neg_T = (losses.distance(x_BD[0: len(whole_T) * 3: 3], x_BD[place: len(whole_T) * 3: 3]).square()
                        for place in (1, 2))
        loss_T = losses.triplet_losses(pos_T, neg_T, self.margin)
        loss = losses.mean(loss_T, whole_T)
        means = {"active": loss_T > 0, "d_pos": pos_T, "d_neg": neg_T}
        logs = {name: losses.mean(x_T.detach().to(loss.dtype), whole_T) for name, x_T in means.items()}
        return Output(loss, logs | {"loss": loss.detach(), "top1": self._top1(x_BD.detach(), batch)}, {})

    @staticmethod
    def _top1(x_BD: Tensor, batch: Batch) -> Tensor:
        """Among the images of the step; an image that stands in it twice is not its own neighbour."""
        found = candidates(x_BD, batch.index, batch.label)
        other_BM = batch.index[:, None] != distributed.gather(batch.index)
        return losses.nearest_is_positive(losses.products(x_BD, found.x_MD), found.related.positive_BM & other_BM,
                                          found.related.negative_BM)

    def mine(self, embed: Callable[[Tensor], Tensor], images: Images, step: int) -> dict[str, float]:
        """Raises ValueError where no pool holds a triplet. Gives how many there are, and which share of them
        is active (has a loss) and hard (its negative nearer than its positive)."""
        index_m = self._pool(images, step)
        x_mD, key = embed(index_m), (self.seed, counter.stream("offline positives"), step)
        mined = mine_triplets(x_mD, images.labels[index_m], self.negatives, self.margin, key) \
            if distributed.is_main() else None
        found = distributed.from_main(mined)                        # as its device rounds, on every rank
        assert found is not None
        self.table.write_(index_m[found.triplet_R3], found.active_R)
        return {"triplets": len(found.active_R), "active": found.active_R.float().mean().item(),
                "hard": found.hard_R.float().mean().item()}

    def _pool(self, images: Images, step: int) -> Tensor:
        """Drawn again if it holds no triplet: a run is not to end because a small pool of uneven classes had none."""
        for attempt in range(DRAWS):
            index_m = self._draw(images, step, attempt)
            if holds_triplet(images.labels[index_m]):
                return index_m
        raise ValueError(f"method.pool: {DRAWS} times the {len(index_m)} images drawn from {images.name} at step "
                         f"{step} held no two of one class beside one of another. Give a larger pool, or null for all.")

    def _draw(self, images: Images, step: int, attempt: int) -> Tensor:
        """Labelled images that can be read, as far as is known, in the order of the set."""
        known_n = images.labels >= 0
        known_n[list(images.bad)] = False
        index_m = known_n.nonzero().flatten()
        key = self.seed, counter.stream("offline pool"), step, attempt
        drawn_m = counter.permutation(len(index_m), *key)[:self.pool]
        return index_m[drawn_m.sort().values]

    def chance(self) -> float:
        """Of features that are one point: every distance is 0."""
        return self.margin

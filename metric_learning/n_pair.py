"""Multi-class N-pair loss: a positive against several negatives at once.

Axes: B images of this rank, A anchors of them, M candidates, D feature dimension.
"""

import math

import torch
from torch import Tensor

from common.data.datasets import Images
from common.data.orders import Balanced, Order, RandomPairs, Shuffled, Tuplets
from common.encoder import Encoder, require_lengths
from common.method import Batch, Output
from metric_learning import losses
from metric_learning.citations import SOHN
from metric_learning.memory import Candidates, Memory
from metric_learning.method import MetricMethod


class NPair(MetricMethod):
    """Sohn 2016, on inner products of features that are not scaled to unit length.

    ``order`` says which form of it. ``Balanced`` (2 a class): N pairs (x, x+), so 2N features are computed, and the
    negatives of x_i are x+_j of the other pairs, of all processes (Section 3.2). ``Tuplets``: an image meets only the
    negatives of its own tuplet (Section 3.1), which takes N + 1 features for each anchor. With a ``dictionary``
    (``Memory``), what that holds of other classes is a negative, too. Pairs whose labels differ, or are not known, and
    tuplets of such, take no part. ``l2`` times the mean squared length of the features is added (Section 3.2.2).
    """

    citation = SOHN

    def __init__(self, encoder: Encoder, *, order: Order | None = None, l2: float = 0.002,
                 dictionary: Memory | None = None, bn_groups: int = 1):
        if not 0 <= l2 < math.inf:
            raise ValueError(f"l2: {l2} given. Give 0 or more: it weighs the mean squared length of the features.")
        if isinstance(order, Balanced) and order.per_class % 2:
            raise ValueError(f"order: per_class {order.per_class} is no number of pairs. Give an even one, best 2.")
        require_lengths(encoder)
        super().__init__(encoder, order, dictionary, bn_groups)
        self.l2, self.group = l2, order.size if isinstance(order, Tuplets) else 2

    def check_images(self, images: Images) -> None:
        super().check_images(images)
        if self.order is None or isinstance(self.order, (Shuffled, RandomPairs)):
            raise ValueError(f"NPair takes two images of a class side by side, and those of {images.name} come "
                             f"{'shuffled' if self.order is None else f'by {type(self.order).__name__}'}. Give "
                             "method.order {name: common.data.orders.Balanced, per_class: 2}, or Tuplets.")

    def forward(self, batch: Batch) -> Output:
        x_BD = self.encoder(batch.views[0])
        batch = batch._replace(label=self._whole(batch.label))
        found, known_B = self.compared(x_BD, batch), batch.label >= 0
        sim_AM, known_A = losses.products(x_BD[::self.group], found.x_MD), known_B[::self.group]
        pos_A = (x_BD[::self.group] * x_BD[1::self.group]).sum(dim=1)
        negative_AM = found.related.negative_BM[::self.group] & self._opposed(found, len(pos_A))
        tuplets = losses.mean(losses.tuplet(pos_A, sim_AM, negative_AM), known_A)
        length = losses.mean(x_BD.square().sum(dim=1), known_B)
        loss = tuplets + self.l2 * length
        logs = {"loss": loss.detach(), "tuplets": tuplets.detach(), "length": length.detach(),
                "top1": losses.mean(self._first(pos_A, sim_AM, negative_AM), known_A)}
        return Output(loss, logs, {"features": x_BD.detach()})

    def chance(self) -> float | None:
        """log N of tuplets of N + 1; of how many pairs, the batch decides."""
        return math.log(self.group - 1) if self.group > 2 and self.dictionary is None else None

    def _whole(self, label_B: Tensor) -> Tensor:
        """The labels, -1 in all of a pair or tuplet that does not begin with two images of one class."""
        same_A = label_B[::self.group] == label_B[1::self.group]
        return torch.where(same_A.repeat_interleave(self.group), label_B, -1)

    def _opposed(self, found: Candidates, num_anchors: int) -> Tensor:
        """Which candidates an anchor may have as negatives if they are of another class, [A, M]."""
        column_M = torch.arange(len(found.x_MD), device=found.x_MD.device)
        in_memory_M = column_M >= found.batch
        if self.group == 2:
            return (in_memory_M | (column_M % 2 == 1)).expand(num_anchors, -1)
        own_A1 = found.first // self.group + torch.arange(num_anchors, device=column_M.device)[:, None]
        return in_memory_M | (column_M // self.group == own_A1)

    @staticmethod
    @torch.no_grad()
    def _first(pos_A, sim_AM, negative_AM):
        """1 where the positive is more similar than every negative."""
        return (pos_A > sim_AM.masked_fill(~negative_AM, -torch.inf).amax(dim=1)).to(pos_A.dtype)

"""Centre loss: a classifier whose features gather around a centre of each class.

Axes: B images of this rank, N of a step on all ranks, C classes, D feature dimension.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.distributed import gather
from common.encoder import Encoder, require_lengths
from common.method import Batch, Output
from metric_learning import losses
from metric_learning.citations import WEN
from metric_learning.classifying import ClassifyingMethod, accuracy, widths


class CentreLoss(ClassifyingMethod):
    """Wen et al. 2016, Eq. 5: L = L_softmax + lambda / 2 sum_i ||x_i - c_{y_i}||^2, both on the head's features.

    ``weight`` is lambda: the paper sums both terms over the batch, here both are means, so lambda is the same and the
    learning rate is that of a mean. ``alpha``: how far centres follow (Eq. 4). They are state, not parameters: they
    start at 0 and move once a step, by the images of all processes and micro-batches.
    """

    citation = WEN
    legend: Mapping[str, str] = {
        **ClassifyingMethod.legend, "d_pos": "mean distance to the centre of the own class, and to the nearest other"}
    centres: Tensor

    def __init__(self, encoder: Encoder, num_classes: int, *, weight: float = 0.003, alpha: float = 0.5,
                 bn_groups: int = 1):
        losses.check_weight("weight", weight)
        losses.check_alpha(alpha)
        require_lengths(encoder)
        dim = widths(encoder)[1]
        super().__init__(encoder, dim, num_classes, bn_groups=bn_groups)
        self.weight, self.alpha = weight, alpha
        self.register_buffer("centres", torch.zeros(num_classes, dim))

    def forward(self, batch: Batch) -> Output:
        x_BD = self.encoder(batch.views[0])
        logits_BC = self.classify(x_BD)
        softmax, centre = losses.softmax(logits_BC, batch.label), losses.centre(x_BD, self.centres, batch.label)
        loss = softmax + self.weight * centre                                                   # Eq. 5
        own, other = self._distances(x_BD.detach(), batch.label)
        logs = {"loss": loss.detach(), "softmax": softmax.detach(), "centre": centre.detach(), "d_pos": own,
                "d_neg": other, "top1": accuracy(logits_BC, batch.label)}
        return Output(loss, logs, {"features": x_BD.detach()})

    def _distances(self, x_BD: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mean distances of labelled images to the centre of their class, and to the nearest of the others."""
        d_BC = losses.distances(x_BD, self.centres)
        own_BC = label_B[:, None] == torch.arange(self.num_classes, device=label_B.device)
        own_B, other_B = torch.where(own_BC, d_BC, 0).sum(dim=1), d_BC.masked_fill(own_BC, torch.inf).amin(dim=1)
        return losses.mean(own_B, label_B >= 0), losses.mean(other_B, label_B >= 0)

    def after_step(self, batches: Sequence[Batch], outputs: Sequence[Output], progress: float) -> None:
        x_ND = torch.cat([gather(output.carry["features"]) for output in outputs])
        label_N = torch.cat([gather(batch.label) for batch in batches])
        losses.move_centres_(self.centres, x_ND, label_N, self.alpha)

    def logits(self, image_BcHW: Tensor) -> Tensor:
        return self.classify(self.encoder(image_BcHW))

    def chance(self) -> float:
        return math.log(self.num_classes)

"""Softmax and contrastive loss, jointly: a classifier of images, and a branch in which images of one class are near.

Axes: B images of this rank, C classes, D width of the backbone, E width of the branch.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from common import distributed
from common.data.datasets import Images
from common.data.orders import Order, Streams
from common.encoder import Encoder
from common.method import Batch, Output
from metric_learning import losses
from metric_learning.citations import HADSELL
from metric_learning.classifying import ClassifyingMethod, accuracy, full, widths
from metric_learning.method import refuse_blocks

MOMENTUM = 0.99             # of the running softmax loss: a hundred steps or so


class SoftmaxContrastive(ClassifyingMethod):
    """Two streams of labelled images through one encoder: a softmax loss on each, a contrastive loss on their pairs.

    The softmax is on the backbone's features, the contrastive loss (Hadsell et al. 2006, Eq. 4) on those of the head:
    in the source a branch of two fully connected layers to 256 features. Images 2i and 2i + 1 of a batch are the i-th
    of the first and of the second stream (``common.data.orders.Streams``, unless ``order`` says otherwise), and similar
    if their labels agree. ``softmax_weight`` counts for each stream.

    ``contrastive_weight``: a number, 0 for the softmax alone; or "softmax_loss", for the suggestion that it be the
    softmax loss at convergence. That is known at the end only, so the weight is the running mean of the softmax loss,
    of the steps before: it begins at log C, what a classifier without knowledge has, and ends at what was suggested.
    """

    citation = HADSELL
    running: Tensor

    def __init__(self, encoder: Encoder, num_classes: int, *, order: Order | None = None, margin: float = 1.0,
                 softmax_weight: float = 0.5, contrastive_weight: float | Literal["softmax_loss"] = 0.1,
                 bn_groups: int = 1):
        losses.check_margin(margin)
        losses.check_weight("softmax_weight", softmax_weight)
        if contrastive_weight != "softmax_loss":
            losses.check_weight("contrastive_weight", contrastive_weight)
        super().__init__(encoder, widths(encoder)[0], num_classes, order or Streams(), bn_groups)
        self.margin, self.softmax_weight, self.contrastive_weight = margin, softmax_weight, contrastive_weight
        if contrastive_weight == "softmax_loss":
            self.register_buffer("running", torch.tensor(math.log(num_classes)))

    def check_images(self, images: Images) -> None:
        super().check_images(images)
        refuse_blocks(self.order, type(self).__name__)

    def forward(self, batch: Batch) -> Output:
        x_BD = self.encoder.backbone(batch.views[0])
        logits_BC, branch_BE = self.classify(x_BD), self.encoder.scaled(full(self.encoder.head(x_BD)))
        weight = self.running if self.contrastive_weight == "softmax_loss" else self.contrastive_weight
        joint = losses.softmax_contrastive(streams(logits_BC), streams(branch_BE), streams(batch.label), self.margin,
                                           self.softmax_weight, weight)
        logs = {"loss": joint.loss.detach(), "softmax": joint.softmax, "contrastive": joint.contrastive,
                "top1": accuracy(logits_BC, batch.label)}
        return Output(joint.loss, logs, {})

    @torch.no_grad()
    def after_step(self, batches: Sequence[Batch], outputs: Sequence[Output], progress: float) -> None:
        if self.contrastive_weight == "softmax_loss":
            of_step = distributed.mean(torch.stack([output.logs["softmax"] for output in outputs]).mean())
            self.running.lerp_(of_step.to(self.running.dtype), 1 - MOMENTUM)

    def logits(self, image_BcHW: Tensor) -> Tensor:
        return self.classify(self.encoder.backbone(image_BcHW))

    def chance(self) -> float | None:
        return 2 * self.softmax_weight * math.log(self.num_classes) if self.contrastive_weight == 0 else None


def streams(x_B: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the first and those of the second stream."""
    return x_B[0::2], x_B[1::2]

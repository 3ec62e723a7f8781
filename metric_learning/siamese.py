"""Siamese networks: one network, or one of its own for each image of a pair, and what is asked of both features.

Axes: B images of this rank, P = B / 2 pairs, D feature dimension.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from common.data.orders import Order
from common.encoder import Encoder
from common.method import Batch, Output
from metric_learning import losses
from metric_learning.citations import CHOPRA
from metric_learning.contrastive import DECIDED, Marks, decided, marks, of_pairs
from metric_learning.method import MetricMethod

SAME = 1                # of the two classes; 0: different


class Siamese(MetricMethod):
    """Images 2i go through the first tower, 2i + 1 through the second (Chopra et al. 2005; weights not shared: ours).

    ``shared``: one set of weights, which is one pass of all images; else the second tower begins as a copy of the first
    and goes its own way, for pairs whose sides differ in kind, such as photos and drawings. Each tower's BatchNorm then
    sees its own images. ``loss``: "contrastive" on Euclidean distances (Hadsell et al. 2006, Eq. 4), or "softmax" of
    two classes, same and different, on both features side by side, first those of the first image: so their number D
    is free, and a pair turned round has another score.

    top1 is the share of pairs decided rightly: by half the margin, or by the class.
    """

    citation = CHOPRA
    in_pairs = True
    legend: Mapping[str, str] = DECIDED

    def __init__(self, encoder: Encoder, *, order: Order | None = None, shared: bool = True,
                 loss: Literal["contrastive", "softmax"] = "contrastive", margin: float = 1.0, bn_groups: int = 1):
        losses.check_margin(margin)
        super().__init__(encoder, order, None, bn_groups)
        self.second_encoder = None if shared else deepcopy(self.encoder)
        self.classifier = classifier(encoder.dim) if loss == "softmax" else None
        self.margin, self.learned = margin, loss == "softmax"

    def towers(self) -> tuple[Encoder, Encoder]:
        return self.encoder, self.second_encoder or self.encoder

    def follow_encoder(self) -> None:
        if self.second_encoder is not None:
            self.second_encoder.load_state_dict(self.encoder.state_dict())

    def similarity(self, x_PD: Tensor, y_PD: Tensor) -> Tensor:
        """By the classifier; not symmetric."""
        logits_P2 = self._classify(x_PD, y_PD)
        return logits_P2[:, SAME] - logits_P2[:, 1 - SAME]

    def chance(self) -> float | None:
        return None if self.classifier is None else math.log(2)

    def forward(self, batch: Batch) -> Output:
        x_PD, y_PD = self._features(batch.views[0])
        of = marks(batch.label)
        loss, logs = of_pairs(losses.distance(x_PD, y_PD), of, self.margin) if self.classifier is None else \
            self._separate(x_PD, y_PD, of)
        return Output(loss, {"loss": loss.detach(), **logs}, {})

    def _features(self, image_BcHW):
        first, second = self.towers()
        if self.second_encoder is not None:
            return first(image_BcHW[0::2]), second(image_BcHW[1::2])
        x_BD = first(image_BcHW)
        return x_BD[0::2], x_BD[1::2]

    def _separate(self, x_PD: Tensor, y_PD: Tensor, of: Marks) -> tuple[Tensor, dict[str, Tensor]]:
        logits_P2 = self._classify(x_PD, y_PD)
        class_P = torch.where(of.same_P, SAME, torch.where(of.other_P, 1 - SAME, -1))
        top1 = decided(logits_P2.argmax(dim=1) == SAME, of)
        return losses.softmax(logits_P2, class_P), {"top1": top1}

    def _classify(self, x_PD: Tensor, y_PD: Tensor) -> Tensor:
        assert self.classifier is not None
        with torch.autocast(x_PD.device.type, enabled=False):
            logits_P2: Tensor = self.classifier(torch.cat([x_PD, y_PD], dim=1))
        return logits_P2


def classifier(dim: int) -> nn.Module:
    """Two classes out of two features side by side, [P, 2D] -> [P, 2], with a hidden layer as wide as they are.

    Without it the log-odds would be u(x) + v(y), a part of each image: that says what an image is, but not whether two
    are of one kind (MatchNet, Han et al. 2015, has two hidden layers).
    """
    return nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, 2))

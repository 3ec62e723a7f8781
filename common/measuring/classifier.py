"""A linear classifier on a backbone, as a method that the trainer trains: alone, or with all or part of the backbone.

Axes: B images of this rank, D width of the backbone, C classes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from common.encoder import Encoder
from common.measuring.frozen import is_frozen
from common.method import Batch, Method, Output


class Classifier(Method):
    """``backbone`` and a linear layer, trained by the cross-entropy of the labels.

    Parts of the backbone that have no trained parameter stay in evaluation mode while the rest trains, so that neither
    a statistic of BatchNorm nor a weight of theirs moves.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear):
        super().__init__()
        self.encoder = Encoder(backbone, head)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        for part in self.modules():
            if is_frozen(part):
                part.eval()
        return self

    def forward(self, batch: Batch) -> Output:
        return Output(F.cross_entropy(self.encoder.project(batch.views[0]), batch.label), {}, {})


def linear(width: int, num_classes: int, std: float | None, seed: int) -> nn.Linear:
    """The classifier before training: weights from N(0, ``std``) and no bias, or torch's own start for None.

    A function of its arguments alone: the same on every rank and on every machine.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(width, num_classes)
        if std is not None:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
    return layer

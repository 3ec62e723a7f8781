"""What the methods with a softmax loss share: a linear classifier, and its accuracy.

Axes: B images of this rank, C classes, D width of the features that are classified.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.data.datasets import Images
from common.data.orders import Order
from common.encoder import Encoder
from metric_learning import losses
from metric_learning.method import MetricMethod


class ClassifyingMethod(MetricMethod):
    """A metric method with a linear classifier, bias included, on features ``width`` wide."""

    legend: Mapping[str, str] = {"top1": "how often the classifier names the right class"}

    def __init__(self, encoder: Encoder, width: int, num_classes: int, order: Order | None = None, bn_groups: int = 1):
        if num_classes < 2:
            raise ValueError(f"num_classes: {num_classes} given, and a classifier tells classes apart. Give "
                             "labelled images of two or more.")
        super().__init__(encoder, order, bn_groups=bn_groups)
        self.num_classes, self.classifier = num_classes, nn.Linear(width, num_classes)

    def check_images(self, images: Images) -> None:
        super().check_images(images)
        if (largest := int(images.labels.max())) >= self.num_classes:
            raise ValueError(f"num_classes: {self.num_classes} given, and {images.name} has the label {largest}. Give "
                             f"{largest + 1} or more, or leave it out.")

    def classify(self, x_BD: Tensor) -> Tensor:
        """Scores of the classes, [B, C], in float32 (float64 stays) under autocast too."""
        with torch.autocast(x_BD.device.type, enabled=False):
            scores_BC: Tensor = self.classifier(full(x_BD))
        return scores_BC


def full(x: Tensor) -> Tensor:
    """In float32, whatever the network ran in; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widths(encoder: Encoder) -> tuple[int, int]:
    """D of the backbone's features and of the head's: what its first linear layer takes, and its last one gives.

    Raises ValueError for a head without one.
    """
    layers = [module for module in encoder.head.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("encoder: its head has no linear layer, by which the widths of its features are known. Give "
                         "head: linear or head: mlp.")
    return layers[0].in_features, layers[-1].out_features


@torch.no_grad()
def accuracy(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """The share of the labelled images whose class has the highest score, a mean as ``losses.mean``."""
    return losses.mean((logits_BC.argmax(dim=1) == label_B).to(logits_BC.dtype), label_B >= 0)

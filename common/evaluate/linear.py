"""Linear probes: logistic regression on frozen features, with all labels and with a few of each class.

Full-batch L-BFGS has no learning rate to tune, so a number depends on the features alone. Papers train the same
classifier by SGD on augmented images (lr 30 for MoCo v1 and v2); those numbers are another protocol's.

Axes: R problems solved at once, n training and m test images, D features, C classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import counter
from common.evaluate.features import CPU, Features
from common.evaluate.result import Result, Setting, accuracy, top1


class Linear:
    """Logistic regression with the labels of all training images."""

    def __init__(self, l2: float = 1e-4, max_iter: int = 100):
        self.l2, self.max_iter = l2, max_iter

    def __call__(self, features: Features, device: torch.device = CPU) -> list[Result]:
        """One result; without labelled test images, on a fifth of the training images that is held out."""
        data = standardised(features, device)
        w_RDC, b_R1C = fit(data.train_nD[None], data.train_label_n[None], features.num_classes, self.l2, self.max_iter)
        protocol: dict[str, Setting] = {"layer": features.layer, "labels": "all", "l2": self.l2,
                                        "max_iter": self.max_iter}
        return [accuracy("linear", _predicted(data, w_RDC[0], b_R1C[0]), data.test_label_m, protocol | data.split)]


class FewLabels:
    """Logistic regression with ``labels`` images of each class (all it has, if fewer): mean and spread over draws.

    The draws are fixed: every encoder, seed and epoch is measured on the same labels. The features are standardised
    by all training images, since those need no label for it.
    """

    def __init__(self, labels: int = 10, draws: int = 10, l2: float = 1e-2, max_iter: int = 100):
        if labels < 1 or draws < 1:
            raise ValueError(f"labels: {labels}, draws: {draws} given; both must be at least 1.")
        self.labels, self.draws, self.l2, self.max_iter = labels, draws, l2, max_iter

    def __call__(self, features: Features, device: torch.device = CPU) -> list[Result]:
        """One result, on the same test images as ``Linear``; its spread is None for a single draw."""
        data = standardised(features, device)
        label_n = data.train_label_n.cpu()
        index_Rn = torch.stack([draw_labels(label_n, self.labels, draw) for draw in range(self.draws)]).to(device)
        weights = fit(data.train_nD[index_Rn], data.train_label_n[index_Rn], features.num_classes, self.l2,
                      self.max_iter)
        values = torch.tensor([top1(_predicted(data, w_DC, b_1C), data.test_label_m)
                               for w_DC, b_1C in zip(*weights, strict=True)])
        spread = values.std().item() if self.draws > 1 else None
        protocol: dict[str, Setting] = {"layer": features.layer, "labels": self.labels, "draws": self.draws,
                                        "l2": self.l2, "max_iter": self.max_iter}
        return [Result("few", values.mean().item(), spread, protocol | data.split)]


class Standardised(NamedTuple):
    """What a probe is trained and tested on, on the device."""

    train_nD: Tensor
    train_label_n: Tensor
    test_mD: Tensor
    test_label_m: Tensor
    split: dict[str, Setting]           # for the protocol


def standardised(features: Features, device: torch.device) -> Standardised:
    """Features with the training images' mean 0 and standard deviation 1; those that are constant become 0."""
    split: dict[str, Setting] = {} if features.test_mD is not None else {"split": "fifth-held-out"}
    train_nD, train_label_n, test_mD, test_label_m = (x.to(device) for x in features.with_test())
    std_D, mean_D = torch.std_mean(train_nD, dim=0)
    scale_D = torch.where(std_D > 1e-6, 1 / std_D, 0)
    return Standardised((train_nD - mean_D) * scale_D, train_label_n, (test_mD - mean_D) * scale_D, test_label_m,
                        split | {"train": len(train_nD), "test": len(test_mD)})


def draw_labels(label_n: Tensor, labels: int, draw: int) -> Tensor:
    """Indices of up to ``labels`` images of each class, a function of the draw's number alone."""
    order_n = counter.permutation(len(label_n), counter.stream("few labels"), draw)
    order_n = order_n[label_n[order_n].argsort(stable=True)]            # by class, shuffled within each
    size_C = label_n.bincount()
    place_n = torch.arange(len(label_n)) - (size_C.cumsum(0) - size_C)[label_n[order_n]]
    return order_n[place_n < labels]


def fit(x_RnD: Tensor, label_Rn: Tensor, num_classes: int, l2: float, max_iter: int) -> tuple[Tensor, Tensor]:
    """Weights [R, D, C] and biases [R, 1, C] that minimise mean cross-entropy + l2 / 2 * |W|^2, for R sets at once.

    L-BFGS in float32 from zero. scikit-learn's LogisticRegression minimises the same with C = 1 / (n * l2). The R
    problems are independent and strictly convex, so the minimum of their sum is each one's own.
    """
    problems, n, width = x_RnD.shape
    w_RDC = x_RnD.new_zeros(problems, width, num_classes, requires_grad=True)
    b_R1C = x_RnD.new_zeros(problems, 1, num_classes, requires_grad=True)
    lbfgs = torch.optim.LBFGS([w_RDC, b_R1C], max_iter=max_iter, max_eval=2 * max_iter, tolerance_grad=1e-6,
                              history_size=10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        lbfgs.zero_grad()
        logits_RnC = x_RnD @ w_RDC + b_R1C
        loss = F.cross_entropy(logits_RnC.flatten(0, 1), label_Rn.flatten(), reduction="sum") / n
        loss = loss + l2 / 2 * w_RDC.square().sum()
        loss.backward()
        return loss

    lbfgs.step(objective)
    return w_RDC.detach(), b_R1C.detach()


def _predicted(data: Standardised, w_DC: Tensor, b_1C: Tensor) -> Tensor:
    return (data.test_mD @ w_DC + b_1C).argmax(dim=1)

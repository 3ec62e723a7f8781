"""Linear probes: logistic regression on frozen features, with all labels and with a few of each class.

Full-batch L-BFGS has no learning rate to tune, so a number depends on the features alone. Papers train the same
classifier by SGD on augmented images (lr 30 for MoCo v1 and v2); those numbers are another protocol's.

Axes: R problems solved at once, n training and m test images, b of them at a time, D features, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.evaluate.draws import Labels, check_labels, draw_labels, over_draws
from common.evaluate.features import CPU, Features
from common.evaluate.result import Result, Setting, accuracy
from common.evaluate.rows import Problems, Rows, standardised


class Linear:
    """Logistic regression with the labels of all training images."""

    def __init__(self, l2: float = 1e-4, max_iter: int = 100):
        self.l2, self.max_iter = l2, max_iter

    def __call__(self, features: Features, device: torch.device = CPU) -> list[Result]:
        """One result; without labelled test images, on a fifth of the training images that is held out."""
        data = standardised(features, device)
        problems = Problems(data.train, data.train_label_n, torch.arange(len(data.train))[None])
        weights = fit(problems, features.num_classes, self.l2, self.max_iter)
        protocol: dict[str, Setting] = {"layer": features.layer, "labels": "all", "l2": self.l2,
                                        "max_iter": self.max_iter}
        return [accuracy("linear", predict(data.test, *weights)[0], data.test_label_m, protocol | data.split)]


class FewLabels:
    """Logistic regression with few labels, ``draws`` times: mean, standard deviation and 95 % interval of the mean.

    ``labels``: so many images of each class, all it has if they are fewer, or a share of each class, such as "1%", at
    least one image. The draws are fixed: every encoder, seed and epoch is measured on the same labels. The features are
    standardised by all training images, since those need no label for it. ``l2`` is fixed, too: with a label a class
    there is nothing to choose it by.
    """

    def __init__(self, labels: Labels = 10, draws: int = 10, l2: float = 1e-2, max_iter: int = 100):
        check_labels(labels)
        if draws < 1:
            raise ValueError(f"draws: {draws} given; must be at least 1.")
        self.labels, self.draws, self.l2, self.max_iter = labels, draws, l2, max_iter

    def __call__(self, features: Features, device: torch.device = CPU) -> list[Result]:
        """One result, on the same test images as ``Linear``."""
        data = standardised(features, device)
        index_Rn = torch.stack([draw_labels(data.train_label_n, self.labels, draw) for draw in range(self.draws)])
        problems = Problems(data.train, data.train_label_n, index_Rn)
        weights = fit(problems, features.num_classes, self.l2, self.max_iter)
        protocol = self._protocol(features.layer, data.train_label_n) | data.split
        return [over_draws("few", [(predicted_m, data.test_label_m) for predicted_m in predict(data.test, *weights)],
                           protocol)]

    def _protocol(self, layer: str, label_n: Tensor) -> dict[str, Setting]:
        size_C = label_n.bincount()
        small = int(((size_C > 0) & (size_C < self.labels)).sum()) if isinstance(self.labels, int) else 0
        return {"layer": layer, "labels": self.labels, "draws": self.draws, "l2": self.l2, "max_iter": self.max_iter,
                **({"smaller_classes": small} if small else {})}


def fit(problems: Problems, num_classes: int, l2: float, max_iter: int,
        start: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Weights [R, D, C] and biases [R, 1, C] that minimise mean cross-entropy + l2 / 2 * |W|^2, for R sets at once.

    L-BFGS in float32 from zero, or from ``start``. scikit-learn's LogisticRegression minimises the same with
    C = 1 / (n * l2). The R problems are independent and strictly convex, so the minimum of their sum is each one's own.
    """
    num_problems, n, width = problems.shape
    shapes = (num_problems, width, num_classes), (num_problems, 1, num_classes)
    w_RDC, b_R1C = start or (torch.zeros(shape, dtype=problems.rows.dtype, device=problems.rows.device)
                             for shape in shapes)
    w_RDC, b_R1C = w_RDC.clone(), b_R1C.clone()
    lbfgs = torch.optim.LBFGS([w_RDC.requires_grad_(), b_R1C.requires_grad_()], max_iter=max_iter,
                              max_eval=2 * max_iter, tolerance_grad=1e-6, history_size=10,
                              line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        lbfgs.zero_grad()
        penalty = l2 / 2 * w_RDC.square().sum()
        penalty.backward()
        total = penalty.detach()
        for x_RbD, label_Rb in problems:                # a block's graph is gone before the next one's is made
            logits_RbC = x_RbD @ w_RDC + b_R1C
            loss = F.cross_entropy(logits_RbC.flatten(0, 1), label_Rb.flatten(), reduction="sum") / n
            loss.backward()
            total = total + loss.detach()
        return total

    lbfgs.step(objective)
    return w_RDC.detach(), b_R1C.detach()


def predict(rows: Rows, w_RDC: Tensor, b_R1C: Tensor) -> Tensor:
    """The class [R, m] of each row by each of R classifiers, on the CPU."""
    return torch.cat([torch.stack([(x_bD @ w_DC + b_1C).argmax(dim=1) for w_DC, b_1C in zip(w_RDC, b_R1C)])
                      for x_bD in rows.blocks()], dim=1).cpu()

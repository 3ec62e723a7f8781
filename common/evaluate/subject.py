"""The chance that an image is of one subject, from a normal density of that subject's features.

Chopra, Hadsell & LeCun 2005, "Learning a similarity metric discriminatively, with application to face verification",
Sec. 4.1: a multivariate normal density is fitted to the features of a subject's images. The likelihood that an image is
genuine is this density at its features, and the likelihood that it is an impostor is a constant: the mean of the
density over images of others. The probability that it is genuine is genuine / (genuine + impostor).

Axes: n images of the subject, i of impostors, m images in question, D features.
"""

import math
from dataclasses import dataclass

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

LEAST = 2               # images of a subject: one has no spread


@dataclass(frozen=True)
class Normal:
    """A multivariate normal density; float64."""

    mean_D: Tensor
    chol_DD: Tensor                     # of the covariance, lower triangle

    @classmethod
    def fit(cls, x_nD: Tensor, shrinkage: float | None = None) -> "Normal":
        """The density of the maximum likelihood, its covariance S drawn towards a sphere: (1 - a) S + a tr(S) / D I.

        A few images cannot span D features: without this S has no inverse; the paper does not say what it does about
        it. ``shrinkage`` a in [0, 1]; None: that of Ledoit & Wolf (2004), which needs no choice. Raises ValueError for
        fewer than two images, for images all alike, and where S has no inverse.
        """
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage: {shrinkage} given; it lies in [0, 1].")
        if len(x_nD) < LEAST or not x_nD.isfinite().all():
            raise ValueError(f"subject: {len(x_nD)} images, or features that are not finite; give at least {LEAST} "
                             "images of it, and an encoder that is not broken.")
        x_nD = x_nD.double().cpu()
        cov_DD = torch.from_numpy(ledoit_wolf(x_nD.numpy())[0]) if shrinkage is None else _shrunk(x_nD, shrinkage)
        chol_DD, failed = torch.linalg.cholesky_ex(cov_DD)
        if failed or not chol_DD.isfinite().all():
            raise ValueError(f"subject: the features of its {len(x_nD)} images leave no spread in some of the "
                             f"{x_nD.shape[1]} directions. Give images that differ, more of them, or a shrinkage above "
                             "0.")
        return cls(x_nD.mean(dim=0), chol_DD)

    def log_density(self, x_mD: Tensor) -> Tensor:
        """The natural logarithm of the density at each row, [m]."""
        white_Dm = torch.linalg.solve_triangular(self.chol_DD, (x_mD.double().cpu() - self.mean_D).T, upper=False)
        log_root = self.chol_DD.diagonal().log().sum()
        return -0.5 * white_Dm.square().sum(dim=0) - log_root - 0.5 * len(self.mean_D) * math.log(2 * math.pi)


def probability(subject: Normal, impostor_iD: Tensor, x_mD: Tensor) -> Tensor:
    """The probability that each image of ``x_mD`` is the subject's, float64 [m].

    In logarithms: a density in many dimensions is beyond any float. Raises ValueError without impostors.
    """
    if not len(impostor_iD):
        raise ValueError("impostors: none given; at least one image of another subject is needed to compare with.")
    log_impostor = subject.log_density(impostor_iD).logsumexp(dim=0) - math.log(len(impostor_iD))
    return torch.sigmoid(subject.log_density(x_mD) - log_impostor)


def _shrunk(x_nD: Tensor, shrinkage: float) -> Tensor:
    cov_DD = torch.cov(x_nD.T, correction=0).reshape(x_nD.shape[1], x_nD.shape[1])
    sphere = cov_DD.diagonal().mean() * torch.eye(len(cov_DD), dtype=torch.float64)
    return (1 - shrinkage) * cov_DD + shrinkage * sphere

"""Non-parametric instance discrimination (Wu et al. 2018, arXiv:1805.01978).

Axes: B images of this rank, N of all ranks, C feature dimension, n training images, m noise samples.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from common.batchnorm import group_batchnorm, has_batchnorm
from common.dictionary import Bank
from common.distributed import gather
from common.encoder import Encoder, require_unit
from common.losses import check_temperature, info_nce, nce
from common.method import Batch, Method, Output
from instdisc.citation import CITATION


class InstDisc(Method):
    """One encoder and a memory bank.

    ``loss``: "nce" (Eq. 7, the paper's), "sampled_softmax" (over the image and m negatives, the authors' later model)
    or "full_softmax" (Eq. 2, exact). ``z``: how the constant Z of Eq. 8 is held: "average" (exponential, momentum
    ``z_momentum``), "first_batch" (the authors' code: estimated once, among random features), or "fixed" (what random
    unit vectors give, n exp(1 / (2 C T^2))). ``proximal`` is lambda of Eq. 9. ``bn_groups`` as in
    ``common.batchnorm``.
    """

    citation = CITATION
    log_z: Tensor

    def __init__(self, encoder: Encoder, dictionary: Bank, *, temperature: float = 0.07,
                 loss: Literal["nce", "sampled_softmax", "full_softmax"] = "nce",
                 z: Literal["average", "first_batch", "fixed"] = "average", z_momentum: float = 0.99,
                 proximal: float = 0.0, bn_groups: int = 1):
        if (loss == "full_softmax") != (dictionary.negatives is None):
            raise ValueError(f"loss: {loss!r} with dictionary.negatives {dictionary.negatives}. "
                             "full_softmax takes all images (null), the other two a number of negatives.")
        check_temperature(temperature)
        require_unit(encoder)
        if not 0 < z_momentum < 1:
            raise ValueError(f"z_momentum: {z_momentum} lies outside (0, 1). Give e.g. 0.99, or z: first_batch.")
        if not 0 <= proximal < math.inf:
            raise ValueError(f"proximal: {proximal} given. Give 0 or more; 0 is without the term of Eq. 9.")
        super().__init__()
        self.encoder = group_batchnorm(encoder, bn_groups) if has_batchnorm(encoder) else encoder
        self.dictionary, self.temperature, self.loss = dictionary, temperature, loss
        self.z, self.z_momentum, self.proximal = z, z_momentum, proximal
        start = math.nan if z != "fixed" else self._log_z_of_random_features()
        self.register_buffer("log_z", torch.tensor(start))                       # nan: not yet estimated

    def prepare(self, embed: Callable[[], Tensor]) -> None:
        if self.dictionary.init == "encoder":
            self.dictionary.fill(embed())

    def forward(self, batch: Batch) -> Output:
        v_BC = self.encoder(batch.views[0])
        found = self.dictionary.compare(v_BC, v_BC, batch.index, self.temperature)
        carry, logs = {"keys": v_BC.detach()}, found.logs()
        if self.loss == "nce":
            loss, carry["log_z"], logs["log_z"] = self._nce(found)
        else:
            loss = info_nce(found.pos_B, found.log_sum_B, self.temperature)      # Eq. 2-3
        if self.proximal:
            loss = loss + self.proximal * (2 - 2 * found.pos_B).mean()         # Eq. 9: |v_t - v_(t-1)|^2 at unit length
        return Output(loss, {"loss": loss.detach(), **logs}, carry)

    def _nce(self, found):
        """The loss, each image's own estimate of log Z (Eq. 8), and the log Z that was used."""
        noise_Bm = found.noise_BM
        log_mean_B = (noise_Bm.detach() / self.temperature).logsumexp(dim=1) - math.log(noise_Bm.shape[1])
        log_z_B = log_mean_B + math.log(self._n)                                 # Eq. 8
        log_z = torch.where(self.log_z.isnan(), _log_mean_exp(gather(log_z_B)), self.log_z)
        return nce(found.pos_B, noise_Bm, self.temperature, self._n, log_z), log_z_B, log_z

    def after_step(self, batches: Sequence[Batch], outputs: Sequence[Output], progress: float) -> None:
        for batch, output in zip(batches, outputs, strict=True):
            self.dictionary.update(output.carry["keys"], batch.index)
        if self.loss == "nce":
            self._update_z(torch.cat([output.carry["log_z"] for output in outputs]))

    def _update_z(self, log_z_B):
        """Z <- t Z + (1 - t) Z_batch, held as a logarithm so that it never overflows."""
        if self.z == "fixed":
            return
        batch = _log_mean_exp(gather(log_z_B))
        keep = 1.0 if self.z == "first_batch" else self.z_momentum
        mixed = torch.logaddexp(self.log_z + math.log(keep), batch + math.log1p(-keep)) if keep < 1 else self.log_z
        self.log_z.copy_(torch.where(self.log_z.isnan(), batch, mixed))

    def memory(self) -> Tensor:
        return self.dictionary.v

    @property
    def _n(self) -> int:
        return len(self.dictionary.v)

    def _log_z_of_random_features(self) -> float:
        return math.log(self._n) + 1 / (2 * self.dictionary.v.shape[1] * self.temperature**2)

    def chance(self) -> float | None:
        if self.loss != "nce":
            return math.log(self.dictionary.candidates())
        m = self.dictionary.candidates() - 1
        return math.log1p(m) + m * math.log1p(1 / m)                             # Eq. 6 with h = 1 / (1 + m) throughout


def _log_mean_exp(x_N):
    return x_N.logsumexp(dim=0) - math.log(len(x_N))

"""SimCLR (Chen et al. 2020, arXiv:2002.05709): no second encoder, no dictionary to keep.

Axes: B images of this rank, Q = 2B views of them, M views of all ranks, C feature dimension.
"""

import math

import torch

from common.batchnorm import group_batchnorm
from common.distributed import gather_with_grad, rank
from common.encoder import Encoder
from common.losses import info_nce
from common.method import Batch, Method, Output


class SimCLR(Method):
    """Each view of an image has the other one as positive, and all views of all other images as negatives."""

    def __init__(self, encoder: Encoder, *, temperature: float = 0.5):
        super().__init__()
        self.encoder, self.temperature = group_batchnorm(encoder, groups=1), temperature

    def forward(self, batch: Batch) -> Output:
        z_QC = self.encoder(torch.cat(batch.views))                          # row b and row B + b: image b
        with torch.autocast(z_QC.device.type, enabled=False):
            sim_QM = z_QC @ gather_with_grad(z_QC).T
        row_Q = torch.arange(len(z_QC), device=z_QC.device)
        first = rank() * len(z_QC)                                           # where this rank's rows stand among all
        own_Q, other_Q = first + row_Q, first + row_Q.roll(len(batch.index))
        pos_Q = sim_QM[row_Q, other_Q]
        sim_QM = sim_QM.index_put((row_Q, own_Q), sim_QM.new_tensor(-math.inf))
        loss = info_nce(pos_Q, (sim_QM / self.temperature).logsumexp(dim=1), self.temperature)      # Eq. 1
        return Output(loss, {"loss": loss.detach(), "pos": pos_Q.detach().mean()}, carry={})

"""The end-to-end mechanism of MoCo Fig. 2a: keys with gradient, the batch as dictionary."""

from common.batchnorm import group_batchnorm, has_batchnorm
from common.dictionary import InBatch
from common.encoder import Encoder, require_unit
from common.losses import check_temperature, info_nce
from common.method import Batch, Method, Output
from moco.citation import CITATION


class EndToEnd(Method):
    """Queries and keys by the same encoder, both trained by back-propagation; N - 1 negatives.

    ``bn_groups``: virtual BatchNorm groups of the global batch; 1 is one group, over all processes.
    """

    num_views = 2
    citation = CITATION

    def __init__(self, encoder: Encoder, *, temperature: float = 0.07, bn_groups: int = 1):
        check_temperature(temperature)
        require_unit(encoder)
        super().__init__()
        self.encoder = group_batchnorm(encoder, bn_groups) if has_batchnorm(encoder) else encoder
        self.dictionary, self.temperature = InBatch(), temperature

    def forward(self, batch: Batch) -> Output:
        q_BC, k_BC = self.encoder(batch.views[0]), self.encoder(batch.views[1])
        found = self.dictionary.compare(q_BC, k_BC, batch.index, self.temperature)
        loss = info_nce(found.pos_B, found.log_sum_B, self.temperature)
        return Output(loss, {"loss": loss.detach(), **found.logs()}, carry={})

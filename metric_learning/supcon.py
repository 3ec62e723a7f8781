"""Supervised contrastive loss: InfoNCE with every image of the class as a positive.

Axes: B images of this rank, V views of each, M candidates, D feature dimension.
"""

import torch

from common.data.orders import Order
from common.encoder import Encoder, require_unit
from common.losses import check_temperature
from common.method import Batch, Output
from metric_learning import losses
from metric_learning.citations import KHOSLA
from metric_learning.memory import Memory
from metric_learning.method import MetricMethod


class SupCon(MetricMethod):
    """Khosla et al. 2020, Eq. 2, on unit features.

    All views of the batch go through the encoder at once, two in the paper; other views of an image, and all views of
    others of its class, on all processes, are its positives. An image without a label takes no part, nor do its views.
    The ``dictionary`` (``Memory``), if any, keeps the first view of each image.
    """

    citation = KHOSLA

    def __init__(self, encoder: Encoder, *, order: Order | None = None, temperature: float = 0.1,
                 dictionary: Memory | None = None, bn_groups: int = 1):
        check_temperature(temperature)
        require_unit(encoder)
        super().__init__(encoder, order, dictionary, bn_groups)
        self.temperature = temperature

    def forward(self, batch: Batch) -> Output:
        views = len(batch.views)                # those of an image side by side, so that ranks are parts of one batch
        x_BD = self.encoder(torch.stack(batch.views, dim=1).flatten(0, 1))
        index_B, label_B = (of.repeat_interleave(views) for of in (batch.index, batch.label))
        found = self.compared(x_BD, batch._replace(index=index_B, label=label_B))
        sim_BM = losses.products(x_BD, found.x_MD)
        loss = losses.supervised_contrastive(sim_BM, *found.related, self.temperature)
        positive_BM, negative_BM = found.related
        logs = {"loss": loss.detach(), "pos": losses.mean(sim_BM.detach(), positive_BM),
                "neg": losses.mean(sim_BM.detach(), negative_BM),
                "top1": losses.nearest_is_positive(sim_BM, *found.related)}
        return Output(loss, logs, {"features": x_BD.detach()[::views]})

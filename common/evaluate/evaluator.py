"""Features once, then each protocol on them: what a run measures of an encoder, on all processes together."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from common import counter, distributed
from common.bar import Watch, silent
from common.data.datasets import Images, Splits
from common.data.loader import plain_batches
from common.data.views import Views
from common.data.workers import PLAIN_CARE, Care
from common.encoder import Encoder
from common.evaluate.features import Features, beside_bank, evaluating, extract, pixels
from common.evaluate.knn import KNN
from common.evaluate.result import Result

Protocol = Callable[..., list[Result]]


class Evaluator:
    """Measures encoders on ``splits`` by ``protocols``. Every rank calls; every rank gets the results."""

    def __init__(self, splits: Splits, views: Views, protocols: Sequence[Protocol], *,
                 layer: Literal["backbone", "head"] = "backbone", batch_size: int = 256, workers: int = 0,
                 device: torch.device, care: Care = PLAIN_CARE, watch: Watch = silent):
        self.splits, self.views, self.protocols, self.layer = splits, views, protocols, layer
        self.batch_size, self.workers, self.device, self.care, self.watch = batch_size, workers, device, care, watch

    @property
    def possible(self) -> bool:
        """Whether there is anything to measure, and labels of classes to measure it by: those of pairs are none."""
        train = self.splits.train
        return bool(self.protocols) and train.together == 1 and int((train.labels >= 0).sum()) >= 2

    def measure(self, encoder: Encoder) -> list[Result]:
        """The results for the encoder's features, by each protocol in turn; the encoder stays as it is."""
        return self._judge(extract(encoder, self.splits, self.views, layer=self.layer, batch_size=self.batch_size,
                                   workers=self.workers, device=self.device, care=self.care, watch=self.watch))

    def measure_by(self, bank_nC: Tensor, encoder: Encoder) -> list[Result]:
        """kNN of the head's features among the rows of a memory bank: only the test images are embedded."""
        features = beside_bank(encoder, bank_nC, self.splits, self.views, batch_size=self.batch_size,
                               workers=self.workers, device=self.device, care=self.care)
        return self._judge(features, [protocol for protocol in self.protocols if isinstance(protocol, KNN)])

    def measure_pixels(self) -> list[Result]:
        """The same protocols on the images themselves."""
        return self._judge(pixels(self.splits, self.views, batch_size=self.batch_size, workers=self.workers,
                                  device=self.device, care=self.care, watch=self.watch))

    def _judge(self, features: Features | None, protocols: Sequence[Protocol] | None = None) -> list[Result]:
        """By ``protocols``, or by all."""
        results: list[Result] = []
        if features is not None:
            with torch.random.fork_rng(devices=[]):
                results = [result for protocol in (self.protocols if protocols is None else protocols)
                           for result in protocol(features, self.device)]
        return [Result(*result) for result in distributed.from_main(results)]


@torch.no_grad()
def embed(encoder: Encoder, images: Images, views: Views, *, batch_size: int, workers: int,
          device: torch.device, care: Care = PLAIN_CARE) -> Tensor:
    """The encoder's features of all images, [n, C] at unit length, the same on every rank; in evaluation mode.

    An image that cannot be read gets a direction of its own, drawn from its index.
    """
    rows: list[Tensor] = [torch.zeros(0, dtype=torch.long, device=device)]
    found: list[Tensor] = []
    with evaluating(encoder):
        for index_B, x_BcSS in plain_batches(images, views, batch_size, workers, device, care=care):
            rows.append(index_B.to(device))
            found.append(encoder(x_BcSS))
    width = max(distributed.gather_objects(found[0].shape[1] if found else 0))
    v_nC = torch.zeros(len(images), width, device=device)
    if found:
        v_nC[torch.cat(rows)] = torch.cat(found)
    if distributed.world() > 1:
        dist.all_reduce(v_nC)
    missing_m = (v_nC.square().sum(dim=1) == 0).nonzero()[:, 0]
    column_C = torch.arange(width, device=device)
    v_nC[missing_m] = counter.uniform(counter.stream("missing"), missing_m[:, None], column_C) - 0.5
    return F.normalize(v_nC, dim=1)

"""Momentum Contrast: v1 (arXiv:1911.05722) and v2 (arXiv:2003.04297) differ only in the config.

Axes: B images of this rank, C feature dimension.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from common.dictionary import Dictionary
from common.encoder import Encoder, ema_, frozen_copy, require_unit
from common.losses import check_temperature, info_nce
from common.method import Batch, Method, Output
from moco.citation import CITATION
from moco.key_batchnorm import KeyBatchNorm, ema_statistics_, encode_shuffled, prepare_batchnorm


class MoCo(Method):
    """Algorithm 1, line by line.

    ``momentum`` m of Eq. 2, ``temperature`` T of Eq. 1. ``symmetric``: each view is query once and key once, the two
    losses are summed (as in the authors' CIFAR-10 notebook, an effective rate twice as high) or averaged, and both sets
    of keys are enqueued after both losses. ``key_bn`` and ``bn_groups``: what keeps a query from recognising its key
    by the company it was normalised in (Sec. 3.3); see ``moco.key_batchnorm``.
    """

    num_views = 2
    citation = CITATION
    step: Tensor

    def __init__(self, encoder: Encoder, dictionary: Dictionary, *, momentum: float = 0.999, temperature: float = 0.07,
                 symmetric: Literal[False, "sum", "mean"] = False, key_bn: KeyBatchNorm = "shuffle",
                 bn_groups: int = 8, seed: int = 0):
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: {momentum} lies outside [0, 1]. The paper's is 0.999.")
        check_temperature(temperature)
        require_unit(encoder)
        super().__init__()
        self.encoder = prepare_batchnorm(encoder, key_bn, bn_groups)            # f_q
        self.key_encoder = frozen_copy(self.encoder)                            # f_k
        self.dictionary = dictionary
        self.momentum, self.temperature, self.symmetric = momentum, temperature, symmetric
        self.key_bn, self.seed = key_bn, seed
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.train()

    def train(self, mode: bool = True) -> "MoCo":
        super().train(mode)
        if self.key_bn == "eval":
            self.key_encoder.eval()
        return self

    def follow_encoder(self) -> None:
        self.key_encoder.load_state_dict(self.encoder.state_dict())             # Algorithm 1: f_k.params = f_q.params

    def forward(self, batch: Batch) -> Output:
        loss, keys_BC, logs = self._contrast(batch.views[0], batch.views[1], batch.index)
        carry = {"keys": keys_BC}
        if self.symmetric:
            other, carry["other_keys"], _ = self._contrast(batch.views[1], batch.views[0], batch.index)
            loss = (loss + other) / (1 if self.symmetric == "sum" else 2)
        return Output(loss, {"loss": loss.detach(), **logs, **self.dictionary.logs()}, carry)

    def _contrast(self, query_BcHW, key_BcHW, index_B):
        q_BC = self.encoder(query_BcHW)
        k_BC = self.encode_keys(key_BcHW, index_B)
        found = self.dictionary.compare(q_BC, k_BC, index_B, self.temperature)
        return info_nce(found.pos_B, found.log_sum_B, self.temperature), k_BC, found.logs()

    @torch.no_grad()
    def encode_keys(self, key_BcHW: Tensor, index_B: Tensor) -> Tensor:
        """Keys of this rank's images, [B, C], no gradient; with shuffled BatchNorm groups if so set."""
        if self.key_bn == "shuffle":
            return encode_shuffled(self.key_encoder, key_BcHW, index_B, self.seed, self.step)
        return self.key_encoder(key_BcHW)

    def after_step(self, batches: Sequence[Batch], outputs: Sequence[Output], progress: float) -> None:
        ema_(self.key_encoder, self.encoder, self.momentum)                     # Eq. 2
        if self.key_bn == "eval":
            ema_statistics_(self.key_encoder, self.encoder, self.momentum)
        for batch, output in zip(batches, outputs, strict=True):
            for keys_BC in output.carry.values():
                self.dictionary.update(keys_BC, batch.index)
        self.step.add_(1)

    def chance(self) -> float | None:
        count = self.dictionary.candidates()
        return None if count is None else math.log(count) * (2 if self.symmetric == "sum" else 1)

"""How keys are normalised: MoCo Sec. 3.3, "Shuffling BN", and its alternatives, in virtual groups.

``shuffle``  queries in ``bn_groups`` groups, keys in as many groups of other company (the paper's; 8 GPUs = 8 groups)
``split``    queries and keys in the same groups: the leak that shuffling is there against, for comparison
``sync``     one group, the whole global batch: not enough with a queue by its authors (facebookresearch/moco#46)
``eval``     keys by running statistics, which follow the query encoder's as its weights do
``none``     BatchNorm is left as it is, each process its own batch; for encoders without BatchNorm (no ``bn_groups``)
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import counter
from common.batchnorm import group_batchnorm, has_batchnorm
from common.distributed import gather, rank
from common.encoder import Encoder

KeyBatchNorm = Literal["shuffle", "split", "sync", "eval", "none"]


def prepare_batchnorm(encoder: Encoder, key_bn: KeyBatchNorm, groups: int) -> Encoder:
    """Put the encoder's BatchNorm in virtual groups. Raises ValueError for a pair of settings that means nothing."""
    if key_bn == "none":
        return encoder
    if not has_batchnorm(encoder):
        raise ValueError(f"key_bn: {key_bn!r}, but the encoder has no BatchNorm. Give 'none'.")
    if key_bn in ("shuffle", "split") and groups == 1:
        raise ValueError(f"key_bn: {key_bn!r} with bn_groups 1 changes nothing: all images are one group. "
                         "Give bn_groups 2 or more (the paper's is 8), or key_bn 'sync'.")
    if key_bn == "sync" and groups != 1:
        raise ValueError(f"key_bn: 'sync' normalises the batch as one group, bn_groups is {groups}. "
                         "Give bn_groups 1, or key_bn 'shuffle'.")
    return group_batchnorm(encoder, groups)


def encode_shuffled(encoder: nn.Module, image_BcHW: Tensor, index_B: Tensor, seed: int, step: Tensor) -> Tensor:
    """``encoder(image)``, but the images of all ranks are dealt anew to the groups; each rank gets its own keys back.

    The order is by a hash of (seed, step, image): the same on every rank and for any number of them.
    """
    batch = len(image_BcHW)
    order_N = counter.bits(seed, counter.stream("shuffle"), step, gather(index_B)).argsort(stable=True)
    mine = slice(rank() * batch, (rank() + 1) * batch)
    key_NC = gather(encoder(gather(image_BcHW)[order_N[mine]]))                 # row j is the key of image order_N[j]
    return key_NC[order_N.argsort()[mine]]


@torch.no_grad()
def ema_statistics_(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Eq. 2 for BatchNorm's running statistics, which ``eval`` keys are normalised by."""
    for old, new in zip(_statistics(slow), _statistics(fast), strict=True):
        old.lerp_(new, 1 - momentum)


def _statistics(module):
    return [buffer for child in module.modules() if isinstance(child, _BatchNorm)
            for buffer in (child.running_mean, child.running_var)]

"""BatchNorm over virtual groups: the batch is normalised in G parts, however many processes share it.

MoCo was trained on 8 GPUs, so its BatchNorm saw 8 groups of 32 images; that number is part of the recipe. Here it is
set (``groups``) and does not follow the machine: with W processes each holds G / W whole groups, or W / G processes
normalise one group together. Group g is the g-th contiguous part of the global batch. Parameters, buffers and their
names are those of the BatchNorm that is replaced, so weights load into the plain backbone.
"""

from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import distributed

M = TypeVar("M", bound=nn.Module)


class GroupBatchNorm(_BatchNorm):
    """BatchNorm in ``groups`` virtual groups of the global batch; ``after`` is what a fused layer does next.

    The running statistics move by the mean over the groups' (biased mean, unbiased variance), as on one GPU each.
    """

    def __init__(self, plain: _BatchNorm, groups: int):
        super().__init__(plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats)
        self.weight, self.bias = plain.weight, plain.bias
        self.running_mean, self.running_var = plain.running_mean, plain.running_var
        self.num_batches_tracked = plain.num_batches_tracked
        self.groups = groups
        fused = [getattr(plain, name) for name in ("drop", "act", "after") if hasattr(plain, name)]
        self.after = nn.Sequential(*fused)
        self.training = plain.training

    def _check_input_dim(self, input):
        """Any number of axes: [B, C, ...]."""

    def forward(self, x_BC: Tensor) -> Tensor:
        if not self.training:
            return self.after(super().forward(x_BC))
        world = distributed.world()
        if world > self.groups:
            return self.after(self._together(x_BC, world // self.groups))
        return self.after(self._apart(x_BC, self.groups // world))

    def _apart(self, x_BC, local_groups):
        """The groups that this process holds whole."""
        assert self.running_mean is not None and self.running_var is not None
        if local_groups == 1:
            return super().forward(x_BC)
        mean_GC, var_GC = self.running_mean.new_zeros(2, local_groups, self.num_features)
        parts = [F.batch_norm(x_bC, mean_C, var_C, self.weight, self.bias, True, 1.0, self.eps)
                 for x_bC, mean_C, var_C in zip(_cut(x_BC, local_groups), mean_GC, var_GC, strict=True)]
        self._track(mean_GC.mean(dim=0), var_GC.mean(dim=0))
        return torch.cat(parts)

    def _together(self, x_BC, ranks):
        """One group that ``ranks`` processes share: its mean and variance are summed over them."""
        group = _process_group(ranks)
        axes = [axis for axis in range(x_BC.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x_BC.dim() - 2)
        count = x_BC.numel() // x_BC.shape[1] * ranks
        x = x_BC.float() if x_BC.dtype in (torch.float16, torch.bfloat16) else x_BC
        mean_C = _AllReduce.apply(x.sum(axes), group) / count
        centred = x - mean_C.view(shape)
        var_C = _AllReduce.apply(centred.square().sum(axes), group) / count
        self._track(mean_C.detach(), var_C.detach() * count / (count - 1))
        y = centred * (var_C + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x_BC.dtype)

    @torch.no_grad()
    def _track(self, mean_C, var_C):
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var_C.to(self.running_var.dtype), self.momentum)


class _AllReduce(torch.autograd.Function):
    """The sum over a process group; so is its gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


_groups: dict[tuple[Any, int], Any] = {}


def _process_group(ranks):
    """The ``ranks`` neighbouring processes that this one belongs to."""
    key = dist.group.WORLD, ranks                           # of a job that was left, the groups are of no use
    if key not in _groups:
        parts = [list(range(first, first + ranks)) for first in range(0, distributed.world(), ranks)]
        _groups[key] = dist.new_subgroups_by_enumeration(parts)[0]
    return _groups[key]


def _cut(x_BC, parts):
    """Contiguous parts whose sizes differ by one at most.

    By ``split``, whose gradient is joined at once and keeps its layout; each slice's would be a whole batch of zeros.
    """
    if len(x_BC) < 2 * parts:
        raise ValueError(f"bn_groups: {len(x_BC)} images cannot be normalised in {parts} groups of at least 2. "
                         "Give a larger train.batch_size or fewer method.bn_groups.")
    bounds = [len(x_BC) * part // parts for part in range(parts + 1)]
    return x_BC.split([stop - first for first, stop in pairwise(bounds)])


def has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(child, _BatchNorm) for child in module.modules())


def group_batchnorm(module: M, groups: int) -> M:
    """``module`` with every BatchNorm in it replaced by one over ``groups`` virtual groups; the same parameters.

    Raises ValueError if the running processes can neither share out the groups nor share each of them.
    """
    world = distributed.world()
    if groups < 1 or (groups % world and world % groups):
        raise ValueError(f"bn_groups: {groups} groups cannot be shared by {world} processes. "
                         f"Give a multiple or a divisor of {world}, or start another number of processes.")
    if isinstance(module, _BatchNorm):
        return GroupBatchNorm(module, groups)        # type: ignore[return-value]   # of a BatchNorm one is asked for
    for name, child in module.named_children():
        setattr(module, name, group_batchnorm(child, groups))
    return module


@torch.no_grad()
def average_running_statistics(module: nn.Module) -> None:
    """Give every rank the mean of the ranks' running statistics: what one process with all groups would hold.

    Called after every step, so that no rank's buffers are private and a checkpoint of one rank is one of all. What is
    in evaluation mode has not moved, and stays as it is to the last bit.
    """
    if distributed.world() == 1:
        return
    buffers = [buffer for child in module.modules()
               if isinstance(child, _BatchNorm) and child.training
               for buffer in (child.running_mean, child.running_var) if buffer is not None]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    torch._foreach_copy_(buffers, distributed.mean(flat).split([buffer.numel() for buffer in buffers]))

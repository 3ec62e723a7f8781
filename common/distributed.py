"""Collectives that are the identity in a single process."""

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(hours=6)       # how long the others wait while the main process searches, fits or saves alone


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


@torch.no_grad()
def gather(x_B: Tensor) -> Tensor:
    """Concatenate ``x_B`` of all ranks in rank order, [B, ...] -> [W*B, ...]; same shape on every rank; no gradient."""
    if world() == 1:
        return x_B
    x_N = x_B.new_empty(world() * len(x_B), *x_B.shape[1:])
    dist.all_gather_into_tensor(x_N, x_B.contiguous())
    return x_N


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_B):
        return gather(x_B)

    @staticmethod
    def backward(ctx, grad_N):
        grad_N = grad_N.clone(memory_format=torch.contiguous_format)      # others may hold the same gradient
        dist.all_reduce(grad_N)                     # every rank's loss depends on every rank's x
        return grad_N.chunk(world())[rank()]


def gather_with_grad(x_B: Tensor) -> Tensor:
    """Like ``gather``; the backward pass sums the gradient over ranks."""
    return _Gather.apply(x_B) if world() > 1 else x_B


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    """The mean of ``x`` over ranks."""
    if world() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world()


def gather_objects(thing: object) -> list:
    """``thing`` of every rank, in rank order, on every rank; for small Python objects between steps."""
    if world() == 1:
        return [thing]
    out: list = [None] * world()
    dist.all_gather_object(out, thing, group=_host_group())
    return out


def highest(*values: int) -> list[int]:
    """The largest of each of these over ranks, on every rank; no device is asked, and none is waited for."""
    if world() == 1:
        return list(values)
    x = torch.tensor(values)
    dist.all_reduce(x, dist.ReduceOp.MAX, group=_host_group())
    return x.tolist()


def from_main(thing: T) -> T:
    """The main process's ``thing``, on every rank; the others wait for as long as it takes to make."""
    if world() == 1:
        return thing
    box = [thing]
    dist.broadcast_object_list(box, src=0, group=_host_group())
    return box[0]


def barrier() -> None:
    if world() > 1:
        dist.barrier(group=_host_group())


_host: tuple[Any, Any] = (None, None)               # the default group, and the one made beside it


def _host_group() -> Any:
    """All ranks once more, for what they tell each other between steps: by gloo, whatever the gradients travel by.

    NCCL would make the host wait for the GPU for every word, and end the job when the main process measures for longer
    than its ten minutes. Made at the first use, which all ranks come to together.
    """
    global _host
    if _host[0] is not dist.group.WORLD:
        _host = dist.group.WORLD, dist.new_group(backend="gloo", timeout=PATIENCE)
    return _host[1]


def start(kind: str, threads: int | None = None) -> torch.device:
    """Join the other processes of this job, if torchrun started any, and give this one's device.

    ``kind`` is "cpu", "cuda", "mps" or "auto": the first of CUDA, MPS and CPU that there is. Raises ValueError for one
    that this machine lacks.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = _device(kind, int(os.environ.get("LOCAL_RANK", 0)))
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if device.type == "mps" and several:
        raise ValueError("device: processes cannot share their gradients on MPS. Start one, or give train.device=cpu.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    global _host
    _host = None, None
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(kind, local_rank):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        kind = next(name for name, found in there.items() if found)
    if not there[kind]:
        raise ValueError(f"device: {kind!r}, but this machine has only {', '.join(n for n, f in there.items() if f)}.")
    return torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)

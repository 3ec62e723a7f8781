"""Collectives that are the identity in a single process."""

import os
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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
    out = [torch.empty_like(x_B, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(out, x_B.contiguous())
    return torch.cat(out)


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
    dist.all_gather_object(out, thing)
    return out


def from_main(thing: T) -> T:
    """The main process's ``thing``, on every rank."""
    if world() == 1:
        return thing
    box = [thing]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def start(kind: str, threads: int | None = None) -> torch.device:
    """Join the other processes of this job, if torchrun started any, and give this one's device.

    ``kind`` is "cpu", "cuda", "mps" or "auto": the first of CUDA, MPS and CPU that there is. Raises ValueError for one
    that this machine lacks.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = _device(kind, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(kind, local_rank):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        kind = next(name for name, found in there.items() if found)
    if not there[kind]:
        raise ValueError(f"device: {kind!r}, but this machine has only {', '.join(n for n, f in there.items() if f)}.")
    return torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)

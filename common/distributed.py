"""Collectives that are the identity in a single process."""

import os
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

T = TypeVar("T")

PATIENCE = timedelta(hours=6)       # how long the others wait while the main process searches, fits or saves alone
JOIN = 300.0                        # seconds: how far apart the processes may start

entered = 0                         # how many of the collectives below this rank has come to: the same order on all


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
    _enter()
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
    _enter()
    x = x.clone()
    dist.all_reduce(x)
    return x / world()


def gather_objects(thing: object) -> list:
    """``thing`` of every rank, in rank order, on every rank; for small Python objects between steps."""
    if world() == 1:
        return [thing]
    _enter()
    out: list = [None] * world()
    dist.all_gather_object(out, thing, group=_host_group())
    return out


def highest(*values: int) -> list[int]:
    """The largest of each of these over ranks, on every rank; no device is asked, and none is waited for."""
    if world() == 1:
        return list(values)
    _enter()
    x = torch.tensor(values)
    dist.all_reduce(x, dist.ReduceOp.MAX, group=_host_group())
    return x.tolist()


def from_main(thing: T) -> T:
    """The main process's ``thing``, on every rank; the others wait for as long as it takes to make."""
    if world() == 1:
        return thing
    _enter()
    box = [thing]
    dist.broadcast_object_list(box, src=0, group=_host_group())
    return box[0]


def barrier() -> None:
    if world() > 1:
        _enter()
        dist.barrier(group=_host_group())


def _enter() -> None:
    global entered
    entered += 1


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


class Place(NamedTuple):
    """This process among those of the job, as torchrun or another launcher says it in the environment."""

    rank: int
    local_rank: int
    world: int
    address: str                    # where all meet

    @classmethod
    def read(cls) -> "Place":
        """Raises ValueError, naming the variable, for what no launcher says."""
        rank, local_rank, world = (_whole(name, at_least, alone) for name, at_least, alone in
                                   (("RANK", 0, 0), ("LOCAL_RANK", 0, 0), ("WORLD_SIZE", 1, 1)))
        if rank >= world:
            raise ValueError(f"RANK={rank} with WORLD_SIZE={world} in the environment: ranks go from 0 to {world - 1}. "
                             "Start the processes with torchrun, or unset both.")
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if world > 1 and missing:
            raise ValueError(f"WORLD_SIZE={world} in the environment, but no {' and no '.join(missing)}. Start the "
                             "processes with torchrun, which sets them, or unset WORLD_SIZE.")
        address = f"{os.environ.get('MASTER_ADDR', '')}:{_whole('MASTER_PORT', 0, 0)}"
        return cls(rank, local_rank, world, address)


def _whole(name: str, at_least: int, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal() or int(text) < at_least:
        raise ValueError(f"{name}={text!r} in the environment is no whole number from {at_least} up. Start the "
                         "processes with torchrun, or unset it.")
    return int(text)


_store: Store | None = None                    # of the processes that ``start`` brought together
_at_stop: list[Callable[[], None]] = []


def start(kind: str, threads: int | None = None, timeout: float = JOIN) -> torch.device:
    """Join the other processes of this job, if torchrun started any, and give this one's device.

    ``kind`` is "cpu", "cuda", "mps" or "auto": the first of CUDA, MPS and CPU that there is. ``timeout`` is how many
    seconds a rank may hang before the others end (common.watch): what torch says after some minutes comes later.
    Raises ValueError for a device that this machine lacks and for an environment that no launcher makes, and
    ConnectionError if the processes do not meet.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    place = Place.read()
    device = _device(kind, place.local_rank)
    if device.type == "mps" and place.world > 1:
        raise ValueError("train.device: processes cannot share their gradients on MPS. Start one, or give "
                         "train.device=cpu.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.world > 1 and not dist.is_initialized():
        _join("nccl" if device.type == "cuda" else "gloo", place, timeout)
    return device


def _join(backend: str, place: Place, timeout: float) -> None:
    global _store
    patience = timedelta(seconds=max(1800, 5 * timeout))
    try:
        found, _, _ = next(rendezvous("env://", place.rank, place.world, timeout=timedelta(seconds=JOIN)))
        _store = _meet(found, place.rank, place.world)
        dist.init_process_group(backend, store=PrefixStore("default_pg", _store), rank=place.rank,
                                world_size=place.world, timeout=patience)
    except (RuntimeError, OSError) as error:
        raise ConnectionError(_apart(place, str(error).partition("\n")[0])) from error


def _meet(store: Store, rank: int, world: int) -> Store:
    """The part of ``store`` that the processes of this start have to themselves.

    torchrun keeps its store over a restart. A process that is there first would read the addresses of those before,
    and fail. So each asks with a word never used, and the first answers with the name of the new part.
    """
    if rank:
        word = secrets.token_hex(8)
        store.set(f"ask{rank}", word)
        name = store.get(f"answer{word}").decode()
        store.set(f"{name}{rank}", "here")
        return PrefixStore(name, store)
    name, missing, until = secrets.token_hex(8), list(range(1, world)), time.monotonic() + JOIN
    while missing:
        if time.monotonic() > until:
            raise ConnectionError(f"rank {', '.join(map(str, missing))} did not come within {JOIN:g} s")
        for other in (other for other in missing if store.check([f"ask{other}"])):
            store.set(f"answer{store.get(f'ask{other}').decode()}", name)
        time.sleep(0.02)
        missing = [other for other in missing if not store.check([f"{name}{other}"])]
    return PrefixStore(name, store)


def _apart(place: Place, reason: str) -> str:
    """Why the processes did not meet, and what to do."""
    if "EADDRINUSE" in reason or "in use" in reason:
        what = ("the port is taken, by another job or one that has not quite ended. Give another: torchrun "
                "--master-port 29501, or --standalone, which finds one")
    else:
        what = ("see that the other processes were started and have not failed, that the address is that of the first "
                "machine, and that no firewall is between them")
    return (f"MASTER_ADDR:MASTER_PORT={place.address}: the {place.world} processes do not meet there "
            f"({reason.strip()}): {what}.")


def at_stop(action: Callable[[], None]) -> None:
    """Call ``action`` once, before the processes part."""
    if action not in _at_stop:
        _at_stop.append(action)


def store(prefix: str) -> tuple[Store, bool] | None:
    """A connection of one's own to what the processes keep in common under a name, and whether this one holds it.

    None in a single process, and in one that joined the others otherwise than by ``start``.
    """
    if _store is None or not dist.is_initialized():
        return None
    return PrefixStore(prefix, _store.clone()), is_main() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def stop() -> None:
    global _host, _store
    while _at_stop:
        _at_stop.pop()()
    _host, _store = (None, None), None
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(kind: str, local_rank: int) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        kind = next(name for name, found in there.items() if found)
    if not there[kind]:
        raise ValueError(f"train.device: {kind!r}, but this machine has only "
                         f"{', '.join(name for name, found in there.items() if found)}. Give one of these, or auto.")
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(f"train.device: process {local_rank} of this machine needs a GPU of its own, and there are "
                         f"{torch.cuda.device_count()}. Start that many (torchrun --nproc-per-node), or see "
                         "CUDA_VISIBLE_DEVICES.")
    return torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)

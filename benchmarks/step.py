"""The training step, ours beside two others and the floor: python -m benchmarks.step [--rounds 9] [--full]

Every side trains the same network on the same batch with a queue of the same size, and does all that belongs to a step:

official    MoCo's builder and main loop, restated: DistributedDataParallel over one process, keys shuffled by a random
            order that is broadcast, logits joined from a copy of the queue, cross entropy, accuracy, moving average
            parameter by parameter
lightly     the modules of lightly 1.6 in the loop of its documentation
ours        ``common.train.Trainer``, channels_last
floor       what cannot be saved: the network forward and backward, and once more forward for the keys; channels_last

Then the parts that are not the network. ``--full``: larger batches; on a CPU that takes half an hour.
``--device cuda``: images a second in bfloat16, against the goals for one H100; ``--only resnet50`` is one slice of it.
"""

import argparse
import copy
from collections.abc import Generator, Iterator
from functools import partial
from importlib import import_module, util
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Report, Side, arguments, figure
from common.backbones import backbone, projection
from common.batchnorm import GroupBatchNorm
from common.dictionary import Queue
from common.encoder import Encoder, ema_
from common.method import Batch
from common.optim import sgd
from common.settings import TrainSettings
from common.train import LOOK, Trainer
from moco import MoCo

DIM, MOMENTUM, TEMPERATURE, GROUPS = 128, 0.999, 0.07, 8
FLOOR = {"cpu": 1.12, "cuda": 1.05}         # how many times the floor a step may take


class Size(NamedTuple):
    arch: str
    pixels: int
    queue: int
    batch: int                  # images of a step here by default
    named: int                  # by ``--full``
    on_gpu: int
    goal: float                 # images a second on one H100

    def __str__(self) -> str:
        return f"{self.arch} {self.pixels} px"


SIZES = (Size("resnet18", 32, 4096, 16, 128, 512, 35_000), Size("resnet50", 224, 65536, 2, 8, 256, 2_500))


def main() -> None:
    options = arguments(__doc__, quick={"only": "resnet18"}, full=False, device="cpu", only="")
    report = Report("step", options.quick, options.out)
    for size in SIZES:
        size = size._replace(pixels=8, queue=16, batch=2, named=2) if options.quick else size
        if options.only in size.arch:
            whole_step(report, size, options)
            parts(report, size, options)
    if dist.is_initialized():
        dist.destroy_process_group()


def whole_step(report: Report, size: Size, options: argparse.Namespace) -> None:
    on_gpu = options.device != "cpu"
    batch = size.on_gpu if on_gpu else size.named if options.full else size.batch
    steps = LOOK if on_gpu else 1                                       # of a call: as many as the host reads at a time
    views = [torch.randn(batch, 3, size.pixels, size.pixels, device=options.device) for _ in range(2)]
    made = {"official": official(size, views), "lightly": lightly(size, views), "ours": ours(size, views),
            "floor": floor(size, views)}
    sides = {name: repeated(partial(next, stream), steps) for name, stream in made.items() if stream is not None}
    what = f"step, {size}, {batch} images"
    seconds = report.compare(what, sides, rounds=options.rounds, at_least={"ours": 1.0}, per=steps,
                             device=options.device)
    for name, limit in {"lightly": 1.0, "floor": FLOOR[options.device]}.items():
        if name in seconds:
            ratios = [own / other for own, other in zip(seconds["ours"], seconds[name])]
            report.add(figure(what, f"ours, time over {name}'s", ratios, "times", baseline=name, at_most=limit))
    if on_gpu:
        rates = [steps * batch / second for second in seconds["ours"]]
        report.add(figure(what, "ours", rates, "images/s", at_least=size.goal))


def repeated(call: Side, times: int) -> Side:
    def calls() -> None:
        for _ in range(times):
            call()
    return calls


def network(size: Size) -> Encoder:
    torch.manual_seed(0)
    trunk: Any = backbone(f"torchvision/{size.arch}", image_size=size.pixels)
    return Encoder(trunk, projection("mlp", trunk.num_features, DIM))


def autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


def floor(size: Size, views: list[Tensor]) -> Generator[None]:
    encoder = network(size).to(views[0].device).to(memory_format=torch.channels_last)
    while True:
        with autocast(views[0]):
            q_BC = encoder(views[0])
            with torch.no_grad():
                encoder(views[1])
        q_BC.sum().backward()
        encoder.zero_grad(set_to_none=True)
        yield


class Feed:
    """Always the same views, of images that come in turn."""

    steps_per_epoch = 10**9

    def __init__(self, views: list[Tensor]):
        self.views = views

    def stream(self, start: int, stop: int) -> Generator[tuple[int, list[Batch], float]]:
        index_B = torch.arange(len(self.views[0]), device=self.views[0].device)
        for step in range(start, stop):
            yield step, [Batch(self.views, index_B, index_B)], 0.0


def ours(size: Size, views: list[Tensor]) -> Iterator:
    device, batch = views[0].device, len(views[0])
    method = MoCo(network(size), Queue(size.queue, DIM), momentum=MOMENTUM, temperature=TEMPERATURE, key_bn="sync",
                  bn_groups=1).to(device).to(memory_format=torch.channels_last)
    settings = TrainSettings(epochs=1, batch_size=batch, precision="bf16" if views[0].is_cuda else "float32")
    feed: Any = Feed(views)
    return Trainer(method, feed, sgd(method, batch, lr=0.03, weight_decay=1e-4), lambda epoch: 1.0, settings,
                   device).steps()


class Builder(nn.Module):
    """MoCo's model as its authors built it, restated: the order of its operations, and where its host waits."""

    queue: Tensor
    place: Tensor

    def __init__(self, size: Size):
        super().__init__()
        self.query, self.key = network(size), network(size)
        self.key.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(DIM, size.queue), dim=0))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        q_BC = self.query(first)
        with torch.no_grad():
            average_by_parameter(self.key, self.query)
            gathered = everyone(second)
            order = torch.randperm(len(gathered), device=second.device)
            dist.broadcast(order, src=0)
            back = order.argsort()
            k_BC = everyone(self.key(gathered[order]))[back]
        positive = torch.einsum("bc,bc->b", q_BC, k_BC).unsqueeze(-1)
        negative = torch.einsum("bc,ck->bk", q_BC, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
        self.enqueue(k_BC)
        return logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)

    @torch.no_grad()
    def enqueue(self, k_BC: Tensor) -> None:
        k_BC = everyone(k_BC)
        first = int(self.place)
        self.queue[:, first:first + len(k_BC)] = k_BC.T
        self.place[0] = (first + len(k_BC)) % self.queue.shape[1]


def everyone(x: Tensor) -> Tensor:
    found = [torch.ones_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    return torch.cat(found)


def average_by_parameter(slow: nn.Module, fast: nn.Module) -> None:
    for old, new in zip(slow.parameters(), fast.parameters()):
        old.data = old.data * MOMENTUM + new.data * (1 - MOMENTUM)


def official(size: Size, views: list[Tensor]) -> Generator[None]:
    if not dist.is_initialized():
        dist.init_process_group("nccl" if views[0].is_cuda else "gloo", store=HashStore(), rank=0, world_size=1)
    model = DistributedDataParallel(Builder(size).to(views[0].device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    told = []
    while True:
        with autocast(views[0]):
            logits, target = model(views[0], views[1])
            loss = F.cross_entropy(logits, target)
        best = logits.topk(5, dim=1).indices == target[:, None]
        told.append([loss.item(), best[:, :1].any(dim=1).float().mean().item(), best.any(dim=1).float().mean().item()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def lightly(size: Size, views: list[Tensor]) -> Generator[None] | None:
    if util.find_spec("lightly") is None:
        print("lightly: left out, it is not installed (pip install lightly)")
        return None
    return _lightly(size, views)


def _lightly(size: Size, views: list[Tensor]) -> Generator[None]:
    loss, modules, utils = (import_module(f"lightly.{name}") for name in ("loss", "models.modules", "models.utils"))
    device, trunk = views[0].device, network(size).backbone.to(views[0].device)
    width: Any = trunk.num_features
    head = modules.MoCoProjectionHead(width, width, DIM).to(device)
    slow_trunk, slow_head = copy.deepcopy(trunk), copy.deepcopy(head)
    utils.deactivate_requires_grad(slow_trunk)
    utils.deactivate_requires_grad(slow_head)
    criterion = loss.NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(size.queue, DIM)).to(device)
    optimizer = torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.03, momentum=0.9, weight_decay=1e-4)
    total = torch.zeros((), device=device)
    while True:
        utils.update_momentum(trunk, slow_trunk, m=MOMENTUM)
        utils.update_momentum(head, slow_head, m=MOMENTUM)
        with autocast(views[0]):
            q_BC = head(trunk(views[0]).flatten(start_dim=1))
            with torch.no_grad():
                mixed, order = utils.batch_shuffle(views[1])
                k_BC = utils.batch_unshuffle(slow_head(slow_trunk(mixed).flatten(start_dim=1)), order)
            found = criterion(q_BC, k_BC)
        total += found.detach()
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def parts(report: Report, size: Size, options: argparse.Namespace) -> None:
    """Moving average, optimizer, and BatchNorm in groups."""
    def compare(what: str, sides: dict[str, Side], goals: dict[str, float]) -> None:
        five = {name: repeated(call, 5) for name, call in sides.items()}
        report.compare(what, five, rounds=options.rounds, at_least=goals, per=5, device=options.device)

    plain = network(size).to(options.device)
    fast = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    slow = [copy.deepcopy(fast).requires_grad_(False) for _ in range(3)]
    compare(f"moving average, {size}", {"official loop": lambda: average_by_parameter(slow[0], fast),
                                        "lightly, mul and add": lambda: mul_and_add(slow[1], fast),
                                        "ours, lerp": lambda: ema_(slow[2], fast, MOMENTUM)}, {"ours, lerp": 2.8})
    compare(f"SGD, {size}", {"loop": optimizer_step(plain, fused=False),
                             "ours, fused": optimizer_step(plain, fused=True),
                             "ours, fused, channels_last": optimizer_step(fast, fused=True)}, {"ours, fused": 2.2})
    if size.arch == "resnet18":
        x = torch.randn(32, 64, size.pixels, size.pixels, device=options.device).to(memory_format=torch.channels_last)
        norms = {"notebook's view": Viewed(64), "ours": GroupBatchNorm(nn.BatchNorm2d(64), GROUPS),
                 "plain, one group": nn.BatchNorm2d(64)}
        sides = {name: there_and_back(norm.to(options.device), x) for name, norm in norms.items()}
        compare("BatchNorm, 8 groups", sides, {"ours": 1.0})


@torch.no_grad()
def mul_and_add(slow: nn.Module, fast: nn.Module) -> None:
    torch._foreach_mul_(list(slow.parameters()), MOMENTUM)
    torch._foreach_add_(list(slow.parameters()), list(fast.parameters()), alpha=1 - MOMENTUM)


def optimizer_step(like: nn.Module, fused: bool) -> Side:
    model = copy.deepcopy(like)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4, foreach=False,
                           fused=fused).step


def there_and_back(norm: nn.Module, x: Tensor) -> Side:
    x = x.clone().requires_grad_()

    def call() -> None:
        y = norm(x)
        y.backward(torch.ones_like(y))
    return call


class Viewed(nn.BatchNorm2d):
    """Groups as the authors' CIFAR-10 notebook makes them, restated: more channels, by a view of the batch."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        assert self.running_mean is not None and self.running_var is not None
        mean, var = self.running_mean.repeat(GROUPS), self.running_var.repeat(GROUPS)
        wide = x_BCHW.reshape(-1, channels * GROUPS, height, width)         # a copy where channels stand last
        out = F.batch_norm(wide, mean, var, self.weight.repeat(GROUPS), self.bias.repeat(GROUPS), True, 0.1, self.eps)
        self.running_mean.copy_(mean.view(GROUPS, channels).mean(dim=0))
        self.running_var.copy_(var.view(GROUPS, channels).mean(dim=0))
        return out.view(batch, channels, height, width)


if __name__ == "__main__":
    main()

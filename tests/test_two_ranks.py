"""One process and two give the same run: loss, weights, running statistics, queue and bank.

Two processes (gloo, on this machine) are started once; each runs every case and leaves its results in a file. The
oracle is the same code in this process, where every collective is the identity. All in float64, where rounding is far
below the tolerance: a wrong rank offset or a forgotten gather is not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from common import distributed
from common.batchnorm import average_running_statistics, group_batchnorm
from common.dictionary import Bank, InBatch, Queue
from common.encoder import Encoder
from common.method import Batch
from instdisc.method import InstDisc
from moco.end_to_end import EndToEnd
from moco.method import MoCo
from tests import metric_cases

N, C, STEPS = 24, 5, 10


def moco(dictionary, **settings):
    settings = {"momentum": 0.9, "temperature": 0.2, "bn_groups": 4, **settings}
    return lambda encoder: MoCo(encoder, dictionary(), **settings)


def instdisc(negatives, **settings):
    return lambda encoder: InstDisc(encoder, Bank(N, C, negatives), temperature=0.2, **settings)


CASES = {
    "moco queue, shuffle": moco(lambda: Queue(20, C)),
    "moco queue, shuffle, one group a process": moco(lambda: Queue(20, C), bn_groups=2),
    "moco queue, split": moco(lambda: Queue(20, C), key_bn="split"),
    "moco queue, sync": moco(lambda: Queue(20, C), key_bn="sync", bn_groups=1),
    "moco queue, eval": moco(lambda: Queue(20, C), key_bn="eval"),
    "moco queue, eval, one group": moco(lambda: Queue(20, C), key_bn="eval", bn_groups=1),
    "moco queue, symmetric, masked": moco(lambda: Queue(20, C, mask_own=True), symmetric="sum"),
    "moco queue smaller than the batch": moco(lambda: Queue(5, C)),
    "moco queue, 2 micro-batches": moco(lambda: Queue(20, C), bn_groups=2),
    "moco bank": moco(lambda: Bank(N, C)),
    "moco bank, sampled": moco(lambda: Bank(N, C, negatives=6)),
    "moco bank, sampled once for all": moco(lambda: Bank(N, C, negatives=6, shared=True)),
    "moco in batch": moco(InBatch),
    "end to end": lambda encoder: EndToEnd(encoder, temperature=0.2, bn_groups=1),
    "end to end, groups": lambda encoder: EndToEnd(encoder, temperature=0.2, bn_groups=4),
    "instdisc nce": instdisc(6),
    "instdisc nce, first batch, groups": instdisc(6, z="first_batch", bn_groups=4),
    "instdisc sampled softmax": instdisc(6, loss="sampled_softmax", bn_groups=2),
    "instdisc full softmax": instdisc(None, loss="full_softmax", bn_groups=4, proximal=0.5),
    **metric_cases.CASES,
}


def encoder() -> Encoder:
    trunk = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
    return Encoder(trunk, nn.Linear(6, C))


def micro_batches(step: int, accumulate: int, labels: list[int]) -> list[Batch]:
    """This rank's share of the step's global batch, micro-batch by micro-batch."""
    draw, size = torch.Generator().manual_seed(step), len(labels)
    index_N, label_N = torch.randperm(N, generator=draw)[:size], torch.tensor(labels)
    view_N = [torch.randn(N, 2, 4, 4, generator=torch.Generator().manual_seed(99), dtype=torch.float64)[index_N]
              + 0.5 * torch.randn(size, 2, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2)]
    share = size // accumulate // distributed.world()
    starts = [size // accumulate * a + share * distributed.rank() for a in range(accumulate)]
    return [Batch([view[start:start + share] for view in view_N], index_N[start:start + share],
                  label_N[start:start + share]) for start in starts]


def run(name: str) -> dict:
    """Ten steps as the trainer takes them: losses, the first gradient, and the whole state at the end."""
    torch.manual_seed(0)
    method = CASES[name](encoder()).double()
    model = method if distributed.world() == 1 else nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.2)
    accumulate = 2 if "micro-batches" in name else 1
    losses, first_gradient = [], None
    for step in range(STEPS):
        batches, outputs = micro_batches(step, accumulate, metric_cases.labels(name)), []
        optimizer.zero_grad()
        for batch in batches:
            outputs.append(model(batch))
            (outputs[-1].loss / accumulate).backward()
        first_gradient = first_gradient or [p.grad.clone() for p in method.encoder.parameters()]
        optimizer.step()
        average_running_statistics(method)
        method.after_step(batches, outputs, (step + 1) / STEPS)
        losses.append(distributed.mean(sum(output.loss.detach() for output in outputs) / accumulate))
    return {"loss": torch.stack(losses), "gradient": first_gradient, "state": method.state_dict()}


def collectives() -> dict:
    """What each collective gives for values that name their rank."""
    rank = distributed.rank()
    leaf, other = torch.full((3, 2), float(rank), requires_grad=True), torch.zeros(6, 2, requires_grad=True)
    beside = other.clone()
    gathered = distributed.gather_with_grad(leaf)
    ((gathered + beside) * torch.arange(12.0).view(6, 2) * (rank + 1)).sum().backward()    # one gradient goes to both
    refused = None
    try:
        group_batchnorm(nn.BatchNorm1d(2), 3)
    except ValueError as error:
        refused = str(error)
    return {"gather": distributed.gather(torch.tensor([rank, rank + 10])),
            "mean": distributed.mean(torch.tensor(float(rank))),
            "objects": distributed.gather_objects({"rank": rank}),
            "from_main": distributed.from_main(f"of rank {rank}"),
            "gather_with_grad": gathered.detach(), "gradient": leaf.grad, "gradient beside": other.grad,
            "refused": refused}


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    torch.save({"collectives": collectives(), **{name: run(name) for name in CASES}}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The results of both ranks, case by case."""
    folder = tmp_path_factory.mktemp("two_ranks")
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                   "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_each_collective_gives_every_rank_what_it_says(two_ranks):
    for rank, found in enumerate(ranks["collectives"] for ranks in two_ranks):
        assert found["gather"].tolist() == [0, 10, 1, 11] and found["mean"] == 0.5
        assert found["objects"] == [{"rank": 0}, {"rank": 1}] and found["from_main"] == "of rank 0"
        assert found["gather_with_grad"][:, 0].tolist() == [0, 0, 0, 1, 1, 1]
        weight = torch.arange(12.0).view(6, 2)
        assert torch.equal(found["gradient"], 3 * weight.chunk(2)[rank])            # both ranks' losses: 1 + 2
        assert torch.equal(found["gradient beside"], (rank + 1) * weight)           # and nobody else's gradient changed
        assert "3 groups cannot be shared by 2 processes" in found["refused"]


def test_every_method_is_among_the_cases():
    assert {type(make(encoder())) for make in CASES.values()} == metric_cases.defined()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(name, two_ranks):
    alone = run(name)
    for rank in two_ranks:
        torch.testing.assert_close(rank[name], alone, rtol=1e-7, atol=1e-7, equal_nan=True)
    assert alone["loss"].std() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_hold_the_same_dictionary_and_the_same_weights(name, two_ranks):
    first, second = (rank[name]["state"] for rank in two_ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))

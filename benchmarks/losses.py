"""Losses over a queue or a bank, against the official operations: python -m benchmarks.losses [--device cuda]

MoCo: 256 queries and 65,536 keys of 128 features, temperature 0.07, against the operations of facebookresearch/moco:
logits by einsum with a copy of the queue, cat, cross entropy, backward, top-5. InstDisc: a bank of 50,000 rows,
temperature 0.1 (and one of ``--large`` rows, 0.07), against those of zhirongw/lemniscate.pytorch, as they are meant,
for the original does not run on today's torch: the rows of 4,096 negatives of each query gathered by index_select, bmm,
exp, / Z, the NCE criterion, backward, and the update of the bank. Both are restated here. Every side ends with the
gradient of the queries. Memory is what one call adds to a process, measured in a fork before anything is timed; on a
GPU what one call allocates there at the most. The goals are those for a CPU.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, Side, arguments, figure, peak_megabytes
from common.dictionary import Bank, Dictionary, Queue
from common.losses import info_nce, nce

DIM = 128
MOCO_GOAL, EXACT_GOAL, SHARED_GOAL, GATHER_GOAL = 3.5, 5.5, 30.0, 1.6
MEGABYTES, MEGABYTES_LARGE = 40.0, 64.0
LARGE = 500_000         # rows: from here on the logits of a dense softmax would take half a gigabyte and more
Sides = dict[str, Side]


def main() -> None:
    tiny = {"batch": 4, "queue": 64, "bank": 64, "negatives": 16, "large": 96}
    options = arguments(__doc__, quick=tiny, batch=256, queue=65_536, bank=50_000, negatives=4096, large=1_281_167,
                        device="cpu")
    report, device = Report("losses", options.quick, options.out), options.device
    moco(report, options.batch, options.queue, options.rounds, device)
    for what, size, rounds in (("InstDisc", options.bank, options.rounds),
                               ("InstDisc, large", options.large, max(1, options.rounds // 3))):
        instdisc(report, what, options.batch, size, options.negatives, rounds, device)


def moco(report: Report, batch: int, size: int, rounds: int, device: str) -> None:
    sides, small = moco_sides(batch, size, device), moco_sides(8, 64, device)
    what, goals = f"MoCo, {batch} x {size:,}", {"one pass": MOCO_GOAL}
    memory(report, what, sides, small, {"one pass": MEGABYTES}, device)
    report.compare(what, sides, rounds=rounds, at_least=goals if device == "cpu" else {}, device=device)


def memory(report: Report, what: str, sides: Sides, small: Sides, at_most: Mapping[str, float], device: str) -> None:
    """Of each side, in MB; the same side in ``small`` runs before it, unmeasured."""
    peak = peak_megabytes if device == "cpu" else gpu_megabytes
    for side, call in sides.items():
        report.add(figure(f"{what}, memory", side, [peak(call, small[side])], "MB", at_most=at_most.get(side)))


def gpu_megabytes(call: Side, first: Side) -> float:
    """What ``call`` allocates on the GPU at the most."""
    first()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def moco_sides(batch: int, size: int, device: str) -> Sides:
    queue = Queue(size, DIM).to(device)
    q_BC, k_BC = unit(batch, device).requires_grad_(), unit(batch, device)
    return {"official": partial(official_moco, q_BC, k_BC, queue.keys.T.contiguous(), 0.07),
            "one pass": partial(softmax, queue, q_BC, k_BC, torch.arange(batch, device=device), 0.07),
            "floor: its two matrix products": partial(two_products, q_BC.detach(), queue.keys)}


def instdisc(report: Report, what: str, batch: int, size: int, negatives: int, rounds: int, device: str) -> None:
    what, large = f"{what}, {batch} x {size:,}", size > LARGE
    sides = instdisc_sides(batch, size, negatives, 0.07 if large else 0.1, device)
    small = instdisc_sides(8, 64, 9, 0.1, device)
    if large:
        del sides["full softmax, dense"]
    limit = {"full softmax, one pass": MEGABYTES_LARGE if large else MEGABYTES}
    memory(report, what, sides, small, limit, device)
    goals = {"NCE, one buffer": GATHER_GOAL, "NCE, shared negatives": SHARED_GOAL}
    goals |= {} if large else {"full softmax, one pass": EXACT_GOAL}
    report.compare(what, sides, rounds=rounds, at_least=goals if device == "cpu" else {}, device=device)


def instdisc_sides(batch: int, size: int, negatives: int, temperature: float, device: str) -> Sides:
    """All work on one bank, so that a large one is held once."""
    bank, own, shared = (Bank(n, DIM, m, shared=together).to(device) for n, m, together in
                         ((size, None, False), (1, negatives, False), (1, negatives, True)))
    own.v = shared.v = bank.v
    q_BC, index_B = unit(batch, device).requires_grad_(), torch.randperm(size, device=device)[:batch]
    return {
        "official NCE": partial(official_nce, q_BC, bank.v, index_B, negatives, temperature),
        "NCE, one buffer": partial(contrast, own, q_BC, index_B, temperature),
        "NCE, shared negatives": partial(contrast, shared, q_BC, index_B, temperature),
        "full softmax, dense": partial(dense_softmax, bank, q_BC, index_B, temperature),
        "full softmax, one pass": partial(exact, bank, q_BC, index_B, temperature),
        "floor: its two matrix products": partial(two_products, q_BC.detach(), bank.v)}


def unit(rows: int, device: str) -> Tensor:
    return F.normalize(torch.randn(rows, DIM, device=device), dim=1)


# Ours: what a method calls, with its logs, the backward pass and, for a bank, the update.

def softmax(dictionary: Dictionary, q_BC: Tensor, k_BC: Tensor, index_B: Tensor, temperature: float) -> None:
    found = dictionary.compare(q_BC, k_BC, index_B, temperature)
    info_nce(found.pos_B, found.log_sum_B, temperature).backward()
    found.logs()


def exact(bank: Bank, q_BC: Tensor, index_B: Tensor, temperature: float) -> None:
    softmax(bank, q_BC, q_BC, index_B, temperature)
    bank.update(q_BC.detach(), index_B)


def contrast(bank: Bank, q_BC: Tensor, index_B: Tensor, temperature: float) -> None:
    """NCE over the bank's draws."""
    found = bank.compare(q_BC, q_BC, index_B, temperature)
    n = len(bank.v)
    assert found.noise_BM is not None
    nce(found.pos_B, found.noise_BM, temperature, n, q_BC.new_tensor(math.log(n) + 0.5)).backward()
    found.logs()
    bank.update(q_BC.detach(), index_B)


# Theirs, restated.

def official_moco(q_BC: Tensor, k_BC: Tensor, queue_CK: Tensor, temperature: float) -> None:
    pos_B1 = torch.einsum("nc,nc->n", q_BC, k_BC)[:, None]
    neg_BK = torch.einsum("nc,ck->nk", q_BC, queue_CK.clone().detach())
    logit_BM = torch.cat([pos_B1, neg_BK], dim=1) / temperature
    target_B = torch.zeros(len(q_BC), dtype=torch.long, device=q_BC.device)
    loss = F.cross_entropy(logit_BM, target_B)
    best_B5 = logit_BM.detach().topk(min(5, logit_BM.shape[1]), dim=1).indices
    (best_B5 == 0).float().sum(dim=1).mean()
    loss.backward()


def official_nce(q_BC: Tensor, bank_nC: Tensor, index_B: Tensor, negatives: int, temperature: float) -> None:
    n, small = len(bank_nC), 1e-7
    rows_BM = torch.randint(n, (len(q_BC), negatives + 1), device=q_BC.device)
    rows_BM[:, 0] = index_B
    keys_BMC = bank_nC.index_select(0, rows_BM.flatten()).view(*rows_BM.shape, -1)
    p_BM = torch.bmm(keys_BMC, q_BC[:, :, None])[:, :, 0].div(temperature).exp().div(2 * n)         # Z is 2 n
    noise = negatives / n
    data_B = p_BM[:, 0] / (p_BM[:, 0] + noise + small)
    noise_Bm = noise / (p_BM[:, 1:] + noise + small)
    (-(data_B.log().sum() + noise_Bm.log().sum()) / len(q_BC)).backward()
    with torch.no_grad():
        mixed_BC = 0.5 * bank_nC[index_B] + 0.5 * q_BC
        bank_nC.index_copy_(0, index_B, mixed_BC / mixed_BC.norm(dim=1, keepdim=True))


def dense_softmax(bank: Bank, q_BC: Tensor, index_B: Tensor, temperature: float) -> None:
    F.cross_entropy(q_BC @ bank.v.T / temperature, index_B).backward()
    bank.update(q_BC.detach(), index_B)


def two_products(q_BC: Tensor, keys_MC: Tensor) -> None:
    """Similarities and a weighted sum of keys, in the cache: without them there is no loss and no gradient."""
    width = 512 if q_BC.device.type == "cpu" else 2**15
    sim_Bm, sum_BC = q_BC.new_empty(len(q_BC), width), torch.zeros_like(q_BC)
    for keys_mC in keys_MC.split(width):
        torch.mm(q_BC, keys_mC.T, out=sim_Bm[:, :len(keys_mC)])
        sum_BC.addmm_(sim_Bm[:, :len(keys_mC)], keys_mC)


if __name__ == "__main__":
    main()

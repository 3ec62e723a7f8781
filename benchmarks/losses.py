"""Losses over a queue or a bank, against the official operations: python -m benchmarks.losses

MoCo: 256 queries and 65,536 keys of 128 features, temperature 0.07, against the operations of facebookresearch/moco:
logits by einsum with a copy of the queue, cat, cross entropy, backward, top-5. InstDisc: a bank of 50,000 rows,
temperature 0.1 (and one of ``--large`` rows, 0.07), against those of zhirongw/lemniscate.pytorch, as they are meant,
for the original does not run on today's torch: the rows of 4,096 negatives of each query gathered by index_select, bmm,
exp, / Z, the NCE criterion, backward, and the update of the bank. Both are restated here. Every side ends with the
gradient of the queries. Memory is what one call adds to a process, measured in a fork before anything is timed.
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
    options = arguments(__doc__, quick=tiny, batch=256, queue=65_536, bank=50_000, negatives=4096, large=1_281_167)
    report = Report("losses", options.quick, options.out)
    moco(report, options.batch, options.queue, options.rounds)
    instdisc(report, "InstDisc", options.batch, options.bank, options.negatives, options.rounds)
    instdisc(report, "InstDisc, large", options.batch, options.large, options.negatives, max(1, options.rounds // 3))


def moco(report: Report, batch: int, size: int, rounds: int) -> None:
    sides, small = moco_sides(batch, size), moco_sides(8, 64)
    memory(report, f"MoCo, {batch} x {size:,}, memory", sides, small, {"one pass": MEGABYTES})
    report.compare(f"MoCo, {batch} x {size:,}", sides, rounds=rounds, at_least={"one pass": MOCO_GOAL})


def memory(report: Report, what: str, sides: Sides, small: Sides, at_most: Mapping[str, float]) -> None:
    """Of each side, in MB; the same side in ``small`` runs before it, unmeasured."""
    for side, call in sides.items():
        report.add(figure(what, side, [peak_megabytes(call, small[side])], "MB", at_most=at_most.get(side)))


def moco_sides(batch: int, size: int) -> Sides:
    queue = Queue(size, DIM)
    q_BC, k_BC = unit(batch).requires_grad_(), unit(batch)
    return {"official": partial(official_moco, q_BC, k_BC, queue.keys.T.contiguous(), 0.07),
            "one pass": partial(softmax, queue, q_BC, k_BC, torch.arange(batch), 0.07),
            "floor: its two matrix products": partial(two_products, q_BC.detach(), queue.keys)}


def instdisc(report: Report, what: str, batch: int, size: int, negatives: int, rounds: int) -> None:
    what, large = f"{what}, {batch} x {size:,}", size > LARGE
    sides, small = instdisc_sides(batch, size, negatives, 0.07 if large else 0.1), instdisc_sides(8, 64, 9, 0.1)
    if large:
        del sides["full softmax, dense"]
    limit = {"full softmax, one pass": MEGABYTES_LARGE if large else MEGABYTES}
    memory(report, f"{what}, memory", sides, small, limit)
    goals = {"NCE, one buffer": GATHER_GOAL, "NCE, shared negatives": SHARED_GOAL}
    goals |= {} if large else {"full softmax, one pass": EXACT_GOAL}
    report.compare(what, sides, rounds=rounds, at_least=goals)


def instdisc_sides(batch: int, size: int, negatives: int, temperature: float) -> Sides:
    """All work on one bank, so that a large one is held once."""
    bank, own, shared = Bank(size, DIM), Bank(1, DIM, negatives), Bank(1, DIM, negatives, shared=True)
    own.v = shared.v = bank.v
    q_BC, index_B = unit(batch).requires_grad_(), torch.randperm(size)[:batch]
    return {
        "official NCE": partial(official_nce, q_BC, bank.v, index_B, negatives, temperature),
        "NCE, one buffer": partial(contrast, own, q_BC, index_B, temperature),
        "NCE, shared negatives": partial(contrast, shared, q_BC, index_B, temperature),
        "full softmax, dense": partial(dense_softmax, bank, q_BC, index_B, temperature),
        "full softmax, one pass": partial(exact, bank, q_BC, index_B, temperature),
        "floor: its two matrix products": partial(two_products, q_BC.detach(), bank.v)}


def unit(rows: int) -> Tensor:
    return F.normalize(torch.randn(rows, DIM), dim=1)


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
    nce(found.pos_B, found.noise_BM, temperature, n, torch.tensor(math.log(n) + 0.5)).backward()
    found.logs()
    bank.update(q_BC.detach(), index_B)


# Theirs, restated.

def official_moco(q_BC: Tensor, k_BC: Tensor, queue_CK: Tensor, temperature: float) -> None:
    pos_B1 = torch.einsum("nc,nc->n", q_BC, k_BC)[:, None]
    neg_BK = torch.einsum("nc,ck->nk", q_BC, queue_CK.clone().detach())
    logit_BM = torch.cat([pos_B1, neg_BK], dim=1) / temperature
    target_B = torch.zeros(len(q_BC), dtype=torch.long)
    loss = F.cross_entropy(logit_BM, target_B)
    best_B5 = logit_BM.detach().topk(min(5, logit_BM.shape[1]), dim=1).indices
    (best_B5 == 0).float().sum(dim=1).mean()
    loss.backward()


def official_nce(q_BC: Tensor, bank_nC: Tensor, index_B: Tensor, negatives: int, temperature: float) -> None:
    n, small = len(bank_nC), 1e-7
    rows_BM = torch.randint(n, (len(q_BC), negatives + 1))
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


def two_products(q_BC: Tensor, keys_MC: Tensor, width: int = 512) -> None:
    """Similarities and a weighted sum of keys, in the cache: without them there is no loss and no gradient."""
    sim_Bm, sum_BC = torch.empty(len(q_BC), width), torch.zeros_like(q_BC)
    for keys_mC in keys_MC.split(width):
        torch.mm(q_BC, keys_mC.T, out=sim_Bm[:, :len(keys_mC)])
        sum_BC.addmm_(sim_Bm[:, :len(keys_mC)], keys_mC)


if __name__ == "__main__":
    main()

"""Losses over the similarities of one query to its candidates, and the sum that they share.

Axes: B queries of this rank, M candidates, C feature dimension. Similarities are cosines: features have unit length.
All of it runs in the precision of the features, float32 under autocast too: at T = 0.07 a bfloat16 logit would be
wrong by 4 % of the loss.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers held at a time. A core's own cache is about as large as 2**18 of them in float32, 1 MiB. Any other device: as
# few launches of kernels as 32 MiB allow, which stay in the cache of a large GPU.
CHUNK = 2**18
CHUNK_OFF_CPU = 2**23

Hide = Callable[[Tensor, int], Tensor]      # (logits [B, chunk], first column) -> the same with some at -inf


def check_temperature(temperature: float) -> None:
    """Raises ValueError where exp(1 / T) is out of all proportion."""
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature} is not positive. The papers' are 0.07 (v1) and 0.2 (v2).")
    if not 1e-3 <= temperature < math.inf:
        raise ValueError(f"temperature: {temperature} given. Give 0.001 or more; the papers' are from 0.07 to 0.2.")


def info_nce(pos_B: Tensor, log_sum_B: Tensor, temperature: float) -> Tensor:
    """InfoNCE, MoCo Eq. 1: -log exp(q.k+ / T) / sum_i exp(q.k_i / T), the mean over queries.

    ``pos_B`` is the cosine with the positive, ``log_sum_B`` the log of the denominator, the positive's term included.
    With all images as candidates it is Eq. 2 of Wu et al. 2018, the non-parametric softmax.
    """
    return (log_sum_B - pos_B / temperature).mean()


def nce(pos_B: Tensor, noise_BM: Tensor, temperature: float, num_samples: int, log_z: Tensor) -> Tensor:
    """Noise-contrastive estimation, Wu et al. 2018 Eq. 6-7, with uniform noise P_n = 1/n; the mean over queries.

    ``pos_B`` is the cosine with the query's own row, ``noise_BM`` with M rows drawn from the noise, ``log_z`` the log
    of the constant Z of Eq. 8. P = exp(s/T) / Z, and h = P / (P + M/n) = sigmoid(log P - log(M/n)): both terms are
    log-sigmoids and never overflow.
    """
    shift = log_z + math.log(noise_BM.shape[1] / num_samples)
    data_B = F.logsigmoid(pos_B / temperature - shift)
    noise_B = F.logsigmoid(shift - noise_BM / temperature).sum(dim=1)
    return -(data_B + noise_B).mean()                                              # Eq. 7


class LogSum(NamedTuple):
    """What one pass over the keys gives."""

    log_sum_B: Tensor       # log sum_j exp(q.k_j / T); carries the gradient
    hardest_B: Tensor       # the largest cosine; detached
    mean: Tensor            # the mean cosine of all queries with all keys, hidden ones included, a scalar; detached


def log_sum_exp(q_BC: Tensor, keys_MC: Tensor, temperature: float, hide: Hide | None = None) -> LogSum:
    """log sum_j exp(q.k_j / T) for each query, without a [B, M] matrix.

    ``keys_MC`` are constants: the gradient goes to ``q_BC`` only, and is formed in the same pass. ``hide`` sets to
    -inf, in each chunk, the logits that shall not count. Right for vectors of any length, and for any T.
    """
    return LogSum(*_LogSumExp.apply(q_BC, keys_MC, temperature, hide))


class _LogSumExp(torch.autograd.Function):
    """Chunked log-sum-exp with a running maximum; the gradient is the softmax-weighted mean of the keys, over T.

    A chunk's logits to base 2, cos / (T ln 2), lie in one buffer and become its weights there: 2^(logit - shift) is
    exp(cos / T) but for a factor for each query, and exp2 takes a third of exp's time on a CPU. Never waits for the
    device.
    """

    @staticmethod
    def forward(ctx, q_BC, keys_MC, temperature, hide):
        scale = 1 / (temperature * math.log(2))
        lowest = torch.finfo(q_BC.dtype).min                                    # a shift under which nothing fades in
        highest_B1 = q_BC.new_full((len(q_BC), 1), -math.inf)
        shift_B1, sum_B1 = torch.full_like(highest_B1, lowest), torch.zeros_like(highest_B1)
        mean_BC, total = torch.zeros_like(q_BC), q_BC.new_zeros(())
        for first, keys_mC, logit_Bm in _similarities(q_BC * scale, keys_MC):
            total += logit_Bm.sum()
            if hide is not None:
                logit_Bm = hide(logit_Bm, first)
            highest_B1 = torch.maximum(highest_B1, logit_Bm.amax(dim=1, keepdim=True))
            higher_B1 = highest_B1.clamp(min=lowest)                  # all hidden so far: 2^(-inf - lowest) = 0
            weight_Bm = logit_Bm.sub_(higher_B1).exp2_()
            fade_B1 = (shift_B1 - higher_B1).exp2_()
            sum_B1.mul_(fade_B1).add_(weight_Bm.sum(dim=1, keepdim=True))
            if ctx.needs_input_grad[0]:
                mean_BC.mul_(fade_B1).addmm_(weight_Bm, keys_mC)
            shift_B1 = higher_B1
        some_B1 = sum_B1.clamp(min=torch.finfo(sum_B1.dtype).tiny)              # all hidden: a slope of 0, not 0 / 0
        ctx.save_for_backward(mean_BC.div_(some_B1 * temperature))
        hardest_B, mean = highest_B1[:, 0] / scale, total / (scale * len(q_BC) * len(keys_MC))
        ctx.mark_non_differentiable(hardest_B, mean)
        return (shift_B1 + sum_B1.log2())[:, 0] * math.log(2), hardest_B, mean

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_B, *_):
        (slope_BC,) = ctx.saved_tensors
        return grad_B[:, None] * slope_BC, None, None, None


def _similarities(q_BC: Tensor, keys_MC: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First column, keys and similarities [B, chunk] of one chunk after the other; each overwrites the one before.

    One buffer for all: memory that is asked for and given back a chunk at a time breaks up, and the process grows.
    """
    width = max(1, _chunk(q_BC) // max(q_BC.shape))
    buffer = q_BC.new_empty(len(q_BC) * min(width, len(keys_MC)))
    for first in range(0, len(keys_MC), width):
        keys_mC = keys_MC[first:first + width]
        cos_Bm = buffer[:len(q_BC) * len(keys_mC)].view(len(q_BC), len(keys_mC))
        yield first, keys_mC, torch.mm(q_BC, keys_mC.T, out=cos_Bm)


def gathered_similarity(q_BC: Tensor, bank_nC: Tensor, rows_BM: Tensor) -> Tensor:
    """Cosine of query b with the rows ``rows_BM[b]`` of a constant bank, [B, M], without a [B, M, C] copy."""
    return _GatheredSimilarity.apply(q_BC, bank_nC, rows_BM)


class _GatheredSimilarity(torch.autograd.Function):
    """The rows of one query at a time (of more, where they fit a chunk) are copied, always to the same place.

    Backward copies none: the gradient of a query is a weighted sum of rows, which is what an embedding bag is.
    """

    @staticmethod
    def forward(ctx, q_BC, bank_nC, rows_BM):
        ctx.save_for_backward(bank_nC, rows_BM)
        few = min(len(q_BC), max(1, _chunk(q_BC) // (rows_BM.shape[1] * q_BC.shape[1])))
        buffer = q_BC.new_empty(few * rows_BM.shape[1], q_BC.shape[1])
        sim_BM = q_BC.new_empty(rows_BM.shape)
        for q_bC, rows_bM, sim_bM in zip(q_BC.split(few), rows_BM.split(few), sim_BM.split(few), strict=True):
            keys_mC = torch.index_select(bank_nC, 0, rows_bM.flatten(), out=buffer[:rows_bM.numel()])
            torch.bmm(keys_mC.view(*rows_bM.shape, -1), q_bC[:, :, None], out=sim_bM[:, :, None])
        return sim_BM

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BM):
        bank_nC, rows_BM = ctx.saved_tensors
        return F.embedding_bag(rows_BM, bank_nC, mode="sum", per_sample_weights=grad_BM.contiguous()), None, None


def _chunk(x: Tensor) -> int:
    return CHUNK if x.device.type == "cpu" else CHUNK_OFF_CPU

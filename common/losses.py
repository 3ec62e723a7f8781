"""Losses over the similarities of one query to its candidates, and the sum that they share.

Axes: B queries of this rank, M candidates, C feature dimension. Similarities are cosines: features have unit length.
All of it runs in the precision of the features, float32 under autocast too: at T = 0.07 a bfloat16 logit would be
wrong by 4 % of the loss.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**21       # similarities held at a time: 8 MiB in float32

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


def log_sum_exp(q_BC: Tensor, keys_MC: Tensor, temperature: float, hide: Hide | None = None) -> tuple[Tensor, Tensor]:
    """log sum_j exp(q.k_j / T) for each query, without a [B, M] matrix; and the largest cosine (detached).

    ``keys_MC`` are constants: the gradient goes to ``q_BC`` only, and is formed in the same pass. ``hide`` sets to
    -inf, in each chunk, the logits that shall not count.
    """
    return _LogSumExp.apply(q_BC, keys_MC, temperature, hide)


class _LogSumExp(torch.autograd.Function):
    """Chunked log-sum-exp with a running maximum; the gradient is the softmax-weighted mean of the keys, over T."""

    @staticmethod
    def forward(ctx, q_BC, keys_MC, temperature, hide):
        max_B = q_BC.new_full((len(q_BC),), -math.inf)
        sum_B = torch.zeros_like(max_B)
        mean_BC = torch.zeros_like(q_BC)
        width = max(1, CHUNK // len(q_BC))
        for first in range(0, len(keys_MC), width):
            keys_mC = keys_MC[first:first + width]
            logit_Bm = (q_BC @ keys_mC.T).div_(temperature)
            if hide is not None:
                logit_Bm = hide(logit_Bm, first)
            higher_B = torch.maximum(max_B, logit_Bm.amax(dim=1))
            finite_B = higher_B.clamp(min=torch.finfo(higher_B.dtype).min)      # all hidden so far: exp(-inf - min) = 0
            scale_B = (max_B - finite_B).exp()
            weight_Bm = logit_Bm.sub_(finite_B[:, None]).exp_()
            sum_B = sum_B * scale_B + weight_Bm.sum(dim=1)
            if ctx.needs_input_grad[0]:
                mean_BC = torch.addmm(mean_BC * scale_B[:, None], weight_Bm, keys_mC)
            max_B = higher_B
        some_B = sum_B.clamp(min=torch.finfo(sum_B.dtype).tiny)                 # all hidden: a slope of 0, not 0 / 0
        ctx.save_for_backward(mean_BC / some_B[:, None] / temperature)
        hardest_B = max_B * temperature
        ctx.mark_non_differentiable(hardest_B)
        return max_B + sum_B.log(), hardest_B

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_B, _):
        (slope_BC,) = ctx.saved_tensors
        return grad_B[:, None] * slope_BC, None, None, None


def gathered_similarity(q_BC: Tensor, bank_nC: Tensor, rows_BM: Tensor) -> Tensor:
    """Cosine of query b with the rows ``rows_BM[b]`` of a constant bank, [B, M], without a [B, M, C] copy."""
    return _GatheredSimilarity.apply(q_BC, bank_nC, rows_BM)


class _GatheredSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BC, bank_nC, rows_BM):
        ctx.save_for_backward(bank_nC, rows_BM)
        pieces = zip(_few(q_BC, rows_BM, q_BC), _few(rows_BM, rows_BM, q_BC), strict=True)
        parts = [torch.einsum("bc,bmc->bm", q_bC, bank_nC[rows_bM]) for q_bC, rows_bM in pieces]
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BM):
        bank_nC, rows_BM = ctx.saved_tensors
        pieces = zip(_few(grad_BM, rows_BM, bank_nC), _few(rows_BM, rows_BM, bank_nC), strict=True)
        parts = [torch.einsum("bm,bmc->bc", grad_bM, bank_nC[rows_bM]) for grad_bM, rows_bM in pieces]
        return torch.cat(parts), None, None


def _few(x_B: Tensor, rows_BM: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    """``x_B`` in pieces of so many queries that the gathered rows of a piece fit a chunk."""
    return x_B.split(max(1, CHUNK // (rows_BM.shape[1] * features.shape[1])))

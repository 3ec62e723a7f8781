"""Where keys live between steps: the three mechanisms of MoCo Fig. 2, side by side.

             | positive of query i   | negatives                  | update after the step
    ---------+-----------------------+----------------------------+-----------------------------
    InBatch  | k_i, with gradient    | the other keys of the batch| nothing
    Bank     | v_i, its last feature | m random rows, or all n    | v_i <- norm(t v_i + (1-t) k_i)
    Queue    | k_i                   | the K most recent keys     | oldest keys <- this batch's

Axes: B batch of this rank, W ranks, N = W*B, C feature dimension, K queue, M candidates, n training images. Every
feature that enters or leaves a dictionary has unit length; after ``update`` every rank holds the same entries.
"""

import math
import warnings
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import counter
from common.distributed import gather, gather_with_grad, rank
from common.guard import write_rows_
from common.losses import gathered_similarity, log_sum_exp


class Comparison(NamedTuple):
    """What a loss needs to know of B queries among their candidates."""

    pos_B: Tensor           # cosine with the positive; carries the gradient
    log_sum_B: Tensor       # log sum_j exp(cosine_j / T) over all candidates, positive included; carries the gradient
    hardest_B: Tensor       # the largest cosine with a negative; detached
    neg: Tensor             # the mean cosine with the negatives, a scalar; detached
    noise_BM: Tensor | None = None      # cosines with the negatives one by one, where they were drawn; with gradient

    def logs(self) -> dict[str, Tensor]:
        """Positive and negative similarity, and how often the positive comes first."""
        pos_B = self.pos_B.detach()
        return {"pos": pos_B.mean(), "neg": self.neg, "top1": (pos_B > self.hardest_B).float().mean()}


def _directions(rows: int, dim: int) -> Tensor:
    """Random unit vectors, [rows, dim], made in place: a bank of gigabytes needs no second one."""
    x = torch.randn(rows, dim)
    return F.normalize(x, dim=1, out=x)


class Dictionary(nn.Module):
    dim: int | None = None          # C of its entries; None where the batch decides
    tables: tuple[str, ...] = ()    # buffers that ``update`` writes by ``write_rows_`` alone

    def compare(self, q_BC: Tensor, k_BC: Tensor, index_B: Tensor, temperature: float) -> Comparison:
        """The queries among their candidates, in float32 under autocast too. Changes no state."""
        with torch.autocast(q_BC.device.type, enabled=False):
            return self._compare(q_BC, k_BC, index_B, temperature)

    def _compare(self, q_BC: Tensor, k_BC: Tensor, index_B: Tensor, temperature: float) -> Comparison:
        raise NotImplementedError

    def update(self, k_BC: Tensor, index_B: Tensor) -> None:
        """Take in the keys of this step; every rank ends with the same entries."""

    def candidates(self) -> int | None:
        """How many keys a query is compared with, its positive included; None where the batch decides."""
        return None

    def logs(self) -> dict[str, Tensor]:
        """What the progress line shows of the dictionary itself."""
        return {}


class InBatch(Dictionary):
    """End to end (Fig. 2a): the dictionary is the batch of all ranks, and gradient flows into the keys."""

    def __init__(self) -> None:         # takes no keys: torch's own would take any
        super().__init__()

    def _compare(self, q_BC, k_BC, index_B, temperature):
        sim_BN = q_BC @ gather_with_grad(k_BC).T
        own_B = torch.arange(len(q_BC), device=q_BC.device)[:, None] + rank() * len(q_BC)
        pos_B = sim_BN.gather(1, own_B)[:, 0]
        others_BN = sim_BN.detach().scatter(1, own_B, -math.inf)
        neg = (sim_BN.detach().sum() - pos_B.detach().sum()) / max(sim_BN.numel() - len(q_BC), 1)
        return Comparison(pos_B, (sim_BN / temperature).logsumexp(dim=1), others_BN.amax(dim=1), neg)


class Queue(Dictionary):
    """Queue of momentum keys (Fig. 2c, Algorithm 1): first in, first out, across all ranks.

    ``size`` is K, any number; a batch may be larger than it. The queue starts with random directions, as the authors'.
    ``mask_own``: a query's own image, still in the queue from the last epoch, is no negative. It matters when K is
    not small against the number of images (facebookresearch/moco#24); the papers do not mask. Without it, a queue as
    long as there are images (``num_samples``) is refused, and one longer than a quarter of that is warned of.
    """

    tables: tuple[str, ...] = ("keys", "image")
    keys: Tensor
    image: Tensor
    head: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int, mask_own: bool = False, num_samples: int | None = None):
        if size < 1:
            raise ValueError(f"size: {size} is no length of a queue. Give 1 or more; the papers' is 65536.")
        if num_samples is not None and not mask_own:
            _check_size(size, num_samples)
        if dim < 1:
            raise ValueError(f"dim: {dim} features. Give as many as the encoder's dim.")
        super().__init__()
        self.dim, self.mask_own = dim, mask_own
        self.register_buffer("keys", _directions(size, dim))
        self.register_buffer("image", torch.full((size,), -1))                   # which image each key is of
        self.register_buffer("head", torch.zeros((), dtype=torch.long))          # the oldest entry
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))        # how many entries are real keys

    def _compare(self, q_BC, k_BC, index_B, temperature):
        pos_B = (q_BC * k_BC).sum(dim=1)
        hide = self._hide_own(index_B) if self.mask_own else None
        log_neg_B, hardest_B, neg = log_sum_exp(q_BC, self.keys, temperature, hide)
        return Comparison(pos_B, torch.logaddexp(pos_B / temperature, log_neg_B), hardest_B, neg)

    def _hide_own(self, index_B):
        return lambda logit_Bm, first: logit_Bm.masked_fill_(
            self.image[first:first + logit_Bm.shape[1]] == index_B[:, None], -math.inf)

    @torch.no_grad()
    def update(self, k_BC: Tensor, index_B: Tensor) -> None:
        self._enqueue(keys=gather(k_BC), image=gather(index_B))

    def _enqueue(self, **entries: Tensor) -> None:
        """One value for each of N entries, [N, ...], into each of the tables named."""
        size, batch = len(self.keys), len(entries["keys"])
        slot_N = (self.head + torch.arange(batch, device=self.keys.device)) % size
        last = slice(max(0, batch - size), None)                                 # of a batch larger than K, the last K
        for name, x_N in entries.items():
            table = getattr(self, name)
            write_rows_(table, slot_N[last], x_N[last].to(table.dtype))
        self.head.copy_((self.head + batch) % size)
        self.filled.add_(batch).clamp_(max=size)

    def candidates(self) -> int:
        return len(self.keys) + 1

    def logs(self) -> dict[str, Tensor]:
        return {"queue": self.filled / len(self.keys)}


def _check_size(size, num_samples):
    if size >= num_samples:
        raise ValueError(f"size: a queue of {size} keys over {num_samples} images holds each image's own key as a "
                         f"negative. Give less than {num_samples}, best at most {max(1, num_samples // 4)}, or "
                         "mask_own: true.")
    if size > num_samples / 4:
        warnings.warn(f"a queue of {size} keys over {num_samples} images: up to {size / num_samples:.0%} of queries "
                      f"meet their own image as a negative. Think of size {num_samples // 4}, or of mask_own: true.",
                      stacklevel=3)


class Bank(Dictionary):
    """Memory bank (Fig. 2b; Wu et al. 2018, Sec. 3.1): one slot for each training image.

    ``negatives`` is m, drawn uniformly with replacement from all n rows anew for each query and step (``shared``: once
    for all queries of a step); None compares with all n (Eq. 2). ``momentum`` t of the update; 0.5 in the authors'
    code. ``init``: "random" directions, or "encoder": the untrained encoder's features, which keeps short runs from
    collapsing. The draws are a function of (seed, step, image), so forward may be called twice.
    """

    tables = ("v",)
    v: Tensor
    step: Tensor

    def __init__(self, num_samples: int, dim: int, negatives: int | None = None, momentum: float = 0.5,
                 shared: bool = False, init: Literal["random", "encoder"] = "random", seed: int = 0):
        if negatives is not None and negatives < 1:
            raise ValueError(f"negatives: {negatives} is no number of negatives. Give 1 or more (4096 in the paper), "
                             "or null for all images.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: {momentum} lies outside [0, 1). The authors' code has 0.5.")
        if dim < 1:
            raise ValueError(f"dim: {dim} features. Give as many as the encoder's dim.")
        super().__init__()
        self.dim, self.negatives, self.momentum, self.shared = dim, negatives, momentum, shared
        self.init, self.seed = init, seed
        self.register_buffer("v", _directions(num_samples, dim))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def _compare(self, q_BC, k_BC, index_B, temperature):
        pos_B = (q_BC * self.v[index_B]).sum(dim=1)
        if self.negatives is None:                                               # Eq. 2: all n rows
            log_neg_B, hardest_B, neg = log_sum_exp(q_BC, self.v, temperature, _hide_column(index_B))
            noise_BM = None
        else:
            noise_BM = self._noise(q_BC, index_B)
            log_neg_B, hardest_B = (noise_BM / temperature).logsumexp(dim=1), noise_BM.detach().amax(dim=1)
            neg = noise_BM.detach().mean()
        return Comparison(pos_B, torch.logaddexp(pos_B / temperature, log_neg_B), hardest_B, neg, noise_BM)

    def _noise(self, q_BC, index_B):
        """Cosine of each query with its m random rows, [B, m]."""
        column_M = torch.arange(self.candidates() - 1, device=q_BC.device)
        keys = (self.seed, counter.stream("bank"), self.step)
        if self.shared:
            return q_BC @ self.v[counter.integers(len(self.v), *keys, column_M)].T
        rows_BM = counter.integers(len(self.v), *keys, index_B[:, None], column_M)
        return gathered_similarity(q_BC, self.v, rows_BM)

    @torch.no_grad()
    def update(self, k_BC: Tensor, index_B: Tensor) -> None:
        """v_i <- norm(t v_i + (1-t) k_i); where an image stands twice in the batch, its last key counts."""
        k_NC, index_N = gather(k_BC), gather(index_B)
        position_N = torch.arange(len(index_N), device=index_N.device)
        last_N = torch.where(index_N[:, None] == index_N, position_N, 0).amax(dim=1)
        v_NC = self.momentum * self.v[index_N] + (1 - self.momentum) * k_NC[last_N].to(self.v.dtype)
        write_rows_(self.v, index_N, F.normalize(v_NC, dim=1))
        self.step.add_(1)

    @torch.no_grad()
    def fill(self, v_nC: Tensor) -> None:
        """Start from these features, one for each training image."""
        F.normalize(self.v.copy_(v_nC), dim=1, out=self.v)

    def candidates(self) -> int:
        return len(self.v) if self.negatives is None else self.negatives + 1


def _hide_column(index_B):
    """Hide the query's own row, which stands in column ``index_B``."""
    def hide(logit_Bm, first):
        own_B = (index_B - first)[:, None]
        inside_B = (own_B >= 0) & (own_B < logit_Bm.shape[1])
        own_B = own_B.clamp(0, logit_Bm.shape[1] - 1)
        return logit_Bm.scatter_(1, own_B, torch.where(inside_B, -math.inf, logit_Bm.gather(1, own_B)))
    return hide

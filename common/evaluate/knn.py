"""Weighted k-nearest-neighbour classification of frozen features: the measure without anything to train.

Axes: n training and m query images, D features, k neighbours.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.evaluate.features import CPU, Features
from common.evaluate.result import Result, Setting, accuracy

Backend = Literal["auto", "faiss", "torch"]

# What torch's search holds at a time: similarities (64 MB on a CPU, 1 GB on a GPU), and training rows on the device.
SIMILARITIES, ROWS = {"cpu": 1 << 24, "cuda": 1 << 28}, {"cpu": 1 << 16, "cuda": 1 << 18}
VOTES = 1 << 22         # weights, and sums of them by class, at a time
LEFT_OUT = 50_000       # training images at most that are searched for among the others, where there are no test images

logger = logging.getLogger(__name__)


class KNN:
    """The k training images most similar to a test image vote for its class (InstDisc, Sec. 3.4).

    One search serves the whole grid of ``k`` and ``temperature``; a ``k`` above the number of training images means all
    of them. ``normalize`` gives features unit length first, so that similarity is the cosine. Papers differ in
    ``temperature`` (0.07, or 0.1 in MoCo's notebook) and ``k``: both are in every result. A data set without labelled
    test images is searched leave-one-out.
    """

    def __init__(self, k: int | Sequence[int] = (20, 200), temperature: float | Sequence[float] = 0.07,
                 normalize: bool = True, backend: Backend = "auto"):
        if (k if isinstance(k, int) else min(k, default=0)) < 1:
            raise ValueError(f"k: {k} given; it is one number of neighbours or a list of them, each at least 1.")
        if (temperature if isinstance(temperature, int | float) else min(temperature, default=0)) <= 0:
            raise ValueError(f"temperature: {temperature} given; it is one number or a list of them, each above 0 (the "
                             "papers use 0.07 and 0.1).")
        self.k = sorted({k} if isinstance(k, int) else set(k))
        self.temperatures = sorted({temperature} if isinstance(temperature, int | float) else set(temperature))
        self.normalize, self.backend = normalize, backend

    def __call__(self, features: Features, device: torch.device = CPU) -> list[Result]:
        """A result for each k and temperature. Call it in the main process only: a forked child that searches may
        hang."""
        test_label_m = features.test_label_m
        if test_label_m is None:
            test_label_m = features.train_label_n[_left_out(len(features.train_nD))]
        return [accuracy("knn", predicted_m, test_label_m, self._protocol(k, tau, features, len(test_label_m)))
                for (k, tau), predicted_m in self.grid(features, device).items()]

    def predict(self, features: Features, device: torch.device = CPU) -> dict[int, Tensor]:
        """For each k the class [m] of each test image, by the first temperature; see ``grid``."""
        return {k: predicted_m for (k, tau), predicted_m in self.grid(features, device).items()
                if tau == self.temperatures[0]}

    def grid(self, features: Features, device: torch.device = CPU) -> dict[tuple[int, float], Tensor]:
        """For each k and temperature the class [m] of each test image; without a test set, of training images by the
        others: all of them up to 50,000, else as many, evenly spread."""
        train_nD = self._scaled(features.train_nD)
        if features.test_mD is None:
            rows_m = _left_out(len(train_nD))
            similarity_mk, index_mk = search_others(train_nD, rows_m, self.k[-1], self.backend, device)
        else:
            similarity_mk, index_mk = search(train_nD, self._scaled(features.test_mD), self.k[-1], self.backend,
                                              device)
        label_mk = features.train_label_n[index_mk]
        return {(k, tau): vote(similarity_mk[:, :k], label_mk[:, :k], features.num_classes, tau)
                for tau in self.temperatures for k in sorted({min(k, label_mk.shape[1]) for k in self.k})}

    def _scaled(self, x_nD: Tensor) -> Tensor:
        return F.normalize(x_nD, dim=1) if self.normalize else x_nD

    def _protocol(self, k: int, tau: float, features: Features, num_test: int) -> dict[str, Setting]:
        protocol: dict[str, Setting] = {"layer": features.layer, "k": k, "tau": tau,
                                        "norm": "l2" if self.normalize else "none"}
        if features.test_mD is None:
            protocol["split"] = "leave-one-out"
        if features.neighbours:
            protocol["neighbours"] = features.neighbours
        return protocol | {"train": len(features.train_nD), "test": num_test}


def vote(similarity_mk: Tensor, label_mk: Tensor, num_classes: int, temperature: float) -> Tensor:
    """The class [m] with the largest sum of exp(s_i / tau) over its neighbours i (InstDisc, Sec. 3.4).

    Weights are relative to the nearest neighbour's, so that similarities of any size stay finite. No one-hot [m, k, C].
    """
    def votes(similarity_bk: Tensor, label_bk: Tensor) -> Tensor:
        weight_bk = ((similarity_bk - similarity_bk.amax(dim=1, keepdim=True)) / temperature).exp()
        return weight_bk.new_zeros(len(weight_bk), num_classes).scatter_add_(1, label_bk, weight_bk)

    num_rows = max(1, VOTES // max(num_classes, label_mk.shape[1]))
    blocks = zip(similarity_mk.split(num_rows), label_mk.split(num_rows), strict=True)
    return torch.cat([votes(*block).argmax(dim=1) for block in blocks])


def search(train_nD: Tensor, query_mD: Tensor, k: int, backend: Backend = "auto",
           device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of ``train_nD`` with the largest inner product with each query, largest first, by exact search.

    Returns similarity [m, k] float32 and index [m, k] int64 on the CPU, with k at most n. ``auto`` is torch on a GPU;
    elsewhere faiss, and torch on ``device`` if faiss fails for whatever reason, which is said once.
    """
    k = min(k, len(train_nD))
    if backend == "faiss":
        return _search_faiss(train_nD, query_mD, k, device)
    if backend == "auto" and device.type != "cuda":
        try:
            return _search_faiss(train_nD, query_mD, k, device)
        except Exception as error:      # no wheel, a library that it needs, memory, its limit of k
            _say_once(f"kNN: faiss failed on {device.type} ({type(error).__name__}: {_first_line(error)}); "
                      "searching with torch instead")
    return _search_torch(train_nD, query_mD, k, device)


def _search_faiss(train_nD: Tensor, query_mD: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """In blocks of faiss's own, over the rows where they lie: no index, which would be a copy of them."""
    import faiss

    if device.type != "cuda":
        found = faiss.knn(query_mD.numpy(), train_nD.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    elif not faiss.get_num_gpus():
        raise RuntimeError("it sees no GPU, and torch on the GPU is faster than faiss beside it")
    else:
        found = faiss.knn_gpu(faiss.StandardGpuResources(), query_mD.numpy(), train_nD.numpy(), k,
                              metric=faiss.METRIC_INNER_PRODUCT, device=device.index or 0,
                              vectorsMemoryLimit=4 * ROWS["cuda"] * train_nD.shape[1])
    similarity_mk, index_mk = map(torch.from_numpy, found)
    return similarity_mk, index_mk


def _search_torch(train_nD: Tensor, query_mD: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """By matrix product, a block of training rows after the other, of each the best k so far of all queries.

    The similarities of a block of rows and a block of queries, in one buffer, are all that is ever held of [m, n]; of
    the rows, one block lies on ``device``.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    num_rows = max(k, ROWS[kind])
    num_queries = max(1, SIMILARITIES[kind] // min(num_rows, len(train_nD)))
    buffer = torch.empty(min(num_queries, len(query_mD)) * min(num_rows, len(train_nD)), device=device)
    best: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(train_nD), num_rows):
        train_tD = train_nD[first:first + num_rows].to(device)
        found = [_nearest(query_bD.to(device), train_tD, min(k, len(train_tD)), buffer)
                 for query_bD in query_mD.split(num_queries)]
        found = [(similarity_bk, index_bk + first) for similarity_bk, index_bk in found]
        best = [_better(*both, k) for both in zip(best, found, strict=True)] if best else found
    similarity, index = zip(*best, strict=True)
    return torch.cat(similarity).cpu(), torch.cat(index).cpu()


def _nearest(query_bD: Tensor, train_tD: Tensor, k: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity and index [b, k] of the nearest of some rows."""
    b, t = len(query_bD), len(train_tD)
    similarity_bt = torch.mm(query_bD, train_tD.T, out=buffer[:b * t].view(b, t))
    similarity_bk, index_bk = similarity_bt.topk(k, dim=1)
    return similarity_bk, index_bk


def _better(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of two lists of similarities and indices, [b, j] together."""
    similarity_bj, index_bj = (torch.cat(both, dim=1) for both in zip(one, other))
    similarity_bk, place_bk = similarity_bj.topk(k, dim=1)
    return similarity_bk, index_bj.gather(1, place_bk)


def _left_out(n: int) -> Tensor:
    """Which training images are searched for among the others."""
    return torch.arange(0, n, -(-n // LEFT_OUT))


def search_others(train_nD: Tensor, rows_m: Tensor, k: int, backend: Backend = "auto",
                  device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """``search`` for training images ``rows_m`` among the others: each one's own row, wherever it is, is left out."""
    similarity_mk, index_mk = search(train_nD, train_nD[rows_m], k + 1, backend, device)
    other_mk = index_mk != rows_m[:, None]
    other_mk[other_mk.all(dim=1), -1] = False               # lost among more than k equal images: drop the last
    return similarity_mk[other_mk].view(len(rows_m), -1), index_mk[other_mk].view(len(rows_m), -1)


@functools.cache
def _say_once(line: str) -> None:
    logger.warning(line)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

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
from common.evaluate.result import Result, Setting, top1

Backend = Literal["auto", "faiss", "torch"]

LEFT_OUT = 50_000       # training images at most that are searched for among the others, where there are no test images

logger = logging.getLogger(__name__)


class KNN:
    """The k training images most similar to a test image vote for its class (InstDisc, Sec. 3.4).

    One search serves each ``k``; a ``k`` above the number of training images means all of them. ``normalize`` gives
    features unit length first, so that similarity is the cosine. Papers differ in ``temperature`` (0.07, or 0.1 in
    MoCo's notebook) and ``k``: both are in every result. A data set without labelled test images is searched
    leave-one-out.
    """

    def __init__(self, k: int | Sequence[int] = (20, 200), temperature: float = 0.07, normalize: bool = True,
                 backend: Backend = "auto"):
        if (k if isinstance(k, int) else min(k, default=0)) < 1:
            raise ValueError(f"k: {k} given; it is one number of neighbours or a list of them, each at least 1.")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} given; it must be above 0 (the papers use 0.07 and 0.1).")
        self.k = sorted({k} if isinstance(k, int) else set(k))
        self.temperature, self.normalize, self.backend = temperature, normalize, backend

    def __call__(self, features: Features, device: torch.device = CPU) -> list[Result]:
        """One result for each k. Call it in the main process only: a forked child that searches may hang."""
        test_label_m = features.test_label_m
        if test_label_m is None:
            test_label_m = features.train_label_n[_left_out(len(features.train_nD))]
        predicted = self.predict(features, device)
        return [Result("knn", top1(predicted_m, test_label_m), None, self._protocol(k, features, len(test_label_m)))
                for k, predicted_m in predicted.items()]

    def predict(self, features: Features, device: torch.device = CPU) -> dict[int, Tensor]:
        """For each k the class [m] of each test image; without a test set, of training images by the others.

        All of them up to 50,000, else as many, evenly spread.
        """
        train_nD = self._scaled(features.train_nD)
        if features.test_mD is None:
            rows_m = _left_out(len(train_nD))
            similarity_mk, index_mk = _search_others(train_nD, rows_m, self.k[-1], self.backend, device)
        else:
            similarity_mk, index_mk = search(train_nD, self._scaled(features.test_mD), self.k[-1], self.backend,
                                              device)
        label_mk = features.train_label_n[index_mk]
        return {k: vote(similarity_mk[:, :k], label_mk[:, :k], features.num_classes, self.temperature)
                for k in sorted({min(k, label_mk.shape[1]) for k in self.k})}

    def _scaled(self, x_nD: Tensor) -> Tensor:
        return F.normalize(x_nD, dim=1) if self.normalize else x_nD

    def _protocol(self, k: int, features: Features, num_test: int) -> dict[str, Setting]:
        protocol: dict[str, Setting] = {"layer": features.layer, "k": k, "tau": self.temperature,
                                        "norm": "l2" if self.normalize else "none"}
        if features.test_mD is None:
            protocol["split"] = "leave-one-out"
        return protocol | {"train": len(features.train_nD), "test": num_test}


def vote(similarity_mk: Tensor, label_mk: Tensor, num_classes: int, temperature: float) -> Tensor:
    """The class [m] with the largest sum of exp(s_i / tau) over its neighbours i (InstDisc, Sec. 3.4).

    Weights are relative to the nearest neighbour's, so that similarities of any size stay finite. No one-hot [m, k, C].
    """
    def votes(similarity_bk: Tensor, label_bk: Tensor) -> Tensor:
        weight_bk = ((similarity_bk - similarity_bk.amax(dim=1, keepdim=True)) / temperature).exp()
        return weight_bk.new_zeros(len(weight_bk), num_classes).scatter_add_(1, label_bk, weight_bk)

    blocks = zip(similarity_mk.split(4096), label_mk.split(4096), strict=True)
    return torch.cat([votes(*block).argmax(dim=1) for block in blocks])


def search(train_nD: Tensor, query_mD: Tensor, k: int, backend: Backend = "auto",
           device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of ``train_nD`` with the largest inner product with each query, largest first, by exact search.

    Returns similarity [m, k] float32 and index [m, k] int64 on the CPU, with k at most n. ``auto`` is faiss, on the
    GPU if ``device`` is one, and torch on ``device`` if faiss fails for whatever reason, which is said once.
    """
    k = min(k, len(train_nD))
    if backend == "faiss":
        return _search_faiss(train_nD, query_mD, k, device)
    if backend == "auto":
        try:
            return _search_faiss(train_nD, query_mD, k, device)
        except Exception as error:      # no wheel, no GPU in it, CUDA 12 beside torch's 13, memory, its limit of k
            _say_once(f"kNN: faiss failed on {device.type} ({type(error).__name__}: {_first_line(error)}); "
                      "searching with torch instead")
    return _search_torch(train_nD, query_mD, k, device)


def _search_faiss(train_nD: Tensor, query_mD: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    import faiss

    index: faiss.Index = faiss.IndexFlatIP(train_nD.shape[1])
    if device.type == "cuda":
        if not faiss.get_num_gpus():
            raise RuntimeError("it sees no GPU, and torch on the GPU is faster than faiss beside it")
        resources = faiss.StandardGpuResources()
        index = faiss.index_cpu_to_gpu(resources, device.index or 0, index)
    index.add(train_nD.numpy())
    similarity_mk, index_mk = index.search(query_mD.numpy(), k)
    return torch.from_numpy(similarity_mk), torch.from_numpy(index_mk)


def _search_torch(train_nD: Tensor, query_mD: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """In blocks of queries that share one buffer: 64 MB of similarities on the CPU, 1 GB on a GPU."""
    train_Dn = train_nD.to(device).T
    num_rows = max(1, (1 << (28 if device.type == "cuda" else 24)) // len(train_nD))
    buffer_bn = torch.empty(min(num_rows, len(query_mD)), len(train_nD), device=device)
    found = []
    for query_bD in query_mD.split(num_rows):
        similarity_bn = torch.mm(query_bD.to(device), train_Dn, out=buffer_bn[:len(query_bD)])
        found.append([part.cpu() for part in similarity_bn.topk(k, dim=1)])
    similarity, index = zip(*found, strict=True)
    return torch.cat(similarity), torch.cat(index)


def _left_out(n: int) -> Tensor:
    """Which training images are searched for among the others."""
    return torch.arange(0, n, -(-n // LEFT_OUT))


def _search_others(train_nD: Tensor, rows_m: Tensor, k: int, backend: Backend,
                   device: torch.device) -> tuple[Tensor, Tensor]:
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

"""Retrieval: each image is a query, and the others are ranked by how similar their features are. Nothing is trained.

Axes: m queries, n images of the gallery, b queries of a block, D features, k neighbours, M values of each query.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import counter
from common.bar import Watch, silent
from common.evaluate.features import CPU, Features
from common.evaluate.knn import search, search_others
from common.evaluate.result import Result, Setting
from common.evaluate.statistics import bootstrap

SIMILARITIES = {"cpu": 1 << 22, "cuda": 1 << 27}        # held and sorted at a time
QUERIES = 50_000                                        # at most, evenly spread; the gallery is always whole

Pool = Literal["test", "train", "test-in-train"]


class Query(NamedTuple):
    """The queries that have an image of their class to find, ``left_out`` others, and the gallery.

    ``row_m`` is each query's row among its images, and so in the gallery, where it is ``leave_one_out``.
    """

    query_mD: Tensor
    label_m: Tensor
    gallery_nD: Tensor
    gallery_label_n: Tensor
    row_m: Tensor
    leave_one_out: bool
    images: Pool
    num_images: int                     # that the queries are of
    left_out: int


class Retrieval:
    """An image of the gallery is relevant to a query if it is of its class. Three measures of the ranking:

    recall@k, the share of queries with a relevant image among the ``k`` nearest (Song et al. 2016, Sec. 5); mAP, the
    mean over queries of average precision over the whole ranking (Manning, Raghavan & Schuetze 2008, Eq. 8.8); mAP@R,
    which stops at rank R, the number of relevant images (Musgrave et al. 2020, Sec. 3.2).

    ``images``: "test" or "train", each image of them among the others (leave-one-out), or "test-in-train". Without
    labelled test images, "test" means "train". ``normalize``: similarity is the cosine. Of more than 50,000 queries as
    many are taken, evenly spread. ``watch`` sees them pass.
    """

    def __init__(self, k: int | Sequence[int] = (1, 5, 10), images: Pool = "test", normalize: bool = True,
                 watch: Watch = silent):
        if (k if isinstance(k, int) else min(k, default=0)) < 1:
            raise ValueError(f"k: {k} given; it is one number of neighbours or a list of them, each at least 1.")
        self.k = sorted({k} if isinstance(k, int) else set(k))
        self.images, self.normalize, self.watch = images, normalize, watch

    def __call__(self, features: Features, device: torch.device = CPU) -> list[Result]:
        """recall@k for each k, mAP, mAP@R, each with its bootstrap interval over queries."""
        query = self.query(features)
        gallery = len(query.gallery_nD) - query.leave_one_out
        ks = sorted({min(k, gallery) for k in self.k})
        score_mM = torch.cat([scores(*block, ks) for block in self._ranked(query, device)])
        protocol: dict[str, Setting] = {"images": query.images, "norm": "l2" if self.normalize else "none"}
        if query.leave_one_out:
            protocol["split"] = "leave-one-out"
        protocol |= {"queries": len(score_mM), "gallery": gallery, "left_out": query.left_out}
        metrics: list[tuple[str, dict[str, Setting]]] = [("recall", {"k": k}) for k in ks]
        columns = zip([*metrics, ("mAP", {}), ("mAP@R", {})], score_mM.unbind(dim=1), bootstrap(score_mM), strict=True)
        return [Result(metric, 100 * score_m.mean().item(), None, {"layer": features.layer, **setting, **protocol},
                       (100 * low, 100 * high), tuple(score_m.tolist()), "bootstrap")
                for (metric, setting), score_m, (low, high) in columns]

    def query(self, features: Features) -> Query:
        """The queries and the gallery. Raises ValueError where no query has a relevant image, or no image a label."""
        test_nD, test_label_n = features.test_mD, features.test_label_m
        images = "train" if self.images == "test" and test_nD is None else self.images
        if images == "train":
            test_nD, test_label_n = features.train_nD, features.train_label_n
        if test_nD is None or test_label_n is None:
            raise ValueError("retrieval: no test image has a label. Give labelled test images, or let each training "
                             "image be searched for among the others (images: train).")
        leave_one_out = images != "test-in-train"
        gallery_nD, label_n = (test_nD, test_label_n) if leave_one_out else (features.train_nD, features.train_label_n)
        row_m = torch.arange(0, len(test_nD), -(-len(test_nD) // QUERIES))
        relevant_m = label_n.bincount(minlength=features.num_classes)[test_label_n[row_m]] > int(leave_one_out)
        if not relevant_m.any():
            raise ValueError(f"retrieval: none of {len(row_m)} queries has another image of its class to be found.")
        left_out, row_m = int((~relevant_m).sum()), row_m[relevant_m]
        query_nD, gallery_nD = (F.normalize(x, dim=1) if self.normalize else x for x in (test_nD, gallery_nD))
        return Query(query_nD[row_m], test_label_n[row_m], gallery_nD, label_n, row_m, leave_one_out, images,
                     len(test_nD), left_out)

    def _ranked(self, query: Query, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """For a block of queries: whether the image at each rank is relevant [b, n], and how many are [b].

        The gallery is shuffled first, always the same way: among equal similarities, as of an encoder that has
        collapsed, the order of the files must not decide. Of [m, n], one block is held at a time.
        """
        n = len(query.gallery_nD)
        order_n = counter.permutation(n, counter.stream("retrieval"))
        place_n = order_n.argsort()
        gallery_nD, label_n = query.gallery_nD[order_n].to(device), query.gallery_label_n[order_n].to(device)
        step = max(1, SIMILARITIES["cuda" if device.type == "cuda" else "cpu"] // n)
        firsts = range(0, len(query.query_mD), step)
        for first in self.watch(firsts, len(firsts), "queries"):
            rows = slice(first, first + step)
            own_b = place_n[query.row_m[rows]].to(device) if query.leave_one_out else None
            hit_bn = ranked(query.query_mD[rows].to(device), query.label_m[rows].to(device), gallery_nD, label_n, own_b)
            yield hit_bn, hit_bn.sum(dim=1)


def ranked(query_bD: Tensor, label_b: Tensor, gallery_nD: Tensor, label_n: Tensor, own_b: Tensor | None) -> Tensor:
    """Whether the image at each rank, nearest first, is of the query's class, bool [b, n]. Equal ones stay in order.

    ``own_b``: the query's own place in the gallery, which is ranked last and counts as irrelevant.
    """
    similarity_bn = query_bD @ gallery_nD.T
    if own_b is not None:
        similarity_bn.scatter_(1, own_b[:, None], -torch.inf)
    hit_bn = label_n[similarity_bn.sort(dim=1, descending=True, stable=True).indices] == label_b[:, None]
    if own_b is not None:
        hit_bn[:, -1] = False
    return hit_bn


def scores(hit_bn: Tensor, relevant_b: Tensor, ks: Sequence[int]) -> Tensor:
    """Each query's recall@k for every k, average precision, and average precision at R, float64 [b, M] on the CPU."""
    rank_n = torch.arange(1, hit_bn.shape[1] + 1, device=hit_bn.device)
    precision_bn = torch.where(hit_bn, hit_bn.cumsum(dim=1, dtype=torch.int32) / rank_n, 0)
    at_r_b = precision_bn.masked_fill(rank_n > relevant_b[:, None], 0).sum(dim=1) / relevant_b
    recalls = [hit_bn[:, :k].any(dim=1).float() for k in ks]
    return torch.stack([*recalls, precision_bn.sum(dim=1) / relevant_b, at_r_b], dim=1).cpu().double()


def nearest(query: Query, chosen_b: Tensor, k: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Similarity and row [b, k] in the gallery of what is nearest to some queries, their own images left out."""
    if query.leave_one_out:
        return search_others(query.gallery_nD, query.row_m[chosen_b], min(k, len(query.gallery_nD) - 1), device=device)
    return search(query.gallery_nD, query.query_mD[chosen_b], k, device=device)

"""Weighted kNN of 50,000 images with 128 features, 10 classes, k = 200: ours beside the loop of MoCo's notebook.

    python -m benchmarks.knn                        images like the digits of scikit-learn, turned and shifted
    python -m benchmarks.knn --root FOLDER          a folder that holds train/ and test/ with class folders
    python -m benchmarks.knn --device cuda          torch in blocks, and faiss where it sees the GPU

The features are pixels projected at random to 128 numbers: neighbours are near and classes overlap, as with those of
a network. The loop is the notebook's, re-stated; ``knn_predict`` of lightly, which came from it, is measured where it
is installed. Both are given features of unit length, in batches of ``--batch`` queries; ours makes the length itself.
The predictions must be the same, but where two classes have the same votes to rounding.
"""

import sys
from collections.abc import Callable
from ctypes import CDLL
from functools import partial
from importlib import import_module, util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, arguments, figure, peak_megabytes
from common import counter
from common.data import Images, digits, folder
from common.evaluate import KNN, Features
from common.evaluate.knn import Backend

DIM, K, CLASSES = 128, 200, 10


def features(root: str, num_train: int, num_test: int) -> Features:
    """Of ``root``'s images, or of digits that are repeated with noise until there are as many; unit length."""
    splits = folder(Path(root)) if root else digits()
    assert splits.test is not None, "root: give a folder with train/ and test/"
    train_nD, train_label_n = _rows(splits.train, num_train, 0.0 if root else 0.8)
    test_mD, test_label_m = _rows(splits.test, num_test, 0.0 if root else 0.8)
    return Features(train_nD, train_label_n, test_mD, test_label_m, "pixels")


def _rows(images: Images, count: int, noise: float) -> tuple[Tensor, Tensor]:
    assert images.array is not None, "the images must have one size, of at most 96 pixels a side"
    row_n = torch.arange(count) * max(1, len(images) // count) % len(images)
    x_nP = images.array[row_n].flatten(1).float() / 255 - 0.4
    noise_nP = counter.uniform(count, torch.arange(x_nP.numel())).view_as(x_nP) - 0.5
    return F.normalize(_project(x_nP + noise * noise_nP), dim=1), images.labels[row_n]


def _project(x_nP: Tensor) -> Tensor:
    pixels = x_nP.shape[1]
    return x_nP @ (counter.uniform(0, torch.arange(pixels * DIM)).view(pixels, DIM) - 0.5)


def notebook(found: Features, temperature: float, batch: int, device: str) -> Tensor:
    """The loop of MoCo's CIFAR-10 notebook (and of lemniscate before it), restated: class of each query."""
    bank_Dn, label_n = found.train_nD.T.contiguous().to(device), found.train_label_n.to(device)
    predicted = []
    for query_bD in found.with_test()[2].split(batch):
        similarity_bn = query_bD.to(device) @ bank_Dn
        weight_bk, index_bk = similarity_bn.topk(K, dim=-1)
        label_bk = label_n.expand(len(query_bD), -1).gather(-1, index_bk)
        one_hot = torch.zeros(len(query_bD) * K, CLASSES, device=device).scatter(-1, label_bk.reshape(-1, 1), 1.0)
        score_bC = (one_hot.view(len(query_bD), K, CLASSES) * (weight_bk / temperature).exp()[..., None]).sum(dim=1)
        predicted.append(score_bC.argsort(dim=-1, descending=True)[:, 0])
    return torch.cat(predicted).cpu()


def lightly(found: Features, temperature: float, batch: int, device: str) -> Tensor:
    predict = import_module("lightly.utils.benchmarking").knn_predict
    bank_Dn, label_n = found.train_nD.T.contiguous().to(device), found.train_label_n.to(device)
    return torch.cat([predict(query_bD.to(device), bank_Dn, label_n, CLASSES, K, temperature)[:, 0]
                      for query_bD in found.with_test()[2].split(batch)]).cpu()


def ours(found: Features, temperature: float, backend: Backend, device: str) -> Tensor:
    return KNN(K, temperature, backend=backend).predict(found, torch.device(device))[K]


def check(predicted: dict[str, Tensor], found: Features, temperature: float) -> None:
    """Raises AssertionError where two sides differ and the two classes have not the same votes in float64."""
    train_nD, label_n, test_mD, _ = found.with_test()
    first, *others = predicted.values()
    for other in others:
        row_r = (first != other).nonzero()[:, 0]
        top_rk = (test_mD[row_r].double() @ train_nD.double().T).topk(K, dim=1)
        weight_rk = ((top_rk.values - 1) / temperature).exp()
        score_rC = weight_rk.new_zeros(len(row_r), CLASSES).scatter_add_(1, label_n[top_rk.indices], weight_rk)
        ratio_r = (score_rC.gather(1, first[row_r, None]) / score_rC.gather(1, other[row_r, None]))[:, 0]
        assert ((ratio_r - 1).abs() < 1e-4).all(), ratio_r


def main() -> None:
    options = arguments(__doc__, quick={"train": 600, "queries": 20}, root="", train=50_000, queries=1000, batch=512,
                        device="cpu")
    found, report = features(options.root, options.train, options.queries), Report("knn", options.quick, options.out)
    for temperature in (0.07, 0.1):
        sides: dict[str, Callable[[], Tensor]] = {
            "notebook": partial(notebook, found, temperature, options.batch, options.device)}
        if util.find_spec("lightly"):
            sides["lightly"] = partial(lightly, found, temperature, options.batch, options.device)
        else:
            print("lightly is not installed (pip install lightly): left out")
        sides |= {f"ours, {backend}": partial(ours, found, temperature, backend, options.device)
                  for backend in _backends(options.device)}
        predicted = {name: side() for name, side in sides.items()}
        check(predicted, found, temperature)
        right = (predicted["notebook"] == found.with_test()[3]).double().mean()
        print(f"tau {temperature}: all sides predict the same, {right:.1%} of it right")
        best = f"ours, {_backends(options.device)[0]}"
        report.compare(f"{options.train:,} x {DIM}, tau {temperature}", sides, rounds=options.rounds,
                       at_least={best: 1.7}, per=options.queries, unit="ms", device=options.device)
    if options.device == "cpu" and sys.platform == "linux":
        CDLL(None).malloc_trim(0)           # what is free must not hide what a side takes
        for name, side in sides.items():
            peaks = [peak_megabytes(side) for _ in range(3)]
            report.add(figure(f"{options.train:,} x {DIM}, memory", name, peaks, "MB"))


def _backends(device: str) -> list[Backend]:
    """The one that ``auto`` takes first; without faiss, torch alone."""
    faiss = import_module("faiss") if util.find_spec("faiss") else None
    if device == "cpu":
        return ["faiss", "torch"] if faiss else ["torch"]
    return ["torch", "faiss"] if faiss and getattr(faiss, "get_num_gpus", int)() else ["torch"]


if __name__ == "__main__":
    main()

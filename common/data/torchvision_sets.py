"""torchvision's data sets that come as arrays, read from where they already are."""

import difflib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.data.datasets import Images, Splits
from common.data.images import as_channels
from common.data.memory import numbered


class _Set(NamedTuple):
    files: str                      # where torchvision looks, below the root
    train: dict[str, Any]           # arguments of torchvision's class
    test: dict[str, Any]


_FLAG = {"train": True}, {"train": False}
_SETS = {
    "CIFAR10": _Set("cifar-10-batches-py", *_FLAG),
    "CIFAR100": _Set("cifar-100-python", *_FLAG),
    "FashionMNIST": _Set("FashionMNIST/raw", *_FLAG),
    "KMNIST": _Set("KMNIST/raw", *_FLAG),
    "MNIST": _Set("MNIST/raw", *_FLAG),
    "STL10": _Set("stl10_binary", {"split": "train+unlabeled"}, {"split": "test"}),
    "SVHN": _Set("train_32x32.mat, test_32x32.mat", {"split": "train"}, {"split": "test"}),
    "USPS": _Set("usps.bz2, usps.t.bz2", *_FLAG),
}


_NO_ROOT = """root: no place to read {dataset} from.
  If you have it, say where it is: data.root=/path (the folder that holds {files}).
  If not, get it once, in Python: torchvision.datasets.{dataset}("/path", download=True).
  To try without any: --config demo.yaml, which trains on handwritten digits that come with scikit-learn."""


def torchvision_set(dataset: str, root: Path | None = None, channels: int | None = None) -> Splits:
    """torchvision's ``dataset`` by its class's name, train and test, read into memory; nothing is downloaded.

    ``root`` is what torchvision's class takes. STL10 trains on its labelled and unlabelled images, the latter with
    label -1. ``channels``: 1 or 3 converts, None leaves what the set has. Raises ValueError for an unknown set, or one
    that is not whole under ``root``.
    """
    if dataset not in _SETS:
        near = difflib.get_close_matches(dataset.upper(), map(str.upper, _SETS), n=1, cutoff=0)[0]
        near = next(name for name in _SETS if name.upper() == near)
        raise ValueError(f"dataset: no set {dataset!r}; did you mean {near!r}? These are read: {', '.join(_SETS)}. "
                         "A set that is a folder of images is read by common.data.folder.")
    if root is None:
        raise ValueError(_NO_ROOT.format(dataset=dataset, files=_SETS[dataset].files.partition(",")[0]))
    folder = Path(os.path.abspath(Path(root).expanduser()))
    train, test = (_images(dataset, split, folder, channels) for split in ("train", "test"))
    return Splits(train, test)


def _images(dataset: str, split: str, root: Path, channels: int | None) -> Images:
    found = _found(dataset, root, getattr(_SETS[dataset], split))
    labels_n = torch.as_tensor(found.labels if hasattr(found, "labels") else found.targets).long()
    classes = list(getattr(found, "classes", map(str, range(int(labels_n.max()) + 1))))
    array_ncHW = _first(torch.as_tensor(found.data))
    try:
        array_ncHW = torch.cat([as_channels(part, channels) for part in array_ncHW.split(1000)])
    except ValueError as error:
        raise ValueError(f"channels: {dataset} {error}.") from None
    return numbered(f"{dataset}/{split}", array_ncHW, labels_n, classes)


def _found(dataset: str, root: Path, arguments: dict[str, Any]) -> Any:
    # Here and not above: it takes a second to import.
    from torchvision import datasets

    try:
        return getattr(datasets, dataset)(root, **arguments)
    except (RuntimeError, OSError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ValueError(
            f"root: torchvision's {dataset} is not whole under {root}, where {_SETS[dataset].files} should be "
            f"({error}). Give the folder that holds it, or get it once, in Python: "
            f"torchvision.datasets.{dataset}({str(root)!r}, {given}, download=True).") from None


def _first(array: Tensor) -> Tensor:
    """[n, H, W] or [n, H, W, 3] or [n, 3, H, W] -> [n, c, H, W]."""
    if array.ndim == 3:
        return array.unsqueeze(1)
    return array.permute(0, 3, 1, 2) if array.shape[3] == 3 else array

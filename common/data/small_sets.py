"""Real images at hand without a download: Fashion-MNIST from Debian's package, digits from scikit-learn's wheel."""

import gzip
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from common.counter import permutation, stream
from common.data.datasets import Images, Splits
from common.data.memory import numbered

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def fashion_mnist(root: Path | None = None) -> Splits:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 grey images of clothes, 28 x 28, 10 classes.

    ``root`` holds its four idx files, with or without .gz; None is where Debian's package puts them. Raises ValueError
    where one is missing or damaged.
    """
    folder = _DEBIAN if root is None else Path(root).expanduser()
    return Splits(_idx_set(folder, "train", "train"), _idx_set(folder, "test", "t10k"))


def digits(test: int = 500, split_seed: int = 0) -> Splits:
    """scikit-learn's 1,797 handwritten digits (UCI optdigits' test set), grey, 8 x 8, 17 levels scaled to 0..255.

    ``test`` of them, drawn by ``split_seed``, are for testing. Raises ValueError where none would be left to train on.
    """
    # Here and not above: other sets need no scikit-learn.
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    n = len(values)
    if not 0 <= test < n:
        raise ValueError(f"test: {test} of {n} digits. Give 0 to {n - 1}.")
    images_ncHW = torch.from_numpy(values * (255 / 16)).round().byte().view(n, 1, 8, 8)
    labels_n, classes = torch.from_numpy(labels).long(), [str(digit) for digit in range(10)]
    order = permutation(n, split_seed, stream("digits split"))
    train_set, test_set = (numbered("digits", images_ncHW[part], labels_n[part], classes, part)
                           for part in (order[test:].sort().values, order[:test].sort().values))
    return Splits(train_set, test_set if test else None)


def read_idx(path: Path) -> Tensor:
    """The uint8 array in an idx file (LeCun's MNIST page: 0, 0, 8, number of axes, their lengths big-endian, data)."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            data = file.read()
        except (OSError, EOFError) as error:
            raise ValueError(f"root: {path} is damaged: {error}. Get it again.") from error
    start = 4 + 4 * data[3] if len(data) >= 4 else 4
    if data[:3] != b"\0\0\x08" or len(data) < start:
        raise ValueError(f"root: {path} is no idx file of bytes; it starts with {data[:4].hex()}. Get it again.")
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(f"root: {path} is damaged: {len(data) - start:,} bytes for {list(shape)}. Get it again.")
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).view(shape)


def _idx_set(folder: Path, split: str, prefix: str) -> Images:
    images_nHW, labels_n = (_idx_file(folder, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if images_nHW.ndim != 3 or labels_n.shape != images_nHW.shape[:1]:
        raise ValueError(f"root: {folder} holds {prefix} images {list(images_nHW.shape)} with labels "
                         f"{list(labels_n.shape)}, not [n, H, W] with [n]. Get the four files again.")
    return numbered(f"fashion_mnist/{split}", images_nHW.unsqueeze(1), labels_n.long(), _CLOTHES)


def _idx_file(folder: Path, name: str) -> Tensor:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return read_idx(path)
    raise ValueError(f"root: {folder} holds no {name}, nor {name}.gz. Install Debian's or Ubuntu's package "
                     "dataset-fashion-mnist, or give the folder that holds the four idx files.")

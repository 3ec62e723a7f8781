"""Images that come as arrays."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data.datasets import Images, Splits
from common.data.npy import channels_first

Array = str | Path | Tensor | np.ndarray


def numbered(name: str, array_ncHW: Tensor, labels_n: Tensor, classes: list[str],
             numbers: Tensor | None = None) -> Images:
    """A set in memory whose images have no names, only ``numbers``, or their positions: "digits/12"."""
    keys = range(len(array_ncHW)) if numbers is None else numbers.tolist()
    return Images(name, [f"{name}/{i}" for i in keys], labels_n, classes, array_ncHW)


def arrays(
    train: Array,
    train_labels: Array | None = None,
    test: Array | None = None,
    test_labels: Array | None = None,
    channels: int | None = None,
) -> Splits:
    """Tensors, arrays, or the ``.npy`` files of them: uint8 [n, H, W], [n, c, H, W] or [n, H, W, c], any c.

    The channels are the axis that has ``channels`` entries, or else the shorter of the second and the last, or else
    the last. Labels are whole numbers [n], counted from 0, or -1 for none. Raises ValueError for anything else.
    """
    train_ncHW = _images("train", train, channels)
    train_n = _labels("train_labels", train_labels, len(train_ncHW))
    test_ncHW = train_ncHW[:0] if test is None else _images("test", test, train_ncHW.shape[1])
    test_n = _labels("test_labels", test_labels, len(test_ncHW))
    if train_ncHW.shape[1] != test_ncHW.shape[1]:
        raise ValueError(f"test: has {test_ncHW.shape[1]} channels, train has {train_ncHW.shape[1]}. Give both alike.")
    classes = [str(i) for i in range(1 + int(torch.cat([train_n, test_n]).max()))]
    splits = Splits(numbered(_name("train", train), train_ncHW, train_n, classes))
    return splits if test is None else Splits(splits.train, numbered(_name("test", test), test_ncHW, test_n, classes))


def _name(split: str, given: Array) -> str:
    return Path(given).name if isinstance(given, str | Path) else split


def _tensor(what: str, given: Array) -> Tensor:
    if isinstance(given, str | Path):
        try:
            given = np.load(Path(given).expanduser(), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{what}: cannot read {given}: {error}. Give a .npy file of numbers.") from error
    return torch.as_tensor(given)


def _images(what: str, given: Array, channels: int | None) -> Tensor:
    array = _tensor(what, given)
    if array.dtype != torch.uint8 or array.ndim not in (3, 4) or array.numel() == 0:
        raise ValueError(f"{what}: holds {str(array.dtype).removeprefix('torch.')} {list(array.shape)}. Give uint8 "
                         "[n, H, W], [n, c, H, W] or [n, H, W, c].")
    if array.ndim == 3:
        array = array.unsqueeze(1)
    elif not channels_first(array.shape[1], array.shape[3], channels):
        array = array.permute(0, 3, 1, 2)
    if channels not in (None, array.shape[1]):
        raise ValueError(f"{what}: {list(array.shape)} has no axis of {channels} channels.")
    return array.contiguous()


def _labels(what: str, given: Array | None, n: int) -> Tensor:
    if given is None:
        return torch.full((n,), -1)
    labels = _tensor(what, given)
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.shape != (n,):
        raise ValueError(f"{what}: holds {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}. Give whole "
                         f"numbers [{n}], one for each image.")
    labels_n = labels.long()
    if labels_n.min() < -1:
        raise ValueError(f"{what}: holds {labels_n.min()}. Give numbers from 0, or -1 for no label.")
    return labels_n

"""The trees that a checkpoint holds: dicts, lists and tuples of tensors, numbers and strings."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_DEPTH = 100         # of lists in lists; a checkpoint has about ten
MAX_COUNT = 1_000_000   # values
_SCALARS = (type(None), bool, int, float, str)


def compact(tensor: Tensor, where: str) -> Tensor:
    """``tensor`` on the CPU, with no more memory than its own elements; itself if it is so already."""
    tensor = tensor.cpu()
    is_compact = tensor.untyped_storage().nbytes() == tensor.nbytes             # a view is saved with all of its base
    return tensor if is_compact else tensor.clone()


def plain(tree: Any, where: str = "state", copy: Callable[[Tensor, str], Tensor] = compact) -> Any:
    """A copy of ``tree`` in plain dicts, lists and tuples, its tensors compact, on the CPU and without gradient.

    Each tensor is ``copy(tensor, where)``; by default, those that are so already are not copied. Raises ValueError for
    what a checkpoint could not give back (NumPy values, paths, objects, sparse tensors), naming its place; ``where`` is
    the name of the root.
    """
    if isinstance(tree, dict):
        return {_plain_key(key, where): plain(value, f"{where}.{key}", copy) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(plain(value, f"{where}.{i}", copy) for i, value in enumerate(tree))
    if isinstance(tree, Tensor) and tree.layout is torch.strided and not (tree.is_quantized or tree.is_meta):
        return copy(tree.detach().resolve_conj().resolve_neg(), where)
    if type(tree) in _SCALARS:
        return tree
    raise ValueError(f"{where}: a {type(tree).__name__} cannot be saved in a checkpoint, which takes dense tensors, "
                     "None, bool, int, float, str, and lists, tuples and dicts of them. Convert it first.")


def _plain_key(key: Any, where: str) -> Any:
    if type(key) in _SCALARS:
        return key
    raise ValueError(f"{where}: the key {key!r} is a {type(key).__name__}; in a checkpoint it must be a str or an int.")


def digest(tree: Any) -> str:
    """SHA-256 over every key and value: their types, and of tensors dtype, shape and bits, but not the device."""
    hashed = hashlib.sha256()
    _feed(hashed, plain(tree))
    return hashed.hexdigest()


def _feed(hashed: Any, tree: Any) -> None:
    """Each value goes in behind its type and length, so that no two trees give the same bytes."""
    if isinstance(tree, dict):
        hashed.update(b"dict %d;" % len(tree))
        for key, value in tree.items():
            _feed(hashed, key)
            _feed(hashed, value)
    elif isinstance(tree, (list, tuple)):
        hashed.update(b"%s %d;" % (type(tree).__name__.encode(), len(tree)))
        for value in tree:
            _feed(hashed, value)
    elif isinstance(tree, Tensor):
        hashed.update(f"{tree.dtype} {tuple(tree.shape)};".encode())
        hashed.update(tree.contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        text = repr(tree).encode()
        hashed.update(b"%s %d;%s" % (type(tree).__name__.encode(), len(text), text))


def check_extent(tree: Any, file_size: int) -> None:
    """Raises ValueError for a tree that unfolds into far more than a file of so many bytes can hold.

    A file can name one value in a thousand places, and a tensor can repeat one element for ever; ``save`` does neither.
    """
    waiting, count, extent = [(tree, 0)], 0, 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if isinstance(node, dict):
            waiting += [(part, depth + 1) for item in node.items() for part in item]
        elif isinstance(node, (list, tuple)):
            waiting += [(part, depth + 1) for part in node]
        elif isinstance(node, Tensor):
            extent += node.nbytes
            if node.nbytes > node.untyped_storage().nbytes():
                raise ValueError(f"a tensor claims {list(node.shape)} elements, and holds fewer")
        elif isinstance(node, str):
            extent += len(node)
        if depth > MAX_DEPTH or count > MAX_COUNT or len(waiting) > MAX_COUNT or extent > 4 * file_size:
            raise ValueError("its content unfolds into more than the file can hold")


def num_bytes(tree: Any) -> int:
    """Bytes of all tensors in the tree: nearly the size of its file."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, (dict, list, tuple)):
        return sum(map(num_bytes, tree.values() if isinstance(tree, dict) else tree))
    return 0

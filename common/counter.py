"""Random numbers without a state: each is a hash of what it is for.

A draw that depends only on (seed, epoch, image, view) is the same for any number of processes and workers, on any
device, and after any resume, so there is no generator to save, to forget or to advance by accident.

The mixing function is the finalizer of splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
generators", Fig. 17), applied once for each key. Integer arithmetic wraps modulo 2^64 and is exact on every device.
"""

import zlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64         # int64 has no unsigned literals
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def stream(name: str) -> int:
    """A key that keeps the draws of one purpose apart from those of another, from the purpose's name."""
    return zlib.crc32(name.encode())


def bits(*keys: int | Tensor) -> Tensor:
    """64 random bits (int64) for each element of ``keys``, broadcast together; at least one key is a tensor.

    ``bits(seed, epoch, index_B)`` has shape [B]. The order of the keys matters.
    """
    state: int | Tensor = 0
    for key in keys:
        step = state + _GOLDEN if isinstance(state, Tensor) else _wrap(state + _GOLDEN)
        state = _mix(step + _mix(key))
    assert isinstance(state, Tensor)
    return state


def uniform(*keys: int | Tensor) -> Tensor:
    """Uniform float32 in [0, 1) for each element of ``keys``, in steps of 2^-24: the same bits on every device."""
    return _shift(bits(*keys), 40).float() * 2.0**-24


def integers(high: int | Tensor, *keys: int | Tensor) -> Tensor:
    """Uniform int64 in [0, high) for each element of ``keys`` and ``high``; the modulo's bias is below high / 2^63."""
    return _shift(bits(*keys), 1) % high


def permutation(n: int, *keys: int) -> Tensor:
    """A random order of ``n`` things, int64 [n] on the CPU: by the rank of each one's hash (ties keep their order)."""
    return bits(*keys, torch.arange(n)).argsort(stable=True)


def _mix(x: int | Tensor) -> int | Tensor:
    """Of a Python integer in Python: a tenth of the time, and nothing to send to a device."""
    if isinstance(x, int):
        x %= 2**64
        x = (x ^ x >> 30) * _MIX_1 % 2**64
        x = (x ^ x >> 27) * _MIX_2 % 2**64
        return _wrap(x ^ x >> 31)
    x = x.long()
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _wrap(x: int) -> int:
    """``x`` modulo 2^64 as int64 holds it."""
    return (x + 2**63) % 2**64 - 2**63


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift: torch's ``>>`` on int64 copies the sign bit in."""
    return (x >> by) & ((1 << (64 - by)) - 1)

"""Learning-rate schedules: a factor on the base rate, a function of how far the training is.

A schedule is a callable ``(epoch) -> factor``; ``epoch`` counts from 0 and has a fraction within an epoch. It holds
no state, so a resumed run needs none.
"""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Callable[[float], float]


def constant(warmup: float = 0.0) -> Schedule:
    """The base rate, after ``warmup`` epochs of linear rise."""
    _check_warmup(warmup)
    return lambda epoch: _warm(epoch, warmup)


def step(milestones: list[int], gamma: float = 0.1, warmup: float = 0.0) -> Schedule:
    """Times ``gamma`` at each milestone (epochs): MoCo v1 and InstDisc, 120 and 160 of 200."""
    _check_warmup(warmup)
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma: {gamma} lies outside (0, 1]. The papers' is 0.1.")
    return lambda epoch: _warm(epoch, warmup) * gamma ** sum(epoch >= milestone for milestone in milestones)


def cosine(epochs: int, warmup: float = 0.0, by: Literal["step", "epoch"] = "step",
           first: Literal[0, 1] = 0) -> Schedule:
    """Half a cosine from the base rate to 0 over ``epochs``, warm-up included (Loshchilov & Hutter 2017, Eq. 5).

    ``by: epoch`` holds the rate within an epoch, as MoCo v2's code does. ``first: 1`` counts epochs from 1, as the
    CIFAR-10 notebook of MoCo's authors does: the rate of the last epoch is then 0. ``epochs`` comes from the training.
    """
    def factor(epoch: float) -> float:
        if epoch < warmup:
            return _warm(epoch, warmup)
        at = math.floor(epoch) + first if by == "epoch" else epoch
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (at - warmup) / (epochs - warmup))))

    if not 0 <= warmup < epochs:
        raise ValueError(f"warmup: {warmup} epochs of {epochs}. Give from 0 to less than the training's epochs.")
    return factor


def _check_warmup(warmup: float) -> None:
    if not 0 <= warmup < math.inf:
        raise ValueError(f"warmup: {warmup} epochs. Give 0 or more.")


def _warm(epoch, warmup):
    return min(1.0, epoch / warmup) if warmup > 0 else 1.0

"""What the numbers of a run say of its health: spikes of loss and gradient, features that collapse.

Axes: B images, C feature dimension.
"""

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.data.datasets import Images
from common.method import AtChance, Method
from common.train import Step

ROWS, LEAST = 256, 8    # how many features are looked at, and how many say anything


class Spike(NamedTuple):
    """A value far above what the last steps had."""

    what: str
    value: float
    median: float


class Spikes:
    """Compares each good step with the last ``LENGTH`` of them.

    A gradient norm is a spike at more than 10 times their median; a loss at more than 10 deviations above it, where a
    deviation is their median distance from the median, as that of a normal distribution, and at least a tenth of it.
    """

    LENGTH, LEAST, FACTOR = 100, 20, 10.0

    def __init__(self) -> None:
        self._loss: deque[float] = deque(maxlen=self.LENGTH)
        self._norm: deque[float] = deque(maxlen=self.LENGTH)

    def add(self, loss: float, gradient_norm: float) -> list[Spike]:
        """Take in a good step; its spikes."""
        found = []
        if len(self._norm) >= self.LEAST:
            middle, usual = statistics.median(self._norm), statistics.median(self._loss)
            deviation = max(1.4826 * statistics.median(abs(x - usual) for x in self._loss), 0.1 * abs(usual))
            if gradient_norm > self.FACTOR * middle:
                found.append(Spike("gradient_norm", gradient_norm, middle))
            if loss > usual + self.FACTOR * deviation:
                found.append(Spike("loss", loss, usual))
        self._loss.append(loss)
        self._norm.append(gradient_norm)
        return found

    def state(self) -> dict[str, Any]:
        return {"loss": list(self._loss), "gradient_norm": list(self._norm)}

    def load_state(self, state: dict[str, Any]) -> None:
        self._loss = deque(state["loss"], self.LENGTH)
        self._norm = deque(state["gradient_norm"], self.LENGTH)


class Spread(NamedTuple):
    """How B unit vectors fill their space of C dimensions. One number alone misses some kind of collapse."""

    std: float              # of a coordinate over images, times sqrt(C): 1 if spread evenly, 0 if all are one point
    rank: float             # exp of the entropy of the normalised singular values: directions in use
    cosine: float           # mean over pairs of different images
    full: int               # the rank that so many features can have


def spread(x_BC: Tensor) -> Spread:
    """Of the first ``ROWS`` features, on the host, in float32."""
    x_BC = x_BC[:ROWS].float().cpu()
    x_BC = x_BC / x_BC.norm(dim=1, keepdim=True).clamp(min=1e-12)
    count = len(x_BC)
    centred_BC = x_BC - x_BC.mean(dim=0)
    value_M = torch.linalg.svdvals(centred_BC)
    share_M = value_M / value_M.sum().clamp(min=1e-12)
    entropy = float(torch.special.entr(share_M).sum())
    cosine = (float(x_BC.sum(dim=0).square().sum()) - count) / (count * (count - 1))
    return Spread(float(centred_BC.square().sum(dim=1).mean().sqrt()), math.exp(entropy), cosine,
                  min(count - 1, x_BC.shape[1]))


def directions(method: Method, images: Images) -> float:
    """As many as the features of sound training need: those of its classes, of a method with labels.

    Nobody knows how many subjects a list of pairs is of, which may be two; without labels as many as there are.
    """
    if not method.supervised:
        return math.inf
    return len(images.labels[images.labels >= 0].unique()) - 1 if images.together == 1 else 1


class Collapse:
    """Tells features that collapse from those of a network that has not begun to learn, which are alike, too.

    What counts is what the run has lost: the alarm comes at the third look in a row (``CHECKS``) at which the spread is
    less than a third of the widest seen and the mean cosine above 0.85, or the rank less than a twentieth of a full one
    and half of the highest seen. Once, until it has passed.

    ``directions``: as many as a sound network needs, where it is known. Labels draw the images of a class together, and
    C of these lie in C - 1 directions.
    """

    CHECKS = 3

    def __init__(self, directions: float = math.inf) -> None:
        self._directions = directions
        self.widest = self.highest = 0.0
        self.checks = 0

    def state(self) -> dict[str, Any]:
        return {"widest": self.widest, "highest": self.highest, "checks": self.checks}

    def add(self, now: Spread) -> str:
        """Take in a look at the features; what to say, or nothing."""
        self.widest, self.highest = max(self.widest, now.std), max(self.highest, now.rank)
        point = now.std < self.widest / 3 and now.cosine > 0.85
        few = now.rank < min(now.full, self._directions) / 20 and now.rank < self.highest / 2
        self.checks = self.checks + 1 if point or few else 0
        if self.checks != self.CHECKS:
            return ""
        what = f"all become one, their mean cosine is {now.cosine:.3f}, their spread {now.std:.3f} after " \
               f"{self.widest:.3f}" if point else f"they use {now.rank:.1f} of {now.full} directions, after " \
               f"{self.highest:.1f}"
        return f"the features are collapsing: {what}. Try a lower learning rate, more schedule.warmup, or in " \
               "MoCo more method.momentum."


class Chance:
    """Tells a loss that stays at that of a network which tells nothing apart; in the words of the method."""

    def __init__(self) -> None:
        self.steps = 0

    def add(self, loss: float, chance: float | None, told: AtChance) -> str:
        """Take in a good step; what to say, or nothing."""
        self.steps = self.steps + 1 if chance is not None and abs(loss - chance) < told.within * chance else 0
        return told.text.format(steps=told.steps) if self.steps == told.steps else ""


class Health:
    """All that watches a run. Main process only; its state is part of a checkpoint, so a resumed run says the same."""

    def __init__(self, directions: float = math.inf) -> None:
        self.spikes, self.collapse, self.at_chance = Spikes(), Collapse(directions), Chance()
        self.spread: Spread | None = None           # at the last look

    def alarms(self, step: Step, chance: float | None, told: AtChance) -> list[str]:
        """Take in a good step; what is wrong with the run, if anything, in words."""
        said = []
        if step.features is not None and len(step.features) >= LEAST:
            self.spread = spread(step.features)
            said.append(self.collapse.add(self.spread))
        alike = self.spread is None or self.spread.cosine >= told.cosine
        said.append(self.at_chance.add(step.loss, chance if alike else None, told))
        return [text for text in said if text]

    def values(self) -> dict[str, float]:
        """For the records."""
        return {} if self.spread is None else {name: getattr(self.spread, name) for name in ("std", "rank", "cosine")}

    def state(self) -> dict[str, Any]:
        return {"spikes": self.spikes.state(), "collapse": self.collapse.state(),
                "chance": dict(vars(self.at_chance)), "spread": None if self.spread is None else list(self.spread)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.spikes.load_state(state["spikes"])
        vars(self.collapse).update(state["collapse"])
        vars(self.at_chance).update(state["chance"])
        self.spread = None if state["spread"] is None else Spread(*state["spread"])

"""The sections of a config that are plain settings; ``train`` stands in ``common.train``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from common.evaluate import Result


@dataclass(frozen=True)
class RunSettings:
    """``dir``: the run's folder (default: runs/ and the config's name). ``seed`` of everything random in the run."""

    dir: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class EvaluateSettings:
    """``every`` so many epochs, and at the end (0: only then), measure ``layer``'s features by each of ``protocols``.

    ``baselines``: at the end, measure raw pixels and the untrained backbone too.
    """

    every: int = 10
    layer: Literal["backbone", "head"] = "backbone"
    protocols: list[Callable[..., list[Result]]] = field(default_factory=list)
    baselines: bool = False
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.every < 0 or self.batch_size < 1:
            raise ValueError("every: give 0 or more epochs, and a batch_size of 1 or more.")


@dataclass(frozen=True)
class CheckpointSettings:
    """A checkpoint every ``minutes`` and before each measurement: the newest ``keep`` stay.

    ``every`` so many epochs (0: never) one stays for good.
    """

    every: int = 0
    minutes: float = 15.0
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 0 or self.minutes <= 0 or self.keep < 1:
            raise ValueError("every, minutes, keep: give 0 or more epochs, a positive time, and at least 1 to keep.")


@dataclass(frozen=True)
class LogSettings:
    """A record every ``every`` steps in metrics.jsonl; ``wandb`` mirrors them to ``project``."""

    every: int = 50
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "contrastive"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: {self.every} steps. Give 1 or more.")

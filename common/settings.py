"""The sections of a config that are plain settings. Reading them needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

MOST = 2**31            # of anything that is counted


@dataclass(frozen=True)
class RunSettings:
    """``dir``: the run's folder (default: runs/ and the config's name). ``seed`` of everything random in the run.

    ``weights``: a file whose encoder a new run begins with, in place of random weights; a run that goes on needs it no
    more.
    """

    dir: str | None = None
    seed: int = 0
    weights: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: {self.seed} given. Give 0 to {2**32 - 1}.")
        for key, path in (("dir", self.dir), ("weights", self.weights)):
            if path is not None and ("\0" in path or not path.isprintable()):
                raise ValueError(f"{key}: holds a character that no path should. Give a path.")


@dataclass(frozen=True)
class TrainSettings:
    """The section ``train`` of a config.

    ``epochs`` passes over the training images; ``batch_size`` images per optimizer step, over all processes and
    micro-batches; ``accumulate`` micro-batches of a step; ``workers`` loader processes of each process; ``clip`` limits
    the gradient's norm; ``threads`` of each process (null: torch's choice); ``max_unreadable`` share of the images that
    may be unreadable; ``worker_timeout`` seconds after which a worker that is waited for and reads nothing more is
    replaced; ``max_skipped`` steps in a row that may be not finite: then the run goes back to its last good checkpoint,
    at ``rollback_lr`` times its learning rate, ``rollbacks`` times at most; ``timeout`` seconds that a process may hang
    before all end; ``compare_ranks`` every so many steps (0: only before a checkpoint).
    """

    epochs: int
    batch_size: int
    accumulate: int = 1
    workers: int = 4
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    clip: float | None = None
    channels_last: bool = True
    compile: bool = False
    threads: int | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    max_unreadable: float = 0.01
    worker_timeout: float = 300.0
    max_skipped: int = 10
    rollbacks: int = 2
    rollback_lr: float = 0.5
    timeout: float = 300.0
    compare_ranks: int = 500

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "accumulate", "max_skipped"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} is less than 1.")
            if getattr(self, key) > MOST:
                raise ValueError(f"{key}: {getattr(self, key)} is too many. Give at most {MOST}.")
        if self.rollbacks < 0 or not 0 < self.rollback_lr <= 1:
            raise ValueError(f"rollbacks: {self.rollbacks} times, each with {self.rollback_lr} of the learning rate. "
                             "Give 0 or more, and a rollback_lr in (0, 1].")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"threads: {self.threads} given. Give 1 to 1024, or null for torch's choice.")
        if self.workers > 1024:
            raise ValueError(f"workers: {self.workers} given. Give at most 1024, of each process.")
        if self.workers < 0:
            raise ValueError(f"workers: {self.workers} is negative. Give 0 to load in the training process.")
        if not self.worker_timeout > 0:
            raise ValueError(f"worker_timeout: {self.worker_timeout} is not positive. Give seconds.")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable: {self.max_unreadable} is no share of the images. Give 0 to 1.")
        if self.timeout < 5 or self.compare_ranks < 0:
            raise ValueError("timeout, compare_ranks: give 5 seconds or more, and 0 or more steps.")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip: {self.clip} is not positive. Give a norm, or null for no clipping.")


@dataclass(frozen=True)
class EvaluateSettings:
    """``every`` so many epochs, and at the end (0: only then), measure ``layer``'s features by each of ``protocols``.

    ``baselines``: at the end, measure raw pixels and the untrained backbone too. ``bank``: before the end, kNN of the
    head's features among those that the method keeps of the training images (InstDisc), which are not embedded then.
    """

    every: int = 10
    layer: Literal["backbone", "head"] = "backbone"
    protocols: list[Callable[..., list]] = field(default_factory=list)
    baselines: bool = False
    batch_size: int = 256
    bank: bool = False

    def __post_init__(self) -> None:
        if self.every < 0 or not 1 <= self.batch_size <= MOST:
            raise ValueError(f"every: give 0 or more epochs, and a batch_size of 1 or more, up to {MOST}.")


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


def check_shares(batch_size: int, accumulate: int, world: int) -> None:
    """Raises ValueError unless a batch divides into micro-batches and the shares of ``world`` processes."""
    parts = accumulate * world
    if batch_size < 1 or batch_size % parts:
        nearest = sorted({max(parts, batch_size // parts * parts + more) for more in (0, parts)})
        shares = f"{world} process{'es' * (world > 1)} x {accumulate} micro-batch{'es' * (accumulate > 1)}"
        raise ValueError(f"train.batch_size: {batch_size} images do not divide into equal shares for {shares}. "
                         f"Nearest sizes that do: {' and '.join(map(str, nearest))}.")

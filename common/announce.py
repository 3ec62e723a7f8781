"""What a run says of itself before the first step and after the last, and when it cannot go on."""

import os
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from common import crash, distributed, last_words, watch
from common.architectures import small_resnet_sizes
from common.backbones import trainable_parameters
from common.checkpoint import NotSaved
from common.config import ConfigError
from common.environment import python_command
from common.method import Method
from common.printable import screen
from common.progress import duration
from common.train import Trainer

if TYPE_CHECKING:
    from common.run import Run

MAIN_FIRST = 0.5        # seconds by which the other ranks let the main one speak of what all have met


def opening(run: "Run", trainer: Trainer, begun: str = "") -> str:
    """What is about to be trained, on what, where; ``begun``: from which weights, if not from random ones."""
    settings = run.train_settings
    train, test = run.splits
    held = "" if test is None else f"; {len(test):,} to test on"
    lr = trainer.optimizer.param_groups[0].get("initial_lr", trainer.optimizer.param_groups[0]["lr"])
    start = f", goes on from step {trainer.step:,}" if trainer.step else ""
    if trainer.step == trainer.total_steps:
        start = ", finished already; to train anew, give another run.dir or delete the folder"
    parts = f" in {settings.accumulate} parts" if settings.accumulate > 1 else ""
    nothing = _nothing_to_measure(run)
    return "\n".join([
        f"method   {type(run.method).__name__}, {trainable_parameters(run.method) / 1e6:.2f} M trained parameters",
        *([f"weights  {begun}"] if begun else []),
        f"data     {train.name}: {len(train):,} images, {train.channels} channel{'s' * (train.channels > 1)}{held}",
        f"train    {settings.epochs} epoch{'s' * (settings.epochs > 1)} of {trainer.loader.steps_per_epoch:,} steps"
        f" of {settings.batch_size} images{parts}; learning rate {lr:g} "
        f"({lr * 256 / settings.batch_size:g} per 256 images)",
        f"machine  {run.device}, {distributed.world()} process{'es' * (distributed.world() > 1)}, "
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} each, {settings.precision}",
        *([f"measure  nothing: {nothing}"] if nothing else []),
        f"run      {run.dir}{start}", ""])


def _nothing_to_measure(run):
    """Why no accuracy is measured; empty if one is."""
    if run.evaluator.possible:
        return ""
    if run.splits.train.together == 2:
        return "the labels are those of pairs; tools/verify.py measures by a list of them"
    return "the training images have no labels" if run.evaluation.protocols else "no evaluate.protocols"


def share(measuring: float, seconds: float) -> str:
    """What measuring has taken of the seconds of a run."""
    return f"measuring took {duration(measuring)} of {duration(seconds)}, {measuring / max(seconds, 1e-9):.0%}"


def closing(run: "Run", seconds: float, measuring: float) -> str:
    """Where everything is, and what to do next; ``measuring`` is its part of the ``seconds`` of the run."""
    python, took = python_command(), share(measuring, seconds) if measuring else duration(seconds)
    return "\n".join([
        f"Run      {run.dir}  ({took}; config.yaml, metrics.jsonl, summary.json, "
        "checkpoints/)",
        *(f"{name:<9}{python} tools/{command}" for name, command in _measuring(run)),
        f"Hand on  {python} tools/export.py --checkpoint {run.dir} --format {_format(run)} --out {run.dir}-backbone",
        *([] if run.method.supervised else
          [f"Next     {python} tools/train.py --config my_images.yaml data.root=/path/to/your/images"])])


def _measuring(run: "Run") -> list[tuple[str, str]]:
    """The commands that measure it, by what they are called; what was trained with labels is verified, too."""
    train, method = run.splits.train, run.method
    if not method.supervised:
        labelled = bool((train.labels >= 0).any())
        return [("Measure", f"evaluate.py knn --checkpoint {run.dir}"
                 + ("" if labelled else " --data /path/to/images/with/classes"))]
    layer = " --layer head" if run.evaluation.layer == "head" else ""
    verify = f"verify.py --checkpoint {run.dir}{'' if method.learned else layer}"
    if train.together == 2:
        return [("Verify", f"{verify} --pairs /path/to/pairs.txt")]
    classifies = type(method).logits is not Method.logits and run.splits.test is not None
    return [("Measure", f"evaluate.py {'classify' if classifies else 'knn'} --checkpoint {run.dir}"
             + ("" if classifies else layer)), ("Verify", verify)]


def _format(run: "Run") -> str:
    """timm's, if it has the network: it knows neither the smallest ResNets nor a stem for small images.

    A graph where the config names no architecture: the encoder is somebody's own.
    """
    trunk, arch = run.encoder.backbone, run.config.get("method.encoder.arch")
    if not isinstance(arch, str):
        return "torch_export"
    small = isinstance(getattr(trunk, "maxpool", None), nn.Identity)
    return "torchvision" if small or small_resnet_sizes(arch) or arch.startswith("torchvision/") else "timm"


def failure(error: Exception, debug: bool = False) -> int:
    """Say why this process ends, on one screen; its exit status: 2 for a user's mistake, 1 for what went wrong later.

    What is nobody's mistake leaves crash.json. Of several ranks the first that failed speaks, and the others wait for
    it. ``debug`` shows every traceback.
    """
    if debug:
        last_words.say(crash.trace(error))
    code, watching = _code(error), watch.current()
    if watching:
        watching.failing = True
    if watching and _rank() and isinstance(error, ConfigError | NotSaved):
        time.sleep(MAIN_FIRST)          # most likely every rank's: let the main one say it
    lost = watching.gone(error) if watching else ""
    if not (watching.words.first(code) if watching else _speaks(error)):
        return watching.words.wait() if watching else code
    last_words.say(screen(f"\n{_rank()}{_lost(lost) if lost else _what(error)}"))
    if watching:
        watching.words.tell(watching.hosts)
    return code


def _code(error: Exception) -> int:
    """2: a mistake of the user's; 74, EX_IOERR: a folder that takes no checkpoint; 1: whatever went wrong later."""
    if isinstance(error, NotSaved):
        return error.code
    return 2 if isinstance(error, ValueError) and _in_words(error) else 1


def _in_words(error: Exception) -> bool:
    """Whether the message was written for the user: the disk's or the system's, or raised so by this project."""
    written = isinstance(error, ValueError | FloatingPointError) and (not error.__traceback__ or crash.is_ours(error))
    return isinstance(error, OSError) or written


def _speaks(error: Exception) -> bool:
    """Before the ranks watch each other: a mistake in the config is every rank's, and said once."""
    return not _rank() or not isinstance(error, ConfigError | NotSaved)


def _rank() -> str:
    """To stand before a message; empty on the main process."""
    rank = os.environ.get("RANK", "0")          # it may fail before the processes have met
    return "" if rank == "0" else f"rank {rank}: "


def _lost(names: str) -> str:
    return watch.said(f"{names} is gone", crash.write(f"{names} is gone", _stacks(), kind="lost"))


def _what(error: Exception) -> str:
    if _in_words(error):
        return f"error: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return (f"error: {str(error).partition('. ')[0]}. Give a smaller train.batch_size, or more train.accumulate: a "
                "step in 2 parts needs about half of it.")
    path = crash.write(f"{type(error).__name__}: {error}", _stacks(crash.trace(error)), kind="error")
    said = str(error).strip().splitlines()
    return "\n".join([
        f"error: {type(error).__name__}: {' '.join(said[:3])[:500]}", f"  at {crash.place(error)}",
        "This should not have happened. Checkpoints saved before it are good: the same command goes on from the last.",
        f"{path or 'crash.json (no folder takes it)'} has the traceback, the stack of every rank, versions, config and "
        "the last records: please send it with a report. --debug shows the traceback here."])


def _stacks(own: str | None = None) -> dict[int, str]:
    """Of every rank; ``own``: this one's traceback."""
    watching = watch.current()
    return {**(watching.words.stacks() if watching else {}), distributed.rank(): own or last_words.main_stack()}

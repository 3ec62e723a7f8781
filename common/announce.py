"""What a run says of itself before the first step and after the last, and when it cannot go on."""

import os
import sys
from typing import TYPE_CHECKING

import torch

from common import distributed
from common.backbones import trainable_parameters
from common.checkpoint import NotSaved
from common.config import ConfigError
from common.environment import python_command
from common.progress import duration
from common.train import Trainer

if TYPE_CHECKING:
    from common.run import Run


def opening(run: "Run", trainer: Trainer) -> str:
    """What is about to be trained, on what, where."""
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
    return "the training images have no labels" if run.evaluation.protocols else "no evaluate.protocols"


def closing(run: "Run", seconds: float) -> str:
    """Where everything is, and what to do next."""
    python, labelled = python_command(), bool((run.splits.train.labels >= 0).any())
    other = "data.root=/path/to/images/with/classes"
    if run.config.get("data.name") != "common.data.folder":
        other = "'data={name: common.data.folder, root: /path/to/images/with/classes}'"
    return "\n".join([
        f"Run      {run.dir}  ({duration(seconds)}; config.yaml, metrics.jsonl, summary.json, "
        "checkpoints/)",
        f"Measure  {python} tools/evaluate.py knn --checkpoint {run.dir}"
        + ("" if labelled else f" {other}"),
        f"Next     {python} tools/train.py --config my_images.yaml data.root=/path/to/your/images"])


def failure(error: Exception) -> int:
    """Say why this process ends; its exit status: 2 for a user's mistake, 1 for what went wrong on the way.

    A mistake in the config is every process's, and said once, as is a folder that takes no checkpoint (74, EX_IOERR);
    anything else by whom it met.
    """
    rank = int(os.environ.get("RANK", 0))       # a mistake may come up before the processes have met
    if rank == 0 or not isinstance(error, ConfigError | NotSaved):
        print(f"\n{f'rank {rank}: ' if rank else ''}error: {error}", file=sys.stderr)
    return error.code if isinstance(error, NotSaved) else 2 if isinstance(error, ValueError) else 1

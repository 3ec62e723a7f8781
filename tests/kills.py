"""Signals at named places of a run, sent by the run's own process; and whether a run is, bit for bit, another."""

import functools
import io
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from common.session import Session
from common.tree import digest
from tests import tiny
from tests.processes import run_tool

Hit = Callable[[], None]


def train(place: str, passes: int, number: int, note: str, *options: str) -> None:
    """``tools/train.py --config OPTIONS``; at its ``passes``-th time at ``place``, this process gets signal ``number``.

    The steps done by then are written to the file ``note``.
    """
    start = Session.start

    def planted(session):
        start(session)
        PLACES[place](session, _hit(session, passes, number, Path(note)))

    Session.start = planted
    run_tool("train", "--config", *options)


def _hit(session: Session, passes: int, number: int, note: Path) -> Hit:
    here, passed = os.getpid(), []

    def hit():
        passed.append(place := os.getpid())                     # data workers inherit what is planted
        if len(passed) == passes and place == here:
            note.write_text(str(session.trainer.step))
            os.kill(here, number)

    return hit


def _before(owner: Any, name: str, hit: Hit) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def planted(*arguments, **named):
        hit()
        return original(*arguments, **named)

    setattr(owner, name, planted)


def _after(owner: Any, name: str, hit: Hit) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def planted(*arguments, **named):
        result = original(*arguments, **named)
        hit()
        return result

    setattr(owner, name, planted)


def _in_backward(session: Session, hit: Hit) -> None:
    """With about half of the gradients there."""
    parameters = [p for p in session.run.method.parameters() if p.requires_grad]
    parameters[len(parameters) // 2].register_hook(lambda gradient: hit())


def _in_the_file(session: Session, hit: Hit) -> None:
    """With half of a checkpoint's bytes written."""
    original = torch.save

    def planted(payload, file):
        whole = io.BytesIO()
        original(payload, whole)
        file.write(whole.getvalue()[:whole.tell() // 2])
        file.flush()
        hit()
        file.write(whole.getvalue()[whole.tell() // 2:])

    torch.save = planted


def _around_the_rename(plant: Callable[[Any, str, Hit], None], session: Session, hit: Hit) -> None:
    """A checkpoint's, and no other file's."""
    original = os.replace

    def renamed(source, target):
        checkpoint = str(target).endswith(".pt")
        if checkpoint and plant is _before:
            hit()
        original(source, target)
        if checkpoint and plant is _after:
            hit()

    os.replace = renamed


def _in_evaluation(session: Session, hit: Hit) -> None:
    evaluator = session.run.evaluator

    def first(features, device):
        hit()
        return []

    evaluator.protocols = [first, *evaluator.protocols]


PLACES: dict[str, Callable[[Session, Hit], None]] = {           # the first five are passed at every step
    "waiting for a data worker": lambda session, hit: _before(Connection, "recv", hit),
    "in backward": _in_backward,
    "before the optimizer's step": lambda session, hit: _before(session.trainer.optimizer, "step", hit),
    "between optimizer step and enqueue": lambda session, hit: _before(session.run.method, "after_step", hit),
    "after the enqueue": lambda session, hit: _after(session.run.method.dictionary, "update", hit),
    "between a step and its save": lambda session, hit: _before(session, "save", hit),
    "in the middle of a checkpoint": _in_the_file,
    "checkpoint not yet renamed": functools.partial(_around_the_rename, _before),
    "checkpoint just renamed": functools.partial(_around_the_rename, _after),
    "in evaluation": _in_evaluation,
    "measured, not yet written down": lambda session, hit: _before(session.monitor, "measured", hit),
    "before the table at the end": lambda session, hit: _before(session.monitor, "finish", hit),
}
AT_EVERY_STEP = list(PLACES)[:5]


def assert_same_run(run: Path, straight: Path) -> None:
    """Losses, results, weights, queue or bank, optimizer, and the random generators."""
    assert tiny.losses(run) == tiny.losses(straight)
    assert tiny.measured(run) == tiny.measured(straight)
    assert tiny.summary(run)["results"] == tiny.summary(straight)["results"]
    now, then = tiny.last_state(run), tiny.last_state(straight)
    assert now["trainer"]["method"].keys() == then["trainer"]["method"].keys()
    for name, value in then["trainer"]["method"].items():
        assert torch.equal(now["trainer"]["method"][name], value), name
    assert digest([now["trainer"], now["rng"]]) == digest([then["trainer"], then["rng"]])

"""A run that is stopped or killed and started again is, bit for bit, the run that was left alone."""

import os
import random
import signal

import pytest
import torch

from common.checkpoint import Folder, load
from common.monitor import Monitor
from common.run import Run
from common.session import Session
from common.tree import digest
from tests import tiny
from tests.processes import finish, start, wait_for_lines

STOP = 25                                           # of 60 steps, in the middle of the third of six epochs
BOTH = pytest.mark.parametrize("method", ["moco", "instdisc"])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """The folder of a run that nothing interrupted, by method."""
    folder = tmp_path_factory.mktemp("straight")
    for method in tiny.METHODS:
        Run(tiny.settings(root, folder / method, method)).train()
    return folder


def train_and_stop(text: str) -> None:
    """Train in this process, which gets SIGTERM while it is in step ``STOP``, as from Slurm."""
    taken = Monitor.step

    def step(monitor, step):
        taken(monitor, step)
        if step.number == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    Monitor.step = step
    tiny.train(text)


def assert_same_run(run, straight):
    """Losses, results, weights, queue or bank, optimizer, and the random generators."""
    assert tiny.losses(run) == tiny.losses(straight)
    assert tiny.records(run, "eval") == tiny.records(straight, "eval")
    assert tiny.summary(run)["results"] == tiny.summary(straight)["results"]
    now, then = tiny.last_state(run), tiny.last_state(straight)
    assert now["trainer"]["method"].keys() == then["trainer"]["method"].keys()
    for name, value in then["trainer"]["method"].items():
        assert torch.equal(now["trainer"]["method"][name], value), name
    assert digest([now["trainer"], now["rng"]]) == digest([then["trainer"], then["rng"]])


@BOTH
def test_stopped_by_sigterm_within_an_epoch_and_continued_with_other_workers(method, root, straight, tmp_path):
    run, said = tmp_path / "run", tmp_path / "said"
    first = tiny.settings(root, run, method, train={"workers": 2}).text()
    stopped = finish(start(train_and_stop, first, output=said), said)
    assert "Stopped after step 25 of 60; everything is saved" in stopped.out, stopped.err
    assert Folder(run / "checkpoints").files()[0][0] == STOP
    assert tiny.losses(run) == tiny.losses(straight / method)[:STOP]

    then = tiny.settings(root, run, method, train={"workers": 3}).text()
    ended = finish(start(tiny.train, then, output=said), said)
    assert ended.code == 0, ended.err
    assert_same_run(run, straight / method)


@BOTH
def test_killed_at_any_moments_and_continued(method, root, straight, tmp_path):
    run, said = tmp_path / "run", tmp_path / "said"
    text = tiny.settings(root, run, method, train={"workers": 2}, checkpoint={"minutes": 1e-4}).text()
    for moment in sorted(random.Random(method).sample(range(3, 55), 3)):
        process = start(tiny.train, text, output=said)
        wait_for_lines(run / "metrics.jsonl", moment, process)
        process.kill()
        assert finish(process, said).code == -signal.SIGKILL, said.with_suffix(".err").read_text()
    ended = finish(start(tiny.train, text, output=said), said)
    assert ended.code == 0, ended.err
    assert "goes on from step" in ended.out
    assert_same_run(run, straight / method)


FORGET = {                                          # item -> method, what puts it back to the start (or its names)
    "nothing": ("moco", lambda state, fresh: None),
    "the step": ("moco", lambda state, fresh: state["trainer"].update(step=20)),
    "the momentum": ("moco", lambda state, fresh: state["trainer"].update(optimizer=fresh["trainer"]["optimizer"])),
    "the random generators": ("moco", lambda state, fresh: state.update(rng=fresh["rng"])),
    "the queue": ("moco", "dictionary.keys"),
    "the queue's images": ("moco", "dictionary.image"),
    "the queue's pointer": ("moco", "dictionary.head"),
    "the key encoder": ("moco", "key_encoder."),
    "the step of the key shuffle": ("moco", "step"),
    "the weights": ("moco", "encoder.backbone"),
    "the bank": ("instdisc", "dictionary.v"),
    "the step of the negatives": ("instdisc", "dictionary.step"),
    "log Z": ("instdisc", "log_z"),
}


@pytest.fixture(scope="module")
def stopped(root, straight, tmp_path_factory):
    """Checkpoints of steps 0 and 25, by method."""
    folder = tmp_path_factory.mktemp("stopped")
    for method in tiny.METHODS:
        session = Session(Run(tiny.settings(root, folder / method, method)))
        session.start()
        session.save()
        for _ in session.trainer.steps(STOP):
            pass
        session.save()
    return folder


def resumed_without(forget, stopped, config):
    """A session at step 25 whose checkpoint holds that as it was at step 0."""
    fresh, state = (load(path) for _, path in reversed(Folder(stopped).files()))
    if callable(forget):
        forget(state, fresh)
    else:
        now, first = state["trainer"]["method"], fresh["trainer"]["method"]
        names = [name for name in now if forget in name]
        assert any(not torch.equal(now[name], first[name]) for name in names)
        now.update({name: first[name] for name in names})
    session = Session(Run(config))
    session.folder.save(STOP, state)
    session.start()
    return session


@pytest.mark.parametrize("item", FORGET)
def test_what_a_checkpoint_would_lack_changes_the_losses_after_it(item, root, straight, stopped, tmp_path):
    """Or else the comparisons above would prove nothing about it."""
    method, forget = FORGET[item]
    session = resumed_without(forget, stopped / method / "checkpoints", tiny.settings(root, tmp_path / "run", method))
    found = [(step.number, float(step.logs["loss"]).hex()) for step in session.trainer.steps(STOP + 8)]
    assert (found == tiny.losses(straight / method)[STOP:STOP + 8]) == (item == "nothing")


def test_running_statistics_that_a_checkpoint_would_lack_are_missed_at_the_end(root, straight, stopped, tmp_path):
    """No loss depends on them, in training mode; what is measured does."""
    config = tiny.settings(root, tmp_path / "run", "moco")
    session = resumed_without("running_", stopped / "moco" / "checkpoints", config)
    for _ in session.trainer.steps():
        pass
    last, now = tiny.last_state(straight / "moco")["trainer"]["method"], session.run.method.state_dict()
    assert all(torch.equal(now[name], last[name]) == ("running_" not in name) for name in last)

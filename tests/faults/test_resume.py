"""A run that is stopped or killed and started again is, bit for bit, the run that was left alone."""

import os
import random
import re
import shutil
import signal

import pytest

from common.checkpoint import Folder
from common.run import Run
from common.session import Session
from tests import kills, tiny
from tests.kills import assert_same_run
from tests.processes import finish, run_tool, start

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
ENDED_BY = {KILL: {-9}, TERM: {-15, 75}, INT: {-2, 130}}                # below zero: before the run, or after it
STOP = 25                                           # of 60 steps, in the middle of the third of six epochs
BOTH = pytest.mark.parametrize("method", list(tiny.METHODS))


def written(folder, config):
    """The config as the file that tools/train.py is given."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.yaml"
    file.write_text(config.text())
    return file


def assert_nothing_is_lost(run, said):
    """Every step that this session showed is in the newest checkpoint."""
    shown = re.findall(r"step +(\d+)/60", said.with_suffix(".out").read_text())
    if shown:
        assert int(shown[-1]) <= Folder(run / "checkpoints").newest()[0]


def options_for(number, draw):
    """One that will be killed saves at every step; one that is asked to stop, when it must. Workers as it comes."""
    return f"checkpoint.minutes={1e-4 if number == KILL else 15}", f"train.workers={draw.randint(0, 3)}"


def end_at_some_moment(file, number, draw, span, said):
    """Start the run, and give it the signal at a moment drawn from its life. Returns its exit status."""
    process = start(run_tool, "train", "--config", str(file), *options_for(number, draw), output=said)
    process.join(draw.uniform(0, span))
    if process.is_alive():
        os.kill(process.pid, number)
    code, _, err = finish(process, said)
    assert code == 0 or code in ENDED_BY[number] or number == INT, err      # Ctrl-C in an import: a traceback
    return code


@BOTH
def test_ended_at_any_moments_and_continued(method, root, straight, soak, tmp_path):
    draw, span = random.Random(method), 1.5 * tiny.summary(straight / method)["seconds"] + 0.5
    waiting = soak.count(1, 50) * [KILL] + soak.count(1, 10) * [TERM, INT]
    ended, runs = {KILL: 0, TERM: 0, INT: 0}, 0
    while waiting:
        run, code = tmp_path / f"run{runs}", None
        file = written(tmp_path / f"of{runs}", tiny.settings(root, run, method))
        while code != 0 and waiting:
            number = draw.choice(waiting)
            if code := end_at_some_moment(file, number, draw, span, tmp_path / "said"):
                waiting.remove(number)
                ended[number] += 1
            if number != KILL:
                assert_nothing_is_lost(run, tmp_path / "said")
        last = finish(start(run_tool, "train", "--config", str(file), output=tmp_path / "said"), tmp_path / "said")
        assert last.code == 0, last.err
        assert_same_run(run, straight / method)
        runs += 1
    soak.report("R1", method=method, **{number.name: count for number, count in ended.items()}, runs=runs, equal=runs)


def endings(soak, method):
    """Of each run, where it is ended and by what: all places by each signal; in the short form half of them once."""
    places = list(kills.PLACES)
    if soak.long:
        return [[(place, number) for place in places] for number in ENDED_BY]
    half = places[list(tiny.METHODS).index(method)::2]
    return [list(zip(half, 2 * list(ENDED_BY), strict=True))]


def end_at_place(file, place, number, draw, folder):
    """Start the run, and let it get the signal there. Returns the steps done by then, and the exit status."""
    passes = draw.randint(1, 3) if place in kills.AT_EVERY_STEP else 1
    config, *options = str(file), *options_for(number, draw)
    if "worker" in place:
        options.append("train.workers=2")
    if "checkpoint" in place or "save" in place:
        options.append("checkpoint.minutes=1e-4")
    process = start(kills.train, place, passes, int(number), str(folder / "note"), config, *options,
                    output=folder / "said")
    code, _, err = finish(process, folder / "said")
    at = int((folder / "note").read_text())
    (folder / "note").unlink()
    assert code == max(ENDED_BY[number]) or (code, at) == (0, 60), f"{place}: {code} {err}"
    return at


@BOTH
def test_ended_at_each_place_and_continued(method, root, straight, soak, tmp_path):
    """A signal costs no step that was done, and is heard before the next but one."""
    draw, count = random.Random(method), 0
    cases = endings(soak, method)
    for i, places in enumerate(cases):
        run = tmp_path / f"run{i}"
        file = written(tmp_path, tiny.settings(root, run, method))
        for place, number in places:
            at = end_at_place(file, place, number, draw, tmp_path)
            if number != KILL:
                found = Folder(run / "checkpoints").newest()
                assert at <= (found[0] if found else 0) <= at + 1, place
            count += 1
        last = finish(start(run_tool, "train", "--config", str(file), output=tmp_path / "said"), tmp_path / "said")
        assert last.code == 0, last.err
        assert_same_run(run, straight / method)
    soak.report("R1", method=method, at_places=count, runs=len(cases), equal=len(cases))


@pytest.fixture(scope="module")
def stopped(root, tmp_path_factory):
    """The folder of a run that was asked to stop in its 25th step, by method."""
    folder = tmp_path_factory.mktemp("stopped")
    for method in tiny.METHODS:
        tiny.train_and_stop(tiny.settings(root, folder / method, method).text(), STOP)
        assert Folder(folder / method / "checkpoints").files()[0][0] == STOP
    return folder


def losses_from(run, steps):
    """Of the next ``steps`` steps of a session that goes on in the folder of ``run``."""
    session = Session(Run(run))
    session.start()
    begin = session.trainer.step
    return [(step.number, float(step.logs["loss"]).hex()) for step in session.trainer.steps(begin + steps)]


@BOTH
@pytest.mark.parametrize("ahead", [2, 7])
def test_losses_do_not_depend_on_the_number_of_workers_nor_on_how_far_ahead_they_work(
        method, ahead, root, stopped, straight, monkeypatch, tmp_path):
    monkeypatch.setattr("common.data.workers.AHEAD", ahead)
    for workers in range(4):
        run = tmp_path / f"run{workers}"
        shutil.copytree(stopped / method, run)
        found = losses_from(tiny.settings(root, run, method, train={"workers": workers}), 12)
        assert found == tiny.losses(straight / method)[STOP:STOP + 12], workers


@BOTH
def test_two_continuations_of_one_checkpoint_are_the_same_run(method, root, straight, stopped, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(stopped / method, tmp_path / name)
        tiny.train(tiny.settings(root, tmp_path / name, method).text())
        assert_same_run(tmp_path / name, straight / method)


@BOTH
def test_run_again_in_another_process_is_the_same_run_by_deterministic_operations_only(
        method, root, straight, tmp_path):
    text = tiny.settings(root, tmp_path / "run", method, train={"workers": 1}).text()
    ended = finish(start(train_deterministically, text, output=tmp_path / "said"), tmp_path / "said")
    assert ended.code == 0, ended.err
    assert_same_run(tmp_path / "run", straight / method)


def train_deterministically(text: str) -> None:
    import torch

    torch.use_deterministic_algorithms(True)        # raises where an operation has no deterministic form
    tiny.train(text)

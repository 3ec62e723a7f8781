"""Whole runs, six steps an epoch, whose triplets are mined every four: stopped, ended, gone back, on two processes."""

import re

import pytest
import torch

from common import distributed
from common.checkpoint import Folder, load, save
from common.data.folders import folder
from common.run import Run
from common.train import Trainer
from metric_learning import OfflineTriplet
from tests import tiny
from tests.kills import assert_same_run
from tests.processes import ranks, tool

EVERY, STEPS, BATCH = 4, 18, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos"), classes=4)


def config(root, run, every=EVERY, **train):
    return tiny.settings(root, run, "offline", train={"epochs": 3, "batch_size": BATCH, **train},
                         method={"every": every}, evaluate={"every": 0, "baselines": False})


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """The folder of the run that nothing interrupted."""
    return Run(config(root, tmp_path_factory.mktemp("straight") / "run")).train().dir


def seen(monkeypatch):
    """(step, image indices) of each step that is trained on from here on."""
    found, forward, optimize = [], OfflineTriplet.forward, Trainer._optimize

    def noted(trainer, batches):
        found.append((trainer.step, torch.cat([batch.index for batch in batches]).tolist()))
        return optimize(trainer, batches)

    monkeypatch.setattr(Trainer, "_optimize", noted)
    return found, forward


def save_at_every_step(patch):
    patch.setattr("common.session.Session._next_save", lambda session: 0.0)
    patch.setattr("common.saving.Saver.busy", property(lambda saver: bool(saver.wait())))


def test_each_step_sees_triplets_of_the_table_that_was_mined_for_it(root, monkeypatch, tmp_path):
    (found, _), tables, mine, labels = seen(monkeypatch), {}, OfflineTriplet.mine, folder(root).train.labels.tolist()

    def noted(method, embed, images, step):
        assert method.encoder.training, "as the trainer left it; embed sees to the rest"
        said = mine(method, embed, images, step)
        tables[step] = {tuple(row) for row in method.table.read()[0].tolist()}
        return said

    monkeypatch.setattr(OfflineTriplet, "mine", noted)
    Run(config(root, tmp_path / "run")).train()
    assert list(tables) == [0, 4, 8, 12, 16] and [step for step, _ in found] == list(range(STEPS))
    assert len({frozenset(rows) for rows in tables.values()}) == 5
    for step, index in found:
        rows = {tuple(index[at:at + 3]) for at in range(0, BATCH, 3)}
        assert rows <= tables[step // EVERY * EVERY]
        assert all(labels[a] == labels[p] != labels[n] for a, p, n in rows)


def test_the_records_say_when_and_how_long_and_how_hard(straight):
    events = [event for event in tiny.records(straight, "event") if event["event"] == "mined"]
    assert [event["step"] for event in events] == [1, 5, 9, 13, 17]         # with the first step that goes by it
    assert all(event["seconds"] > 0 and event["triplets"] == 32 and 0 <= event["hard"] <= event["active"] <= 1
               for event in events)
    assert tiny.summary(straight)["measuring_seconds"] >= round(sum(event["seconds"] for event in events), 1) - 0.1
    assert all({"loss", "active", "d_pos", "d_neg", "top1"} <= record.keys() for record in tiny.records(straight))


@pytest.mark.parametrize("stop", [3, 4, 5, 16])         # before a mining, at the very step, after it, at the last one
def test_a_run_that_was_stopped_is_the_run_that_was_not(stop, root, straight, tmp_path):
    text = config(root, tmp_path / "run").text()
    tiny.train_and_stop(text, stop)
    assert tiny.last_state(tmp_path / "run")["trainer"]["step"] == stop
    tiny.train(text)
    assert_same_run(tmp_path / "run", straight)
    assert [event["step"] for event in tiny.records(tmp_path / "run", "event")] == [1, 5, 9, 13, 17]


def test_other_triplets_in_a_checkpoint_would_make_another_run(root, straight, tmp_path):
    """So the comparisons above say something of the table."""
    text = config(root, tmp_path / "run").text()
    tiny.train_and_stop(text, 5)
    (_, path), *_ = Folder(tmp_path / "run" / "checkpoints").files()
    state = load(path)
    table = state["trainer"]["method"]["table.triplet"]
    table.copy_(table.roll(1, dims=0).flip(1))
    save(path, state)
    tiny.train(text)
    assert tiny.losses(tmp_path / "run")[:5] == tiny.losses(straight)[:5]
    assert tiny.losses(tmp_path / "run")[5] != tiny.losses(straight)[5]


def test_a_dry_run_mines_too(root, tmp_path):
    (tmp_path / "tiny.yaml").write_text(config(root, tmp_path / "run").text())
    ended = tool("train", "--config", "tiny.yaml", "--dry-run", cwd=tmp_path)
    assert ended.code == 0 and "train     6 steps, loss " in ended.out, ended.err


def test_a_run_that_ended_while_it_mined_is_the_run_that_did_not(root, straight, monkeypatch, tmp_path):
    text, mine = config(root, tmp_path / "run").text(), OfflineTriplet.mine

    def ended(method, embed, images, step):
        said = mine(method, embed, images, step)
        if step == 8:
            raise MemoryError
        return said

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(OfflineTriplet, "mine", ended)
        save_at_every_step(patch)
        tiny.train(text)
    assert tiny.last_state(tmp_path / "run")["trainer"]["step"] == 8
    tiny.train(text)
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("trail", [0, 1, 2])
def test_a_run_that_goes_back_sees_the_triplets_of_its_checkpoint_again(trail, root, monkeypatch, tmp_path):
    """Not finite from step 5 + ``trail`` on: back across a mining, to the very step of one, and within its stretch."""
    (found, forward), calls = seen(monkeypatch), []

    def spoiled(method, batch):
        calls.append(1)
        output = forward(method, batch)
        bad = 5 + trail <= len(calls) < 7 + trail
        return output._replace(loss=output.loss * float("nan")) if bad else output

    monkeypatch.setattr(OfflineTriplet, "forward", spoiled)
    save_at_every_step(monkeypatch)
    run = Run(config(root, tmp_path / "run", max_skipped=2)).train()
    steps, begin = [step for step, _ in found], 3 + trail
    back = next(at for at in range(1, len(steps)) if steps[at] <= steps[at - 1])
    first, again = dict(found[:back]), dict(found[back:])
    assert list(again) == list(range(begin, STEPS)) and run.method.mine_every == EVERY
    until = min(begin // EVERY * EVERY + EVERY, max(first) + 1)             # from there on by other weights
    assert [step for step in range(begin, until) if again[step] != first[step]] == []


def train_each(*texts: str) -> None:
    """Each in turn; one that is to be stopped says where: STEP, a colon, its text."""
    for text in texts:
        if at := re.match(r"(\d+):", text):
            tiny.train_and_stop(text[at.end():], int(at[1]))
        else:
            tiny.train(text)
    distributed.stop()


@pytest.fixture(scope="module")
def two(root, tmp_path_factory):
    """The folder of the runs of two processes: straight, and stopped at the very step of a mining and after it."""
    top = tmp_path_factory.mktemp("two")
    straight, at, after = (config(root, top / name).text() for name in ("straight", "at", "after"))
    ended = ranks(train_each, straight, f"8:{at}", at, f"9:{after}", after, output=top / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    return top


@pytest.mark.parametrize("name", ["at", "after"])
def test_two_processes_that_were_stopped_are_those_that_were_not(name, two):
    assert_same_run(two / name, two / "straight")


def test_two_processes_mine_and_train_as_one(two, straight):
    found, expected = (tiny.records(run) for run in (two / "straight", straight))
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], abs=1e-5)
    found, expected = (tiny.last_state(run)["trainer"]["method"] for run in (two / "straight", straight))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4 if value.is_floating_point() else 0)


@pytest.mark.parametrize("override, said", [
    ("train.batch_size=64", "method: 64 images of a process' micro-batch are no triplets. Give a train.batch_size of"),
    ("method.pool=2", "command line: method.pool: 2 given. Give 3 images at least"),
])
def test_what_cannot_be_mined_is_said_before_training(override, said, tmp_path):
    ended = tool("train", "--config", "offline_triplet.yaml", *DIGITS, override, cwd=tmp_path)
    assert ended.code == 2 and said in ended.err, ended.err


DIGITS = ("data={name: common.data.digits}", "views={name: common.data.recipes.digits, num_views: 1, crop_min: 0.8}",
          "method.encoder={name: common.backbones.encoder, arch: w8s2, head: linear, dim: 32}", "method.every=20",
          "evaluate.baselines=true", "train.epochs=4", "train.batch_size=60", "train.threads=1", "train.device=cpu")


def test_the_command_learns_digits(tmp_path):
    ended = tool("train", "--config", "offline_triplet.yaml", *DIGITS, cwd=tmp_path)
    assert ended.code == 0, ended.err
    results = tiny.summary(tmp_path / "runs" / "offline_triplet")["results"]
    value = {name: rows[0]["value"] for name, rows in results.items()}
    assert value["trained"] > value["untrained"] + 10, value

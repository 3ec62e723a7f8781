"""A whole run on two gloo processes is the run on one; it stops and goes on like one."""

import json
import math
import os
import signal
import sys
import time
from contextlib import closing
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from common import distributed
from common.checkpoint import Folder
from common.config import Config
from common.run import Run
from common.session import Session
from common.tree import digest
from tests import tiny
from tests.processes import ROOT, finish, ranks, run_tool, start, wait_for_lines

PLAIN = {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}     # no dropout: each rank draws its own
CASES = {
    "moco": {"of": "moco", "method": {"encoder": PLAIN}},
    "instdisc": {"of": "instdisc", "method": {"dictionary": {**tiny.BANK, "init": "encoder"}}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos"))


def config(root, run, case, **train):
    return tiny.settings(root, run, **CASES[case], train={"epochs": 2, "workers": 1, **train}, evaluate={"every": 1})


def train_each(*texts: str) -> None:
    for text in texts:
        tiny.train(text)
    distributed.stop()


@pytest.fixture(scope="module")
def two(root, tmp_path_factory):
    """The folder of the runs of two processes, by case."""
    folder = tmp_path_factory.mktemp("two")
    ended = ranks(train_each, *(config(root, folder / case, case).text() for case in CASES), output=folder / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    assert "2 processes" in ended[0].out and ended[1].out == "", "only the main process speaks"
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_curve_the_memory_and_the_results_of_one(case, root, two, tmp_path):
    one = Run(config(root, tmp_path / "one", case)).train()
    for kind, key, within in (("train", "loss", 1e-5), ("eval", "value", 2.5)):     # 2.5: one image of 40
        found, expected = (tiny.records(run, kind) for run in (two / case, one.dir))
        assert [record["step"] for record in found] == [record["step"] for record in expected]
        assert [record[key] for record in found] == pytest.approx([record[key] for record in expected], abs=within)
    found, expected = (tiny.last_state(run)["trainer"]["method"] for run in (two / case, one.dir))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4 if value.is_floating_point() else 0)
    assert tiny.summary(two / case)["processes"] == 2 and len(tiny.last_state(two / case)["rng"]) == 2


def torchrun(*arguments: str) -> None:
    from torch.distributed.run import main

    main(["--standalone", "--nproc-per-node", "2", str(ROOT / "tools" / "train.py"), *arguments])


def test_torchrun_that_is_asked_to_stop_saves_and_a_second_start_goes_on(root, two, tmp_path):
    run, file = tmp_path / "run", tmp_path / "tiny.yaml"
    file.write_text(config(root, run, "moco").text())
    process = start(torchrun, "--config", str(file), output=tmp_path / "said", env={"PYTHONPATH": str(ROOT)})
    wait_for_lines(run / "metrics.jsonl", 4, process)
    os.kill(process.pid, signal.SIGTERM)
    stopped = finish(process, tmp_path / "said")
    step, _ = Folder(run / "checkpoints").files()[0]
    assert 4 <= step < 20 and f"Stopped after step {step} of 20" in stopped.out, stopped.err
    assert tiny.losses(run)[-1][0] == step, "no step is lost"

    again = ranks(run_tool, "train", "--config", str(file), output=tmp_path / "again")
    assert [rank.code for rank in again] == [0, 0] and f"goes on from step {step}" in again[0].out, again[0].err
    assert tiny.losses(run) == tiny.losses(two / "moco")
    assert digest(tiny.last_state(run)["trainer"]) == digest(tiny.last_state(two / "moco")["trainer"])


def train_with_an_infinite_loss_on_rank_1(text: str) -> None:
    run, calls = Run(Config.parse(text, "tiny.yaml")), []
    forward = run.method.forward

    def spoiled(batch):
        calls.append(batch)
        output = forward(batch)
        bad = len(calls) == 4 and distributed.rank() == 1
        return output._replace(loss=output.loss + math.inf) if bad else output       # its gradient is finite

    run.method.forward = spoiled
    run.train()
    print("weights", digest(run.method.state_dict()))
    distributed.stop()


def test_an_infinite_loss_on_one_rank_skips_the_step_on_both(root, tmp_path):
    text = config(root, tmp_path / "run", "moco", epochs=1).text()
    ended = ranks(train_with_an_infinite_loss_on_rank_1, text, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    weights = [rank.out.partition("weights ")[2] for rank in ended]
    assert weights[0] == weights[1] != ""
    assert [(event["step"], event["event"]) for event in tiny.records(tmp_path / "run", "event")] == [(4, "skipped")]
    state = tiny.last_state(tmp_path / "run")["trainer"]["method"]
    assert int(state["step"]) == 9 and int(state["dictionary.filled"]) == 36


def step_with_other_keys_on_rank_1(text: str) -> None:
    session = Session(Run(Config.parse(text, "tiny.yaml")))
    session.start()
    queue = session.run.method.dictionary
    queue.keys.copy_(queue.keys.roll(distributed.rank(), 0))
    with closing(session.trainer.steps(1)) as steps:
        print("keys of", next(steps).number, digest(queue.keys[4:]))
    distributed.stop()


def test_no_step_sends_the_queue_of_one_process_over_that_of_another(root, tmp_path):
    """It would cost 32 MiB a step at K = 65536, and hide processes that have drifted apart."""
    text = config(root, tmp_path / "run", "moco").text()
    ended = ranks(step_with_other_keys_on_rank_1, text, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    keys = [rank.out.partition("keys of 1 ")[2] for rank in ended]
    assert "" not in keys and keys[0] != keys[1]


def train_as_the_first_of_its_machine(text: str) -> None:
    """Two machines with one process each and a shared disk: both are LOCAL_RANK 0."""
    os.environ["LOCAL_RANK"] = "0"
    checkpoints = Config.parse(text, "tiny.yaml").get("run.dir") + "/checkpoints/"
    sys.addaudithook(lambda event, details: event == "open" and str(details[0]).startswith(checkpoints)
                     and print("opened", details[0]))
    train_each(text)


def test_one_process_saves_and_speaks_for_two_machines(root, tmp_path):
    text = config(root, tmp_path / "run", "moco", epochs=1).text()
    ended = ranks(train_as_the_first_of_its_machine, text, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    assert "opened" in ended[0].out and ended[1].out == ""


def train_apart(*texts: str) -> None:
    """Each process in a folder of its own, as where run.dir is no shared disk."""
    try:
        tiny.train(texts[int(os.environ["RANK"])])
    finally:
        distributed.stop()


def test_processes_that_see_different_checkpoints_are_refused(root, two, tmp_path):
    texts = [config(root, run, "moco").text() for run in (two / "moco", tmp_path / "empty")]
    for rank in ranks(train_apart, *texts, output=tmp_path / "said"):
        assert rank.code and "see different newest checkpoints in it (step 20, none)" in rank.err
    assert not (tmp_path / "empty").exists()


def speak_late() -> None:
    """The main process takes longer over something than a collective may take."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=1))
    time.sleep(3 * distributed.is_main())
    print(distributed.from_main(os.environ["RANK"]), distributed.highest(3 - distributed.rank(), distributed.rank()))
    distributed.stop()


def test_the_others_wait_for_the_main_process_longer_than_for_a_collective(tmp_path):
    for rank in ranks(speak_late, output=tmp_path / "said"):
        assert (rank.code, rank.out) == (0, "0 [3, 1]\n"), rank.err


def test_images_that_only_the_other_rank_could_not_read_are_written_down(tmp_path):
    root = tiny.photos(tmp_path / "photos", count=16)
    for i in range(4):
        (root / "class0" / f"{2 * i:03}.png").write_bytes(b"no image")
    text = config(root, tmp_path / "run", "instdisc", epochs=1, max_unreadable=0.5).text()
    ended = ranks(train_each, text, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    lines = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["path"][-7:] for line in lines) == ["000.png", "002.png", "004.png", "006.png"]
    assert tiny.summary(tmp_path / "run")["unreadable"] == 4


def test_dry_run_on_two_processes_speaks_once(root, tmp_path):
    (tmp_path / "tiny.yaml").write_text(config(root, tmp_path / "run", "moco").text())
    ended = ranks(run_tool, "train", "--config", str(tmp_path / "tiny.yaml"), "--dry-run", output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    assert "A full run: 2 epochs" in ended[0].out and ended[1].out == "" and not (tmp_path / "run").exists()

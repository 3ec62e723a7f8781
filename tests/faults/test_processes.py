"""A rank that dies, hangs, fails or drifts: the others end soon, and one message names it."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common import checkpoint, distributed, watch
from common.agreement import Drifted
from common.config import Config
from common.monitor import Monitor
from common.run import Run
from common.session import Session
from tests import tiny
from tests.processes import Finished, ranks, run_tool

TIMEOUT = 6                             # seconds, train.timeout
STOP = 4                                # the step at which it happens
PLAIN = {"encoder": {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos"), count=24)


def config(root, run, of="moco", **train) -> Config:
    method = {} if of == "instdisc" else {"method": PLAIN}
    return tiny.settings(root, run, of, **method, train={"epochs": 4, "timeout": TIMEOUT, **train},
                         evaluate={"every": 0, "protocols": []})


def at_step(rank: int, action: Callable[[], None]) -> None:
    """Let this rank do that in the forward pass after ``STOP`` steps."""
    if os.environ["RANK"] != str(rank):
        return
    built = Run.build_method

    def build(run):
        method, calls = built(run), []
        forward = method.forward

        def meet(batch):
            calls.append(batch)
            if len(calls) == STOP + 1:
                print(f"\nat {time.time()}", flush=True)
                action()
            return forward(batch)

        method.forward = meet
        return method

    Run.build_method = build


def fail() -> None:
    raise KeyError(f"only on rank {os.environ['RANK']}")


def mistake() -> None:
    raise OSError("/data: the disk of this machine is gone")


def hang() -> None:
    time.sleep(600)


def stop() -> None:
    """As SIGSTOP, Ctrl-Z or a machine that swaps; it goes on when all is over."""
    time.sleep(2.5)                     # until the other has heard that it is here
    if os.fork() == 0:
        time.sleep(3 * TIMEOUT)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(file: str, rank: int, action: Callable[[], None]) -> None:
    at_step(rank, action)
    run_tool("train", "--config", file)


def trouble(root, folder: Path, rank: int, action: Callable[[], None]) -> tuple[list[Finished], dict, float]:
    """What the two ranks said when ``rank`` met with ``action``; crash.json; and when all had ended, in seconds."""
    (folder / "tiny.yaml").write_text(config(root, folder / "run").text())
    ended = ranks(train, str(folder / "tiny.yaml"), rank, action, output=folder / "said")
    seconds = time.time() - float(ended[rank].out.rpartition("\nat ")[2].split()[0])
    path = folder / "run" / "crash.json"
    return ended, json.loads(path.read_text()) if path.exists() else {}, seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_named_by_the_other(rank, root, soak, tmp_path):
    ended, report, seconds = trouble(root, tmp_path, rank, die)
    soak.report("death", rank=rank, seconds=round(seconds, 1))
    survivor = ended[1 - rank]
    assert ended[rank].code == -signal.SIGKILL and survivor.code == 1
    assert f"error: rank {rank} (" in survivor.err and "is gone. All processes end." in survivor.err
    assert "Traceback" not in survivor.err and report["kind"] == "lost" and f"rank {rank}" in report["message"]


def test_a_rank_that_is_stopped_is_named_and_ends_when_it_goes_on(root, tmp_path):
    ended, report, _ = trouble(root, tmp_path, 1, stop)
    assert [rank.code for rank in ended] == [1, 1]
    assert "error: rank 1 (" in ended[0].err and f"gave no sign of life for {TIMEOUT} s" in ended[0].err
    assert f"after step {STOP}, in forward" in ended[0].err
    assert report["kind"] == "hang" and report["message"].startswith("rank 1 (") and "rank 0" in report["stacks"]


def pause_both(file: str, seconds: float) -> None:
    """As ``scontrol suspend`` does, for longer than the timeout."""
    if os.fork() == 0:
        rank = os.getppid()
        while not Path(file).with_name("run").joinpath("metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(rank, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(rank, signal.SIGCONT)
        os._exit(0)
    run_tool("train", "--config", file)


def test_a_job_that_is_suspended_as_a_whole_goes_on(root, tmp_path):
    (tmp_path / "tiny.yaml").write_text(config(root, tmp_path / "run", epochs=40).text())
    ended = ranks(pause_both, str(tmp_path / "tiny.yaml"), TIMEOUT + 3, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err


def test_a_rank_that_hangs_in_a_step_is_named_with_its_stack(root, soak, tmp_path):
    ended, report, seconds = trouble(root, tmp_path, 1, hang)
    soak.report("hang", timeout=TIMEOUT, seconds=round(seconds, 1))
    said = ended[0].err + ended[1].err
    assert [rank.code for rank in ended] == [1, 1] and said.count("error: ") == 1
    assert "error: rank 1 (" in said and f"after step {STOP}, in forward) did not get on for {TIMEOUT} s" in said
    assert "time.sleep(600)" in report["stacks"]["rank 1"] and "rank 0" in report["stacks"]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_ends_all_and_it_alone_speaks(rank, root, soak, tmp_path):
    ended, report, seconds = trouble(root, tmp_path, rank, fail)
    soak.report("E4", rank=rank, seconds=round(seconds, 1))
    assert [ended.code for ended in ended] == [1, 1] and "error" not in ended[1 - rank].err
    assert f"error: KeyError: 'only on rank {rank}'" in ended[rank].err
    assert "in fail" in report["stacks"][f"rank {rank}"] and "train.py" in report["stacks"][f"rank {1 - rank}"]


def test_what_one_rank_alone_could_not_read_is_said_once_and_is_no_crash(root, tmp_path):
    ended, report, _ = trouble(root, tmp_path, 1, mistake)
    assert [rank.code for rank in ended] == [1, 1] and not report and "error" not in ended[0].err
    assert "rank 1: error: /data: the disk of this machine is gone" in ended[1].err


def train_writing_slowly(file: str, action: Callable[[], None]) -> None:
    """Rank 1 meets with ``action`` while rank 0 writes a checkpoint, for longer than ``TIMEOUT``."""
    begun, save = Path(file).with_name("begun"), checkpoint.save

    def slow(path, state):
        if state["trainer"]["step"] == STOP - 1:
            begun.touch()
            time.sleep(TIMEOUT + 3)
        return save(path, state)

    def meet():
        while not begun.exists():
            time.sleep(0.05)
        action()

    checkpoint.save = slow
    train(file, 1, meet)


@pytest.mark.parametrize("action", [fail, hang])
def test_what_is_being_written_when_another_rank_fails_is_on_the_disk_at_the_end(action, root, tmp_path):
    text = config(root, tmp_path / "run").text() + "checkpoint: {minutes: 1.0e-6}\n"
    (tmp_path / "tiny.yaml").write_text(text)
    ended = ranks(train_writing_slowly, str(tmp_path / "tiny.yaml"), action, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [1, 1]
    assert (ended[0].err + ended[1].err).count("error: ") == 1
    assert tiny.last_state(tmp_path / "run")["trainer"]["step"] == STOP - 1


def own_script(text: str, broken: bool) -> None:
    """A program of the user's own, which does more after the training, or after it has failed, on rank 0 only."""
    def fail(monitor, step):
        raise ZeroDivisionError("in what the user gave")

    if broken:
        Monitor.step = fail
    with contextlib.suppress(ZeroDivisionError):
        tiny.train(text)
    if distributed.is_main():
        time.sleep(2 * TIMEOUT + 6)
        print("done")


@pytest.mark.parametrize("broken", [False, True])
def test_nobody_watches_what_a_program_does_after_the_training(broken, root, tmp_path):
    text = config(root, tmp_path / "run", epochs=1).text()
    ended = ranks(own_script, text, broken, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    assert ended[0].out.endswith("done\n") and "error: " not in ended[0].err + ended[1].err


def goes_on_alone(file: str) -> None:
    """Rank 1 catches its exception, and lives on."""
    at_step(1, fail)
    watch.WRITING = 0
    with contextlib.suppress(KeyError):
        tiny.train(Path(file).read_text())
    time.sleep(4 * TIMEOUT)


def test_a_rank_that_left_the_training_alone_is_named(root, tmp_path):
    (tmp_path / "tiny.yaml").write_text(config(root, tmp_path / "run").text())
    ended = ranks(goes_on_alone, str(tmp_path / "tiny.yaml"), output=tmp_path / "said")
    assert ended[0].code == 1 and "error: rank 1 (" in ended[0].err
    assert f"after step {STOP}, in exit) left the training by an exception; the others wait" in ended[0].err


FLIPPED = {                             # what rank 1 has one bit of changed -> the method
    "dictionary.keys": "moco", "encoder.head": "moco", "key_encoder": "moco", "momentum_buffer": "moco",
    "dictionary.v": "instdisc", "log_z": "instdisc",
}


def flip(session: Session, name: str) -> None:
    """One bit of the last element of the first tensor of that name: high in the mantissa, lest it be rounded off."""
    momenta = [state["momentum_buffer"] for state in session.trainer.optimizer.state.values()]
    tensors = {**session.run.method.state_dict(), "momentum_buffer": momenta[0]}
    tensor = next(tensor for key, tensor in tensors.items() if name in key)
    with torch.no_grad():
        tensor.as_strided((tensor.numel(),), (1,))[-1:].view(torch.uint8)[2] ^= 64


def drift(root: str, folder: str, rounds: int) -> None:
    """Train with one bit of each thing changed on rank 1 after some step, and say after which it was found."""
    taken = Monitor.step
    for number in range(rounds):
        for name, of in FLIPPED.items():
            at, run = 3 + number, Path(folder) / f"{name}{number}"
            session = Session(Run(config(Path(root), run, of, compare_ranks=4)))

            def step(monitor, step, session=session, name=name, at=at):
                taken(monitor, step)
                if step.number == at and distributed.rank() == 1:
                    flip(session, name)

            Monitor.step = step
            with contextlib.suppress(Drifted):
                session.train()
                print(name, at, "never found")
            files = [step for step, _ in session.folder.files() if step]           # that of the start is good
            print(name, at, "found", session.trainer.step, "saved", len(files))
    Monitor.step = taken
    distributed.stop()


def test_one_bit_that_differs_is_found_and_never_saved(root, soak, tmp_path):
    rounds = soak.count(1, 6)
    ended = ranks(drift, str(root), str(tmp_path), rounds, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    found = [line.split() for line in ended[1].out.splitlines() if " found " in line]
    assert len(found) == rounds * len(FLIPPED) and "never" not in ended[1].out
    for name, at, _, step, _, files in found:
        assert 0 <= int(step) - int(at) < 4 and files == "0", name
    soak.report("drift", flipped=len(found), found=len(found), within_steps=4)


def healthy(root: str, folder: str, epochs: int) -> None:
    for of in ("moco", "instdisc"):
        run = config(Path(root), Path(folder) / of, of, compare_ranks=1, epochs=epochs)
        Session(Run(run)).train()
    distributed.stop()


def test_healthy_ranks_never_differ(root, soak, tmp_path):
    epochs = soak.count(3, 40)
    ended = ranks(healthy, str(root), str(tmp_path), epochs, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    soak.report("drift", healthy_steps=2 * 6 * epochs, alarms=0)


def test_a_rank_with_one_image_more_is_refused_at_the_start_on_both(root, tmp_path):
    more = tiny.photos(tmp_path / "more", count=25)
    for name, photos in (("0", root), ("1", more)):
        (tmp_path / f"{name}.yaml").write_text(config(photos, tmp_path / "run").text())
    ended = ranks(train_own, str(tmp_path), output=tmp_path / "said")
    assert [rank.code for rank in ended] == [2, 2]
    said = ended[0].err + ended[1].err
    assert said.count("error: ") == 1 and "data: rank 1 sees other training images than rank 0 (25 against 24)" in said


def train_own(folder: str) -> None:
    run_tool("train", "--config", f"{folder}/{os.environ['RANK']}.yaml")

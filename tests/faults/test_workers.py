"""Workers that die, hang or are slow: replaced, named, waited for; and the batches are the same."""

import faulthandler
import itertools
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from common.data import workers
from common.data.datasets import Images
from common.data.loader import Loader
from common.data.recipes import moco_v2
from common.data.workers import Care
from tests import tiny
from tests.processes import finish, start, wait_for_lines

VIEWS = moco_v2(8)
N = 24


class Fragile(Images):
    """Small images out of nothing; ``harm`` is what reading one of them does besides."""

    def __init__(self, harm=lambda i: None):
        super().__init__("fragile", [f"{i}.png" for i in range(N)], torch.full((N,), -1), [], None)
        self.channels, self.size, self.harm = 3, 12, harm

    def path(self, i):
        return f"/photos/{i}\x1b.png"

    def read(self, i):
        self.harm(i)
        return torch.arange(3 * 12 * 14).add(i).mul(37).remainder(256).byte().view(3, 12, 14)


def loader(images, lost=None, waiting=lambda seconds, what: None, timeout=300.0, num_workers=2):
    """Batches of four; ``lost`` collects what is said of lost workers."""
    said = [].append if lost is None else lost.append
    return Loader(images, VIEWS, batch_size=4, seed=1, workers=num_workers, care=Care(timeout, said, waiting))


def bits(step):
    """A step to its last bit: images and views."""
    number, (batch,), _ = step
    return number, batch.index.tolist(), [view.numpy().tobytes() for view in batch.views]


def expected(steps):
    return [bits(step) for step in loader(Fragile(), num_workers=0).stream(0, steps)]


def once(tmp_path, harm):
    """``harm``, the first time that anybody calls it."""
    def harmed(i):
        try:
            os.close(os.open(tmp_path / "harmed", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        harm(i)
    return harmed


def kill(i):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_killed_at_random_workers_are_replaced_and_the_batches_are_the_same(num_workers, soak):
    kills, lost = soak.count(3, 20), []
    steps = 60 * kills
    draw = random.Random(num_workers)
    when = {60 * i + draw.randrange(5, 55) for i in range(kills)}           # no more often than is forgiven
    found = []
    with closing(loader(Fragile(), lost, num_workers=num_workers).stream(0, steps)) as stream:
        for step in stream:
            found.append(bits(step))
            if step[0] in when:
                time.sleep(draw.random() / 500)                             # in the middle of what it does
                os.kill(draw.choice(multiprocessing.active_children()).pid, signal.SIGKILL)
    assert found == expected(steps)
    assert len(lost) == kills
    assert not multiprocessing.active_children()
    soak.report("E1", workers=num_workers, kills=kills, equal_batches=len(found))


def test_a_lost_worker_is_named_with_the_image_that_it_was_reading(tmp_path):
    lost = []
    images = Fragile(once(tmp_path, kill))
    first = loader(images).order(0)[0].item()
    found = [bits(step) for step in loader(images, lost, num_workers=1).stream(0, 8)]
    assert found == expected(8)
    (said,) = lost
    assert said.startswith("data worker 0 of 1 (process ") and "was killed by SIGKILL, reading /photos/" in said
    assert said.endswith(f"{first}\\x1b.png; another takes its place")


def test_a_stopped_worker_is_killed_named_and_replaced(tmp_path):
    lost = []
    images = Fragile(once(tmp_path, lambda i: os.kill(os.getpid(), signal.SIGSTOP)))
    found = [bits(step) for step in loader(images, lost, timeout=1.5).stream(0, 8)]
    assert found == expected(8)
    assert len(lost) == 1 and "did nothing for 2 s and was killed, reading /photos/" in lost[0]


def test_an_image_that_kills_every_worker_ends_the_run_with_its_name():
    def die(i):
        if i == 7:
            faulthandler.disable()                          # pytest's, which would print every thread's stack
            os.kill(os.getpid(), signal.SIGSEGV)

    images = Fragile(die)
    said = r"was killed by SIGSEGV, reading /photos/7\\x1b.png. It is the second over the same images.*an empty file"
    with pytest.raises(ChildProcessError, match=said):
        list(loader(images).stream(0, 12))
    assert not multiprocessing.active_children()


def test_an_image_that_hangs_every_worker_ends_the_run_with_its_name():
    images = Fragile(lambda i: i == 7 and time.sleep(1000))
    said = r"did nothing for . s and was killed, reading /photos/7\\x1b.png.*raise train.worker_timeout \(1 s\)"
    with pytest.raises(ChildProcessError, match=said):
        list(loader(images, timeout=1.0).stream(0, 12))


def test_workers_that_die_again_and_again_end_the_run():
    lost = []
    with closing(loader(Fragile(), lost).stream(0, 1000)) as stream, \
            pytest.raises(ChildProcessError, match="number 4 within 100 batches. .*out of memory: use fewer workers"):
        for number in range(60):
            next(stream)
            if number % 10 == 9:
                multiprocessing.active_children()[0].kill()
    assert len(lost) == workers.LOSSES


def test_a_worker_that_ends_by_itself_is_replaced_too(tmp_path):
    lost = []
    found = [bits(step) for step in loader(Fragile(once(tmp_path, lambda i: os._exit(5))), lost).stream(0, 8)]
    assert found == expected(8)
    assert "ended with exit code 5, reading" in lost[0]


def test_replacements_start_while_other_threads_hold_locks(tmp_path):
    """As when a checkpoint is written in the background: whatever they held, nobody gives it back in the child."""
    done = threading.Event()

    def busy():
        log = logging.getLogger("busy")
        log.addHandler(logging.FileHandler(tmp_path / "log"))
        with open(tmp_path / "text", "w") as file:
            while not done.is_set():
                log.warning("x" * 1000)
                print("x" * 1000, file=file)
                torch.ones(1000).exp().sum()

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        lost, found = [], []
        for step in loader(Fragile(), lost, timeout=60).stream(0, 120):
            found.append(bits(step))
            if step[0] % 40 == 10:
                multiprocessing.active_children()[0].kill()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert found == expected(120) and len(lost) == 3


def test_a_slow_disk_is_waited_for_and_said_to_be_slow_not_hung(monkeypatch):
    """A batch takes longer than the timeout, but no image does."""
    monkeypatch.setattr(workers, "_TICK", 0.05)
    monkeypatch.setattr(workers, "_PATIENCE", 0.2)
    lost, waits = [], []
    slow = loader(Fragile(lambda i: time.sleep(0.4)), lost, timeout=1.2, num_workers=1,
                  waiting=lambda seconds, what: waits.append((seconds, what)))
    steps = list(itertools.islice(slow.stream(0, 3), 3))
    assert [bits(step) for step in steps] == expected(3)
    assert not lost
    assert all(0.2 < seconds < 60 for seconds, _ in waits)
    assert any(what.startswith("worker 0 reads /photos/") and what.endswith("\\x1b.png") for _, what in waits)
    assert sum(waited for _, _, waited in steps) > 1.6


class Slow(Images):
    """A set of the tiny photos' size whose disk has a bad moment."""

    def __init__(self, seconds):
        super().__init__("slow", [f"{i}.png" for i in range(N)], torch.full((N,), -1), [], None)
        self.channels, self.size, self.seconds = 3, 12, seconds

    def read(self, i):
        if i == 3:
            time.sleep(self.seconds)
        return torch.full((3, 12, 12 + i % 3), 10 * i, dtype=torch.uint8)


def slow(seconds: float = 0.0):
    from common.data.datasets import Splits
    return Splits(Slow(seconds))


def train_impatiently(text: str) -> None:
    from common import progress
    workers._PATIENCE = progress.FIRST_WORD = 0.5
    tiny.train(text)


def settings(run: Path, seconds: float, **train: object) -> str:
    config = tiny.settings(Path("unused"), run, "instdisc", evaluate={"every": 0, "protocols": []},
                           train={"epochs": 1, "workers": 2, "threads": 1, **train})
    config.set("data", {"name": "tests.faults.test_workers.slow", "seconds": seconds}, "test")
    return config.text()


def test_a_run_on_a_slow_disk_says_that_it_waits_records_it_and_is_the_same_run(tmp_path):
    said = tmp_path / "said"
    for name, seconds in (("fast", 0.0), ("slow", 2.0)):
        ended = finish(start(train_impatiently, settings(tmp_path / name, seconds), output=said), said)
        assert ended.code == 0, ended.err
    assert "waiting for data for" in ended.out and "reads 3.png)" in ended.out
    assert tiny.losses(tmp_path / "slow") == tiny.losses(tmp_path / "fast")
    assert max(record["data_wait"] for record in tiny.records(tmp_path / "slow")) > 0.5
    assert not tiny.records(tmp_path / "slow", "event")


def test_a_run_whose_workers_are_killed_records_it_and_is_the_same_run(tmp_path, soak):
    root, said = tiny.photos(tmp_path / "photos"), tmp_path / "said"
    assert finish(start(tiny.train, tiny.settings(root, tmp_path / "straight").text(), output=said), said).code == 0
    runs = soak.count(1, 10)
    for number in range(runs):
        run = tmp_path / f"run{number}"
        text = tiny.settings(root, run, train={"workers": 2, "worker_timeout": 60.0}).text()
        process = start(tiny.train, text, output=said)
        draw, killed = random.Random(number), 0
        for moment in (draw.randrange(3, 15), draw.randrange(22, 40)):
            wait_for_lines(run / "metrics.jsonl", moment, process)
            time.sleep(draw.random() / 50)
            killed += kill_a_child(process.pid, draw)
        ended = finish(process, said)
        assert ended.code == 0, ended.err
        assert killed and tiny.records(run, "event")
        assert all(event["event"] == "worker" and "was killed by SIGKILL" in event["text"]
                   for event in tiny.records(run, "event"))
        assert tiny.losses(run) == tiny.losses(tmp_path / "straight")
        assert tiny.records(run, "eval") == tiny.records(tmp_path / "straight", "eval")
    soak.report("E1", runs=runs, equal_traces=runs)


def kill_a_child(parent: int, draw: random.Random) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    if children:
        os.kill(int(draw.choice(children)), signal.SIGKILL)
    return len(children) > 0

"""Records are whole after any kill, and no failure of wandb, the real one, changes or stops a run."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import mirror
from common.monitor import Monitor
from common.run import Run
from tests import tiny
from tests.processes import ROOT, finish, start, wait_for_lines

SHORT = {"train": {"epochs": 2}, "evaluate": {"every": 0}}          # 20 steps
DELAY = 15                                                          # seconds that the start may take longer


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """The folder of a run without wandb."""
    return Run(tiny.settings(root, tmp_path_factory.mktemp("straight") / "run", **SHORT)).train().dir


# metrics.jsonl

def test_records_are_whole_after_kills(root, straight, tmp_path, soak):
    """L2."""
    run, said, draw, kills = tmp_path / "run", tmp_path / "said", random.Random(0), soak.count(2, 10)
    text = tiny.settings(root, run, **SHORT, checkpoint={"minutes": 1e-4}).text()
    for _ in range(kills):
        process = start(tiny.train, text, output=said)
        lines = draw.randrange(1, 20)
        wait_for_lines(run / "metrics.jsonl", lines, process)
        time.sleep(draw.random() * 0.05)
        process.kill()
        finish(process, said)
        text_now = (run / "metrics.jsonl").read_text()
        steps = [json.loads(line)["step"] for line in text_now.splitlines()]            # no torn line
        assert text_now.endswith("\n") and steps == list(range(1, len(steps) + 1))      # each step once, in order
    assert finish(start(tiny.train, text, output=said), said).code == 0
    assert tiny.losses(run) == tiny.losses(straight)
    soak.report("L2", kills=kills, whole=kills)


# wandb

@pytest.fixture
def server(tmp_path) -> Iterator[tuple[int, int]]:
    """(port, process) of a server for wandb; tmp_path/asked holds what it was asked."""
    command = [sys.executable, ROOT / "tests/wandb_server.py", tmp_path / "asked"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield int(process.stdout.readline()), process.pid
        process.kill()


def fill(place: Path) -> None:
    """The rest of the disk that ``place`` is."""
    with contextlib.suppress(OSError), open(place / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def train_with_wandb(text: str, blocked: bool, deed: tuple, delay: str) -> None:
    """Train; say how long wandb held up the start; after step 8 comes the deed."""
    starting, step_done = mirror.Mirror.__init__, Monitor.step
    mirror.FINISH_SECONDS = 5
    if blocked:
        sys.modules["wandb"] = None

    def start_timed(self, *arguments, **settings):
        began = time.monotonic()
        starting(self, *arguments, **settings)
        Path(delay).write_text(str(time.monotonic() - began))

    def step(monitor, step):
        step_done(monitor, step)
        if step.number == 8 and deed:
            deed[0](*deed[1:])

    mirror.Mirror.__init__, Monitor.step = start_timed, step
    tiny.train(text)


def train(root, tmp_path: Path, wandb: str, env: dict, blocked: bool = False, deed: tuple = ()):
    """What became of a run that wandb follows, as (its end, seconds by which its start was delayed)."""
    run, said = tmp_path / "run", tmp_path / "said"
    text = tiny.settings(root, run, **SHORT, log={"wandb": wandb}).text()
    env = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_SILENT": "true", **env}
    arguments = (text, blocked, deed, str(tmp_path / "delay"))
    ended = finish(start(train_with_wandb, *arguments, output=said, env=env), said)
    return ended, float((tmp_path / "delay").read_text())


def assert_unharmed(ended, delay: float, run: Path, straight: Path, warns: str, warnings: tuple = (1,)) -> None:
    """The same run, no later than it may be, and so many warnings."""
    assert ended.code == 0, ended.err
    assert tiny.losses(run) == tiny.losses(straight) and tiny.summary(run)["finished"]
    assert delay < DELAY
    said = ended.err.splitlines()                                       # nothing else
    assert len(said) in warnings, ended.err
    assert all(line.startswith("wandb: ") and warns in line and line.endswith("metrics.jsonl has everything.")
               for line in said)


KEY = {"WANDB_API_KEY": "0" * 40}
FAILURES = {"the server refuses": ({"wandb": "online", "env": KEY}, ""),
            "no key": ({"wandb": "online", "env": {}}, "run 'wandb login' once"),
            "the package is missing": ({"wandb": "online", "env": {}, "blocked": True}, "ModuleNotFoundError")}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_wandb_that_does_not_start_changes_nothing(failure, root, straight, tmp_path, soak):
    """L1, three of five."""
    pytest.importorskip("wandb")
    if failure == "the server refuses" and not soak.long:
        pytest.skip("waits for ten seconds: in the long form only")
    settings, warns = FAILURES[failure]
    ended, delay = train(root, tmp_path, **settings)
    assert_unharmed(ended, delay, tmp_path / "run", straight, warns)
    soak.report("L1", failure=failure, losses_equal=1, start_delayed_s=round(delay, 1), warnings=1)


def test_a_server_that_dies_on_the_way_changes_nothing(root, straight, tmp_path, server, soak):
    """L1, the fourth of five."""
    pytest.importorskip("wandb")
    port, process = server
    env = {**KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{port}"}
    ended, delay = train(root, tmp_path, "online", env, deed=(os.kill, process, signal.SIGKILL))
    assert "file_stream" in (tmp_path / "asked").read_text()            # it was there, and took records
    assert_unharmed(ended, delay, tmp_path / "run", straight, "")
    assert list((tmp_path / "run" / "wandb").glob("run-*/run-*.wandb"))
    soak.report("L1", failure="the server dies", losses_equal=1, start_delayed_s=round(delay, 1), warnings=1)


@pytest.mark.parametrize("since", ["the start", "step 8"])
def test_a_full_disk_in_the_folder_of_wandb_changes_nothing(since, root, straight, tmp_path, soak):
    """L1, the fifth of five. What wandb's own process cannot write on the way, it keeps to itself."""
    pytest.importorskip("wandb")
    if since == "step 8" and not soak.long:
        pytest.skip("in the long form only")
    place = tmp_path / "run" / "wandb"
    place.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        deed = (fill, place)
        if since == "the start":
            fill(place)
        ended, delay = train(root, tmp_path, "offline", {}, deed=deed)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
    assert_unharmed(ended, delay, tmp_path / "run", straight, "", (1,) if since == "the start" else (0, 1))
    soak.report("L1", failure=f"its disk is full since {since}", losses_equal=1, start_delayed_s=round(delay, 1),
                warnings=ended.err.count("wandb: "))


@pytest.mark.parametrize("output", ["> /dev/full 2> /dev/full", ">&-"])
def test_output_that_nobody_takes_ends_no_run(output, root, tmp_path):
    """A real interpreter: its own last flush, too, must not change the exit status."""
    run = tmp_path / "run"
    (tmp_path / "tiny.yaml").write_text(tiny.settings(root, run, train={"epochs": 2}).text())
    command = f"{sys.executable} tools/train.py --config {tmp_path}/tiny.yaml --trust tests {output}"
    assert subprocess.run(command, shell=True, cwd=ROOT).returncode == 0
    assert tiny.summary(run)["finished"] and len(tiny.records(run)) == tiny.summary(run)["step"] == 20

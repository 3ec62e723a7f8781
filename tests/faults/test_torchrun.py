"""Runs under torchrun: asked to stop by either signal, ranks and workers killed, a rank that no longer moves."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from common.checkpoint import Folder
from tests import tiny
from tests.processes import PATIENCE, ROOT, finish, ranks, start, wait_for_lines

PLAIN = {"encoder": {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}}
HANDLE = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]                # as docs/configuration.md says


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos"))


def config(root, run, epochs, **train):
    return tiny.settings(root, run, method=PLAIN, train={"epochs": epochs, "workers": 1, **train},
                         evaluate={"every": 0, "protocols": []}, checkpoint={"minutes": 1e-3}).text()


def torchrun(*arguments: str) -> None:
    from torch.distributed.run import main

    main(["--standalone", "--nproc-per-node", "2", *arguments])


def launch(text: str, folder: Path, *options: str):
    (folder / "tiny.yaml").write_text(text)
    script = [str(ROOT / "tools" / "train.py"), "--config", str(folder / "tiny.yaml")]
    return start(torchrun, *options, *script, output=folder / "said", env={"PYTHONPATH": str(ROOT)})


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def family(pid: int) -> list[int]:
    """The ranks and their workers."""
    return [one for child in children(pid) for one in (child, *family(child))]


def running(pids: list[int]) -> list[int]:
    """Those that have not ended, a while after they should have."""
    until, left = time.monotonic() + 60, pids
    while left and time.monotonic() < until:
        time.sleep(0.1)
        left = [pid for pid in left if Path(f"/proc/{pid}/cmdline").exists() and
                Path(f"/proc/{pid}/cmdline").read_bytes()]
    return left


def steps_done(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def straight(text: str, run: Path, steps: int) -> list[tuple[int, str]]:
    """The first losses of the same run on two ranks that nothing disturbed."""
    return tiny.losses(run)[:steps] if ranks(tiny.train, text, output=run / "said") else []


def test_a_signal_to_torchrun_costs_no_step_and_leaves_no_process(root, soak, tmp_path):
    run, draw = tmp_path / "run", random.Random(0)
    text = config(root, run, epochs=soak.count(10, 80))
    asked = [signal.SIGUSR1] * soak.count(1, 5) + [signal.SIGTERM] * soak.count(0, 20)
    took = []
    for number in draw.sample(asked, len(asked)):
        before = steps_done(run)
        process = launch(text, tmp_path, *HANDLE)
        wait_for_lines(run / "metrics.jsonl", before + draw.randint(1, 25), process)
        all_of_them, began = family(process.pid), time.monotonic()
        os.kill(process.pid, number)
        ended = finish(process, tmp_path / "said")
        took.append(time.monotonic() - began)
        step = Folder(run / "checkpoints").files()[0][0]
        assert len(all_of_them) >= 4 and running(all_of_them) == [], "no orphans"
        assert tiny.losses(run)[-1][0] == step > before and f"Stopped after step {step}" in ended.out, ended.err
        marker = json.loads((run / "PREEMPTED").read_text())
        assert (marker["step"], marker["signal"]) == (step, number.name) and not (run / "crash.json").exists()
    soak.report("P1 P2", signals=len(asked), steps_lost=0, orphans=0, slowest=round(max(took), 1))
    done = steps_done(run)
    found, expected = tiny.losses(run), tmp_path / "straight"
    expected.mkdir()
    assert found == straight(text.replace(str(run), str(expected)), expected, done) and len(found) == done


def test_a_rank_or_worker_that_is_killed_costs_nothing_once_torchrun_has_restarted(root, soak, tmp_path):
    run, draw, kills = tmp_path / "run", random.Random(1), soak.count(1, 9)
    text = config(root, run, epochs=soak.count(6, 40))
    process = launch(text, tmp_path, "--max-restarts", str(kills))
    victims = []
    for i in range(kills):
        wait_for_lines(run / "metrics.jsonl", steps_done(run) + draw.randint(3, 20), process)
        both = children(process.pid)
        victims += [both[0], both[1], draw.choice([worker for rank in both for worker in children(rank)])][i % 3:][:1]
        every, step = family(process.pid), tiny.losses(run)[-1][0]
        os.kill(victims[-1], signal.SIGKILL)
        assert running(every) == []
        wait_for(lambda step=step: (run / "metrics.jsonl").read_text().count("\n") > step, process)
    ended = finish(process, tmp_path / "said")
    assert ended.code == 0, ended.err
    expected = tmp_path / "straight"
    expected.mkdir()
    assert tiny.losses(run) == straight(text.replace(str(run), str(expected)), expected, steps_done(run))
    soak.report("E1", killed=kills, restarted=kills, steps_differing=0)


def wait_for(done, process) -> None:
    until = time.monotonic() + PATIENCE
    while process.is_alive() and not done():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_rank_that_is_stopped_is_named_and_all_are_running_again(root, soak, tmp_path):
    if not soak.long:
        pytest.skip("a minute and a half; tests/faults/test_processes.py has it without torchrun")
    run = tmp_path / "run"
    process = launch(config(root, run, epochs=6, timeout=20), tmp_path, "--max-restarts", "1")
    wait_for_lines(run / "metrics.jsonl", 8, process)
    victim, began = children(process.pid)[1], time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    step = tiny.losses(run)[-1][0]
    wait_for(lambda: tiny.losses(run)[-1][0] > step + 1, process)
    seconds = time.monotonic() - began
    ended = finish(process, tmp_path / "said")
    assert ended.code == 0 and "error: rank 1 (" in ended.err and "no sign of life for 20 s" in ended.err
    assert f"process {victim}; last heard of after step" in ended.err and running([victim]) == []
    soak.report("E2", timeout=20, running_again_after=round(seconds, 1))
    assert seconds < PATIENCE

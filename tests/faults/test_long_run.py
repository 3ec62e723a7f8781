"""Nothing that a run holds grows with its length or its stops: memory, files, threads, processes, shared memory."""

import json
import os
import random
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest

from common.config import Config
from common.monitor import Monitor
from common.run import Run
from common.signals import Stopped
from tests import tiny
from tests.flat import Held, held, slope
from tests.kills import assert_same_run
from tests.processes import finish, start, wait_for_lines

SMALL = {"name": "moco.MoCo", "momentum": 0.9, "key_bn": "split", "bn_groups": 2,
         "encoder": {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 8},
         "dictionary": {"name": "common.dictionary.Queue", "size": 32, "dim": 8, "mask_own": True}}


def test_a_slope_is_that_of_a_line_and_its_interval_holds_it_19_times_of_20():
    assert slope([0, 1, 2, 3], [5, 7, 9, 11]) == pytest.approx((2, 0))
    draw = random.Random(0)
    inside = 0
    for _ in range(400):
        found, within = slope(range(50), [0.3 * i + draw.gauss(0, 4) for i in range(50)])
        inside += abs(found - 0.3) < within
    assert 0.91 < inside / 400 < 0.98


def train_with_stops(text: str, every: int, sample: int) -> None:
    """Train; be stopped by SIGTERM every so many steps, and go on in this same process. Print what it holds."""
    taken = Monitor.step

    def step(monitor, step):
        taken(monitor, step)
        if step.number % sample == 0:
            print("held", json.dumps([step.number, *held()]))
        if step.number % every == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    Monitor.step = step
    finished = False
    while not finished:
        try:
            Run(Config.parse(text, "tiny.yaml")).train()
            finished = True
        except Stopped:
            pass


def assert_flat(steps, samples, soak, report):
    """Memory grows by less than 5 %, by its slope; the counts not at all, by the median of each half."""
    for name, values in zip(Held._fields, zip(*samples, strict=True), strict=True):
        grows, within = slope(steps, values)
        first, last = (statistics.median(half) for half in (values[:len(values) // 2], values[len(values) // 2:]))
        print(f"{name:10} {1000 * grows:+9.4f} +- {1000 * within:.4f} per 1,000 steps; {first:g}, then {last:g}")
        report[name] = f"{1000 * grows:+.4f} +- {1000 * within:.4f} per 1,000 steps, {first:g} then {last:g}"
        if name == "memory":
            assert grows * (steps[-1] - steps[0]) < 0.05 * values[0], report
        else:
            assert first == last, report
    soak.report(**report)


@pytest.mark.parametrize("source", ["arrays", "files"])
def test_a_long_run_with_stops_holds_no_more_at_its_end(source, root, soak, tmp_path):
    """From memory, and from files by a worker; measured and saved all the while."""
    steps = soak.count(150, 20_000 if source == "arrays" else 2_000)
    config = tiny.settings(
        root, tmp_path / "run", method=SMALL, train={"epochs": steps // 10, "workers": int(source == "files")},
        log={"every": 10}, evaluate={"every": 5}, checkpoint={"minutes": 0.03})
    if source == "arrays":
        np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
        np.save(tmp_path / "y.npy", np.arange(40) % 2)
        config.set("data", {"name": "common.data.arrays", "train": str(tmp_path / "x.npy"),
                            "train_labels": str(tmp_path / "y.npy")}, "the test")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    said = tmp_path / "said"
    every, sample = (50, 3) if steps < 1000 else (steps // 20, 50)
    process = start(train_with_stops, config.text(), every, sample, output=said, env={"TMPDIR": str(temporary)})
    process.join(3000)
    ended = finish(process, said)
    assert ended.code == 0, ended.err
    lines = [json.loads(line[5:]) for line in ended.out.splitlines() if line.startswith("held")]
    warm = len(lines) // 3 if steps < 1000 else len(lines) // 10
    assert_flat([line[0] for line in lines[warm:]], [Held(*line[1:]) for line in lines[warm:]], soak,
                {"promise": "long run", "source": source, "steps": steps, "stops": (steps - 1) // every})


def note_what_it_holds(text: str, note: str, at: int) -> None:
    """Train; ``at`` steps after the start, add what this process holds to ``note``."""
    taken, seen = Monitor.step, []

    def step(monitor, step):
        taken(monitor, step)
        seen.append(step.number)
        if len(seen) == at:
            with open(note, "a") as file:
                file.write(json.dumps([step.number, *held()]) + "\n")

    Monitor.step = step
    tiny.train(text)


def test_killed_every_twenty_steps_a_run_leaves_nothing_behind(root, soak, tmp_path):
    """In its folder, in /dev/shm, among the temporary files and the processes; each start holds what the first did."""
    steps = soak.count(60, 1_000)
    settings = {"train": {"epochs": steps // 10, "workers": 2}, "evaluate": {"every": 20},
                "checkpoint": {"minutes": 1e-4}}
    run, note, said, temporary = (tmp_path / name for name in ("run", "note", "said", "tmp"))
    temporary.mkdir()
    text = tiny.settings(root, run, **settings).text()
    before, files, kills = set(os.listdir("/dev/shm")), [], 0
    for until in range(20, steps, 20):
        process = start(note_what_it_holds, text, str(note), 10, output=said, env={"TMPDIR": str(temporary)})
        wait_for_lines(run / "metrics.jsonl", until, process)
        process.kill()
        kills += finish(process, said).code == -signal.SIGKILL
        files.append(len(list(run.rglob("*"))))
        assert not [name for name in set(os.listdir("/dev/shm")) - before if str(process.pid) in name]
        assert not [child for child in Path("/proc").glob("[0-9]*/stat") if parent_of(child) == process.pid]
    ended = finish(start(tiny.train, text, output=said), said)
    assert ended.code == 0, ended.err
    straight = Run(tiny.settings(root, tmp_path / "straight", **settings)).train()
    assert_same_run(run, straight.dir)
    lines = [json.loads(line) for line in note.read_text().splitlines()]
    assert max(files) <= files[0] + 2 and kills == len(files)           # one more checkpoint, one being written
    if len(lines) >= 4:
        assert_flat([line[0] for line in lines], [Held(*line[1:]) for line in lines], soak,
                    {"promise": "H1", "steps": steps, "kills": kills, "files": [files[0], max(files)]})


def parent_of(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:                                 # it has ended meanwhile
        return 0

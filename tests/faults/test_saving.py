"""Checkpoints are written behind the steps, each of them whole; a disk that takes none costs as little as can be.

A full disk is a small tmpfs, where this process may mount one; a vanished folder has been moved away.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from common import lock, session
from common.background import Background
from common.checkpoint import Folder, NotSaved, load
from common.monitor import Monitor
from common.run import Run
from common.saving import Saver
from common.snapshot import Snapshot
from common.tree import digest, plain
from tests import tiny
from tests.processes import finish, ranks, run_tool, start
from tests.test_checkpoint import FORK, is_state_after, state_after

SHORT = {"train": {"epochs": 2}, "evaluate": {"every": 0}, "checkpoint": {"minutes": 1e-4}}     # 20 steps


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """The folder of a run that nothing hindered."""
    return Run(tiny.settings(root, tmp_path_factory.mktemp("straight") / "run", **SHORT)).train().dir


@pytest.fixture
def tmpfs(tmp_path):
    """``tmpfs("1m")``: a folder on a disk of its own, of that size."""
    mounted = []

    def mount(size: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={size}"]
        if subprocess.run(["mount", *options, "tmpfs", place], capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


class Held:
    """A ``Background`` that starts no job before it is let go."""

    def __init__(self) -> None:
        self.disk, self._may = Background("disk"), threading.Event()
        self.disk.submit(self._may.wait)

    def let_go(self) -> None:
        self._may.set()


# The state saved is that of the step

def leaves(value: float) -> dict:
    """Tensors in every layout that a state may have, all of them ``value``."""
    return {"plain": torch.full((3, 4), value), "last": torch.full((2, 3, 4, 5), value).contiguous(
                memory_format=torch.channels_last), "view": torch.full((50,), value)[10:20:2],
            "turned": torch.full((3, 4), value).T, "expanded": torch.full((1,), value).expand(6),
            "conjugate": torch.full((3,), value, dtype=torch.complex64).conj(), "scalar": torch.tensor(value),
            "empty": torch.zeros(0, 2), "half": torch.full((3,), value, dtype=torch.bfloat16),
            1: torch.full((2,), value), "1": torch.full((2,), -value)}


def set_all(tree: dict, value: float) -> None:
    for tensor in tree.values():
        if tensor.numel():
            (tensor if tensor.stride() != (0,) else tensor[:1]).fill_(value)


def test_a_copy_is_what_the_state_was_whatever_becomes_of_it():
    snapshot = Snapshot()
    for value in (1.0, 2.0, 3.0):
        state = leaves(value)
        expected = digest(plain(state))
        taken = snapshot.take(state)
        set_all(state, -7.0)
        snapshot.wait()
        assert digest(state) != expected and digest(taken) == expected
        assert taken["last"].is_contiguous(memory_format=torch.channels_last)


def test_copies_are_made_in_the_same_memory():
    snapshot, where = Snapshot(), []
    for value in (1.0, 2.0, 3.0):
        where.append([tensor.data_ptr() for tensor in snapshot.take({"a": torch.full((9,), value), 1: torch.ones(3)})
                      .values()])
    assert where[0] == where[1] == where[2]
    other = snapshot.take({"a": torch.ones(10), 1: torch.ones(3)})
    assert other["a"].shape == (10,) and bool((other["a"] == 1).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_of_a_device_is_of_the_moment_though_the_host_has_not_waited():
    snapshot, x = Snapshot(), torch.zeros(50_000_000, device="cuda")
    for step in range(1, 6):
        x.fill_(step)
        taken = snapshot.take({"x": x})
        x.fill_(-1.0)                                       # queued behind the copy
        snapshot.wait()
        assert taken["x"].is_pinned() and bool((taken["x"] == step).all())


def test_training_goes_on_while_the_disk_is_busy_and_does_not_change_what_is_saved(tmp_path):
    held = Held()
    saver, state = Saver(tmp_path, 2, held.disk), state_after(7, 1000)
    saver.save(7, state)
    assert saver.busy and not saver.path.joinpath("step-00000007.pt").exists()
    state["weights"].fill_(8.0)
    state["pointer"].fill_(8)
    held.let_go()
    saver.wait()
    assert is_state_after(7, load(tmp_path / "step-00000007.pt")) and saver.error() is None


def test_reading_waits_for_the_save_that_is_going_on(tmp_path):
    held = Held()
    saver = Saver(tmp_path, 2, held.disk)
    saver.save(7, state_after(7, 10))
    threading.Timer(0.2, held.let_go).start()
    assert saver.newest()[0] == 7


def test_a_checkpoint_is_on_the_disk_after_all_that_was_to_be_written_before_it(tmp_path):
    disk, seen = Background("disk"), []
    saver = Saver(tmp_path, 2, disk)
    disk.submit(lambda: (time.sleep(0.1), seen.append(saver.path.joinpath("step-00000001.pt").exists())))
    saver.save(1, state_after(1, 10))
    saver.wait()
    assert seen == [False] and saver.newest()[0] == 1


def test_an_error_is_kept_and_told_once_and_the_next_save_is_free_of_it(tmp_path):
    saver = Saver(tmp_path / "there", 2, Background("disk"))
    saver.save(1, state_after(1, 10))
    saver.wait()
    saver.path.rename(tmp_path / "away")
    saver.save(2, state_after(2, 10))
    saver.wait()
    error = saver.error()
    assert isinstance(error, NotSaved) and not error.for_want_of_room and "no such folder" in str(error)
    assert saver.error() is None
    (tmp_path / "away").rename(saver.path)
    saver.save(3, state_after(3, 10))
    assert saver.newest()[0] == 3 and saver.error() is None


def test_a_job_that_fails_is_told_and_stops_no_other():
    disk = Background("disk")
    jobs = [disk.submit(job) for job in (lambda: 1, lambda: 1 / 0, lambda: 3)]
    assert disk.wait(10) and (jobs[0].result(), jobs[2].result()) == (1, 3)
    with pytest.raises(ZeroDivisionError):
        jobs[1].result()


# Kills and damage

def save_for_ever(folder: Path, first: int, done) -> None:
    torch.set_num_threads(1)
    saver, state = Saver(folder, 2, Background("disk")), state_after(first)
    for step in range(first, first + 10_000):
        for value in state["weights"], state["pointer"]:
            value.fill_(step)                           # training goes on while the step before is being written
        saver.save(step, {**state, "step": step})
        done.value = max(done.value, step - 1)          # it has waited for the one before: that one is promised


def test_sigkill_in_the_thread_that_writes_never_loses_a_completed_save(tmp_path, soak):
    """C1."""
    done, draw, in_save, kills = FORK.Value("q", 0, lock=False), random.Random(0), 0, soak.count(8, 50)
    for _ in range(kills):
        first = done.value + 2
        child = FORK.Process(target=save_for_ever, args=(tmp_path, first, done))
        child.start()
        while done.value < first and child.is_alive():
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        in_save += any(tmp_path.glob("*.tmp"))
        step, state = Folder(tmp_path).newest()
        assert step >= done.value and is_state_after(step, state)
        done.value = step
    assert in_save, "no kill hit a save that was being written: the test shows nothing"
    soak.report("C1", kills=kills, newest_good_one_loads=kills, file_half_written=in_save)


def damaged(content: bytes, draw: random.Random) -> dict[str, bytes]:
    """A byte of the weights flipped, one cut, all cut, torn anywhere, a page that never reached the disk."""
    start, count = content.index(b"\x00\x00\x80\x40" * 8), len(content)     # 4.0
    at = start + draw.randrange(3000)
    page = draw.randrange(0, count // 512) * 512
    return {"flipped": content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1:],
            "cut": content[:-1], "empty": b"", "torn": content[:draw.randrange(1, count)],
            "not written": content[:start] + bytes(1000) + content[start + 1000:] if page else b"\0" * count}


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, soak):
    """C2."""
    folder, draw, count = Folder(tmp_path), random.Random(1), 0
    folder.save(3, state_after(3, 1000))
    newest = folder.save(4, state_after(4, 1000))
    content = newest.read_bytes()
    for _ in range(soak.count(1, 4)):
        for spoiled in damaged(content, draw).values():
            newest.write_bytes(spoiled)
            caplog.clear()
            step, state = folder.newest()
            assert step == 3 and is_state_after(3, state)
            assert newest.name in caplog.text and "step-00000003.pt" in caplog.text
            count += 1
    soak.report("C2", damaged=count, previous_used=count, both_named=count)


# A disk that takes no more

def train_hindered(config: str, deeds: dict[int, tuple], temporary: str) -> None:
    """``tools/train.py``; after some steps, something is done to the main process's disk."""
    taken, session.RETRY, tempfile.tempdir = Monitor.step, 0.0, temporary

    def step(monitor, step):
        taken(monitor, step)
        if step.number in deeds and monitor.main:
            deed, *arguments = deeds[step.number]
            deed(*arguments)

    Monitor.step = step
    run_tool("train", "--config", config)


def fill(place: Path) -> None:
    """Every page of the disk that ``place`` is."""
    with pytest.raises(OSError, match="No space left"), open(place / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def limit(size: int) -> None:
    """No file may become larger than this."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def remount(place: Path, option: str) -> None:
    lock.release(place / "run")                         # its file is open for writing
    while subprocess.run(["mount", "-o", f"remount,{option}", place], capture_output=True).returncode:
        time.sleep(0.001)                               # a file is just being written


def look(run: Path, seen: Path) -> None:
    """Write down what the newest checkpoint is by now."""
    step, state = Folder(run / "checkpoints").newest()
    seen.write_text(json.dumps([step, state["trainer"]["step"]]))


@pytest.fixture
def elsewhere(tmp_path):
    """The folder for temporary files."""
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


@pytest.fixture
def train(root, tmp_path, elsewhere):
    """``train(run, deeds)``: what became of a run whose disk met these deeds, or of each of ``world`` processes."""
    def train(run: Path, deeds: dict, world: int = 1):
        config = tmp_path / "tiny.yaml"
        config.write_text(tiny.settings(root, run, **SHORT).text())
        arguments = (train_hindered, str(config), deeds, str(elsewhere))
        if world > 1:
            return ranks(*arguments, output=tmp_path / "said", world=world)
        return finish(start(*arguments, output=tmp_path / "said"), tmp_path / "said")
    return train


def assert_same_end(run: Path, straight: Path) -> None:
    now, then = tiny.last_state(run), tiny.last_state(straight)
    assert digest([now["trainer"], now["rng"]]) == digest([then["trainer"], then["rng"]])


LAYOUTS = {                                         # how the disk fills after step 8, and what makes room after step 14
    "others fill it": lambda place, size: ((fill, place), (os.unlink, place / "ballast")),
    "its own checkpoints fill it": lambda place, size: ((os.getpid,), (remount, place, "size=8m")),
    "files may not be so large": lambda place, size: ((limit, size // 2), (limit, resource.RLIM_INFINITY))}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_costs_no_step_and_no_old_checkpoint(layout, train, straight, tmpfs, tmp_path, soak):
    """C3."""
    size = Folder(straight / "checkpoints").files()[0][1].stat().st_size
    place = tmpfs(str(int(2.5 * size)) if "own" in layout else "8m")
    run, seen = place / "run", tmp_path / "seen"
    fills, makes_room = LAYOUTS[layout](place, size)
    ended = train(run, {8: fills, 13: (look, run, seen), 14: makes_room})

    assert ended.code == 0, ended.err
    step, saved = json.loads(seen.read_text())
    assert 0 < step == saved <= 8
    assert tiny.losses(run) == tiny.losses(straight)
    assert_same_end(run, straight)
    said = [record["text"] for record in tiny.records(run, "event")]
    assert len(said) > 1                                            # it repeats
    assert all("step-000000" in text and "MB needed, " in text and "MB free there" in text for text in said)
    assert ("File too large" if "large" in layout else "No space left") in said[0] and said[0] in ended.out
    assert not list(run.rglob("*.tmp"))
    soak.report("C3", layout=layout, warnings=len(said), old_checkpoint_loads=1, losses_equal=1)


def move_in(elsewhere: Path, run: Path) -> None:
    """What the message tells the user to do."""
    found, = elsewhere.rglob("step-*.pt")
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.move(found, run / "checkpoints")


def assert_stopped_with_its_state_elsewhere(ended, elsewhere: Path, reason: str) -> None:
    found, = elsewhere.rglob("step-*.pt")
    said = ended.err[ended.err.rindex("error: "):]
    assert ended.code == NotSaved.code, ended.err
    assert reason in said and str(found) in said and "Traceback" not in ended.err


def test_a_run_that_ends_on_a_full_disk_is_saved_elsewhere(train, straight, tmpfs, elsewhere):
    run = tmpfs("8m") / "run"
    ended = train(run, {8: (fill, run.parent)})
    assert_stopped_with_its_state_elsewhere(ended, elsewhere, "No space left")
    assert "records could not be written; they are in" in ended.err
    (run.parent / "ballast").unlink()
    move_in(elsewhere, run)
    assert train(run, {}).code == 0
    assert_same_end(run, straight)


def test_a_run_whose_folder_vanishes_stops_and_is_saved_elsewhere(train, straight, tmp_path, elsewhere):
    run = tmp_path / "run"
    ended = train(run, {8: (os.rename, run, tmp_path / "away")})
    assert_stopped_with_its_state_elsewhere(ended, elsewhere, "no such folder")
    assert not run.exists()
    step = int(next(elsewhere.rglob("step-*.pt")).stem[5:])
    assert 8 <= step <= 11
    move_in(elsewhere, run)
    assert train(run, {}).code == 0
    assert_same_end(run, straight)
    assert tiny.losses(run) == tiny.losses(straight)[step:]


def test_a_run_whose_disk_becomes_read_only_stops_and_is_saved_elsewhere(train, tmpfs, elsewhere):
    run = tmpfs("8m") / "run"
    ended = train(run, {8: (remount, run.parent, "ro")})
    assert_stopped_with_its_state_elsewhere(ended, elsewhere, "Read-only file system")
    assert Folder(run / "checkpoints").newest()[0] <= 9


def test_all_ranks_stop_when_the_main_process_cannot_save(train, tmp_path, elsewhere):
    run = tmp_path / "run"
    main, other = train(run, {8: (os.rename, run, tmp_path / "away")}, world=2)
    assert_stopped_with_its_state_elsewhere(main, elsewhere, "no such folder")
    assert other.code == NotSaved.code and "error" not in other.err


def test_where_nothing_takes_the_state_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    folder = Saver(tmp_path / "run" / "checkpoints", 2, Background("disk"))
    said = folder.save_elsewhere(3, state_after(3, 10), NotSaved("The disk has gone."))
    assert said.startswith("The disk has gone. Nor could the state be saved elsewhere: ") and "none" in said


@pytest.mark.parametrize("hindrance", ["a read-only disk", "a file for the run", "a file for its checkpoints"])
def test_a_folder_that_takes_no_checkpoint_is_known_before_the_first_step(hindrance, train, tmpfs, tmp_path, soak):
    """C4."""
    run = tmp_path / "run"
    if hindrance == "a read-only disk":
        run = tmpfs("1m") / "run"
        remount(run.parent, "ro")
    elif hindrance == "a file for the run":
        run.write_text("in the way")
    else:
        run.mkdir()
        (run / "checkpoints").write_text("in the way")
    ended, other = train(run, {1: (os.abort,)}, world=2)
    assert ended.code == other.code == NotSaved.code, ended.err
    assert "error" not in other.err
    assert f"error: {run / 'checkpoints'}: checkpoints cannot be saved here: " in ended.err
    assert "run.dir" in ended.err and "Traceback" not in ended.err
    soak.report("C4", hindrance=hindrance, known_before_the_first_step=1)

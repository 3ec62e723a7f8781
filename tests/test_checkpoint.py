"""Checkpoints survive kills, damage, full disks; what is loaded is what was saved, and nothing runs on loading."""

import logging
import multiprocessing
import os
import random
import resource
import signal
import struct
import subprocess
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoint
from common.checkpoint import DamagedCheckpoint, Folder, load, save
from common.rng import rng_state, set_rng_state
from common.tree import digest

KILLS = int(os.environ.get("CHECKPOINT_KILLS", "12"))       # 50 in the long form
FORK = multiprocessing.get_context("fork")                  # torch is imported already: a child starts at once


def state_after(step: int, size: int = 500_000) -> dict:
    """A state that can be told from every other step's by all of its content."""
    return {"step": step, "weights": torch.full((size,), float(step)), "pointer": torch.tensor(step)}


def is_state_after(step: int, state: dict) -> bool:
    return state["step"] == step and bool((state["weights"] == step).all()) and int(state["pointer"]) == step


def trained_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for k in range(3):
        model(torch.arange(15.0).reshape(5, 3) * (k + 1)).square().sum().backward()
        optimizer.step()
    return model, optimizer


# What is loaded is what was saved

def test_model_optimizer_and_scaler_come_back_bit_for_bit(tmp_path):
    model, optimizer = trained_model()
    scaler = torch.amp.GradScaler("cpu")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    num_bytes = save(tmp_path / "a.pt", state)
    assert num_bytes == (tmp_path / "a.pt").stat().st_size

    loaded = load(tmp_path / "a.pt")
    assert digest(loaded) == digest(state)
    again, again_optimizer = trained_model()
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(loaded["model"])
    again_optimizer.load_state_dict(loaded["optimizer"])
    assert digest(again.state_dict()) == digest(model.state_dict())
    assert digest(again_optimizer.state_dict()) == digest(optimizer.state_dict())


def test_saving_changes_nothing_it_is_given(tmp_path):
    model, optimizer = trained_model()
    state = {"model": model.state_dict(keep_vars=True), "optimizer": optimizer.state_dict()}
    before = digest(state)
    save(tmp_path / "a.pt", state)
    assert digest(state) == before
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


def test_a_view_is_saved_without_the_rest_of_its_base(tmp_path):
    base = torch.zeros(1_000_000)
    assert save(tmp_path / "a.pt", {"view": base[10:20]}) < 10_000


def test_memory_format_survives(tmp_path):
    image_BcHW = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    save(tmp_path / "a.pt", {"image": image_BcHW})
    loaded = load(tmp_path / "a.pt")["image"]
    assert loaded.stride() == image_BcHW.stride() and torch.equal(loaded, image_BcHW)


@pytest.mark.parametrize("thing", [np.float64(1), np.zeros(2), Path("a"), {1, 2}, b"bytes", object(), nn.Linear(1, 1),
                                   torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_what_could_not_be_loaded_is_not_saved_and_its_place_is_named(tmp_path, thing):
    with pytest.raises(ValueError, match=r"state\.optimizer\.groups\.1"):
        save(tmp_path / "a.pt", {"optimizer": {"groups": [0, thing]}})
    with pytest.raises(ValueError, match="key"):
        save(tmp_path / "a.pt", {("a", "tuple"): 1})
    assert list(tmp_path.iterdir()) == []


# Digest

def leaves() -> list:
    """No two of these are the same; a digest must tell all of them apart."""
    ones = torch.ones(4)
    return [None, True, 1, 1.0, "1", False, 0, 0.0, -0.0, float("nan"), "", "None", [], (), {}, [[]], [1, 2], (1, 2),
            [12], [2, 1], {"a": 1}, {"b": 1}, {"a": 2}, {1: 1}, {"1": 1}, {"a": {"b": 1}}, {"a": 1, "b": None},
            ones, ones.double(), ones.half(), ones.bfloat16(), ones.int(), ones.long(), ones.bool(),
            ones.to(torch.complex64), ones.to(torch.float8_e4m3fn), ones.reshape(2, 2), ones.reshape(4, 1), ones[:3],
            -ones, ones * 1.000001, torch.tensor(1.0), torch.tensor(1), torch.zeros(0), torch.zeros(0, 2),
            torch.zeros(1), -torch.zeros(1), torch.zeros(1).int(), torch.arange(6).reshape(2, 3),
            torch.arange(6).reshape(3, 2).T, [ones, ones], [torch.ones(8)]]


def test_digest_tells_every_kind_of_leaf_apart():
    digests = [digest({"leaf": leaf}) for leaf in leaves()]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64,
                                   torch.uint8, torch.bool])
def test_digest_sees_each_element_of_a_tensor(dtype):
    seen = {digest(torch.zeros(2, 3, dtype=dtype))}
    for i in range(6):
        changed = torch.zeros(6, dtype=dtype)
        changed[i] = 1
        seen.add(digest(changed.reshape(2, 3)))
    assert len(seen) == 7


def test_digest_does_not_depend_on_how_a_value_is_held():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    same = [x, x.clone(), nn.Parameter(x), x.contiguous(memory_format=torch.channels_last),
            torch.cat([x, x])[2:], x.to(torch.complex64).conj().real]
    assert len({digest({"x": held}) for held in same}) == 1
    assert digest(OrderedDict(a=1)) == digest({"a": 1})


# Kills

def save_for_ever(folder: Path, first: int, done) -> None:
    torch.set_num_threads(1)                                # a forked child hangs in its parent's OpenMP threads
    for step in range(first, first + 10_000):
        Folder(folder, keep=2).save(step, state_after(step))
        done.value = step                                   # only now is the step promised


def test_sigkill_at_any_moment_never_loses_a_completed_save(tmp_path):
    done, draw, in_save = FORK.Value("q", 0, lock=False), random.Random(0), 0
    for _ in range(KILLS):
        first, child = done.value + 1, None
        child = FORK.Process(target=save_for_ever, args=(tmp_path, first, done))
        child.start()
        while done.value < first and child.is_alive():      # the first save of this child is complete
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)                    # waits for nothing: the kill is to come anywhere in a save
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        in_save += any(tmp_path.glob("*.tmp"))

        step, state = Folder(tmp_path).newest()
        assert step in (done.value, done.value + 1)         # + 1: renamed, and killed before it could say so
        assert is_state_after(step, state)
        done.value = step
    assert in_save, "no kill hit a save that was being written: the test shows nothing"


def test_what_a_killed_save_leaves_is_cleared_by_the_next(tmp_path):
    (tmp_path / "step-00000007.pt.tmp").write_bytes(b"half")
    Folder(tmp_path).save(8, state_after(8, 10))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008.pt"]


def test_an_interrupt_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.pt"
    save(path, state_after(1, 10))

    def interrupted(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.replace_file(path, interrupted)
    assert is_state_after(1, load(path)) and os.listdir(tmp_path) == ["a.pt"]


# Damage

class Evil:
    """Pickles to a call; loaded without care, it leaves a canary file."""

    def __init__(self, call, *arguments):
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


def evil_files(folder: Path, canary: Path) -> list[Path]:
    touch, python = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    payloads = [Evil(os.system, touch), Evil(subprocess.getoutput, touch), Evil(subprocess.Popen, touch, -1, None),
                Evil(open, str(canary), "w"), Evil(eval, python), Evil(exec, python)]
    paths = []
    for i, payload in enumerate(payloads):
        for place, content in {"top": payload, "in": {"format": 1, "sha256": "0", "state": {"step": 1, "x": payload}},
                               "old": {"format": 1, "sha256": "0", "state": payload}}.items():
            paths.append(folder / f"{place}{i}.pt")
            torch.save(content, paths[-1], _use_new_zipfile_serialization=place != "old")
    return paths


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path):
    canary = tmp_path / "canary"
    for path in evil_files(tmp_path, canary):
        with pytest.raises(DamagedCheckpoint, match=path.name):
            load(path)
    with pytest.raises(DamagedCheckpoint, match=r"posix.system could run code"):
        load(tmp_path / "in0.pt")
    assert not canary.exists()
    torch.load(tmp_path / "in0.pt", weights_only=False)
    assert canary.exists(), "the payloads are harmless: the test shows nothing"


def damages() -> dict:
    """Name of the damage -> (what it makes of a good file's bytes, what the message must say)."""
    return {"empty": (lambda b: b"", "empty"),
            "cut in half": (lambda b: b[:len(b) // 2], "cut off"),
            "cut by one byte": (lambda b: b[:-1], "cut off|damaged"),
            "a byte of a tensor flipped": (lambda b: _flip(b, b.index(struct.pack("<4f", *[8.0] * 4))), "damaged"),
            "the checksum flipped": (lambda b: _flip(b, b.index(b"sha256") + 20), "damaged"),
            "the first byte flipped": (lambda b: _flip(b, 0), "beginning"),
            "zeros": (lambda b: bytes(len(b)), "not a checkpoint"),
            "a web page": (lambda b: b"<html>404</html>", "not a checkpoint"),
            "something behind it": (lambda b: b[:-400] + bytes(400), "damaged|cut off")}


def _flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_file_is_named_with_the_reason_and_the_one_before_is_used(tmp_path, damage, caplog):
    folder = Folder(tmp_path, keep=2)
    folder.save(4, state_after(4, 1000))
    newest = folder.save(8, state_after(8, 1000))
    spoil, says = damages()[damage]
    newest.write_bytes(spoil(newest.read_bytes()))

    with pytest.raises(DamagedCheckpoint, match=rf"{newest.name}: .*({says})"):
        load(newest)
    with caplog.at_level(logging.WARNING):
        step, state = folder.newest()
    assert step == 4 and is_state_after(4, state)
    assert newest.name in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_disk_or_a_machine_that_fails_does_not_make_a_checkpoint_a_damaged_one(error, tmp_path, monkeypatch):
    """It would be passed over, and deleted after the next save."""
    folder = Folder(tmp_path, keep=2)
    folder.save(4, state_after(4, 1000))
    folder.save(8, state_after(8, 1000))

    def fails(*given, **settings):
        raise error

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(MemoryError if isinstance(error, RuntimeError) else type(error)):
        folder.newest()
    monkeypatch.undo()
    assert folder.newest()[0] == 8


def test_no_flipped_or_missing_byte_is_ever_taken_for_other_content(tmp_path):
    """Not every byte of the container matters (padding between its parts); none may change what is loaded."""
    path, draw, refused = tmp_path / "a.pt", random.Random(1), 0
    save(path, {"weights": torch.arange(300.0), "epoch": 3, "name": "run"})
    good, expected = path.read_bytes(), digest(load(path))
    for at in draw.sample(range(len(good)), 150):
        path.write_bytes(_flip(good, at))
        try:
            assert digest(load(path)) == expected
        except DamagedCheckpoint:
            refused += 1
    assert refused > 50
    for length in draw.sample(range(len(good)), 50):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedCheckpoint):
            load(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1], {"format": 1, "state": {}}, torch.zeros(2), "text",
                                     {"format": 1, "sha256": 5, "state": {}},
                                     {"format": torch.zeros(2), "sha256": "", "state": {}},
                                     {"format": 1, "sha256": "", "state": {torch.zeros(1): 1}}])
def test_a_foreign_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DamagedCheckpoint, match=r"a\.pt"):
        load(tmp_path / "a.pt")


def test_a_later_format_is_named(tmp_path):
    torch.save({"format": 2, "sha256": "", "state": {}}, tmp_path / "a.pt")
    with pytest.raises(DamagedCheckpoint, match=r"format 2; this version reads 1"):
        load(tmp_path / "a.pt")


def test_a_folder_or_a_pipe_in_place_of_the_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path, tmp_path / "pipe.pt"):
        with pytest.raises(DamagedCheckpoint, match="not a regular file"):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt")


def test_a_run_does_not_start_over_when_all_its_checkpoints_are_damaged(tmp_path):
    assert Folder(tmp_path / "new").newest() is None and not (tmp_path / "new").exists()
    for step in (1, 2):
        Folder(tmp_path).save(step, state_after(step, 10)).write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match=r"none of the 2 .*step-00000002\.pt: .*empty"):
        Folder(tmp_path).newest()


# A disk that takes no more

def test_a_full_disk_keeps_the_old_checkpoints_and_says_how_much_is_needed(tmp_path):
    folder = Folder(tmp_path, keep=1)
    folder.save(1, state_after(1, 100_000))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for big in (500_000, 5_000_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
        try:
            with pytest.raises(OSError, match=r"step-00000002\.pt: not saved: .*File too large.*MB needed, .*MB free"):
                folder.save(2, state_after(2, big))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert os.listdir(tmp_path) == ["step-00000001.pt"]
        step, state = folder.newest()
        assert step == 1 and is_state_after(1, state)
    folder.save(2, state_after(2, 500_000))
    assert folder.newest()[0] == 2


def test_a_folder_that_cannot_be_written_is_known_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"file.*: checkpoints cannot be saved here: .*run\.dir"):
            Folder(path).prepare()
    Folder(tmp_path / "new" / "one").prepare()
    assert os.listdir(tmp_path / "new" / "one") == []


# Which ones stay

def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_and_the_kept_stay_across_restarts(tmp_path):
    for step in range(1, 11):
        Folder(tmp_path, keep=2).save(step, state_after(step, 5), keep_always=step % 4 == 0)
    assert names(tmp_path) == ["step-00000004-kept.pt", "step-00000008-kept.pt", "step-00000009.pt", "step-00000010.pt"]
    assert [step for step, _ in Folder(tmp_path).files()] == [10, 9, 8, 4]
    assert Folder(tmp_path).newest()[0] == 10


def test_the_newest_is_by_step_and_not_by_name_or_date(tmp_path):
    folder = Folder(tmp_path, keep=3)
    for step in (99_999_999, 100_000_000):
        folder.save(step, state_after(step, 5))
    os.utime(folder.files()[0][1], (0, 0))
    (tmp_path / "step-best.pt").write_bytes(b"the user's own")
    assert folder.newest()[0] == 100_000_000
    folder.save(100_000_001, state_after(1, 5))
    assert (tmp_path / "step-best.pt").exists()


def test_a_resume_from_before_a_damaged_checkpoint_replaces_it(tmp_path):
    folder = Folder(tmp_path, keep=2)
    for step in (10, 20, 30):
        folder.save(step, state_after(step, 5))
    folder.files()[0][1].write_bytes(b"")                   # 30 is damaged: the run goes on from 20
    assert folder.newest()[0] == 20
    folder.save(25, state_after(25, 5))
    assert names(tmp_path) == ["step-00000020.pt", "step-00000025.pt"]
    assert folder.newest()[0] == 25


def test_keep_below_one_is_refused():
    with pytest.raises(ValueError, match=r"checkpoint\.keep: 0 given"):
        Folder("somewhere", keep=0)


# Random generators

def draws() -> list:
    return [torch.randn(3).tolist(), np.random.rand(3).tolist(), np.random.randn(3).tolist(),  # noqa: NPY002
            random.random(), random.gauss(0, 1), torch.randperm(5).tolist()]


def test_random_generators_go_on_where_they_were_saved(tmp_path):
    before = rng_state()
    try:
        random.gauss(0, 1), np.random.randn()               # noqa: NPY002 - both hold back a second value
        save(tmp_path / "a.pt", {"rng": rng_state()})
        expected = draws()
        assert draws() != expected
        set_rng_state(load(tmp_path / "a.pt")["rng"])
        assert draws() == expected
    finally:
        set_rng_state(before)


def test_neither_saving_nor_loading_draws_a_random_number(tmp_path):
    before = digest(rng_state())
    Folder(tmp_path).save(1, state_after(1, 10))
    Folder(tmp_path).newest()
    assert digest(rng_state()) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_and_generator_come_back(tmp_path):
    torch.randn(1, device="cuda")
    x = torch.arange(5.0, device="cuda")
    save(tmp_path / "a.pt", {"x": x, "rng": rng_state()})
    expected = torch.randn(4, device="cuda")
    loaded = load(tmp_path / "a.pt")
    assert loaded["x"].device.type == "cpu" and digest(loaded["x"]) == digest(x)
    set_rng_state(loaded["rng"])
    assert torch.equal(torch.randn(4, device="cuda"), expected)

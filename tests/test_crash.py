"""What a failure prints and leaves: one screen, and crash.json where the fault is the program's."""

import inspect
import json

import pytest
import torch

from common import announce, crash
from common.data.recipes import moco_v2
from common.settings import TrainSettings
from tests import tiny
from tests.processes import tool


def faulty(**given) -> None:
    """A recipe whose third batch meets a fault of the program."""
    views, calls = moco_v2(**given), []
    finish = views.finish

    def broken(*batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyError("no such thing")
        return finish(*batch)

    views.finish = broken
    return views


faulty.__signature__ = inspect.signature(moco_v2)            # what a config may say of it


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos"), count=16)


def train(root, folder, *arguments, **sections):
    (folder / "tiny.yaml").write_text(tiny.settings(root, folder / "run", train={"epochs": 1}, **sections).text())
    return tool("train", "--config", "tiny.yaml", *arguments, cwd=folder)


@pytest.mark.parametrize("debug", [False, True])
def test_a_fault_of_the_program_is_one_screen_and_leaves_crash_json(debug, root, tmp_path):
    ended = train(root, tmp_path, *["--debug"] * debug, views={"name": "tests.test_crash.faulty"})
    report = json.loads((tmp_path / "run" / "crash.json").read_text())
    assert ended.code == 1 and "error: KeyError: 'no such thing'\n  at tests/test_crash.py:" in ended.err
    assert "crash.json has the traceback" in ended.err
    assert ("Traceback" in ended.err) == debug and (debug or len(ended.err.splitlines()) < 8)
    assert "in broken" in report["stacks"]["rank 0"] and "KeyError" in report["stacks"]["rank 0"]
    assert report["message"] == "KeyError: 'no such thing'" and "torch" in report["versions"]
    assert "tests.test_crash.faulty" in report["config"] and "tiny.yaml" in report["command"]
    assert report["records"][0]["step"] == 1 and report["records"][0]["loss"] > 0


@pytest.mark.parametrize("setting, code", [("data.root=/nowhere", 2), ("optimizer.lr=1e30", 1)])
def test_a_users_mistake_shows_a_traceback_only_with_debug_and_leaves_no_crash_json(setting, code, root, tmp_path):
    given = [setting, "train.max_skipped=1"]
    for debug in (False, True):
        ended = train(root, tmp_path, *given, *["--debug"] * debug)
        assert ended.code == code and "error: " in ended.err and ("Traceback" in ended.err) == debug
    assert not list(tmp_path.rglob("crash.json"))


def test_evaluate_knows_debug_too(tmp_path):
    for debug in ([], ["--debug"]):
        ended = tool("evaluate", "knn", "--checkpoint", "nothing", *debug, cwd=tmp_path)
        assert ended.code == 2 and "no run with a checkpoint" in ended.err and ("Traceback" in ended.err) == bool(debug)


def test_an_error_of_a_library_is_a_fault_of_the_program_whatever_its_kind(root, tmp_path):
    """BatchNorm's ValueError for one value a channel, say, comes from torch and was not written for the user."""
    with pytest.raises(ValueError) as found:
        torch.nn.functional.batch_norm(torch.zeros(1, 2), None, None, training=True)
    assert not crash.is_ours(found.value) and announce._code(found.value) == 1
    with pytest.raises(ValueError) as found:
        TrainSettings(epochs=0, batch_size=1)
    assert crash.is_ours(found.value) and announce._code(found.value) == 2


def test_before_there_is_a_folder_crash_json_lies_where_it_can(tmp_path, monkeypatch):
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setattr(crash, "scene", crash.Scene(tmp_path / "never made"))
    assert announce.failure(RuntimeError("broken")) == 1
    assert json.loads((tmp_path / "current" / "crash.json").read_text())["message"] == "RuntimeError: broken"


def test_a_gpu_that_is_full_is_no_crash(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
    assert announce.failure(torch.OutOfMemoryError(said)) == 1 and not list(tmp_path.iterdir())
    assert "error: CUDA out of memory. Give a smaller train.batch_size, or more train.accum" in capsys.readouterr().err


def test_a_folder_that_takes_nothing_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(crash, "scene", crash.Scene(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "crash.json").mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    assert crash.write("broken", {}) is None
    (tmp_path / "tmp").mkdir()
    assert crash.write("broken", {}) == str(tmp_path / "tmp" / "crash.json")


def test_the_crash_of_the_rank_that_failed_first_stays_and_that_of_an_earlier_job_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(crash, "scene", crash.Scene(tmp_path))
    for message, left in (("first", "first"), ("after it", "first")):
        crash.write(message, {})
        assert json.loads((tmp_path / "crash.json").read_text())["message"] == left
    monkeypatch.setattr(crash, "_BEGAN", crash.time.time() + 1)
    crash.write("another job", {})
    assert json.loads((tmp_path / "crash.json").read_text())["message"] == "another job"

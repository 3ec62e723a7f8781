"""One training process for each run's folder; a lock never outlives its process."""

import json
import os
import signal
import time

import pytest

from common import lock
from common.config import ConfigError
from common.run import Run
from tests import tiny
from tests.processes import finish, start


def hold(folder):
    assert lock.take(folder) is None
    if os.fork() == 0:                                      # a worker ends: it must not take the lock with it
        os._exit(0)
    os.wait()
    print("held", flush=True)
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    process = start(hold, tmp_path / "run", output=tmp_path / "said")
    while "held" not in (tmp_path / "said.out").read_text() if (tmp_path / "said.out").exists() else True:
        time.sleep(0.01)
        assert process.is_alive()
    yield process
    process.kill()
    finish(process, tmp_path / "said")


def test_a_second_run_in_the_folder_is_refused_until_the_first_has_died_however_it_died(holder, tmp_path):
    run = tiny.settings(tiny.photos(tmp_path / "photos", count=8), tmp_path / "run", train={"epochs": 1})
    with pytest.raises(ConfigError, match=rf"run: another process trains in this folder \(.*, process {holder.pid}, s"):
        Run(run).train()
    assert os.listdir(tmp_path / "run") == [".lock"], "nothing of the first run was touched"
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    Run(run).train()
    again = finish(start(tiny.train, run.text(), output=tmp_path / "again"), tmp_path / "again")
    assert again.code == 0, "it was given back: " + again.err


def test_one_process_may_come_again_and_says_who_it_is(tmp_path):
    assert lock.take(tmp_path) is None and lock.take(tmp_path) is None
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    lock.release(tmp_path)
    lock.release(tmp_path)


def test_a_link_to_the_folder_is_the_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert lock.take(tmp_path / "run") is None and lock.take(tmp_path / "link") is None
    lock.release(tmp_path / "link")
    assert not lock._held.keys() & {(tmp_path / "run").resolve(), tmp_path / "link"}


def test_where_nothing_can_be_written_there_is_no_lock(tmp_path):
    (tmp_path / "file").touch()
    assert lock.take(tmp_path / "file" / "run") is None

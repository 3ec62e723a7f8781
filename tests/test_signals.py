"""Exit statuses of a run that was asked to stop, and signals that come while it saves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.signals import Stopped, StopRequest
from tests import tiny
from tests.processes import ROOT, finish, start


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_scheduler_can_tell_preemption_from_the_users_own_ctrl_c(number, code, tmp_path):
    stopped = Stopped(number, 7)
    stopped.mark(tmp_path)
    assert stopped.code == code and (tmp_path / "PREEMPTED").exists() == (code == 75)


def test_a_second_interrupt_does_not_break_the_save(monkeypatch, capfd):
    monkeypatch.setattr("common.signals.PATIENCE", -1.0)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        with request.saving():
            os.kill(os.getpid(), signal.SIGINT)
        assert "the run ends after it" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_where_there_is_nothing_to_save_a_signal_stops_at_once_also_one_that_came_before():
    with StopRequest() as request:
        with pytest.raises(Stopped, match="SIGTERM"), request.at_once(lambda number: Stopped(number, 7)):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"), request.at_once(lambda number: Stopped(number, 7)):
            raise AssertionError("it was asked to stop before")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_preempted_before_it_trains_a_run_says_so_too(number, tmp_path):
    """While torch is imported, which takes seconds."""
    root, run = tiny.photos(tmp_path / "photos", count=8), tmp_path / "run"
    (tmp_path / "tiny.yaml").write_text(tiny.settings(root, run).text())
    command = [sys.executable, ROOT / "tools/train.py", "--config", tmp_path / "tiny.yaml", "--trust", "tests"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while b"libtorch" not in Path(f"/proc/{process.pid}/maps").read_bytes():         # torch's library is being loaded
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == 75 and json.loads((run / "PREEMPTED").read_text())["step"] == 0


def test_a_preempted_run_says_so_until_it_goes_on(tmp_path):
    root, run, said = tiny.photos(tmp_path / "photos"), tmp_path / "run", tmp_path / "said"
    text = tiny.settings(root, run, train={"epochs": 3}).text()
    finish(start(tiny.train_and_stop, text, 25, output=said), said)
    marker = json.loads((run / "PREEMPTED").read_text())
    assert (marker["step"], marker["signal"]) == (25, "SIGTERM") and set(marker) == {"step", "signal", "time"}
    assert finish(start(tiny.train, text, output=said), said).code == 0
    assert not (run / "PREEMPTED").exists()

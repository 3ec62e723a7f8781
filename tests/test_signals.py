"""Exit statuses of a run that was asked to stop, and signals that come while it saves."""

import json
import os
import signal

import pytest

from common.signals import Stopped, StopRequest
from tests import tiny
from tests.processes import finish, start


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


def test_a_preempted_run_says_so_until_it_goes_on(tmp_path):
    root, run, said = tiny.photos(tmp_path / "photos"), tmp_path / "run", tmp_path / "said"
    text = tiny.settings(root, run, train={"epochs": 3}).text()
    finish(start(tiny.train_and_stop, text, 25, output=said), said)
    marker = json.loads((run / "PREEMPTED").read_text())
    assert (marker["step"], marker["signal"]) == (25, "SIGTERM") and set(marker) == {"step", "signal", "time"}
    assert finish(start(tiny.train, text, output=said), said).code == 0
    assert not (run / "PREEMPTED").exists()

"""Curves of accuracy against seconds, compared at equal times."""

import pytest

from benchmarks.curves import Mark, seconds_to, smallest_lead
from benchmarks.time_to_result import TURN, Ours
from common.run import Run
from common.sections import open_config

OURS = [Mark(0, 0, 0, 10), Mark(100, 10, 20, 30), Mark(200, 20, 40, 28), Mark(300, 30, 60, 50)]
THEIRS = [Mark(0, 0, 0, 10), Mark(100, 25, 30, 30), Mark(200, 50, 60, 40), Mark(300, 75, 90, 50)]


@pytest.mark.parametrize(("clock", "lead"), [
    ("cpu", 30 - (10 + 20 * 20 / 25)),          # at 20 s: the best of ours so far, and between two of their marks
    ("wall", 30 - (30 + 10 * 10 / 30))])        # at 40 s they are ahead
def test_the_smallest_lead_is_at_one_moment_while_both_train(clock, lead):
    assert smallest_lead(OURS, THEIRS, clock) == pytest.approx(lead, abs=0.05)


def test_an_accuracy_is_reached_when_the_line_first_crosses_it():
    assert seconds_to(OURS, 40, "cpu") == pytest.approx(25, abs=0.05)
    assert seconds_to(OURS, 29, "wall") == pytest.approx(19, abs=0.05)
    assert seconds_to(OURS, 51, "cpu") is None


def test_a_turn_ends_at_its_last_step_where_the_trainer_is_read_late(tmp_path):
    """As on a GPU, whose trainer gives control back for many steps at a time."""
    side = Ours(Run(open_config("demo.yaml", dir=str(tmp_path / "run"), epochs=6, overrides=["train.threads=1"])))
    trainer = side._session.trainer
    trainer.late = True
    for turn in (1, 2, 3):
        side.advance(TURN)
        assert trainer.step == turn * TURN

"""NaN or Inf anywhere, on one process only: nothing is updated on any; too many in a row: back, slower; then a stop."""

import json
import math
import random
import signal
from contextlib import closing

import pytest

from common import distributed
from common.checkpoint import Folder
from common.config import Config
from common.diagnosis import NonFinite
from common.run import Run
from common.session import Session
from common.tree import digest
from tests import tiny
from tests.processes import finish, ranks, start, wait_for_lines

PLAIN = {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}
SECTIONS = {"moco": {"method": {"encoder": PLAIN}}, "instdisc": {"method": {"dictionary": tiny.BANK}}}
PLACES = ["image", "loss", "loss and gradient", "gradient", "keys"]
VALUES = {"NaN": math.nan, "Inf": math.inf}
FAILS = 25                                          # the first step that is not finite


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos"))


def places(method: str) -> list[tuple[str, int, str]]:
    """(what, in which micro-batch of two, the value)"""
    what = PLACES + ["log_z"] * (method == "instdisc")
    return [(place, part, value) for place in what for part in (0, 1) for value in VALUES]


class Spoiler:
    """Stands in for a method's forward: puts ``value`` in a ``place`` of micro-batch ``part``, when it is armed."""

    def __init__(self, method):
        self.method, self.forward, self.armed, self.calls = method, method.forward, None, 0
        method.forward = self

    def arm(self, place, part, value):
        self.armed, self.calls = (place, part, VALUES[value]), 0

    def __call__(self, batch):
        place, part, value = self.armed or (None, 0, 0.0)
        here, self.calls = place and self.calls == part, self.calls + 1
        if not here:
            return self.forward(batch)
        if place == "image":
            batch.views[0][1, 2, 3, 3] = value
        output = self.forward(batch)
        if place in output.carry:
            output.carry[place] = output.carry[place].clone()
            output.carry[place].view(-1)[0] = value
        if place == "gradient":
            output.loss.register_hook(lambda gradient: gradient * value)
        spoil = {"loss": output.loss + value, "loss and gradient": output.loss * value}
        return output._replace(loss=spoil.get(place, output.loss))


def spoil_every_place(text: str, method: str, by_device: bool) -> None:
    """On rank 1 of the job; between two of them one good step. Says of each what was found."""
    session = Session(Run(Config.parse(text, "tiny.yaml")))
    session.start()
    trainer, spoiler = session.trainer, Spoiler(session.run.method)
    trainer.late, trainer.read_every = by_device, 1
    with closing(trainer.steps()) as steps:
        next(steps)
        for case in places(method):
            before = held(trainer)
            if distributed.rank() == 1:
                spoiler.arm(*case)
            bad, spoiler.armed = next(steps), None
            after = held(trainer)
            good = next(steps)
            print(json.dumps({"case": case, "skipped": [bad.skipped, good.skipped], "same": before == after,
                              "steps": good.number - bad.number, "moved": held(trainer) != after, "state": after}))
    distributed.stop()


def held(trainer) -> str:
    """A digest of all that a step may change; the learning rate follows the schedule in any case."""
    return digest([trainer.method.state_dict(), trainer.optimizer.state_dict()["state"]])


@pytest.mark.parametrize("method, by_device", [("moco", False), ("moco", True), ("instdisc", True)])
def test_what_is_not_finite_on_one_of_two_ranks_updates_nothing_on_both(method, by_device, root, tmp_path, soak):
    """Weights, moving averages, queue or bank, statistics of BatchNorm, optimizer: bit for bit as before the step.

    Left out by the host, which has read the step, or as on a GPU by the device.
    """
    text = tiny.settings(root, tmp_path / "run", method, **SECTIONS[method], evaluate={"protocols": []},
                         train={"epochs": 12, "batch_size": 8, "accumulate": 2}).text()
    ended = ranks(spoil_every_place, text, method, by_device, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    found = [[json.loads(line) for line in rank.out.splitlines() if line.startswith("{")] for rank in ended]
    assert [tuple(line["case"]) for line in found[0]] == places(method) and found[0] == found[1]
    for line in found[0]:
        assert line == line | {"skipped": [True, False], "same": True, "steps": 1, "moved": True}, line["case"]
    soak.report("N1", method=method, places=len(found[0]), ranks=2, unchanged=sum(line["same"] for line in found[0]))


def train_failing(text: str, always: bool = False, images: bool = False, late: bool = False) -> None:
    """From step ``FAILS`` on no loss is finite: until the run has gone back, or ``always``. ``late``: as on a GPU."""
    session = Session(Run(Config.parse(text, "tiny.yaml")))
    trainer, forward = session.trainer, session.run.method.forward
    trainer.late, trainer.read_every = late, 7

    def spoiled(batch):
        bad = trainer.step + 1 >= FAILS and (always or trainer.rollbacks == 0)
        if bad and images:
            batch.views[1][2, 0, 0, 0] = math.inf
        output = forward(batch)
        return output._replace(loss=output.loss * math.nan) if bad and not images else output

    session.run.method.forward = spoiled
    try:
        session.train()
    finally:
        distributed.stop()


def failing(root, run, of="moco", **sections):
    """Checkpoints at the ends of epochs: where a run goes back to does not depend on the clock."""
    sections = {"train": {"max_skipped": 3}, "checkpoint": {"every": 1}, "evaluate": {"protocols": []}} | sections
    return tiny.settings(root, run, of, **sections)


def rates(run):
    return [record["lr"] for record in tiny.records(run)]


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """A run whose numbers are all finite, and one that goes back once."""
    folder = tmp_path_factory.mktemp("straight")
    Run(failing(root, folder / "finite")).train()
    train_failing(failing(root, folder / "back").text())
    return folder


def test_a_run_goes_back_to_its_last_good_checkpoint_and_on_at_half_the_rate(straight):
    finite, back = straight / "finite", straight / "back"
    assert [step for step, _ in tiny.losses(back)] == list(range(1, 61)), "every step once"
    assert tiny.losses(back)[:20] == tiny.losses(finite)[:20]
    assert rates(back) == rates(finite)[:20] + [rate / 2 for rate in rates(finite)[20:]]
    event, = tiny.records(back, "event")
    assert (event["event"], event["step"], event["failed"], event["lr_scale"]) == ("rollback", 20, FAILS + 2, 0.5)
    assert "back to here from step 27: not finite for 3 steps in a row. the loss is not finite" in event["text"]
    trainer = tiny.last_state(back)["trainer"]
    assert (trainer["lr_scale"], trainer["rollbacks"], trainer["skipped"]) == (0.5, 1, 0)


def test_a_run_that_is_read_late_goes_back_from_the_same_step_to_the_same_records(root, straight, tmp_path):
    """As on a GPU. The steps after the failure, done before it was read, have left no trace."""
    late, back = tmp_path / "late", straight / "back"
    train_failing(failing(root, late).text(), late=True)
    untimed = {"images_per_second", "data_wait"}
    told = [[{key: value for key, value in record.items() if key not in untimed}
             for kind in ("train", "event") for record in tiny.records(run, kind)] for run in (late, back)]
    assert told[0] == told[1]
    now, then = tiny.last_state(late), tiny.last_state(back)
    assert digest([now["trainer"], now["rng"], now["health"]]) == digest([then["trainer"], then["rng"], then["health"]])


def test_no_checkpoint_is_written_while_steps_are_skipped(straight, root, tmp_path):
    run = tmp_path / "run"
    text = failing(root, run, train={"max_skipped": 9, "rollbacks": 0}, checkpoint={"minutes": 1e-6, "keep": 99})
    with pytest.raises(NonFinite):
        train_failing(text.text(), always=True)
    assert 0 < Folder(run / "checkpoints").files()[0][0] < FAILS        # the last ones are left out on a slow disk


@pytest.mark.parametrize("images", [False, True])
def test_a_run_that_going_back_does_not_help_stops_and_names_step_layer_and_images(images, root, tmp_path):
    run, said = tmp_path / "run", tmp_path / "said"
    ended = finish(start(train_failing, failing(root, run).text(), True, images, output=said), said)
    assert ended.code == 1 and "step 27: the loss, a key or the gradient was not finite for 3 steps in a row; none " \
        "was taken, and 2 rollbacks did not help." in ended.err
    lines = [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rollbacks"]) for line in lines] == [(27, 0), (27, 1), (27, 2)]
    batch = Session(Run(failing(root, run))).loader.images_of(26)
    spoiled = [batch[2]] if images else batch
    assert all(line["images"] == spoiled for line in lines)
    assert lines[0]["cause"] == ("view 1 of these images is not finite." if images else
                                 "the loss is not finite, though the output of every layer was.")
    assert lines[0]["paths"][0] in ended.err
    assert [event["lr_scale"] for event in tiny.records(run, "event") if event["event"] == "rollback"] == [0.5, 0.25]


def test_a_run_that_fails_from_its_first_step_goes_back_to_its_start(root, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.faults.test_numbers.FAILS", 1)
    train_failing(failing(root, tmp_path / "run", "instdisc").text())
    assert [step for step, _ in tiny.losses(tmp_path / "run")] == list(range(1, 61))
    event, = tiny.records(tmp_path / "run", "event")
    assert (event["step"], event["failed"]) == (0, 3)


def test_killed_at_any_moments_around_a_rollback_and_continued(root, straight, tmp_path, soak):
    """The count of rollbacks, the rate and the losses are those of the run that nothing interrupted."""
    runs, kills, equal = soak.count(1, 4), 0, 0
    for number in range(runs):
        run, said, draw = tmp_path / f"run{number}", tmp_path / "said", random.Random(number)
        text = failing(root, run).text()
        for moment in sorted(draw.sample(range(21, 45), 3)):
            process = start(train_failing, text, output=said)
            wait_for_lines(run / "metrics.jsonl", moment, process)
            process.kill()
            kills += finish(process, said).code == -signal.SIGKILL
        ended = finish(start(train_failing, text, output=said), said)
        assert ended.code == 0, ended.err
        assert tiny.losses(run) == tiny.losses(straight / "back") and rates(run) == rates(straight / "back")
        assert tiny.records(run, "event") == tiny.records(straight / "back", "event")
        now, then = tiny.last_state(run), tiny.last_state(straight / "back")
        equal += digest([now["trainer"], now["rng"], now["health"]]) == digest([then["trainer"], then["rng"],
                                                                               then["health"]])
    assert equal == runs
    soak.report("rollback", runs=runs, kills=kills, equal=equal)


def test_two_processes_go_back_together(root, tmp_path):
    text = failing(root, tmp_path / "run", **SECTIONS["moco"]).text()
    ended = ranks(train_failing, text, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    event, = tiny.records(tmp_path / "run", "event")
    assert "the loss is not finite, though the output of every layer was (rank 0, 1)." in event["text"]
    assert len(event["images"]) == 4 and tiny.last_state(tmp_path / "run")["trainer"]["rollbacks"] == 1


def spike(config, stop):
    """Train to step ``stop``; the gradient of step 45 is a hundredfold. Its images, if it was among them."""
    session = Session(Run(config))
    session.start()
    trainer, forward, seen = session.trainer, session.run.method.forward, []

    def spiked(batch):
        output = forward(batch)
        if trainer.step + 1 == 45:
            seen.extend(batch.index.tolist())
            output.loss.register_hook(lambda gradient: gradient * 100)
        return output

    session.run.method.forward = spiked
    for step in trainer.steps(stop):
        session.monitor.step(step)
    session.save()
    return seen


def test_a_spike_is_recorded_with_its_images_and_after_a_stop_all_the_same(root, tmp_path):
    straight, stopped = (tiny.settings(root, tmp_path / name, "instdisc", evaluate={"protocols": []})
                         for name in ("straight", "stopped"))
    seen = spike(straight, 46)
    event, = tiny.records(tmp_path / "straight", "event")
    assert (event["event"], event["step"], event["what"]) == ("spike", 45, "gradient_norm")
    assert event["images"] == seen and event["value"] > 10 * event["median"] > 0
    assert not spike(stopped, 40) and spike(stopped, 46) == seen
    assert tiny.records(tmp_path / "stopped", "event") == [event]

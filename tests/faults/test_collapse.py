"""Runs on scikit-learn's digits that are made to collapse, and sound ones: who is warned, and when."""

import json

import pytest

from common.config import Config
from common.method import Output
from common.run import Run
from common.session import Session
from moco import MoCo

WITHIN = 100            # steps


class WithoutNegatives(MoCo):
    """Two views of an image are pulled together, and nothing is pushed apart."""

    def forward(self, batch):
        q_BC, k_BC = (self.encoder(view_BcHW) for view_BcHW in batch.views)
        loss = (2 - 2 * (q_BC * k_BC).sum(dim=1)).mean()
        return Output(loss, {"loss": loss.detach()}, {"keys": k_BC.detach()})


WAYS = {                # how a run is made to collapse
    "without momentum (MoCo, Sec. 4.1)": ("demo", "method.momentum=0"),
    "a thousandfold rate": ("demo", "optimizer.lr=60"),
    "no negatives": ("demo", f"method.name={__name__}.WithoutNegatives"),
    "InstDisc at a thousandfold rate": ("instdisc_digits", "optimizer.lr=60"),
}


def alarms(folder, config: str, steps: int, *overrides: str) -> list[dict]:
    """The events of the first ``steps`` steps, but for skipped ones."""
    run = Run(Config.load(config, [f"run.dir={folder}", "evaluate.protocols=[]", "log.every=20", *overrides]))
    session = Session(run)
    session.start()
    for step in session.trainer.steps(steps):
        session.monitor.step(step)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"std", "rank", "cosine"} <= next(record for record in records if record["kind"] == "train").keys()
    return [record for record in records if record["kind"] == "event" and record["event"] in ("alarm", "spike")]


def test_a_run_that_collapses_is_told_of_within_100_steps(tmp_path, soak):
    told = {}
    for number, (way, (config, override)) in enumerate(list(WAYS.items())[:soak.count(1, 4)]):
        found = [event for event in alarms(tmp_path / str(number), config, WITHIN, override)
                 if "the features are collapsing" in event["text"]]
        told[way] = found[0]["step"] if found else None
    assert None not in told.values(), told
    soak.report("K1", forced=len(told), told_at_step=told)


@pytest.mark.parametrize("config", ["demo", "instdisc_digits"])
def test_a_sound_run_raises_no_alarm(config, tmp_path, soak):
    steps, seeds = soak.count(WITHIN, 200), range(1, 1 + soak.count(1, 5))
    found = {seed: alarms(tmp_path / str(seed), config, steps, f"run.seed={seed}") for seed in seeds}
    assert not any(found.values()), found
    soak.report("K1", config=config, sound=len(found), steps=steps, false_alarms=0)

"""The two configs for scikit-learn's digits, run as they stand: what they reach, and what a broken run looks like.

The bands leave the spread over seeds and machines below the means of three seeds in docs/results.md.
"""

import json
import math

import pytest

from common.config import Config
from common.run import pretrain


def run(config, folder, *overrides):
    return pretrain(Config.load(config, ["run.dir=" + str(folder), *overrides]))


@pytest.mark.parametrize(("config", "few", "linear"), [("demo", 94.0, 97.0), ("instdisc_digits", 92.0, 97.0)])
def test_digits_are_learned_without_labels(config, few, linear, tmp_path):
    trained = run(config, tmp_path, "evaluate.baselines=false", "evaluate.every=0")
    assert trained.few(10)[0].value >= few
    assert trained.linear()[0].value >= linear
    pixels = trained.evaluator_for(trained.evaluation.protocols, "backbone").measure_pixels()
    few_of_pixels = next(result.value for result in pixels if result.metric == "few")
    assert trained.few(10)[0].value >= few_of_pixels + (3 if config == "demo" else 1)


def test_without_momentum_moco_collapses(tmp_path):
    """MoCo, Sec. 4.1: m = 0 fails. All features become one: the loss is that of chance, every similarity 1."""
    run("demo", tmp_path, "method.momentum=0", "train.epochs=12", "evaluate.protocols=[]")
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["loss"] == pytest.approx(math.log(1025), rel=0.01)
    assert last["pos"] > 0.99 and last["neg"] > 0.95

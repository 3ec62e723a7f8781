"""Configs of metric learning from the command line, on scikit-learn's digits instead of their images: they learn."""

import json
import sys

import pytest

import tools.train

DIGITS = ["data={name: common.data.digits}", "method.encoder.arch=w8s2", "method.encoder.dim=16", "train.epochs=3",
          "train.batch_size=60", "train.device=cpu", "train.threads=1", "log.every=1", "evaluate.baselines=false",
          "evaluate.protocols=[{name: common.evaluate.Retrieval}]"]
RUNS = {
    "n_pair": (1, "optimizer.lr=0.02"),
    "supcon": (2, "optimizer.lr=0.1"),
    "cross_batch_memory": (1, "optimizer.lr=0.3", "method.order.per_class=6", "method.dictionary.dim=16",
                           "method.dictionary.size=300"),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_images_of_a_class_come_together(name, tmp_path, monkeypatch):
    """The mean average precision of such a network before training is 21.5; 10 would be that of a random order."""
    views, *overrides = RUNS[name]
    views = f"views={{name: common.data.recipes.digits, size: 8, num_views: {views}, crop_min: 0.8}}"
    monkeypatch.setattr(sys, "argv", ["train", "--config", name, *DIGITS, views, *overrides, f"run.dir={tmp_path}"])
    assert tools.train.main() == 0
    results = json.loads((tmp_path / "summary.json").read_text())["results"]["trained"]
    assert next(result["value"] for result in results if result["metric"] == "mAP") > 35

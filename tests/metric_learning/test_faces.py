"""Faces: trained on some people, verified on others. The Olivetti faces where they are on the disk, and drawn ones."""

import json

import joblib
import numpy as np
import pytest

from common.data import olivetti
from common.run import Run
from tests import tiny
from tools import verify


def drawn_faces(folder):
    """A smooth pattern for each of 40 people, ten times, each time lit from elsewhere, and noisy; in scikit-learn's
    form."""
    draw = np.random.default_rng(0)
    person_40HW = draw.normal(size=(40, 8, 8)).repeat(8, axis=1).repeat(8, axis=2)
    light_400W = draw.normal(size=(400, 1, 1)) * np.linspace(-1, 1, 64)
    pixels = person_40HW.repeat(10, axis=0) + light_400W + 0.3 * draw.normal(size=(400, 64, 64))
    pixels = (255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.uint8)
    joblib.dump(pixels.transpose(0, 2, 1).reshape(400, -1), folder / "olivetti_py3.pkz", compress=3)


@pytest.mark.parametrize("faces", ["drawn", "real"])
def test_people_that_training_has_not_seen_are_told_apart(faces, tmp_path, monkeypatch):
    if faces == "drawn":
        monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
        drawn_faces(tmp_path)
    try:
        olivetti()
    except ValueError as error:
        pytest.skip(str(error))
    run = tmp_path / "run"
    config = tiny.settings(tmp_path, run, train={"epochs": 8, "batch_size": 40}, log={"every": 10},
                           evaluate={"every": 0, "protocols": []}, optimizer={"lr": 0.06, "momentum": 0.9})
    config.set("data", {"name": "common.data.olivetti"}, "test")
    config.set("views", {"name": "common.data.recipes.fashion", "size": 32, "num_views": 1, "crop_min": 0.8}, "test")
    config.set("method", {"name": "metric_learning.Triplet", "order": {"name": "common.data.orders.Balanced"},
                          "encoder": {"name": "common.backbones.encoder", "arch": "w16p4", "dim": 32}}, "test")
    Run(config).train()
    trained, untrained = area(run), area(run / "checkpoints" / "step-00000000.pt", "--untrained")
    assert trained > 80 and (trained > untrained + 3 or faces == "real"), (trained, untrained)


def area(checkpoint, *words):
    """AUC of verification, in percent, of a thousand pairs of images of the people to test on; 50 by chance."""
    results = checkpoint.with_name("results.jsonl")
    verify.main(["--checkpoint", str(checkpoint), "--layer", "head", "--draw", "1000", "--no-picture", *words,
                 "--results", str(results), "--scores", str(results.with_suffix(".csv"))])
    found = [json.loads(line) for line in results.read_text().splitlines()]
    return next(line["value"] for line in found if line["metric"] == "AUC")

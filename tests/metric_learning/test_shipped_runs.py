"""Configs of metric learning on scikit-learn's digits instead of their images: all are built, some learn."""

import json
import shlex
import sys

import pytest

import tools.evaluate
import tools.train
import tools.verify
from common.announce import closing
from common.config.files import CONFIGS
from common.run import Run, open_config
from tests import tiny

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


SUPERVISED = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "name: metric_learning." in path.read_text())
CLASSIFY, KNN, HEAD = "evaluate.py classify --checkpoint X", "evaluate.py knn --checkpoint X", " --layer head"
LAST = {"siamese": [KNN + HEAD, "verify.py --checkpoint X"],
        "centre_loss": [CLASSIFY, "verify.py --checkpoint X --layer head"],
        "centre_loss_2d": [CLASSIFY, "verify.py --checkpoint X"],
        "softmax_contrastive": [CLASSIFY, "verify.py --checkpoint X"],
        "softmax_contrastive_resnet50": [CLASSIFY, "verify.py --checkpoint X"]}


def built(name, *overrides):
    return Run(open_config(name, overrides=[*overrides, "train.device=cpu"]))


def commands(run):
    """Those of the last lines, after the python that runs them, but for the export; the folder is X."""
    lines = [line for line in closing(run, 1.0, 0.0).replace(str(run.dir), "X").splitlines() if "tools/" in line]
    return [line.partition("tools/")[2] for line in lines if "export.py" not in line]


@pytest.mark.parametrize("name", SUPERVISED)
def test_every_config_is_built_and_its_last_lines_tell_how_to_measure_it(name, tmp_path):
    run = built(name, "data={name: common.data.digits}", f"run.dir={tmp_path}",
                f"views={{name: common.data.recipes.digits, num_views: {1 + (name == 'supcon')}}}")
    assert commands(run) == LAST.get(name, [KNN + HEAD, "verify.py --checkpoint X --layer head"])
    for command, parse in zip(commands(run), (tools.evaluate.parse, tools.verify.parse), strict=True):
        assert str(parse(shlex.split(command)[1:]).checkpoint) == "X"


def test_a_run_of_pairs_is_verified_by_a_list(tmp_path):
    images = tiny.photos(tmp_path / "images")
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))
    (tmp_path / "list.txt").write_text("".join(f"{name} {names[0]} {i % 2}\n" for i, name in enumerate(names)))
    data = f"data={{name: common.data.pair_list, train: {tmp_path}/list.txt, root: {images}}}"
    run = built("contrastive", data, "method.pairs=adjacent", "method.order=null", "train.batch_size=8", "views.size=8",
                f"run.dir={tmp_path}/run")
    assert commands(run) == ["verify.py --checkpoint X --layer head --pairs /path/to/pairs.txt"]

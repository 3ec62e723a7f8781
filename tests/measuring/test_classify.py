"""``evaluate.py classify`` and ``draw``: what a run's own classifier says, and its features in a plane."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from common.config import Config
from common.measuring import features_picture
from common.measuring.draw import titles
from common.measuring.features_picture import Cloud
from common.trained import load_trained
from tests import tiny
from tests.processes import ranks, tool
from tools import evaluate

DIGITS = ["data={name: common.data.digits}", "views={name: common.data.recipes.digits, num_views: 1, crop_min: 0.8}",
          "method.encoder.arch=w8s2", "evaluate.protocols=[]", "train.epochs=5", "train.device=cpu", "train.threads=1",
          "train.workers=0", "log.every=10"]
RUNS = {"joint": "softmax_contrastive", "flat": "centre_loss_2d"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs on digits, a hundred steps each, from the command line."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in RUNS.items():
        done = tool("train", "--config", config, *DIGITS, f"run.dir={folder / name}", cwd=folder)
        assert done.code == 0, done.err
    return folder


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name, reached", [("joint", 80), ("flat", 40)])
def test_a_run_from_the_command_line_learns_the_classes(runs, name, reached, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    evaluate.main(["classify", "--checkpoint", str(runs / name), "--results", str(results)])
    assert "classify classes=10" in capsys.readouterr().out
    (line,) = lines(results)
    assert line["value"] > reached and (line["features"], line["layer"]) == ("trained classifier", "classifier")
    assert line["protocol"] == {"classes": 10, "train": 1297, "test": 500}
    records = tiny.records(runs / name)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"] and records[-1]["top1"] > records[0]["top1"] + 0.2


def test_the_value_is_the_share_of_right_answers(runs, tmp_path):
    trained, results = load_trained(runs / "flat"), tmp_path / "results.jsonl"
    test = trained.splits().test
    x = (test.array.float() / 255 - torch.tensor(trained.views.mean)) / torch.tensor(trained.views.std)
    with torch.no_grad():
        x = trained.encoder.head(trained.encoder.backbone(x))
        right = (trained.method.classifier(x).argmax(dim=1) == test.labels).double().mean().item()
    evaluate.main(["classify", "--checkpoint", str(runs / "flat"), "--results", str(results)])
    assert lines(results)[0]["value"] == pytest.approx(100 * right)


def test_test_images_of_classes_that_were_not_trained_on_are_left_out_and_counted(runs, tmp_path, capsys):
    """A classifier cannot be right on them."""
    results, of = tmp_path / "results.jsonl", load_trained(runs / "flat").splits().test
    some = "data={name: common.data.only_classes, of: {name: common.data.digits}, classes: ['0', '1'], test: %s}"
    with pytest.raises(SystemExit):
        evaluate.main(["classify", "--checkpoint", str(runs / "flat"), some % "others"])
    assert "no test image of digits is of a class that has training images" in capsys.readouterr().err
    evaluate.main(["classify", "--checkpoint", str(runs / "flat"), "--results", str(results), some % "all"])
    evaluate.main(["classify", "--checkpoint", str(runs / "flat"), "--results", str(results), some % "same"])
    left, same = lines(results)
    assert left["value"] == same["value"]
    assert left["protocol"] == same["protocol"] | {"of_other_classes_left_out": int((of.labels > 1).sum())}


def test_two_processes_answer_as_one_does(runs, tmp_path):
    words = ["classify", "--checkpoint", str(runs / "flat"), "--results"]
    evaluate.main([*words, str(tmp_path / "one.jsonl")])
    ended = ranks(evaluate.main, [*words, str(tmp_path / "two.jsonl")], output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    (one,), (two,) = (lines(tmp_path / name) for name in ("one.jsonl", "two.jsonl"))
    for key in ("value", "interval", "protocol"):
        assert one[key] == two[key]


def test_a_run_without_a_classifier_is_told_so(tmp_path, capsys):
    tiny.digits_run(tmp_path)
    with pytest.raises(SystemExit):
        evaluate.main(["classify", "--checkpoint", str(tmp_path)])
    assert "moco.MoCo trains no classifier. Measure its features" in capsys.readouterr().err


def test_other_classes_and_no_test_images_are_refused(runs, tmp_path, capsys):
    root = tiny.photos(tmp_path / "photos", classes=2)
    for more, message in (([], "photos has no labelled test images, and a classifier"),
                          (["data.test=" + str(root)], "2 classes in")):
        with pytest.raises(SystemExit):
            evaluate.main(["classify", "--checkpoint", str(runs / "joint"), "--data", str(root), *more])
        assert message in capsys.readouterr().err


# pictures

def test_two_runs_are_drawn_side_by_side(runs, tmp_path, capsys):
    file = tmp_path / "new" / "features.png"
    evaluate.main(["draw", str(runs / "flat"), str(runs / "flat"), "--picture", str(file), "--images", "100"])
    assert f"drawn: {file}" in capsys.readouterr().out
    width, height = Image.open(file).size
    assert width == 2 * (64 + 260 + 20) and height > 260


def test_a_head_that_is_no_plane_is_refused_before_any_image_is_read(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["draw", str(runs / "flat"), str(runs / "joint"), "--picture", str(tmp_path / "a.png")])
    assert "its head gives 64 features, and a picture shows 2" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_points_are_where_their_features_are_in_the_colour_of_their_class_and_means_are_white(tmp_path):
    at = torch.tensor([[-3.0, 0.0], [-1.0, 0.0], [5.0, 0.0], [5.0, 8.0]])               # two of each class
    features_picture.draw(tmp_path / "a.png", [Cloud(at, torch.tensor([0, 0, 1, 1]), ["a", "b"], "", "")], 1000)
    picture = Image.open(tmp_path / "a.png").convert("RGB")

    def pixel(x, y):                            # the middle is (1, 4), the reach 1.05 * 4
        return picture.getpixel((int(64 + 260 * ((x - 1) / 8.4 + 0.5)), int(40 + 260 * (0.5 - (y - 4) / 8.4))))

    assert [pixel(x, y) for x, y in at.tolist()] == [features_picture.COLOURS[c] for c in (0, 0, 1, 1)]
    assert pixel(-2, 0) == pixel(5, 4) == (255, 255, 255)                    # on the grid, whose lines are grey
    assert [pixel(x, y) for x, y in ((0, 2), (4, 6))] == [(221, 221, 221)] * 2


@pytest.mark.parametrize("middle, reach, expected", [(0, 10, ["-10", "-5", "0", "5", "10"]),
                                                     (1.5, 1.2, ["0.5", "1", "1.5", "2", "2.5"]), (0, 1e-7, None)])
def test_ticks_are_round_and_few(middle, reach, expected):
    ticks = features_picture._ticks(middle, reach)
    assert 2 <= len(ticks) <= 6 and all(-1e-9 <= place <= 1 + 1e-9 for place in ticks)
    assert expected is None or list(ticks.values()) == expected


def test_a_title_is_what_differs(runs):
    one = load_trained(runs / "flat")
    recorded = Config.parse(one.recorded.text(), "again", ["method.weight=0.25"])
    assert titles([one, replace(one, recorded=recorded)]) == ["weight 0.01", "weight 0.25"]
    assert titles([one, one]) == ["flat", "flat"]

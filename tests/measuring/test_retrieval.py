"""``evaluate.py retrieval``, its picture, and the records that it and the other commands leave."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import digits
from common.data.datasets import Images
from common.evaluate import Features, Retrieval
from common.measuring import gallery, records
from tests import tiny
from tools import evaluate

KEYS = {"metric", "value", "interval", "interval_by", "spread", "features", "layer", "k", "tau", "split", "protocol",
        "checkpoint", "chosen", "step", "epoch", "seed", "config", "weights", "data", "against", "command", "folder",
        "commit", "versions", "time"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: digits, five steps."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    tiny.digits_run(folder)
    return folder


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_command_prints_records_and_draws(run, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    evaluate.main(["retrieval", "--checkpoint", str(run), "--k", "1", "5", "--pixels", "--results", str(results)])
    out = capsys.readouterr().out
    assert "recall k=1" in out and "300 queries, each against 299 images" in out
    found = lines(results)
    assert [(line["features"], line["metric"], line["k"]) for line in found] == [
        (name, metric, k) for name in ("raw pixels", "trained backbone")
        for metric, k in (("recall", 1), ("recall", 5), ("mAP", None), ("mAP@R", None))]
    assert {line["split"] for line in found} == {"leave-one-out"}
    train, test = digits(300)
    x = test.array.flatten(1).float() / 255
    std, mean = torch.std_mean(train.array.float() / 255, correction=0)
    expected = Retrieval([1, 5])(Features(x, test.labels, (x - mean) / std, test.labels, "pixels"))
    assert [line["value"] for line in found[:4]] == pytest.approx([result.value for result in expected], abs=1.0)
    assert Image.open(run / "retrieval.png").size[0] > 1000


def test_test_images_are_searched_for_among_the_training_images(run, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    evaluate.main(["retrieval", "--checkpoint", str(run), "--gallery", "--k", "1", "--no-picture", "--results",
                   str(results)])
    evaluate.main(["knn", "--checkpoint", str(run), "--k", "1", "--results", str(results)])
    recall, _, _, knn = lines(results)
    assert (recall["split"], recall["protocol"]["gallery"], recall["protocol"]["queries"]) == ("test", 1497, 300)
    assert recall["value"] == knn["value"]
    with pytest.raises(SystemExit):
        evaluate.main(["retrieval", "--checkpoint", str(run), "--gallery", "--images", "train"])
    assert "Give one of the two" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_costs_nothing_but_itself(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    evaluate.main(["retrieval", "--checkpoint", str(run), "--results", str(tmp_path / "results.jsonl"),
                   "--picture", str(tmp_path / "file" / "picture.png")])
    said = capsys.readouterr()
    assert "warning:" in said.err and "not drawn" in said.err and "mAP" in said.out


def test_a_results_file_that_cannot_be_written_does_not_cost_the_values(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    evaluate.main(["knn", "--checkpoint", str(run), "--k", "5", "--results", str(tmp_path / "file" / "results.jsonl")])
    said = capsys.readouterr()
    assert "trained backbone" in said.out and "added to" not in said.out
    assert "warning:" in said.err and "not added: File exists" in said.err


def test_a_record_alone_is_enough_to_repeat_it(run, tmp_path, monkeypatch):
    """Of each command: the words that it holds, in the folder that it holds, give the same record again."""
    monkeypatch.chdir(run.parent)
    results = tmp_path / "results.jsonl"
    for words in ("knn --k 1 20 --tau 0.07 0.5 --pixels --layer head", "few --labels 3 --draws 2",
                  "linear --epochs 2", "retrieval --images train --no-picture"):
        command, *rest = words.split()
        evaluate.main([command, "--checkpoint", "small", *rest, "--results", str(results)])
        first = lines(results)
        results.unlink()
        monkeypatch.chdir(tmp_path)                                     # somewhere else
        os.chdir(first[0]["folder"])
        evaluate.main(first[0]["command"])
        again = lines(results)
        results.unlink()
        assert first and [{**line, "time": None} for line in again] == [{**line, "time": None} for line in first]
        assert all(set(line) == KEYS for line in first), set(first[0]) ^ KEYS


def test_a_record_says_what_was_measured_and_on_what(run, tmp_path):
    results = tmp_path / "results.jsonl"
    evaluate.main(["knn", "--checkpoint", str(run), "--k", "5", "--pixels", "--results", str(results)])
    pixels, trained = lines(results)
    assert (trained["split"], trained["layer"], trained["k"], trained["tau"]) == ("test", "backbone", 5, 0.07)
    assert trained["checkpoint"] == str(run / "checkpoints" / "step-00000005.pt")
    assert (trained["step"], trained["epoch"], trained["seed"], trained["interval_by"]) == (5, 1.0, 3, "Wilson")
    assert trained["data"]["name"] == "common.data.digits" and "torch" in trained["versions"]
    assert pixels["weights"] is None and pixels["checkpoint"] is None and pixels["config"] == trained["config"]


def test_the_split_is_said_without_test_images(run, tmp_path):
    results = tmp_path / "results.jsonl"
    for command in ("knn", "few"):
        evaluate.main([command, "--checkpoint", str(run), "--results", str(results), "data.test=0"])
    assert [line["split"] for line in lines(results)] == ["leave-one-out"] * 2 + ["fifth-held-out"] * 5


def colours(count, sizes=((40, 30), (16, 16), (9, 50))):
    """Images of three sizes: even ones red, odd ones blue, in files of no kind: each is read by itself."""
    class Sized(Images):
        channels, size = 3, 16

        def read(self, i):
            image = torch.zeros(3, *sizes[i % len(sizes)], dtype=torch.uint8)
            image[0 if i % 2 == 0 else 2] = 200
            return image

    labels = torch.arange(count) % 2
    return Sized("colours", [str(i) for i in range(count)], labels, ["red", "blue,\na name that is long"], None)


def features(count=12):
    """Image i looks like i + 1: half of the nearest are wrong."""
    x = torch.stack([torch.tensor([1.0, 0.1 * i]) for i in range(count)])
    return Features(torch.eye(2), torch.arange(2), x, torch.arange(count) % 2, "backbone")


def test_the_picture_frames_right_and_wrong_and_shows_each_image(tmp_path):
    images, file = colours(12), tmp_path / "picture.png"
    query = Retrieval().query(features())
    gallery.draw(query, images, images, file)
    sheet = np.asarray(Image.open(file).convert("RGB")).astype(int)
    _, nearest = gallery.nearest(query, torch.arange(12)[::2], gallery.NEIGHBOURS)
    step, height = gallery.SIDE + 2 * gallery.FRAME + gallery.GAP, \
        gallery.SIDE + 2 * gallery.FRAME + gallery.CAPTION + gallery.GAP
    for row, (i, neighbours) in enumerate(zip(range(0, 12, 2), nearest, strict=True)):
        top = gallery.TITLE + row * height
        for column, j in enumerate(neighbours.tolist(), 1):
            left = 3 * gallery.GAP + column * step
            right = (i - j) % 2 == 0
            assert tuple(sheet[top + gallery.FRAME + gallery.SIDE // 2, left + 2]) == gallery.COLOUR[right]
            middle = sheet[top + gallery.FRAME + gallery.SIDE // 2, left + gallery.FRAME + gallery.SIDE // 2]
            assert tuple(middle) == ((200, 0, 0) if j % 2 == 0 else (0, 0, 200))
            mark = sheet[top:top + 22, left:left + 22]                  # white strokes tell the marks apart
            assert (mark == 255).all(axis=2).any()


def test_right_and_wrong_have_marks_of_their_own():
    marks = []
    for right in (True, False):
        sheet = Image.new("RGB", (30, 30))
        gallery._mark(sheet, 0, 0, right)
        marks.append((np.asarray(sheet) == 255).all(axis=2))
    assert (marks[0] != marks[1]).sum() > 20
    luma = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in gallery.COLOUR.values()]
    assert all(value < 140 for value in luma)                           # white strokes are seen on both


def test_rows_of_features_are_matched_with_images_though_some_are_unreadable_or_unlabelled():
    images = digits(300).test
    images.labels = images.labels.clone()
    images.labels[[0, 7]] = -1
    images.bad[3] = "cut off"
    kept = [i for i in range(300) if i not in (0, 3, 7)]
    assert gallery.image_of_row(images, 297).tolist() == kept
    images.bad.clear()
    assert gallery.image_of_row(images, 298).tolist() == sorted([3, *kept])


def test_appending_keeps_what_is_there(tmp_path):
    records.append(tmp_path / "new" / "results.jsonl", [{"a": 1}])
    records.append(tmp_path / "new" / "results.jsonl", [{"a": 2}, {"a": 3}])
    assert [line["a"] for line in lines(tmp_path / "new" / "results.jsonl")] == [1, 2, 3]


def test_a_line_that_a_full_disk_cut_off_is_said_and_costs_no_other(tmp_path):
    resource, path = pytest.importorskip("resource"), tmp_path / "results.jsonl"
    records.append(path, [{"a": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, before[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            records.append(path, [{"a": 22222222}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    records.append(path, [{"a": 3}])
    assert path.read_text().splitlines() == ['{"a": 1}', '{"a', '{"a": 3}']

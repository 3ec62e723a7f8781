"""The table of results."""

import pytest
import torch

from common.evaluate import Result, table
from common.evaluate.result import top1


def knn(value, k, layer="backbone", tau=0.07, test=500):
    return Result("knn", value, None, {"layer": layer, "k": k, "tau": tau, "norm": "l2", "train": 1297, "test": test})


def retrieval(metric, value, left_out=0, **setting):
    protocol = {"layer": "backbone", **setting, "images": "test", "queries": 490, "gallery": 499, "left_out": left_out}
    return Result(metric, value, None, protocol, (value - 1, value + 1))


def few(value, spread, layer="backbone"):
    return Result("few", value, spread, {"layer": layer, "labels": 10, "draws": 10, "train": 1297, "test": 500})


def test_rows_are_aligned_and_the_protocols_follow():
    rows = {"raw pixels": [knn(98.2, 20, "pixels"), knn(97.16, 200, "pixels"), few(90.3, 1.24, "pixels")],
            "trained backbone": [knn(98.0, 20), knn(100.0, 200), few(96.0, 0.3)]}
    assert table(rows).splitlines() == [
        "                  knn k=20  knn k=200  few labels=10",
        "raw pixels            98.2       97.2     90.3 ± 1.2",
        "trained backbone      98.0      100.0     96.0 ± 0.3",
        "",
        "Top-1 accuracy in percent on features of the backbone, 1,297 training and 500 test images; "
        "± is the standard deviation over draws of labels.",
        "knn(k=20, tau=0.07, norm=l2)",
        "knn(k=200, tau=0.07, norm=l2)",
        "few(labels=10, draws=10)",
    ]


def test_a_value_that_was_not_measured_is_a_dash():
    lines = table({"raw pixels": [knn(98.2, 20)], "trained backbone": [knn(98.0, 20), knn(97.0, 200)]}).splitlines()
    assert lines[1].split() == ["raw", "pixels", "98.2", "-"]
    assert "±" not in "".join(lines)


def test_columns_that_differ_later_say_so():
    header = table({"trained": [knn(98.0, 20), knn(97.0, 20, tau=0.1)]}).splitlines()[0]
    assert header.split() == ["knn", "k=20", "tau=0.07", "knn", "k=20", "tau=0.1"]


def test_a_metric_with_one_column_is_not_told_apart_by_what_only_another_needs():
    header = table({"trained": [knn(98.0, 20), knn(97.0, 20, tau=0.1), few(96.0, 0.3)]}).splitlines()[0]
    assert header.endswith("tau=0.1  few labels=10")


def test_rows_without_a_value_in_a_block_are_left_out_of_it():
    wide = "a" * 90
    lines = table({wide: [knn(98.0, 20), knn(98.0, 200)], "other": [knn(97.0, 200)]}).splitlines()
    assert [line.split()[0] if line else "" for line in lines[:6]] == ["knn", wide, "", "knn", wide, "other"]


def test_other_numbers_of_images_are_said():
    assert "1,297 training and 500 test images or 1,297 training and 900 test images" in table(
        {"a": [knn(98.0, 20)], "b": [knn(98.0, 20, test=900)]})


def test_the_layer_is_said_and_pixels_have_none():
    assert "percent on features of the head, 1,297" in table({"pixels": [knn(98.0, 20, "pixels")],
                                                              "trained": [knn(98.0, 20, "head")]})
    assert "percent, 1,297" in table({"pixels": [knn(98.0, 20, "pixels")]})


def test_two_layers_in_one_row_are_refused():
    with pytest.raises(ValueError, match="row 'trained' has two values"):
        table({"trained": [knn(98.0, 20), knn(97.0, 20, layer="head")]})


def test_a_label_names_what_the_value_depends_on():
    assert knn(98.0, 20).label() == "knn(layer=backbone, k=20, tau=0.07, norm=l2)"
    assert knn(98.04, 20).text() == "98.0"


def test_top1_is_a_percentage():
    assert top1(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0])) == 75


def test_what_is_wider_than_a_line_goes_on_below():
    grid = [knn(98.0 + k / 100, k, tau=tau)._replace(interval=(97, 99)) for tau in (0.07, 0.1) for k in (1, 20, 200)]
    lines = table({"raw pixels": grid, "trained backbone": grid}, intervals=True).splitlines()
    assert max(map(len, lines)) <= 100
    headers = [lines[0], lines[4]]
    assert [header.count("knn") for header in headers] == [4, 2] and lines[3] == ""
    assert [line.split()[0] for line in lines[1:3] + lines[5:7]] == ["raw", "trained"] * 2
    assert lines[5].split()[2] == "98.2" and lines[6].endswith("100.0 [97.0, 99.0]")


def test_a_column_that_has_no_room_stands_alone():
    lines = table({"a" * 120: [knn(98.0, 20), knn(97.0, 200)]}).splitlines()
    assert [line.split()[-1] if line else "" for line in lines[:5]] == ["k=20", "98.0", "", "k=200", "97.0"]


def test_retrieval_is_no_accuracy_and_stands_in_columns_of_its_own():
    text = table({"trained": [knn(98.0, 20), retrieval("recall", 97.0, k=20), retrieval("mAP", 55.0, left_out=3)]})
    assert text.splitlines()[0].split() == ["knn", "k=20", "recall", "k=20", "mAP", "images=test"]
    assert text.splitlines()[1].split() == ["trained", "98.0", "97.0", "55.0"]
    assert "In percent on features of the backbone, 1,297 training and 500 test images or 490 queries, each against " \
        "499 images or 490 queries (3 more have none to find), each against 499 images." in text
    assert "Top-1 accuracy." in text and "mAP: mean average precision" in text and "recall@k: queries" in text

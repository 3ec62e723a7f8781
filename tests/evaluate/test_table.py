"""The table of results."""

import pytest
import torch

from common.evaluate import Result, table
from common.evaluate.result import top1


def knn(value, k, layer="backbone", tau=0.07, test=500):
    return Result("knn", value, None, {"layer": layer, "k": k, "tau": tau, "norm": "l2", "train": 1297, "test": test})


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

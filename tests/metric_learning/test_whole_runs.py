"""Whole runs in the orders of metric learning: stopped and gone on with, on two processes, with odd labels."""

import numpy as np
import pytest
import torch

from common import distributed
from common.config import Config, ConfigError
from common.run import Run
from common.tree import digest
from tests import tiny
from tests.processes import ranks

ORDERS = {"balanced": {"name": "common.data.orders.Balanced", "per_class": 2},
          "pairs": {"name": "common.data.orders.RandomPairs", "positive": 0.3}}
ENCODER = {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}
MEMORY = {"name": "metric_learning.Memory", "size": 80, "dim": 16}      # holds which images a run sees
EVERY = pytest.mark.parametrize("order", ORDERS)


LABELS = [0, 2, 3, 4, -1] * 7 + [6, 6, 6, -1, 8]           # 40 images; no image of 1, 5 and 7, one of 8, eight of none


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images and labels as arrays."""
    folder = tmp_path_factory.mktemp("arrays")
    draw = np.random.default_rng(0)
    np.save(folder / "images.npy", draw.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    np.save(folder / "labels.npy", np.array(LABELS))
    np.save(folder / "alone.npy", np.arange(40))
    return folder


def config(root, run, order, **train) -> Config:
    """Two epochs of five steps of eight images."""
    made = tiny.settings(root, run, "instdisc", train={"epochs": 2, "batch_size": 8, "workers": 1, **train},
                         evaluate={"every": 0, "protocols": []})
    made.set("data", {"name": "common.data.arrays", "train": str(root / "images.npy"),
                      "train_labels": str(root / "labels.npy")}, "the test")
    made.set("method", {"name": "metric_learning.Contrastive", "margin": 2.0, "pairs": "all", "order": ORDERS[order],
                        "encoder": ENCODER, "dictionary": MEMORY}, "the test")
    return Config.parse(made.text(), "tiny.yaml")


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """The folder of the runs that nothing stopped, by order."""
    folder = tmp_path_factory.mktemp("straight")
    for order in ORDERS:
        Run(config(root, folder / order, order)).train()
    return folder


@EVERY
def test_images_without_a_label_and_in_classes_too_small_are_not_seen(order, root, straight):
    method = tiny.last_state(straight / order)["trainer"]["method"]
    image, label = method["dictionary.image"], method["dictionary.label"]
    assert torch.equal(label, torch.tensor(LABELS)[image])
    assert {*label.tolist()} == ({0, 2, 3, 4, 6} if order == "balanced" else {0, 2, 3, 4, 6, 8})


@EVERY
@pytest.mark.parametrize("stop", [3, 7])                                # in the first epoch, in the second
def test_stopped_and_continued_is_the_straight_run_bit_for_bit(order, stop, root, straight, tmp_path):
    text = config(root, tmp_path, order).text()
    tiny.train_and_stop(text, stop)
    assert tiny.last_state(tmp_path)["trainer"]["step"] == stop
    tiny.train(text)
    assert tiny.losses(tmp_path) == tiny.losses(straight / order)
    assert digest(tiny.last_state(tmp_path)["trainer"]) == digest(tiny.last_state(straight / order)["trainer"])


def train_each(*texts: str) -> None:
    for text in texts:
        tiny.train(text)
    distributed.stop()


def test_two_processes_see_the_images_of_one_in_each_step(root, straight, tmp_path):
    """The memory holds which images there were, eight of each step, rank by rank."""
    texts = [config(root, tmp_path / order, order).text() for order in ORDERS]
    ended = ranks(train_each, *texts, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    for order in ORDERS:
        assert tiny.summary(tmp_path / order)["processes"] == 2
        found, expected = (tiny.last_state(run / order)["trainer"]["method"] for run in (tmp_path, straight))
        assert (expected["dictionary.image"] >= 0).all()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4 if value.is_floating_point() else 0)
        found, expected = ([record["loss"] for record in tiny.records(run / order)] for run in (tmp_path, straight))
        assert found == pytest.approx(expected, abs=1e-5)


def test_batches_without_a_positive_pair_give_no_loss_and_leave_the_weights(root, tmp_path):
    """In shuffled order, of images each alone in its class."""
    made = config(root, tmp_path / "run", "balanced")
    for where, value in (("data.train_labels", str(root / "alone.npy")), ("method.order", None),
                         ("method.dictionary", None), ("method.margin", 1e-6), ("optimizer.weight_decay", 0.0)):
        made.set(where, value, "the test")
    run = Run(Config.parse(made.text(), "tiny.yaml"))
    before = {name: value.clone() for name, value in run.method.named_parameters()}
    run.train()
    assert [record["loss"] for record in tiny.records(run.dir)] == 10 * [0.0]
    assert all(torch.equal(before[name], value) for name, value in run.method.named_parameters())


def test_too_few_images_of_a_class_are_said_before_training(root, tmp_path):
    made = config(root, tmp_path, "balanced", batch_size=16)
    made.set("method.order", {**ORDERS["balanced"], "per_class": 8}, "the test")
    with pytest.raises(ConfigError, match="a step takes 8 images of each of 2 classes, and of the 6 classes .* 0 hold"):
        Run(Config.parse(made.text(), "tiny.yaml"))


def test_images_that_a_method_cannot_learn_from_are_no_fault_of_their_order(root, tmp_path):
    made = config(root, tmp_path, "balanced")
    np.save(tmp_path / "one.npy", np.full(40, 3))
    made.set("data.train_labels", str(tmp_path / "one.npy"), "the test")
    with pytest.raises(ConfigError, match=": method: .* has labelled images of 1 class"):
        Run(Config.parse(made.text(), "tiny.yaml"))

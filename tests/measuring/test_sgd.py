"""The published linear probes: a plain loop gives the same classifier, and the backbone stays what it was."""

import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import counter, distributed
from common.config import ConfigError
from common.data import folder
from common.data.datasets import Splits
from common.data.loader import Loader
from common.data.memory import numbered
from common.data.recipes import digits, moco_v2
from common.data.subset import Subset
from common.evaluate.features import Features, held_out
from common.measuring.classifier import Classifier, linear
from common.measuring.frozen import untouched
from common.measuring.labelled import augmented, labelled
from common.measuring.sgd import RECIPES, probe
from common.measuring.teaching import batch_for, predict, teaching
from common.optim import sgd
from tests import tiny
from tests.measuring.runs import opened, trained_run
from tests.processes import ranks, run_tool, tool

SHORT = RECIPES["moco"].changed(epochs=5, batch=8, lr=0.5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("sgd"))


@pytest.fixture
def trained(run):
    return opened(run)


def in_memory(label_n, test=None) -> Splits:
    """Images of one size whose brightness is their class."""
    def images(name, label_n):
        label_n = torch.tensor(label_n)
        noise = counter.integers(40, 0, torch.arange(len(label_n) * 3 * 64)).view(-1, 3, 8, 8)
        array = (noise + 50 * label_n.clamp(min=0).view(-1, 1, 1, 1)).to(torch.uint8)
        return numbered(name, array, label_n, [str(i) for i in range(5)])
    return Splits(images("train", label_n), None if test is None else images("test", test))


@pytest.mark.parametrize("name, lr_of_256, batch, epochs, rates", [
    ("moco", 30, 256, 100, {0: 1, 59: 1, 60: 0.1, 79: 0.1, 80: 0.01, 99: 0.01}),
    ("moco_v3", 0.1, 1024, 90, {0: 1, 0.9: 1, 45: 0.5, 45.7: 0.5, 89: 0.5 * (1 + math.cos(math.pi * 89 / 90))}),
    ("moco_v3_vit", 3, 1024, 90, {0: 1, 30: 0.75, 60.5: 0.25}),
    ("lightly", 0.1, 256, 90, {0: 1, 45: 0.5, 45.5: 0.5 * (1 + math.cos(math.pi * 45.5 / 90))}),
])
def test_the_recipes_are_those_that_were_published(name, lr_of_256, batch, epochs, rates):
    recipe = RECIPES[name]
    assert (recipe.batch, recipe.epochs) == (batch, epochs) and recipe.lr == pytest.approx(lr_of_256 * batch / 256)
    schedule = recipe.schedule(epochs)
    assert {epoch: schedule(epoch) for epoch in rates} == pytest.approx(rates)
    head = linear(200, 50, recipe.std, seed=0)
    if name != "lightly":
        assert head.bias.abs().max() == 0 and head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    optimizer = sgd(Classifier(nn.Identity(), head), batch, lr=recipe.lr)
    assert [(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.9, 0)]


def test_what_differs_from_the_protocol_stands_in_it():
    assert "changed" not in RECIPES["moco"].changed().protocol()
    smaller = RECIPES["moco"].changed(batch=64, epochs=10)
    assert (smaller.lr, smaller.protocol()["changed"]) == (7.5, "lr batch epochs")
    assert RECIPES["moco_v3"].changed(lr=0.2).protocol()["changed"] == "lr"
    assert [smaller.schedule(10)(epoch) for epoch in (5, 6, 8)] == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": math.nan}, {"crop_min": 1.5}])
def test_settings_that_no_probe_could_use_are_refused(wrong):
    with pytest.raises(ValueError, match="^--"):
        RECIPES["moco"].changed(**wrong)


def test_crops_are_mirrored_only_where_the_runs_views_are():
    assert str(augmented(moco_v2(8))).count("HorizontalFlip") == 1 and "(0.08, 1.0)" in str(augmented(moco_v2(8)))
    assert "HorizontalFlip" not in str(augmented(digits()))


def test_the_classifier_is_that_of_a_plain_loop(trained):
    """The same order and crops, a backbone in evaluation mode, torch's SGD on features: the same predictions."""
    data = labelled(trained.splits())
    found = probe(trained, trained.splits(), SHORT)
    trunk = trained.encoder.backbone.eval()
    head = linear(16, data.num_classes, 0.01, seed=0)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
    loader = Loader(data.train, augmented(trained.views), batch_size=8, seed=0)
    losses = []
    for step, (batch,), _ in loader.stream(0, 5 * 4):                           # 32 of 40 images are trained on
        optimizer.param_groups[0]["lr"] = 0.5 * (0.1 if 12 <= step < 16 else 0.01 if step >= 16 else 1)
        with torch.no_grad():
            x_BD = trunk(batch.views[0])
        loss = F.cross_entropy(head(x_BD), batch.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert found.loss == pytest.approx(sum(losses[-4:]) / 4, rel=1e-5)
    how = teaching(trained, augmented(trained.views), 5, 8)
    predicted_m, label_m = predict(Classifier(trunk, head), data.test, how, "test")
    assert found.result.value == pytest.approx(100 * (predicted_m == label_m).float().mean().item(), abs=1e-9)
    assert found.result.protocol["train"] == 32 and found.result.protocol["test"] == 8
    assert found.result.protocol["split"] == "fifth-held-out" and len(found.result.score_m) == 8


def test_no_tensor_of_the_backbone_moves(trained):
    before = {name: tensor.clone() for name, tensor in trained.encoder.state_dict().items()}
    found = probe(trained, trained.splits(), SHORT)
    after = trained.encoder.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert found.tensors == len(trained.encoder.backbone.state_dict())


@pytest.mark.parametrize("planted, named", [("batchnorm", "running_mean"), ("weight", "conv1.weight")])
def test_a_backbone_that_moves_is_no_measurement(trained, monkeypatch, planted, named):
    train = Classifier.train

    def move(self, mode=True):
        train(self, mode)
        if planted == "batchnorm":
            self.encoder.backbone.bn1.train(mode)
        elif mode:
            self.encoder.backbone.conv1.weight.data[0, 0, 0, 0] += 1e-6
        return self
    monkeypatch.setattr(Classifier, "train", move)
    with pytest.raises(RuntimeError, match=rf"have moved while.*{named}"):
        probe(trained, trained.splits(), SHORT)


def test_a_buffer_that_is_put_in_the_place_of_another_counts_as_moved():
    norm = nn.BatchNorm2d(3).requires_grad_(False)
    with pytest.raises(RuntimeError, match="1 of 5 .*: running_mean"), untouched(norm) as names:
        assert len(names) == 5
        norm.running_mean = norm.running_mean + 1


def test_only_labelled_images_are_trained_on_and_gaps_between_labels_are_none(trained):
    splits = in_memory([0, 3, -1] * 10 + [4] * 2, test=[0, 3, -1, 4])
    splits.train.bad[1] = "broken"
    data = labelled(splits)
    assert data.train.labels.tolist() == [0] + [0, 3] * 9 + [4, 4] and data.test.labels.tolist() == [0, 3, 4]
    assert data.num_classes == 5 and data.split == {} and data.train.keys[1] == "train/3"
    found = probe(trained, splits, SHORT)
    assert (found.result.protocol["train"], found.result.protocol["test"]) == (21, 3)


def test_a_subset_is_the_images_that_it_names_in_memory_and_in_files(trained):
    for whole in (in_memory([0, 1, 2, 3]).train, trained.splits().train):
        part = Subset(Subset(whole, torch.tensor([3, 1, 2])), torch.tensor([2, 0]))
        assert torch.equal(part.read(0), whole.read(2)) and torch.equal(part.read(1), whole.read(3))
        assert part.path(0) == whole.path(2) and part.keys == [whole.keys[2], whole.keys[3]] and len(part) == 2
        assert part.labels.tolist() == whole.labels[[2, 3]].tolist()
        assert (part.channels, part.size, part.classes) == (whole.channels, whole.size, whole.classes)


def test_the_fifth_that_is_held_out_is_that_of_the_probes_on_features(trained):
    data = labelled(in_memory([0, 1, -1, 2] * 8))
    label_n = torch.tensor([0, 1, 2] * 8)
    x_nD = torch.arange(24.0)[:, None]
    train_nD, train_label_n, _, test_label_m = Features(x_nD, label_n, None, None, "backbone").with_test()
    assert train_nD[:, 0].tolist() == held_out(24)[0].tolist() and data.split == {"split": "fifth-held-out"}
    assert data.test.labels.tolist() == test_label_m.tolist() and data.train.labels.tolist() == train_label_n.tolist()
    assert sorted([*data.train.keys, *data.test.keys]) == sorted(f"train/{i}" for i in range(32) if i % 4 != 2)


@pytest.mark.parametrize("label_n", [[-1] * 6, [0] + [-1] * 5, [2] * 6])
def test_images_without_two_classes_are_refused(trained, label_n):
    with pytest.raises(ValueError, match="two classes at least"):
        probe(trained, in_memory(label_n), SHORT)


def test_test_images_of_which_none_can_be_read_are_no_measurement(trained, tmp_path):
    for split in ("train", "test"):
        tiny.photos(tmp_path / split, count=16)
    splits = folder(tmp_path)
    for path in tmp_path.glob("test/*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ConfigError, match="none of the 16 labelled test images"):
        probe(trained, splits, SHORT.changed(epochs=1))


@pytest.mark.parametrize("images, wanted, batch", [(1000, 256, 256), (256, 256, 256), (255, 256, 248), (13, 256, 8),
                                                   (7, 256, 7)])
def test_fewer_images_than_a_batch_make_a_smaller_one(images, wanted, batch):
    assert batch_for(images, wanted) == batch


def test_a_smaller_batch_takes_the_learning_rate_along_and_is_named(trained):
    found = probe(trained, trained.splits(), RECIPES["moco"].changed(epochs=2))
    assert (found.result.protocol["batch"], found.result.protocol["lr"]) == (32, 3.75)
    assert found.result.protocol["changed"] == "lr batch epochs"


def test_a_loss_at_chance_is_said_in_words(trained, caplog):
    with caplog.at_level(logging.WARNING):
        probe(trained, trained.splits(), SHORT)
        assert not caplog.records
        alike = in_memory([0, 1] * 12)
        alike.train.array.fill_(100)
        probe(trained, alike, SHORT.changed(lr=1e5))
    assert "no better than chance (0.693)" in caplog.text and "a learning rate of 100000 is too high" in caplog.text


def test_a_loss_that_is_not_finite_and_features_that_are_not_are_refused(trained):
    with pytest.raises(ValueError, match="not finite for 10 steps in a row.*Give a lower --lr"):
        probe(trained, trained.splits(), SHORT.changed(lr=1e38))
    trained.encoder.backbone.conv1.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="the features are not finite"):
        probe(trained, trained.splits(), SHORT)


def test_the_head_is_measured_only_if_it_was_trained(trained):
    assert probe(trained, trained.splits(), SHORT, "head").norm == pytest.approx(1)
    imported = type(trained)(**{**vars(trained), "parts": ("backbone",)})
    with pytest.raises(ConfigError, match="a head of random numbers"):
        probe(imported, trained.splits(), SHORT, "head")


def steps_in_evaluation_mode() -> None:
    """BatchNorm's statistics of what is not trained stay, and those of what is meet."""
    distributed.start("cpu")
    from common.batchnorm import average_running_statistics
    norms = nn.ModuleList([nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval()])
    for norm in norms:
        norm.running_mean.fill_(distributed.rank())
    average_running_statistics(norms)
    print([norm.running_mean[0].item() for norm in norms])


def evaluate_and_more(*arguments: str) -> None:
    steps_in_evaluation_mode()
    run_tool("evaluate", *arguments)


COMMAND = ("linear", "--epochs", "6", "--batch-size", "8", "--lr", "0.5", "--checkpoint")


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    said = ranks(evaluate_and_more, *COMMAND, str(run), "--results", str(folder / "two.jsonl"), output=folder / "said")
    assert [rank.code for rank in said] == [0, 0], said[0].err + said[1].err
    return folder, said


def test_two_processes_measure_what_one_does(run, two, tmp_path):
    folder, said = two
    one = tool("evaluate", *COMMAND, str(run), "--results", str(tmp_path / "one.jsonl"), cwd=tmp_path)
    assert one.code == 0, one.err
    first, second = (json.loads(path.read_text()) for path in (tmp_path / "one.jsonl", folder / "two.jsonl"))
    for key in ("metric", "value", "interval", "protocol", "layer", "weights"):
        assert first[key] == second[key]
    assert first["protocol"]["recipe"] == "moco" and first["protocol"]["changed"] == "lr batch epochs"
    lines = [next(line for line in rank.out.splitlines() if line.startswith("features")) for rank in (one, said[0])]
    assert lines[0] == lines[1] and "mean length" in lines[0]
    assert "are what they were" in one.out and said[1].out.count("\n") == 1


def test_statistics_of_what_is_in_evaluation_mode_do_not_meet(two):
    assert [rank.out.splitlines()[0] for rank in two[1]] == ["[0.5, 0.0]", "[0.5, 1.0]"]


def test_raw_pixels_have_no_published_probe(run, tmp_path):
    refused = tool("evaluate", "linear", "--checkpoint", str(run), "--pixels", cwd=tmp_path)
    assert refused.code == 2 and "--pixels: no published protocol" in refused.err

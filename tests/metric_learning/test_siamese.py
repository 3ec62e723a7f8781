"""Siamese networks beside plain loops over pairs, their two towers, and what verification makes of them."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import distributed
from common.config import ConfigError
from common.data import digits
from common.evaluate.verification import area, roc
from common.exchange.handed import hand
from common.method import Batch
from common.rehearsal import rehearse
from common.run import Run
from common.sections import complete
from common.start import begin_with
from common.trained import load_trained
from metric_learning import Contrastive, Siamese
from tests import tiny
from tests.metric_cases import lengths
from tools import verify

FORMS = [{"shared": shared, "loss": loss, "unit": unit} for shared in (True, False)
         for loss, unit in (("contrastive", False), ("contrastive", True), ("softmax", False))]


def made(encoder, unit=True, **form):
    encoder.unit = unit
    return Siamese(encoder, margin=1.5, **form).double()


@pytest.fixture
def batch(batches):
    """Pairs: same, different, same, not known."""
    return batches(1)[0]


def parted(method):
    """As after some training: the second tower is another network."""
    if method.second_encoder is not None:
        with torch.no_grad():
            for parameter in method.second_encoder.parameters():
                parameter.mul_(1.3).add_(0.05)
    return method


def of_pair(method, x, y, same):
    """The loss of one pair of features, as a child would compute it."""
    if method.classifier is None:
        d = math.dist(x.tolist(), y.tolist())
        return d**2 / 2 if same else max(0.0, method.margin - d)**2 / 2
    first, _, second = method.classifier
    hidden = [max(0.0, (row @ torch.cat([x, y]) + b).item()) for row, b in zip(first.weight, first.bias)]
    logits = [sum(w * h for w, h in zip(row.tolist(), hidden)) + b.item()
              for row, b in zip(second.weight, second.bias)]
    return math.log(sum(map(math.exp, logits))) - logits[1 if same else 0]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_loss_is_the_mean_over_labelled_pairs_each_image_through_its_tower(form, small_encoder, batch):
    method = parted(made(small_encoder(batchnorm=False), **form))
    first, second = method.towers()
    pairs = []
    for i in range(0, 8, 2):
        x, y = (tower.project(batch.views[0][j:j + 1])[0].detach() for tower, j in ((first, i), (second, i + 1)))
        if method.encoder.unit:
            x, y = F.normalize(x, dim=0), F.normalize(y, dim=0)
        if batch.label[i] >= 0 and batch.label[i + 1] >= 0:
            pairs.append(of_pair(method, x, y, bool(batch.label[i] == batch.label[i + 1])))
    assert len(pairs) == 3
    assert method(batch).loss.item() == pytest.approx(sum(pairs) / 3, rel=1e-9)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_its_gradient_is_that_of_differences(form, small_encoder, batch):
    method = parted(made(small_encoder(batchnorm=False), **form))
    image = batch.views[0].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: method(Batch([x], batch.index, batch.label)).loss, image)


def test_one_tower_and_contrastive_is_contrastive_on_adjacent_pairs(small_encoder, batch):
    encoder = small_encoder()
    one, other = (kind(encoder, margin=1.5).double()(batch) for kind in (Siamese, Contrastive))
    assert torch.equal(one.loss, other.loss)
    assert all(torch.equal(one.logs[key], other.logs[key]) for key in ("d_pos", "d_neg", "active"))


@pytest.mark.parametrize("loss", ["contrastive", "softmax"])
def test_top1_is_the_share_of_pairs_decided_rightly(loss, small_encoder, batch):
    method = Siamese(lengths(small_encoder(batchnorm=False)), loss=loss, margin=0.3).double()
    x = method.encoder(batch.views[0])
    a, b = x[0::2], x[1::2]
    said = (a - b).norm(dim=1) < 0.15 if loss == "contrastive" else method.similarity(a, b) > 0
    expected = sum(bool(said[i]) == same for i, same in enumerate((True, False, True))) / 3
    assert method(batch).logs["top1"].item() == pytest.approx(expected)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("labels", [[-1] * 8, [0, 0, 7, 7, 900, 900, 3, 3], [0, 1] * 4])
def test_pairs_of_one_kind_or_none_have_a_finite_loss_and_gradient(form, labels, small_encoder, batch):
    method = made(small_encoder(), **form)
    output = method(Batch(batch.views, batch.index, torch.tensor(labels)))
    output.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in method.parameters()])
    assert gradient.isfinite().all() and all(value.isfinite() for value in output.logs.values())
    if labels[0] < 0:
        assert output.loss == 0 and not gradient.any()


def test_two_towers_begin_alike_and_part(small_encoder, batch):
    method = Siamese(small_encoder(), shared=False, margin=1.5).double()
    first, second = method.towers()
    assert first is not second
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    method(batch).loss.backward()
    optimizer.step()
    assert not torch.equal(first.head.weight, second.head.weight)
    method.follow_encoder()
    assert torch.equal(first.head.weight, second.head.weight)


def test_each_tower_has_batchnorm_statistics_of_its_own_images(small_encoder, batch):
    method = Siamese(small_encoder(), shared=False).double()
    method(batch)
    for side, tower in enumerate(method.towers()):
        alone = small_encoder()
        alone.load_state_dict(tower.state_dict())
        norm = alone.backbone[1]
        norm.reset_running_stats()
        alone.train()(batch.views[0][side::2])
        torch.testing.assert_close(tower.backbone[1].running_mean, norm.running_mean)
        torch.testing.assert_close(tower.backbone[1].running_var, norm.running_var)


def test_a_linear_classifier_could_not_tell_pairs_but_this_one_can():
    """Four features of two kinds: with one layer the log-odds of (a, a) and (b, b) add up to those of the others."""
    x = torch.eye(2).repeat_interleave(2, dim=0)
    y, same = torch.eye(2).repeat(2, 1), torch.tensor([1, 0, 0, 1])
    method = Siamese(tiny.Encoder(torch.nn.Identity(), torch.nn.Linear(2, 2)), loss="softmax")
    optimizer = torch.optim.Adam(method.classifier.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(method.classifier(torch.cat([x, y], dim=1)), same).backward()
        optimizer.step()
    assert torch.equal(method.similarity(x, y) > 0, same.bool())


def test_bad_values_are_refused(small_encoder):
    with pytest.raises(ValueError, match="margin: 0 is not a positive number"):
        Siamese(small_encoder(), margin=0)
    with pytest.raises(ValueError, match="no linear layer"):
        Siamese(tiny.Encoder(torch.nn.Identity(), torch.nn.Identity()), loss="softmax")


@pytest.mark.parametrize("shared, groups", [(True, 4), (False, 2)])
def test_batchnorm_groups_have_two_images_of_each_tower(shared, groups, tmp_path):
    """Of a batch of eight images: refused before training, and half as many are taken."""
    encoder = {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 8}
    config = tiny.settings(tmp_path, tmp_path / "run", train={"batch_size": 8})
    for bn_groups in (groups, 2 * groups):
        config.set("method", {"name": "metric_learning.Siamese", "encoder": encoder, "shared": shared,
                              "bn_groups": bn_groups}, "test")
        if bn_groups == groups:
            rehearse(complete(config))
    with pytest.raises(ConfigError, match="cannot be normalised"):
        rehearse(complete(config))


def run_of(folder, epochs=20, **method):
    """A siamese run on random pairs of the digits."""
    encoder = {"name": "tests.tiny.dense_encoder", "dim": 16}
    config = tiny.settings(folder, folder, train={"epochs": epochs, "batch_size": 64}, log={"every": 10},
                           evaluate={"every": 0, "protocols": []}, optimizer={"lr": 0.1, "momentum": 0.9})
    config.set("views", {"name": "common.data.recipes.digits", "num_views": 1, "crop_min": 0.9}, "run_of")
    config.set("data", {"name": "common.data.digits", "test": 300}, "run_of")
    config.set("method", {"name": "metric_learning.Siamese", "encoder": encoder,
                          "order": {"name": "common.data.orders.RandomPairs"}, **method}, "run_of")
    run = Run(config).train()
    distributed.stop()
    return run


@pytest.fixture(scope="module")
def softmax(tmp_path_factory):
    """Two towers and a classifier, trained on digits."""
    folder = tmp_path_factory.mktemp("siamese") / "softmax"
    run_of(folder, shared=False, loss="softmax")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """60 test digits as PNG files, and all pairs (path, path, mark) of one kind of which every 15th is taken."""
    folder, test = tmp_path_factory.mktemp("digits"), digits(300).test
    for i in range(60):
        Image.fromarray(test.array[i, 0].numpy()).save(folder / f"{i}.png")
    pairs = [(f"{i}.png", f"{j}.png", int(test.labels[i] == test.labels[j])) for i in range(60) for j in range(60)
             if i != j]
    return folder, [pair for mark in (0, 1) for pair in [p for p in pairs if p[2] == mark][::15 if not mark else 3]]


def write(file, pairs):
    file.write_text("".join(f"{a} {b} {mark}\n" for a, b, mark in pairs))
    return str(file)


def verified(run, folder, *words):
    verify.main(["--checkpoint", str(run), "--trust", "tests", "--no-picture",
                 "--results", str(folder / "results.jsonl"), "--scores", str(folder / "scores.csv"), *words])
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_verification_asks_the_classifier_and_sends_each_image_through_its_tower(softmax, files, tmp_path):
    """One pair at a time is the oracle; the checkpoint holds towers that have parted."""
    rows = verified(softmax, tmp_path, "--pairs", write(tmp_path / "pairs.txt", files[1]), "--root", str(files[0]))
    trained = load_trained(softmax, trust=["tests"])
    first, second = trained.method.towers()
    assert not torch.equal(first.head.weight, second.head.weight)
    for row in rows[::40]:
        x, y = (tower(trained.views.evaluation_batch(pixels(files[0] / row[side])))
                for tower, side in ((first, "first"), (second, "second")))
        assert float(row["score"]) == pytest.approx(trained.method.similarity(x, y).item(), abs=1e-4)
    value, same = (torch.tensor([float(row[column]) for row in rows]) for column in ("score", "same"))
    assert area(roc(value, same.bool())) > 0.7, "it has learned; by chance it is 0.5"


def pixels(file):
    """[1, 1, 8, 8]"""
    return torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).reshape(1, 1, 8, 8)


def test_two_files_get_a_probability_and_in_their_order(softmax, files, tmp_path, capsys):
    a, b = (str(files[0] / f"{i}.png") for i in (0, 1))
    said, words = [], ["--checkpoint", str(softmax), "--trust", "tests", "--threshold", "0"]
    for pair in ((a, b), (b, a)):
        verify.main([*words, "--results", str(tmp_path / "none"), "--image", pair[0], "--image", pair[1]])
        said.append(capsys.readouterr().out.splitlines())
    for lines in said:
        chance, score = float(lines[1].split()[1]), float(lines[2].split()[2])
        assert lines[0].endswith("features of the head") and "probability" in lines[1]
        assert chance == pytest.approx(1 / (1 + math.exp(-score)), abs=2e-4)
        assert lines[2].startswith("same" if score >= 0 else "different") and "(learned)" in lines[2]
    assert said[0] != said[1], "the measure is not symmetric"


def test_other_measures_are_there_on_demand_and_a_missing_one_is_refused(softmax, files, tmp_path, capsys):
    words = ["--pairs", write(tmp_path / "pairs.txt", files[1]), "--root", str(files[0])]
    rows = verified(softmax, tmp_path, *words, "--measure", "euclidean", "--layer", "head")
    trained = load_trained(softmax, trust=["tests"])
    first, second = trained.method.towers()
    x, y = (tower(trained.views.evaluation_batch(pixels(files[0] / rows[0][side])))
            for tower, side in ((first, "first"), (second, "second")))
    assert float(rows[0]["score"]) == pytest.approx(-(x - y).norm().item(), abs=1e-4)
    with pytest.raises(SystemExit):
        verified(softmax, tmp_path, *words, "--measure", "learned", "--layer", "backbone")
    assert "it is one of the head's features" in capsys.readouterr().err


def test_the_second_tower_can_be_handed_on(softmax, small_encoder):
    trained = load_trained(softmax, ["train.device=cpu"], ["tests"])
    second = trained.method.towers()[1]
    handed = hand(trained, "second_backbone")
    x = torch.rand(3, 1, trained.views.size, trained.views.size)
    torch.testing.assert_close(handed.module(x), second.backbone(x))
    assert not torch.equal(handed.module(x), hand(trained, "backbone").module(x))
    trained.method.second_encoder = None
    with pytest.raises(ConfigError, match="--what second_backbone: Siamese has one tower"):
        hand(trained, "second_backbone")


def test_a_start_from_weights_reaches_both_towers(softmax):
    file = max((softmax / "checkpoints").glob("*.pt"))
    encoder, other = (load_trained(softmax, trust=["tests"]).encoder for _ in range(2))
    method = Siamese(other, shared=False)
    for parameter in method.parameters():
        parameter.data.zero_()
    begin_with(method, str(file))
    for tower in method.towers():
        assert torch.equal(tower.head.weight, encoder.head.weight)


def test_distances_learn_to_tell_digits_apart(tmp_path):
    """Guessing gives 0.5."""
    run_of(tmp_path / "run", epochs=8)
    top1 = [record["top1"] for record in tiny.records(tmp_path / "run")]
    assert sum(top1[:2]) / 2 < 0.75 and sum(top1[-5:]) / 5 > 0.78

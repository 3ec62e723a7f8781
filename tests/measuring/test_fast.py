"""linear --fast: heads trained at once against each alone; chosen without the test images; features that are kept."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from common import counter, distributed
from common.data import digits
from common.evaluate import Features
from common.evaluate.rows import Rows
from common.measuring import stored as stored_module
from common.measuring.heads import NORMS, Group, Scaling, train
from common.measuring.labelled import augmented
from common.measuring.search import Data, Grid, Head, Inputs, Logistic, search
from common.measuring.stored import Stored, key_of, stored
from common.trained import load_trained
from tests import tiny
from tests.processes import ranks, run_tool, tool
from tools import evaluate

CPU = torch.device("cpu")
PLAIN = {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}


@pytest.fixture(scope="module")
def features():
    """The digits' pixels: 1,297 to train on, 500 to test on."""
    splits = digits()
    train_nD, test_mD = (images.array.flatten(1).float() / 255 for images in splits)
    return Features(train_nD, splits.train.labels, test_mD, splits.test.labels, "pixels")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run on forty image files."""
    folder = tmp_path_factory.mktemp("fast")
    config = tiny.settings(tiny.photos(folder / "photos"), folder / "run", method={"encoder": PLAIN},
                           train={"epochs": 1}, evaluate={"every": 0, "protocols": []})
    tiny.train(config.text())
    return folder / "run"


def alone(x_nD, label_n, indices, lr, decay, epochs, batch_size):
    """One head by torch's own SGD and autograd."""
    w_DC, b_C = torch.zeros(x_nD.shape[1], 10, dtype=x_nD.dtype), torch.zeros(10, dtype=x_nD.dtype)
    sgd = torch.optim.SGD([{"params": [w_DC.requires_grad_()], "weight_decay": decay},
                           {"params": [b_C.requires_grad_()], "weight_decay": 0}], lr=lr, momentum=0.9)
    batches = []
    for epoch in range(epochs):
        index_n = indices[epoch % len(indices)]
        batches += index_n[counter.permutation(len(index_n), counter.stream("heads"), epoch)].split(batch_size)
    for step, index_b in enumerate(batches):
        for group in sgd.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / len(batches))) / 2
        sgd.zero_grad()
        F.cross_entropy(x_nD[index_b] @ w_DC + b_C, label_n[index_b]).backward()
        sgd.step()
    return w_DC.detach(), b_C.detach()


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_each_of_the_heads_trained_at_once_is_what_it_becomes_alone(features, dtype, within):
    x_nD, label_n = features.train_nD.to(dtype), features.train_label_n
    rows = [Scaling.of(norm, Rows(x_nD)).rows(x_nD, CPU) for norm in NORMS]
    lr_G, decay_G = torch.tensor([1.0, 3.0, 3.0], dtype=dtype), torch.tensor([0.0, 1e-3, 1e-2], dtype=dtype)
    indices = [torch.arange(0, 700), torch.arange(500, 1297)]           # views of different lengths, a short last batch
    found = train([Group(one, lr_G, decay_G) for one in rows], label_n, indices, 10, epochs=3, batch_size=200)
    for one, (w_GDC, b_G1C) in zip(rows, found):
        for g in range(3):
            w_DC, b_C = alone(one[:], label_n, indices, lr_G[g].item(), decay_G[g].item(), 3, 200)
            torch.testing.assert_close(w_GDC[g], w_DC, atol=within, rtol=0)
            torch.testing.assert_close(b_G1C[g, 0], b_C, atol=within, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_whatever_the_norm_the_mean_squared_length_is_one(features, norm):
    x_nD = 1000 * torch.cat([features.train_nD, torch.full((1297, 2), 3.0)], dim=1).half().float()
    scaled_nD = Scaling.of(norm, Rows(x_nD)).rows(x_nD, CPU)[:]
    assert scaled_nD.square().sum(dim=1).mean().item() == pytest.approx(1, abs=2e-3)
    if norm == "l2":
        torch.testing.assert_close(scaled_nD, F.normalize(x_nD, dim=1))
    if norm == "standardised":
        live = x_nD.std(dim=0) > 0
        expected = (x_nD - x_nD.mean(dim=0))[:, live] / x_nD.std(dim=0)[live] / math.sqrt(int(live.sum()))
        torch.testing.assert_close(scaled_nD[:, live], expected, atol=1e-5, rtol=1e-3)
        assert not scaled_nD[:, ~live].any()


def data_of(features):
    kept = Stored.of(features)
    return Data.of(kept, features.train_label_n, features.test_label_m), kept.width


def test_the_logistic_head_is_that_of_scikit_learn(features):
    data, width = data_of(features)
    inputs, head = Inputs(data, width, CPU, False), Head("pixels", "standardised", {"l2": 1e-2})
    (w_1DC, b_11C), = Logistic(max_iter=400).fit([head], inputs, data.indices(every=False))
    x_nD, label_n = (column[data.fit_n] for column in (data.train.x_nD, data.train.label_n))
    std_D, mean_D = torch.std_mean(features.train_nD, dim=0)
    scale_D = torch.where(std_D > 1e-6, 1 / std_D, 0)
    oracle = LogisticRegression(C=1 / (len(x_nD) * 1e-2), max_iter=3000, tol=1e-8).fit(
        ((x_nD - mean_D) * scale_D).numpy(), label_n.numpy())
    held_hD = (data.held.x_nD - mean_D) * scale_D
    torch.testing.assert_close((held_hD @ w_1DC[0] + b_11C[0]).softmax(dim=1),
                               torch.from_numpy(oracle.predict_proba(held_hD.numpy())).float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("classifiers", [Grid((1, 3, 10), (0, 1e-3), epochs=2, min_steps=1, batch_size=128),
                                         Logistic((1e-2, 1e-4), max_iter=15)], ids=["grid", "logistic"])
def test_swapped_test_labels_change_the_value_and_never_the_winner(features, classifiers):
    one = search(classifiers, *data_of(features), 0, CPU)
    values = set()
    for shift in range(1, 10):
        swapped = features._replace(test_label_m=(features.test_label_m + shift) % 10)
        other = search(classifiers, *data_of(swapped), 0, CPU)
        assert other.result.protocol["won"] == one.result.protocol["won"] and other.ranking == one.ranking
        values.add(other.result.value)
        if isinstance(classifiers, Logistic):
            break
    assert one.result.value > 90 > 20 > max(values)
    assert one.result.label() == other.result.label() and "won" not in one.result.label()


def test_no_copy_of_a_held_out_image_is_trained_on_and_the_tenth_is_of_each_class(features):
    kept = Stored.of(features)
    crops = kept._replace(crop_nD=kept.train_nD.repeat(2, 1), crop_image_n=kept.train_image_n.repeat(2),
                          crop_view_n=torch.arange(2).repeat_interleave(1297))
    for given, copies in ((kept, 1), (crops, 2)):
        data = Data.of(given, features.train_label_n, features.test_label_m)
        indices = data.indices(every=False)
        assert len(indices) == copies and sum(map(len, data.indices(every=True))) == copies * 1297
        trained_on = set(data.train.image_n[torch.cat(indices)].tolist())
        assert not trained_on & set(data.held.image_n.tolist()) and len(trained_on) + len(data.held.image_n) == 1297
        share_C = data.held.label_n.bincount() / features.train_label_n.bincount()
        assert ((share_C - 0.1).abs() < 0.01).all()
        assert torch.equal(data.train.label_n, features.train_label_n[data.train.image_n])


def test_without_a_test_set_the_fifth_is_the_other_protocols(features):
    none = features._replace(test_mD=None, test_label_m=None)
    train_nD, _, test_mD, test_label_m = none.with_test()
    data, _ = data_of(none)
    assert sorted(data.test.x_nD.tolist()) == sorted(test_mD.tolist())
    assert sorted(data.train.x_nD.tolist()) == sorted(train_nD.tolist())
    assert sorted(data.test.label_n.tolist()) == sorted(test_label_m.tolist())
    assert data.protocol == {"split": "fifth-held-out", "train": len(train_nD), "test": len(test_mD)}


def test_where_each_class_has_one_image_none_is_left_and_that_is_said(features):
    one_each = torch.stack([(features.train_label_n == c).nonzero()[0, 0] for c in range(10)])
    with pytest.raises(ValueError, match=r"10 labelled images to train on.*Give more images"):
        data_of(features._replace(train_nD=features.train_nD[one_each], train_label_n=torch.arange(10)))


def test_what_is_kept_are_the_encoders_features_of_images_and_of_their_crops(run, tmp_path):
    trained = load_trained(run)
    splits, encoder = trained.splits(), trained.encoder
    found = stored(trained, splits, views=2, dtype=torch.float32, cache=False)
    recipe = augmented(trained.views)
    for column, images, view_n in ((found.train_nD, found.train_image_n, None),
                                   (found.crop_nD, found.crop_image_n, found.crop_view_n)):
        for row, i in enumerate(images.tolist()):
            image_cHW = splits.train.read(i)
            if view_n is None:
                x_BcSS = trained.views.normalize(trained.views.evaluation(image_cHW)[None].float())
            else:
                epoch = int(view_n[row])
                crop_cSS = recipe.crop(image_cHW, stored_module.SEED, epoch, i, 0)
                x_BcSS = recipe.finish(crop_cSS[None], stored_module.SEED, epoch, torch.tensor([i]), 0)
            with torch.no_grad():
                expected = torch.cat([encoder.backbone(x_BcSS), encoder(x_BcSS)], dim=1)[0]
            torch.testing.assert_close(column[row], expected, atol=1e-5, rtol=1e-4)
    assert found.crop_image_n.tolist() == 2 * list(range(40)) and found.width == {"backbone": 16, "head": 16}
    assert len(found.test_mD) == 0


def test_the_batches_of_crops_are_the_same_ones_for_any_number_of_processes(run, monkeypatch):
    """Forty images in three batches: they were 13 in each for one process, 12 for two."""
    trained = load_trained(run, ["evaluate.batch_size=14"])
    splits = trained.splits()

    def seen(world):
        monkeypatch.setattr(distributed, "world", lambda: world)
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            for index_B, _ in stored_module._crops(trained, splits.train, trained.evaluator(splits, []), 1):
                yield index_B.tolist()

    one = list(seen(1))
    assert [len(batch) for batch in one] == [13, 13, 13] and list(seen(2)) == one and list(seen(4)) == one


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run, and what is embedded of it: how many images."""
    folder = shutil.copytree(run, tmp_path / "run")
    seen = []

    def get(*overrides, **given):
        seen.clear()
        trained = load_trained(folder, overrides)
        trained.encoder.backbone.register_forward_hook(lambda module, images, out: seen.append(len(out)))
        return stored(trained, trained.splits(), **given), sum(seen)

    return folder / "features", get


def same(one, other):
    return one.width == other.width and all(torch.equal(x, y) for x, y in zip(one[:-1], other[:-1]))


def test_a_second_measurement_embeds_nothing_and_gets_the_same(copied):
    folder, get = copied
    (first, computed), (again, none) = get(views=1), get(views=1)
    assert computed == 80 and none == 0 and same(first, again) and first.train_nD.dtype == torch.float16
    assert get(views=1, cache=False)[1] == 80 and len(list(folder.iterdir())) == 1


def test_other_views_precision_size_images_or_weights_are_other_features(copied):
    folder, get = copied
    get()
    assert get(views=1)[1] and get(dtype=torch.float32)[1] and get("views.size=12")[1] and get()[1] == 0
    trained = load_trained(folder.parent)
    splits, given = trained.splits(), (0, torch.float16)
    before = key_of(trained, splits, *given)
    assert f"{before[:16]}.safetensors" in {file.name for file in folder.iterdir()}
    photo = Path(splits.train.path(7))
    os.utime(photo, ns=(0, photo.stat().st_mtime_ns + 1))               # another picture under the same name
    touched = key_of(trained, splits, *given)
    with torch.no_grad():
        next(trained.encoder.backbone.parameters())[0] += 1e-3
    assert len({before, touched, key_of(trained, splits, *given)}) == 3


@pytest.mark.parametrize("damage", ["bit", "cut", "foreign", "text"])
def test_a_damaged_or_foreign_file_is_said_and_made_anew(copied, caplog, damage):
    folder, get = copied
    first, _ = get()
    file, = folder.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[-100] ^= 1
    elif damage == "foreign":
        get(dtype=torch.float32)
        content = next(other for other in folder.iterdir() if other != file).read_bytes()
    file.write_bytes({"cut": content[:-50], "text": b"not safetensors"}.get(damage, content))
    again, computed = get()
    assert computed == 40 and same(first, again) and "they are computed anew" in caplog.text
    assert len(caplog.text.strip().splitlines()) == 1 and get()[1] == 0


def test_so_many_files_are_kept_and_the_one_longest_unused_goes(copied, monkeypatch):
    folder, get = copied
    monkeypatch.setattr(stored_module, "KEPT", 2)
    get()
    first, = folder.iterdir()
    get(views=1)
    get()                                                               # used again
    get(views=2)
    assert len(list(folder.iterdir())) == 2 and first.exists()


def test_where_nothing_can_be_written_it_is_said_and_measured_all_the_same(copied, caplog):
    folder, get = copied
    folder.write_text("a file where the folder should be")
    assert len(get()[0].train_nD) == 40 and "the features are not kept" in caplog.text


def test_features_too_large_for_float16_are_refused_with_the_way_out(run):
    trained = load_trained(run)
    trained.encoder.backbone.register_forward_hook(lambda module, images, out: out + 1e5)
    with pytest.raises(ValueError, match="40 of 40 images .* --precision float32"):
        stored(trained, trained.splits(), cache=False)
    assert stored(trained, trained.splits(), dtype=torch.float32, cache=False).train_nD[:, :16].min() > 9e4


@pytest.mark.parametrize("words, refused", [
    (["--fast", "--protocol", "lightly", "--lr", "1"], "--protocol --lr: of linear without --fast only"),
    (["--fast", "--epochs", "5"], "--epochs: of linear without --fast only"),
    (["--views", "0", "--no-cache"], "--views --no-cache: of linear with --fast only"),
])
def test_an_option_of_the_other_way_is_refused_and_not_ignored(words, refused):
    options = evaluate.parse(["linear", "--checkpoint", "runs/none", *words])
    with pytest.raises(ValueError, match=refused):
        options.check(options)


@pytest.mark.parametrize("layer", ["backbone", "head"])
def test_a_layer_that_is_given_is_the_only_one_tried(run, tmp_path, layer, capsys):
    results = tmp_path / "results.jsonl"
    evaluate.main(["linear", "--fast", "--head", "logistic", "--views", "0", "--no-cache", "--layer", layer,
                   "--checkpoint", str(run), "--results", str(results)])
    line = json.loads(results.read_text())
    assert (line["layer"], line["protocol"]["layers"], line["protocol"]["heads"]) == (layer, layer, 3)
    assert f"checkpoint  {run / 'checkpoints' / 'step-00000010.pt'}: epoch 1, last\n" in capsys.readouterr().out


def measure(run, results):
    run_tool("evaluate", "linear", "--fast", "--head", "logistic", "--checkpoint", str(run), "--results", str(results),
             "--no-cache")
    distributed.stop()


def test_two_processes_find_what_one_finds(run, tmp_path):
    """And the main one alone says it."""
    ended = ranks(measure, run, tmp_path / "two.jsonl", output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    assert ended[1].out == "" and "6 classifiers" in ended[0].out
    one = tool("evaluate", "linear", "--fast", "--head", "logistic", "--checkpoint", str(run), "--results",
               str(tmp_path / "one.jsonl"), "--no-cache", cwd=tmp_path)
    assert one.code == 0, one.err
    lines = [[{name: value for name, value in json.loads(line).items() if name not in ("time", "command", "folder")}
              for line in (tmp_path / file).read_text().splitlines()] for file in ("one.jsonl", "two.jsonl")]
    assert lines[0] == lines[1] and len(lines[0]) == 1
    assert lines[0][0]["protocol"]["chosen_by"] == "10% of train" and lines[0][0]["protocol"]["views"] == 2

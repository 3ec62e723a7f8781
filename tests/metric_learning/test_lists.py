"""From lists of pairs to a verified network, by the commands; and one clear line for each list that cannot be used."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common.data import digits
from tests import tiny
from tests.processes import tool

CONTRASTIVE = {"name": "metric_learning.Contrastive"}
SIAMESE = {"name": "metric_learning.Siamese"}
ONE, TWO = {"train": "train.txt"}, {"train": "train1.txt", "train_second": "train2.txt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 digits of four kinds as PNG files, 0.png and so on; lists of 400 pairs, and of 100 others of other images."""
    folder, images = tmp_path_factory.mktemp("lists"), digits(300).train
    chosen = (images.labels < 4).nonzero().flatten()[:120]
    for i, place in enumerate(chosen.tolist()):
        Image.fromarray(images.array[place, 0].numpy()).save(folder / f"{i}.png")
    label = images.labels[chosen].tolist()
    for name, first, last, count in (("train", 0, 80, 400), ("test", 80, 120, 100)):
        every = [(f"{i}.png", f"{j}.png", int(label[i] == label[j])) for i in range(first, last)
                 for j in range(first, last) if i != j]
        draw = np.random.default_rng(0)
        rows = [every[place] for mark in (0, 1) for place in draw.choice(
            [place for place, pair in enumerate(every) if pair[2] == mark], count // 2, replace=False)]
        write(folder / f"{name}.txt", rows)
        write(folder / f"{name}1.txt", [(first, mark) for first, _, mark in rows])
        write(folder / f"{name}2.txt", [(second, mark) for _, second, mark in rows])
    write(folder / "classes.txt", enumerated := [(f"{i}.png", kind) for i, kind in enumerate(label)])
    write(folder / "one_class.txt", [(path, 3) for path, _ in enumerated])
    write(folder / "missing.txt", [*rows[:3], ("gone.png", "1.png", 1)])
    write(folder / "three.txt", [*rows[:3], ("0.png", "1.png", 2)])
    write(folder / "short.txt", [(second, mark) for _, second, mark in rows[:-1]])
    write(folder / "alike.txt", rows[-20:])
    return folder


def write(file, rows):
    file.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))


def config_of(folder, data, method, **sections):
    """The path of a config in ``folder``: a small network on 8 x 8 pixels, three seconds of training."""
    data = {"name": "common.data.pair_list", "channels": 1, **data}
    tree = {"data": data, "views": {"name": "common.data.recipes.digits", "num_views": 1, "crop_min": 0.9},
            "method": {"encoder": {"name": "tests.tiny.dense_encoder", "dim": 16}, **method},
            "optimizer": {"name": "common.optim.sgd", "lr": 0.1, "momentum": 0.9},
            "schedule": {"name": "common.schedule.cosine", "warmup": 0.5},
            "train": {"epochs": 12, "batch_size": 64, "workers": 0, "threads": 1, "device": "cpu"},
            "evaluate": {"every": 0, "protocols": []}, "log": {"every": 10}, **sections}
    (folder / "lists.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "lists.yaml")


def auc(folder, run, *words):
    """Of verification on the list of test pairs."""
    said = tool("verify", "--checkpoint", str(run), "--trust", "tests", "--pairs", str(folder / "test.txt"), *words,
                "--results", str(run / "found.jsonl"), "--no-picture", "--layer", "head", cwd=run)
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in (run / "found.jsonl").read_text().splitlines()]
    return next(line["value"] for line in reversed(lines) if line["metric"] == "AUC")


@pytest.mark.parametrize("method, lists", [
    (CONTRASTIVE, ONE), (SIAMESE, TWO), ({**SIAMESE, "loss": "softmax"}, ONE),
    ({**SIAMESE, "shared": False}, ONE), ({**SIAMESE, "shared": False, "loss": "softmax"}, TWO),
], ids=["contrastive", "siamese", "siamese, softmax", "two towers", "two towers, softmax"])
def test_what_was_trained_from_lists_verifies_pairs_of_images_it_has_not_seen(method, lists, folder, tmp_path):
    data = {key: str(folder / name) for key, name in lists.items()}
    ended = tool("train", "--config", config_of(tmp_path, data, method), "run.dir=run", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert auc(folder, tmp_path / "run") > 85


def test_both_kinds_of_list_are_one_run(folder, tmp_path):
    """The same steps to the last bit."""
    found = []
    for name, data in (("one", {"train": str(folder / "train.txt")}),
                       ("two", {"train": str(folder / "train1.txt"), "train_second": str(folder / "train2.txt")})):
        ended = tool("train", "--config", config_of(tmp_path, data, CONTRASTIVE), f"run.dir={name}", "train.epochs=1",
                     cwd=tmp_path)
        assert ended.code == 0, ended.err
        found.append(tiny.last_state(tmp_path / name)["trainer"]["method"])
    assert found[0].keys() == found[1].keys() and all(torch.equal(x, found[1][key]) for key, x in found[0].items())


PAIRED, CLASSED = {"order": {"name": "common.data.orders.RandomPairs"}}, {"name": "common.data.file_list"}


@pytest.mark.parametrize("data, method, said", [
    ({"train": "missing.txt"}, {}, "1 of its files is not below"),
    ({"train": "three.txt"}, {}, "three.txt:4: label '2' of a pair. Give 1 for a similar pair, 0 for a dissimilar"),
    ({"train": "test1.txt", "train_second": "short.txt"}, {}, "short.txt lists 99 images, and "),
    ({"train": "alike.txt"}, {}, "all 20 pairs of "),
    ({"train": "nowhere.txt"}, {}, "nowhere.txt"),
    ({"train": "test1.txt"}, {}, "holds no second path after"),
    ({"train": "test.txt"}, PAIRED, "is a list of pairs, which go through a step as they stand there"),
    ({"train": "test.txt"}, {"pairs": "all"}, "is a list of pairs, and Contrastive compares the images of a batch by"),
    ({"train": "classes.txt", **CLASSED}, {}, "Contrastive takes images in pairs, and those of"),
    ({"train": "one_class.txt", **CLASSED}, PAIRED, "has labelled images of 1 class, and metric learning tells"),
    ({"train": "one_class.txt", **CLASSED}, {"pairs": "all"}, "has labelled images of 1 class, and metric learning"),
])
def test_what_cannot_be_learned_from_is_one_line_before_training_starts(data, method, said, folder, tmp_path):
    data = {key: str(folder / value) if key.startswith("train") else value for key, value in data.items()}
    ended = tool("train", "--config", config_of(tmp_path, data, {**CONTRASTIVE, **method}), "run.dir=run", cwd=tmp_path)
    assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err, ended.err
    assert len(ended.err.strip().splitlines()) == 1 and ended.err.strip().startswith("error: ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()

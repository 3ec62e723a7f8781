"""``evaluate.py compare``: its rows are those of each by itself, its tests those of statistics; and two processes."""

import json
import shlex

import pytest
import timm
import torch
from safetensors.torch import save_file

from common import distributed
from common.config import ConfigError
from common.evaluate.statistics import holm, paired
from common.measuring import compare, entrants
from common.measuring.pretrained import TimmViews, pretrained
from common.run import Run, load_run
from tests import tiny
from tests.processes import ranks
from tools import evaluate


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs a and b, of two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        tiny.digits_run(folder / name, seed=seed)
    return folder


@pytest.fixture(autouse=True)
def _here(runs, monkeypatch):
    monkeypatch.chdir(runs)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def compared(words, tmp_path):
    """The records of ``compare WORDS``."""
    file = tmp_path / "results.jsonl"
    evaluate.main(["compare", *shlex.split(words), "--results", str(file)])
    return lines(file)


def test_each_row_is_what_the_encoder_gets_by_itself(runs, tmp_path):
    found = compared("a b pixels untrained --by 'knn --k 1 20'", tmp_path)
    assert [(line["features"], line["k"]) for line in found] == [(name, k) for name in ("a", "b", "pixels", "untrained")
                                                                 for k in (1, 20)]
    values = {(line["features"], line["k"]): line["value"] for line in found}
    scores = {}
    for name in "ab":
        for result in load_run(runs / name).knn([1, 20]):
            assert values[name, result.protocol["k"]] == result.value
            scores[name, result.protocol["k"]] = result.score_m
    assert len({line["weights"] for line in found}) == 4                # a, b, untrained, and none of pixels
    assert {line["interval_by"] for line in found} == {"bootstrap"}
    against = [line["against"] for line in found]
    assert against[:2] == [None, None] and {pair["tests"] for pair in against[2:]} == {6}
    for place, k in ((2, 1), (3, 20)):
        expected = paired(scores["b", k], scores["a", k])
        assert against[place]["difference"] == expected.difference
        assert against[place]["interval"] == list(expected.interval)
    plain = [paired(scores["b", k], scores["a", k]).p for k in (1, 20)]
    assert all(pair["p"] >= p for pair, p in zip(against[2:4], plain, strict=True))


def test_the_untrained_net_is_the_one_at_the_end_of_a_run(tmp_path):
    """Session measures it as a baseline; compare makes it again from the checkpoint."""
    run = tiny.digits_run(tmp_path / "run")
    config = run.config
    config.set("run.dir", str(tmp_path / "other"), "test")
    config.set("evaluate.protocols", [{"name": "common.evaluate.KNN", "k": 5}], "test")
    config.set("evaluate.baselines", True, "test")
    Run(config).train()
    in_run, = tiny.summary(tmp_path / "other")["results"]["untrained"]
    found = compared(f"{tmp_path}/other untrained --by 'knn --k 5'", tmp_path)
    assert found[1]["value"] == in_run["value"] and found[1]["chosen"] == "untrained" and found[1]["step"] == 0


@pytest.mark.parametrize("by", ["linear --max-iter 5", "few --labels 2 --draws 3", "retrieval --k 1"])
def test_every_protocol_compares(by, tmp_path, capsys):
    found = compared(f"a b --by '{by}'", tmp_path)
    second = [line for line in found if line["features"] == "b"]
    assert all(line["against"]["name"] == "a" for line in second)
    exact = {line["metric"]: line["against"]["p_mcnemar"] is not None for line in second}
    assert exact == {"linear": {"linear": True}, "few": {"few": False},
                     "retrieval": {"recall": True, "mAP": False, "mAP@R": False}}[by.split()[0]]
    assert "Ahead of a on the same images" in capsys.readouterr().out


def test_p_is_corrected_for_all_that_are_shown():
    rows = [[paired([1.0] * 9 + [0.0], [0.0] * 10), paired([1.0] * 5, [1.0, 1, 1, 0, 0])], [None], []]
    plain = [rows[0][0], rows[0][1]]
    found = compare.corrected(rows)
    assert [pair.p for pair in found[0]] == holm([pair.p for pair in plain])
    assert [pair.p_mcnemar for pair in found[0]] == holm([pair.p_mcnemar for pair in plain])
    assert found[1:] == [[None], []]


@pytest.mark.parametrize(("words", "expected"), [
    (["runs/a", "runs/b"], ["a", "b"]),
    (["x/a", "y/a", "pixels"], ["x/a", "y/a", "pixels"]),
    (["a", "a", "a"], ["a", "a (2)", "a (3)"]),
    (["r/a/checkpoints/step-00000005.pt", "r/b/checkpoints/step-00000005.pt"], ["a/step-00000005", "b/step-00000005"]),
    (["r/a", "r/a/checkpoints/step-00000005.pt"], ["a", "a/step-00000005"]),
    (["timm:resnet18=f", "timm:resnet34=f"], ["timm:resnet18", "timm:resnet34"]),
    (["timm:resnet18=f", "timm:resnet18=g"], ["f/timm:resnet18", "g/timm:resnet18"]),
])
def test_names_that_collide_are_told_apart(words, expected):
    assert entrants.names(words) == expected


@pytest.mark.parametrize(("words", "message"), [
    ("pixels untrained", "none of these is a checkpoint"),
    ("a nowhere", "nowhere: no run with a checkpoint"),
    ("a b --by 'knn --layer head'", "layer is the same for all"),
    ("a b --by svm", "no protocol 'svm'"),
    ("a b --by ''", "no protocol ''"),
    ("a timm:resnet18.a1_in1k", "are not on this machine. Give --download"),
    ("a timm:resnet9000", "knows no pretrained weights"),
    ("a timm:resnet18=nothing.pt", "cannot be read"),
    ("a timm:resnet18=nothing.pt --layer head", "have no head"),
])
def test_what_cannot_be_compared_is_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit):
        compared(words, tmp_path)
    assert message in " ".join(capsys.readouterr().err.split())


def test_other_images_are_refused(tmp_path, capsys):
    tiny.digits_run(tmp_path / "c", test=301)
    with pytest.raises(SystemExit):
        compared(f"a {tmp_path}/c", tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "have other training images or classes (1,497 of digits and 1,496 of digits)" in said
    compared(f"a {tmp_path}/c data.test=200", tmp_path)                # the same for both


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small timm backbone with its classifier, random, as a file of safetensors."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("timm") / "test_resnet.safetensors"
    model = timm.create_model("test_resnet.r160_in1k")
    save_file(model.state_dict(), file)
    return model.eval(), file


def test_timms_weights_are_loaded_from_a_file_without_running_code(weights, tmp_path, capsys):
    model, file = weights
    loaded = pretrained("test_resnet.r160_in1k", 3, str(file))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encoder.backbone(x), model.forward_head(model.forward_features(x),
                                                                                  pre_logits=True))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "torch.pth")
    again = pretrained("test_resnet.r160_in1k", 3, str(tmp_path / "torch.pth"))
    with torch.no_grad():
        assert torch.equal(again.encoder.backbone(x), loaded.encoder.backbone(x))
    torch.save(model, tmp_path / "code.pth")                            # a whole module: code would have to run
    with pytest.raises(ConfigError, match="code.pth cannot be read"):
        pretrained("test_resnet.r160_in1k", 3, str(tmp_path / "code.pth"))
    with pytest.raises(ConfigError, match="are not its own"):
        pretrained("test_vit.r160_in1k", 3, str(file))
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    (tmp_path / "empty.pth").touch()
    for name, said in (("tensor", "holds a Tensor"), ("empty", "cannot be read: EOFError")):
        with pytest.raises(ConfigError, match=f"{name}.pth {said}"):
            pretrained("test_resnet.r160_in1k", 3, str(tmp_path / f"{name}.pth"))


def test_timms_weights_are_found_in_the_hubs_cache(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"timm/test_resnet.r160_in1k\) are not on this machine"):
        pretrained("test_resnet.r160_in1k", 3)
    folder = tmp_path / "models--timm--test_resnet.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    (folder / "snapshots" / "0123").mkdir(parents=True)
    (folder / "snapshots" / "0123" / "model.safetensors").write_bytes(weights[1].read_bytes())
    found = pretrained("test_resnet.r160_in1k", 1)
    assert found.file.parent.name == "0123" and found.encoder.backbone.num_features > 1
    assert found.views.size == 160 and len(found.views.mean) == 1


def test_timms_images_are_cut_as_it_publishes():
    published = timm.models.get_pretrained_cfg("test_resnet.r160_in1k")
    views = TimmViews(published, 3)
    image = torch.arange(168, dtype=torch.uint8).expand(3, 168, 168).contiguous()
    assert int(published.input_size[-1] / published.crop_pct) == 168
    x = views.evaluation_batch(image[None])[0]
    mean, std = (torch.tensor(colours)[:, None, None] for colours in (published.mean, published.std))
    torch.testing.assert_close(x, (image[:, 4:164, 4:164] / 255 - mean) / std)


def test_timms_backbone_takes_part(weights, tmp_path):
    """Sixteen photographs, since its images are 160 pixels wide."""
    root = tiny.photos(tmp_path / "photos", count=16)
    Run(tiny.settings(root, tmp_path / "run", "instdisc", train={"epochs": 1}, evaluate={"protocols": []})).train()
    found = compared(f"{tmp_path}/run timm:test_resnet.r160_in1k={weights[1]} --by 'knn --k 5'", tmp_path)
    assert found[1]["features"] == "timm:test_resnet.r160_in1k" and found[1]["checkpoint"] == str(weights[1])
    assert found[1]["config"] is None and found[1]["seed"] is None and found[1]["against"]["name"] == "run"


def measure_each(*commands):
    for words in commands:
        options = evaluate.parse(shlex.split(words))
        options.run(options)
    distributed.stop()


COMMANDS = ("compare {runs}/a pixels untrained --by 'knn --k 1 20' --results {file}",
            "compare {runs}/a {runs}/b --by 'retrieval --k 1 5' --results {file}",
            "retrieval --checkpoint {runs}/a --k 1 --gallery --no-picture --results {file}")


def test_two_processes_give_the_records_of_one(runs, tmp_path):
    one, two = ([command.format(runs=runs, file=tmp_path / name) for command in COMMANDS] for name in ("one", "two"))
    measure_each(*one)
    ended = ranks(measure_each, *two, output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    assert ended[1].out == "" and ended[0].out.count("added to") == 3
    found, expected = lines(tmp_path / "two"), lines(tmp_path / "one")
    assert len(found) == len(expected) == 3 * 2 + 2 * 4 + 3
    for line, other in zip(found, expected, strict=True):
        assert line["value"] == pytest.approx(other["value"], abs=0.35)             # one image of 300
        rounded = ["value", "interval", "against"] + ["weights"] * (line["features"] == "untrained")
        same = [name for name in line if name not in (*rounded, "command", "folder", "time")]
        assert [line[name] for name in same] == [other[name] for name in same]

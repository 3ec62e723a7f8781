"""Fine-tuning: a plain loop gives the same weights, layers learn at the rates of a hand table, and draws are paired."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from common import distributed
from common.backbones import backbone
from common.data.loader import Loader
from common.data.subset import Subset
from common.evaluate.draws import amount, difference, draw_labels, over_draws, t95
from common.measuring.classifier import linear
from common.measuring.frozen import is_frozen
from common.measuring.labelled import augmented, labelled
from common.measuring.layers import first_trained, freeze, layer_groups, parameter_groups, rates
from common.measuring.tuning import Tuning, tune, untrained
from common.trained import load_trained
from tests.measuring.runs import opened, trained_run
from tests.processes import ranks, run_tool, tool

ALL = "100%"
SHORT = {"epochs": 4, "batch": 8, "lr": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("finetune"))


@pytest.fixture
def trained(run):
    return opened(run)


def groups_of(arch, **options):
    with torch.device("meta"):
        return layer_groups(backbone(arch, **options))


@pytest.mark.parametrize("arch, options, names", [
    ("w4s1", {}, "stem layer1 layer2 layer3"),
    ("resnet18", {}, "stem layer1 layer2 layer3 layer4"),
    ("torchvision/resnet50", {}, "stem layer1 layer2 layer3 layer4"),
    ("vit_tiny_patch16_224", {"image_size": 32}, "stem " + " ".join(f"blocks.{i}" for i in range(12))),
    ("torchvision/vit_b_32", {"image_size": 32},
     "stem " + " ".join(f"encoder.layers.encoder_layer_{i}" for i in range(12))),
    ("torchvision/vgg11", {}, " ".join(f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18))),
    ("mobilenetv3_small_050", {}, "stem blocks.0.0 blocks.1.0 blocks.1.1 blocks.2.0 blocks.2.1 blocks.2.2 blocks.3.0 "
     "blocks.3.1 blocks.4.0 blocks.4.1 blocks.4.2 blocks.5.0 conv_head"),
])
def test_layers_stand_in_groups_from_the_image_on(arch, options, names):
    groups = groups_of(arch, **options)
    assert [group.name for group in groups] == names.split()
    with torch.device("meta"):
        every = [name for name, _ in backbone(arch, **options).named_parameters()]
    assert sorted(name for group in groups for name in group.parameters) == sorted(every)


def test_a_network_within_another_and_a_plain_chain_have_groups_too():
    inner = nn.Sequential(backbone("w4s1"), nn.Dropout())
    assert [group.name for group in layer_groups(inner)] == ["stem", "0.layer1", "0.layer2", "0.layer3"]
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))
    assert [group.name for group in layer_groups(chain)] == ["0", "1", "3"]


def test_the_learning_rates_are_those_of_a_hand_table():
    trunk, head = backbone("w4s1"), nn.Linear(16, 2)
    groups = parameter_groups(trunk, head, layer_groups(trunk), lr=0.8, weight_decay=0.1, layer_decay=0.5)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    table = {"conv1": 0.05, "bn1": 0.05, "layer1": 0.1, "layer2": 0.2, "layer3": 0.4}
    expected = {id(p): (table[name.split(".")[0]], 0.1 if p.ndim > 1 else 0) for name, p in trunk.named_parameters()}
    expected |= {id(head.weight): (0.8, 0.1), id(head.bias): (0.8, 0)}
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(pair) for key, pair in expected.items())


def test_the_rates_of_a_vit_are_those_of_timm():
    from timm import create_model
    from timm.optim import param_groups_layer_decay

    trunk = backbone("vit_tiny_patch16_224", image_size=32)
    whole = create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    theirs = {id(p): group["lr_scale"] for group in param_groups_layer_decay(whole, layer_decay=0.65)
              for p in group["params"]}
    groups = layer_groups(trunk)
    ours = {name: rate for group, rate in zip(groups, rates(groups, 0.65), strict=True) for name in group.parameters}
    assert ours == pytest.approx({name: theirs[id(whole.get_parameter(name))] for name in ours})


@pytest.mark.parametrize("layers, first", [("all", 0), ("head", 4), ("1", 3), ("3", 1), ("4", 0), ("layer2", 2)])
def test_which_layers_are_trained(layers, first):
    trunk = backbone("w4s1")
    groups = layer_groups(trunk)
    assert first_trained(groups, layers) == first
    freeze(trunk, groups, first)
    trained = {name for name, p in trunk.named_parameters() if p.requires_grad}
    assert trained == {name for group in groups[first:] for name in group.parameters}
    assert is_frozen(trunk) == (layers == "head")


@pytest.mark.parametrize("layers", ["0", "5", "-1", "layer7", "last", ""])
def test_layers_that_there_are_not_are_named_with_those_that_there_are(layers):
    with pytest.raises(ValueError, match=rf"--layers {layers}: .*last 4 groups.*stem, layer1, layer2, layer3"):
        first_trained(layer_groups(backbone("w4s1")), layers)


@pytest.mark.parametrize("text, expected", [("10%", [1, 2, 3, 0, 1]), ("50%", [5, 10, 15, 0, 1]),
                                            ("100%", [10, 20, 30, 0, 1]), ("4", [4, 4, 4, 0, 1]),
                                            ("1%", [1, 1, 1, 0, 1])])
def test_a_draw_has_its_share_of_each_class_and_at_least_one(text, expected):
    label_n = torch.tensor([0] * 10 + [1] * 20 + [2] * 30 + [4])[torch.randperm(61)]
    drawn = draw_labels(label_n, amount(text), draw=1)
    assert label_n[drawn].bincount(minlength=5).tolist() == expected and len(drawn.unique()) == len(drawn)
    assert set(drawn.tolist()) <= set(draw_labels(label_n, ALL, 1).tolist())


def test_more_labels_hold_the_fewer_and_draws_differ():
    label_n = torch.arange(600) % 6
    few, more, other = (set(draw_labels(label_n, amount(text), draw).tolist()) for text, draw in
                        (("5%", 0), ("10%", 0), ("5%", 1)))
    assert few < more and few != other and few == set(draw_labels(label_n, 5, 0).tolist())


@pytest.mark.parametrize("text", ["0%", "101%", "0", "-3", "many", "1.5", ""])
def test_labels_that_nobody_can_draw_are_refused(text):
    with pytest.raises(ValueError, match=r"labels: .* given; must be at least 1|invalid literal"):
        Tuning(amount(text))


def test_students_quantile_is_that_of_scipy():
    assert [t95(freedom) for freedom in range(1, 40)] == pytest.approx(
        [stats.t.ppf(0.975, freedom) for freedom in range(1, 40)], abs=1e-6)


def test_draws_are_averaged_and_differences_paired():
    label_m = torch.arange(200) % 4
    wrong = [label_m.clone() for _ in range(6)]
    for place, predicted_m in enumerate(wrong):
        predicted_m[:5 + 7 * place % 11 + 10 * (place > 2)] = 9
    one, other = ([(predicted_m, label_m) for predicted_m in part] for part in (wrong[:3], wrong[3:]))
    a, b = ([100 * (p == label_m).float().mean().item() for p, _ in part] for part in (one, other))
    mean = over_draws("finetune", one, {})
    oracle = stats.t.interval(0.95, 2, loc=mean.value, scale=stats.sem(a))
    assert mean.value == pytest.approx(sum(a) / 3) and mean.spread == pytest.approx(torch.tensor(a).std().item())
    assert mean.interval == pytest.approx((oracle[0], min(100, oracle[1])), abs=1e-5)
    assert 100 * sum(mean.score_m) / 200 == pytest.approx(mean.value)
    paired = difference(one, other, "ahead", {})
    test = stats.ttest_rel(a, b).confidence_interval()
    assert paired.value == pytest.approx(sum(a) / 3 - sum(b) / 3)
    assert paired.interval == pytest.approx((test.low, test.high), abs=1e-5)


def test_a_single_draw_is_paired_by_its_test_images():
    label_m = torch.zeros(400, dtype=torch.int64)
    one, other = label_m.clone(), label_m.clone()
    one[:30], other[20:80] = 1, 1
    found = difference([(one, label_m)], [(other, label_m)], "ahead", {})
    assert found.value == pytest.approx(7.5) and found.spread is None           # 50 gained, 20 lost, of 400
    share, var = 30 / 402, (50.5 + 20.5) / 402 - (30 / 402) ** 2
    half = 1.959964 * (var / 402) ** 0.5
    assert found.interval == pytest.approx((100 * (share - half), 100 * (share + half)))
    low, high = difference([(one, label_m)], [(one, label_m)], "ahead", {}).interval
    assert low == -high and 0 < high < 1
    assert over_draws("finetune", [(one, label_m)], {}).interval == pytest.approx((89.5, 94.7), abs=0.1)


def test_the_weights_are_those_of_a_plain_loop(trained):
    """torchvision's blocks, torch's BatchNorm and SGD, the same order and crops."""
    data = labelled(trained.splits())
    found = tune(trained, data, Tuning("50%", layer_decay=0.5, **SHORT), draw=1, scratch=False, what="")
    trunk, head = backbone("w4s1"), linear(16, 2, 0.01, seed=1)
    trunk.load_state_dict(trained.encoder.backbone.state_dict())
    groups = layer_groups(trunk)
    optimizer = torch.optim.SGD(parameter_groups(trunk, head, groups, 0.1, 1e-4, 0.5), momentum=0.9)
    base = [group["lr"] for group in optimizer.param_groups]
    train = Subset(data.train, draw_labels(data.train.labels, "50%", 1))
    loader = Loader(train, augmented(trained.views), batch_size=8, seed=1)
    assert loader.steps_per_epoch == 2
    for step, (batch,), _ in loader.stream(0, 8):
        epoch = step / 2
        factor = epoch / 0.4 if epoch < 0.4 else 0.5 * (1 + torch.tensor((epoch - 0.4) / 3.6 * torch.pi).cos().item())
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad()
        F.cross_entropy(head(trunk(batch.views[0])), batch.label).backward()
        optimizer.step()
    for name, tensor in trunk.state_dict().items():
        torch.testing.assert_close(found.backbone.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_only_the_chosen_layers_move_and_the_trained_encoder_does_not(trained):
    before = copy.deepcopy(trained.encoder.state_dict())
    found = tune(trained, labelled(trained.splits()), Tuning(ALL, layers="2", **SHORT), 0, scratch=False, what="")
    moved = {name.split(".")[0] for name, tensor in found.backbone.state_dict().items()
             if not torch.equal(tensor, before[f"backbone.{name}"])}
    assert moved == {"layer2", "layer3"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.encoder.state_dict().items())


def test_random_weights_are_others_in_each_draw_and_none_of_the_trained_ones(trained):
    first, again, second = (untrained(trained, seed).conv1.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert not torch.equal(first, trained.encoder.backbone.conv1.weight)


@pytest.mark.parametrize("images, batch, extent", [(10_000, 64, (50, 64)), (640, 64, (100, 64)), (13, 64, (1000, 8))])
def test_few_labels_get_as_many_steps(images, batch, extent):
    assert Tuning(ALL, batch=batch).extent(images) == extent
    assert Tuning(ALL, batch=batch, epochs=3).extent(images)[0] == 3


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"layer_decay": 0.0},
                                   {"layer_decay": 2.0}, {"weight_decay": -1.0}, {"crop_min": 0.0}])
def test_settings_that_no_training_could_use_are_refused(wrong):
    with pytest.raises(ValueError, match="^--"):
        Tuning(ALL, **wrong)


def test_adamw_has_its_own_rates():
    assert Tuning(ALL, optimizer="adamw").rates == (1e-3, 0.05) and Tuning(ALL, optimizer="adamw", lr=2.0).rates[0] == 2


COMMAND = ("finetune", "--labels", "50%", "--epochs", "6", "--batch-size", "8", "--scratch", "--layer-decay", "0.7",
           "--checkpoint")


@pytest.fixture(scope="module")
def one(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, tool("evaluate", *COMMAND, str(run), "--results", "it.jsonl", "--save", "it.pt", cwd=folder)


def evaluate(*arguments: str) -> None:
    run_tool("evaluate", *arguments)
    distributed.stop()


def test_two_processes_tune_as_one_does(run, one, tmp_path):
    said = ranks(evaluate, *COMMAND, str(run), "--results", str(tmp_path / "it.jsonl"), "--save",
                 str(tmp_path / "it.pt"), output=tmp_path / "said")
    assert [rank.code for rank in (*said, one[1])] == [0, 0, 0], said[0].err + said[1].err + one[1].err
    expected, found = ([json.loads(line) for line in (folder / "it.jsonl").read_text().splitlines()]
                       for folder in (one[0], tmp_path))
    assert [(line["features"], line["metric"]) for line in found] == [
        ("fine-tuned", "finetune"), ("from scratch", "finetune"), ("fine-tuned less from scratch", "ahead")]
    assert "ahead: difference of two accuracies" in said[0].out
    for key in ("value", "interval", "protocol", "layer", "split"):
        assert [line[key] for line in found] == [line[key] for line in expected]
    assert [line["chosen"] for line in found] == ["last", "random weights", "last"]
    assert [line["weights"] is None for line in found] == [False, True, False]
    assert found[2]["value"] == pytest.approx(found[0]["value"] - found[1]["value"])
    assert said[1].out == "" and "trained  stem, layer1, layer2, layer3, classifier" in said[0].out
    weights = [load_trained(folder / "it.pt").encoder.backbone.state_dict() for folder in (one[0], tmp_path)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_what_is_saved_is_the_tuned_backbone(trained, one):
    saved = load_trained(one[0] / "it.pt")
    tuning = Tuning("50%", layer_decay=0.7, epochs=6, batch=8)
    found = tune(trained, labelled(trained.splits()), tuning, 0, scratch=False, what="").backbone.state_dict()
    assert saved.parts == ("backbone",) and saved.origin["labels"] == "50%"
    for name, tensor in saved.encoder.backbone.state_dict().items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options, said", [
    (["--layers", "layer9"], "--layers layer9: the backbone has no such layers"),
    (["--labels", "0%"], "labels: 0% given; must be at least 1"),
    (["--draws", "2", "--save", "it.pt"], "--draws: 2 given"),
])
def test_a_mistake_is_said_in_one_line_before_anything_is_trained(run, tmp_path, options, said):
    ended = tool("evaluate", "finetune", "--checkpoint", str(run), *options, cwd=tmp_path)
    assert ended.code == 2 and said in ended.err and len(ended.err.strip().splitlines()) == 1

"""What metric learning trained is handed on as it is: features keep their lengths, the card says labels were seen."""

import json
import runpy

import pytest
import torch

from common.config import ConfigError
from common.exchange.export import export
from common.exchange.handed import hand
from common.exchange.own import load_backbone
from common.run import Run, load_run
from common.trained import load_trained
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits of five steps, whose encoder leaves its features as they come."""
    folder = tmp_path_factory.mktemp("runs") / "contrastive"
    encoder = {"name": "common.backbones.encoder", "arch": "w4s2", "dim": 6, "unit": False}
    config = tiny.settings(folder, folder, views={"name": "common.data.recipes.digits", "num_views": 1},
                           train={"epochs": 1, "batch_size": 256}, evaluate={"every": 0, "protocols": []})
    config.set("method", {"name": "metric_learning.Contrastive", "encoder": encoder,
                          "order": {"name": "common.data.orders.RandomPairs"}}, "test")
    config.set("data", {"name": "common.data.digits"}, "test")
    Run(config).train()
    return folder


@pytest.mark.parametrize("format", ["torchvision", "safetensors"])
def test_features_keep_their_lengths_in_what_is_handed_on(run, format, tmp_path):
    trained = load_trained(run)
    exported, = export(hand(trained, "encoder"), [format], tmp_path / "out")
    x_BcSS = torch.randn(3, 1, 8, 8)
    load = load_backbone if format == "safetensors" else runpy.run_path(str(exported.folder / "load.py"))["load"]
    with torch.inference_mode():
        found, expected = load(str(exported.folder))(x_BcSS), trained.encoder(x_BcSS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected.norm(dim=1) - 1).abs().min() > 1e-3


def test_the_card_says_that_labels_were_seen(run, tmp_path):
    exported, = export(hand(load_trained(run), "encoder"), ["safetensors"], tmp_path / "out")
    card = (exported.folder / "README.md").read_text()
    for said in ("metric-learning", "1,297, with their labels", "Trained with labels", "its projection head:"):
        assert said in card, said
    assert "self-supervised" not in card and "unit length" not in card


def test_an_export_of_before_has_features_of_length_1(run, tmp_path):
    exported, = export(hand(load_trained(run), "encoder"), ["safetensors"], tmp_path / "out")
    file = exported.folder / "config.json"
    facts = json.loads(file.read_text())
    assert facts.pop("unit") is False
    file.write_text(json.dumps(facts))
    with torch.inference_mode():
        length_B = load_backbone(exported.folder)(torch.randn(3, 1, 8, 8)).norm(dim=1)
    torch.testing.assert_close(length_B, torch.ones(3))


def test_a_method_of_cosines_refuses_features_of_any_length(run, tmp_path):
    config = load_run(run).config
    config.set("method", {**tiny.METHODS["instdisc"], "encoder": config.get("method.encoder")}, "test")
    with pytest.raises(ConfigError, match="encoder.unit: false given. .* leave it true"):
        Run(config)

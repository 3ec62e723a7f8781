"""The preprocessing that is written down is the one that is done; the card says what is known, and names nobody."""

import getpass
import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from common.data import recipes
from common.exchange import public
from common.exchange.card import card, license_fields
from common.exchange.export import export
from common.exchange.formats import torchvision
from common.exchange.handed import hand
from common.exchange.measured import measured
from common.exchange.preprocessing import FILE, HUGGING_FACE, Preprocessing
from common.exchange.proof import Proof
from common.run import Run
from common.trained import load_trained
from tests import tiny

LEVEL = 1 / 255 + 1e-5              # one grey level of values 0..1
NASTY = "a|b](http://x) `c` ```\n---\nlicense: mit\n# <b>pwned</b> \x1b[31m: {x: &y"


def photographs():
    """Two real photographs of 427 x 640, and parts of them that are upright, and odd in their margins."""
    whole = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in load_sample_images().images]
    return [whole[0], whole[1][:, :301, :411], whole[0][:, :389, :300]]


def deviation(found_cSS, views, image_cHW):
    """The largest from ``Views.evaluation``, of values 0..1."""
    ours_cSS = views.normalize(views.evaluation(image_cHW).unsqueeze(0).float())[0]
    assert found_cSS.shape == ours_cSS.shape
    return ((found_cSS - ours_cSS).abs() * torch.tensor(views.std).view(-1, 1, 1)).max().item()


def transform_of(file: Path) -> v2.Compose:
    """What a stranger makes of preprocessing.json, with torchvision alone."""
    said = json.loads(file.read_text())
    assert (said["interpolation"], said["antialias"], said["crop"]) == ("bilinear", True, "center")
    return v2.Compose([v2.Resize(said["short_side"], antialias=True), v2.CenterCrop(said["size"]),
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(said["mean"], said["std"])])


@pytest.mark.parametrize("size", [32, 95, 96, 128, 224, 225])
def test_the_preprocessing_that_is_written_is_the_one_of_the_evaluation(size, tmp_path):
    views = recipes.moco_v2(size=size)
    preprocessing = Preprocessing.of(views, 3)
    preprocessing.write(tmp_path)
    by_torchvision = transform_of(tmp_path / FILE)
    by_timm = timm.data.create_transform(**timm.data.resolve_data_config(preprocessing.timm()))
    for image_cHW in photographs():
        picture = Image.fromarray(image_cHW.permute(1, 2, 0).numpy())
        assert deviation(by_torchvision(image_cHW), views, image_cHW) < 1e-6
        assert deviation(by_timm(picture), views, image_cHW) < LEVEL            # Pillow rounds after each axis


@pytest.mark.parametrize("size", [32, 96, 224])
def test_grey_pictures_are_prepared_alike(size, tmp_path):
    views = recipes.fashion(size=size)
    Preprocessing.of(views, 1).write(tmp_path)
    image_cHW = photographs()[0][:1]
    assert deviation(transform_of(tmp_path / FILE)(image_cHW), views, image_cHW) < 1e-6


def test_a_picture_of_the_very_size_is_taken_whole_as_the_file_says(tmp_path):
    views = recipes.moco_v2(size=128)
    Preprocessing.of(views, 3).write(tmp_path)
    image_cHW = photographs()[0][:, :128, :128]
    assert json.loads((tmp_path / FILE).read_text())["as_is"] == [128, 128]
    *_, scale, normalise = transform_of(tmp_path / FILE).transforms
    assert deviation(normalise(scale(image_cHW)), views, image_cHW) < 1e-6
    Preprocessing.of(recipes.moco_v2(size=32), 3).write(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["as_is"] is None


@pytest.mark.parametrize("size", [64, 128, 224])
def test_hugging_face_prepares_a_picture_so_up_to_the_pixel_that_it_rounds_otherwise(size, tmp_path):
    transformers = pytest.importorskip("transformers")
    views = recipes.moco_v2(size=size)
    preprocessing = Preprocessing.of(views, 3)
    preprocessing.write(tmp_path)
    assert (tmp_path / HUGGING_FACE).is_file()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    for image_cHW in photographs():
        found_cSS = processor(image_cHW, return_tensors="pt")["pixel_values"][0]
        deviations = []
        for moved in ((0, 0), (0, 1), (1, 0), (1, 1)):      # where the margin is odd, half a pixel goes up or down
            resized_cHW = v2.Resize(preprocessing.short_side, antialias=True)(image_cHW)
            top, left = (round((side - size) / 2) - by for side, by in zip(resized_cHW.shape[1:], moved))
            ours_cSS = resized_cHW[:, max(0, top):, max(0, left):][:, :size, :size]
            ours_cSS = views.normalize(ours_cSS.unsqueeze(0).float())[0]
            deviations.append((found_cSS - ours_cSS).abs().max().item() if ours_cSS.shape == found_cSS.shape else 9)
        assert min(deviations) < 1e-5


def test_timm_finds_the_short_side_for_every_size():
    for size in range(1, 1025):
        preprocessing = Preprocessing.of(recipes.moco_v2(size=size), 3)
        assert int(size / preprocessing.crop_share()) == preprocessing.short_side


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose folder of images has a name that would break a page, right in a user's own folder."""
    root = tmp_path_factory.mktemp("home") / "alice" / NASTY.replace("/", "")
    folder = tmp_path_factory.mktemp("runs") / "secret-project"
    config = tiny.settings(tiny.photos(root), folder, "instdisc", train={"epochs": 2}, method=tiny.METHODS["instdisc"])
    Run(config).train()
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    handed = hand(load_trained(run), license=NASTY)
    return export(handed, ["torchvision"], tmp_path_factory.mktemp("out") / "x")[0].folder


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_is_one_that_the_hub_reads(exported):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(exported / "README.md", ignore_metadata_errors=False)
    assert card.data.license == "other"
    assert re.fullmatch(r"[a-z0-9.-]+", card.data.license_name)
    assert card.data.library_name == "pytorch"
    assert {"instdisc", "self-supervised-learning"} <= set(card.data.tags)


def test_the_card_says_what_was_trained_on_what_and_how_well(exported, run):
    text = (exported / "README.md").read_text()
    trained = load_trained(run)
    for said in ("InstDisc", trained.data.partition(" ")[0], trained.sha256(), "| 40, without their labels |", "w4s1",
                 "temperature: 0.2", "knn(k=5", "wu2018instdisc", "epoch 2, step 20", 'load("FOLDER")'):
        assert said in text, said


def test_the_card_has_the_values_of_its_own_checkpoint_alone(run):
    values = {round(result.value, 3) for results in measured(load_trained(run)).values() for result in results}
    last = {round(record["value"], 3) for record in tiny.records(run, "eval") if record["step"] == 20}
    assert values and last <= values
    early = load_trained(run / "checkpoints" / "step-00000020.pt", untrained=True)
    assert measured(early).keys() == measured(load_trained(run)).keys()


@pytest.fixture
def recorded(run):
    """Writes results.jsonl, with records of the run's weights unless they say otherwise."""
    trained, file = load_trained(run), run / "results.jsonl"
    line = {"metric": "linear", "value": 71.5, "interval": [60, 80], "spread": None, "features": "trained backbone",
            "layer": "backbone", "k": None, "tau": None, "split": "test",
            "protocol": {"lr": 30, "train": 40, "test": 8}, "weights": trained.sha256(),
            "config": trained.recorded.digest()}

    def write(*records):
        file.write_text("".join(json.dumps({**line, **one} if isinstance(one, dict) else one) + "\n"
                                for one in records) + '{"cut off')
        return trained

    yield write
    file.unlink()


def test_what_the_tools_measured_of_these_weights_stands_there_and_of_others_not(recorded):
    trained = recorded({}, {"value": 99, "weights": "0" * 64}, {"value": 98, "config": "another"},
                       {"protocol": "broken"}, ["no record"])
    found = [result for result in measured(trained)["trained backbone"] if result.metric == "linear"]
    assert [(result.value, result.interval, result.settings()) for result in found] == [(71.5, (60, 80), {"lr": 30})]


def test_one_protocol_is_one_value_whoever_measured_it_and_by_whatever_name(recorded, run):
    by_run = next(result for result in measured(load_trained(run))["trained backbone"] if result.metric == "knn")
    k, tau, norm = (by_run.protocol[name] for name in ("k", "tau", "norm"))
    same = {"metric": "knn", "k": k, "tau": tau, "value": 12.5, "features": "mine",
            "protocol": {"norm": norm, "train": by_run.protocol["train"], "test": by_run.protocol["test"]}}
    once = {**same, "split": "leave-one-out", "value": 13.5}
    rows = measured(recorded(same, once))
    assert "mine" not in rows
    knn = {str(result.settings().get("split")): result.value for result in rows["trained backbone"]
           if result.metric == "knn" and result.protocol["k"] == k}
    assert knn == {"None": 12.5, "leave-one-out": 13.5}


def test_rankings_and_fine_tuning_stand_on_the_card_too(recorded):
    ranking = {"norm": "l2", "queries": 8, "gallery": 7, "left_out": 0}
    tuned = {"metric": "finetune", "protocol": {"labels": "10%", "train": 40, "test": 8}}
    rows = measured(recorded({"metric": "mAP", "protocol": ranking}, {**tuned, "features": "fine-tuned"},
                             {**tuned, "features": "difference, paired", "value": 8.0}))
    assert "mAP" in {result.metric for result in rows["trained backbone"]}
    assert [result.value for result in rows["fine-tuned"]] == [71.5]
    assert 8.0 not in {result.value for results in rows.values() for result in results}


def test_images_that_the_proof_took_are_not_said_to_be_those_of_the_training(run, tmp_path):
    other = tiny.photos(tmp_path / "others", count=4)
    trained = load_trained(run, data=str(other))
    text = card(hand(trained), torchvision.FORMAT, Proof(0, 1, (), (), "8 images of folder others"))
    assert "others" in text and "common.data.folder, others" not in text


def test_no_name_breaks_the_page(exported):
    text = (exported / "README.md").read_text()
    assert "\x1b" not in text and "\n---\nlicense: mit" not in text
    assert front_matter(text)["license"] == "other"
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# w4s1, by InstDisc"]
    assert re.search(r"(?<!\\)<b>", text) is None


def test_nothing_that_is_written_names_the_machine_or_its_user(exported, run):
    secrets = [str(run.parent), str(exported), "alice", str(Path.home()), socket.gethostname(), str(Path.cwd())]
    secrets += [] if len(getpass.getuser()) < 5 else [getpass.getuser()]
    for file in exported.iterdir():
        for secret in secrets:
            assert len(secret) < 3 or secret.encode() not in file.read_bytes(), (file.name, secret)


@pytest.mark.parametrize("path, name", [
    ("/home/alice/photos", "photos"), ("C:\\Users\\bob\\cats", "cats"), ("photos/", "photos"),
    *((path, "(a folder)") for path in ("/home/alice", "C:\\Users\\bob", "~", "~bob", "/", "..")),
])
def test_of_a_path_the_last_name_stays_if_it_is_nobodys(path, name):
    assert public.last_name(path) == name


def test_settings_lose_their_folders_and_nothing_else():
    tree = {"data": {"root": "/data/in1k", "train": "lists/a.txt", "size": [1, 2.5, None]},
            "method": {"encoder": {"arch": "torchvision/resnet50", "file": "/home/alice/w.pt"}}}
    assert public.settings(tree) == {
        "data": {"root": "in1k", "train": "a.txt", "size": [1, 2.5, None]},
        "method": {"encoder": {"arch": "torchvision/resnet50", "file": "w.pt"}}}


@pytest.mark.parametrize("given, fields", [
    (None, {"license": "unknown"}), ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
    ("Our own: v2", {"license": "other", "license_name": "our-own-v2"}),
    ("***", {"license": "other", "license_name": "other"}),
])
def test_a_licence_is_the_hubs_identifier_or_another(given, fields):
    assert license_fields(given) == fields


def test_a_fence_holds_whatever_it_is_given():
    text = public.block("a\n````\n# b\x07")
    assert text.startswith("`````\n") and text.endswith("\n`````") and "\x07" not in text

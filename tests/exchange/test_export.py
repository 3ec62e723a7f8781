"""What is handed on is what was trained: loaded by the other library alone, in a process that lacks this project."""

import copy
import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tools.export
from common.config import ConfigError
from common.data.views import Views
from common.dictionary import Bank
from common.exchange import export as exporting
from common.exchange import images, load_backbone, manifest
from common.exchange.export import export, verify
from common.exchange.facts import Facts
from common.exchange.format import LOADER
from common.exchange.formats import FORMATS, by_name, detectron2
from common.exchange.handed import hand, source_of
from common.exchange.proof import Job, Proof, Unproven, prove
from common.run import load_run
from instdisc import InstDisc
from tests.exchange import networks

# Convolutional networks and transformers of as many families as there are small ones.
TIMM = ["resnet10t", "resnet18", "mobilenetv3_small_050", "mobilenetv2_035", "convnext_atto",
        "convnextv2_atto", "regnetx_002", "regnety_002", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
        "ghostnet_050", "lcnet_035", "tinynet_e", "mnasnet_small", "semnasnet_075", "hardcorenas_a",
        "edgenext_xx_small", "mobilevit_xxs", "dla46_c", "ese_vovnet19b_slim_dw", "torchvision/resnet18"]
RUNS = [("demo", "backbone", "torchvision"), ("demo", "backbone", "safetensors"), ("demo", "backbone", "moco"),
        ("demo", "encoder", "torchvision"), ("demo", "encoder", "safetensors"), ("demo", "encoder", "moco"),
        ("demo", "key_backbone", "torchvision"), ("resnet", "backbone", "torchvision"), ("resnet", "backbone", "timm"),
        ("resnet", "key_backbone", "detectron2"), ("resnet", "encoder", "moco")]
OTHERS = [("torchvision/mobilenet_v3_small", "imagenet", 3, "torchvision"),
          ("torchvision/mnasnet0_5", "auto", 3, "torchvision"),
          ("torchvision/mnasnet0_5", "auto", 3, "safetensors"),
          ("torchvision/resnet18", "small_padded", 5, "torchvision"), ("w8p2", "auto", 4, "torchvision"),
          ("resnet50", "imagenet", 3, "detectron2"), ("vit_tiny_patch16_224", "auto", 2, "safetensors")]


def written(folder: Path, network, name: str) -> Path:
    folder.mkdir(parents=True)
    FORMATS[name].write(folder, network)
    (folder / LOADER).write_text(FORMATS[name].loader(network))
    return folder


def spoil(folder: Path) -> None:
    """Change one weight of the first convolution."""
    state = torch.load(folder / "weights.pth", weights_only=True)
    state["conv1.weight"][0, 0, 0, 0] += 1
    torch.save(state, folder / "weights.pth")


@pytest.fixture(scope="module")
def proofs(tmp_path_factory, demo, resnet):
    """(what) -> Proof, or the error, of everything that is proven here: in one process without us, and one with us."""
    place, jobs = tmp_path_factory.mktemp("exports"), {}

    def job(key, network, features, x_BcHW):
        folder = written(place / str(len(jobs)), network, key[-1])
        jobs[key] = Job(folder, {"x": x_BcHW}, {"x": features}, ours=FORMATS[key[-1]].ours)

    for of, what, name in RUNS:
        trained = {"demo": demo, "resnet": resnet}[of]
        x_BcHW, *_ = images.real(trained, None)
        with torch.inference_mode():
            job((of, what, name), hand(trained, what), source_of(trained, what)(x_BcHW), x_BcHW)
    for arch, stem, channels, name in [(arch, "imagenet", 3, "timm") for arch in TIMM] + OTHERS:
        network, x_BcHW = networks.handed(arch, stem=stem, channels=channels), torch.randn(2, channels, 64, 64)
        job((arch, stem, channels, name), network, networks.features(network, x_BcHW), x_BcHW)
    return dict(zip(jobs, prove(list(jobs.values())), strict=True))


@pytest.mark.parametrize("of, what, name", RUNS)
def test_a_run_handed_on_gives_its_own_features(of, what, name, proofs):
    assert proofs[of, what, name] == Proof(0.0, proofs[of, what, name].scale, (), ())
    assert proofs[of, what, name].scale > 0.1


@pytest.mark.parametrize("arch", TIMM)
def test_timm_loads_its_folder_in_one_line_bit_for_bit(arch, proofs):
    proof = proofs[arch, "imagenet", 3, "timm"]
    assert (proof.difference, proof.missing, proof.unexpected) == (0.0, (), ())


def test_at_least_twenty_of_timms_names_were_tried():
    assert len([arch for arch in TIMM if "/" not in arch]) >= 20


@pytest.mark.parametrize("arch, stem, channels, name", OTHERS)
def test_other_stems_channels_and_networks_are_built_from_the_librarys_parts(arch, stem, channels, name, proofs):
    proof = proofs[arch, stem, channels, name]
    assert (proof.difference, proof.missing, proof.unexpected) == (0.0, (), ())


@pytest.fixture(scope="module")
def exported(tmp_path_factory, demo_run):
    """The demo's backbone in two formats, by the command line."""
    out = tmp_path_factory.mktemp("out") / "made" / "handed"
    command = ["--checkpoint", str(demo_run), "--format", "torchvision", "moco", "--out", str(out)]
    assert tools.export.main(command) == 0
    return out


def test_of_two_exports_that_are_verified_the_one_with_a_changed_weight_is_named(exported, tmp_path, capsys):
    """Though its manifest was made to fit. Of the other one it is said what lies there and how to load it."""
    shutil.copytree(exported, tmp_path / "both")
    spoil(tmp_path / "both" / "torchvision")
    relisted(tmp_path / "both" / "torchvision")
    capsys.readouterr()
    assert tools.export.main(["--verify", str(tmp_path / "both")]) == 2
    said = capsys.readouterr()
    assert re.search("torchvision: its features differ from the trainer's by up to .* where the largest", said.err)
    for word in ("checkpoint.pth.tar", " bytes", "largest difference 0,", "no key missing", "4 generated images",
                 f'load = runpy.run_path("{tmp_path}/both/moco/load.py")["load"]'):
        assert word in said.out
    assert "torchvision:" not in said.out


def test_an_export_lies_where_it_was_asked_for_and_nothing_else_does(exported):
    assert sorted(path.name for path in exported.parent.iterdir()) == ["handed"]
    assert sorted(path.name for path in exported.iterdir()) == ["moco", "torchvision"]


def test_no_image_of_the_user_lies_in_an_export(exported, demo):
    kept = load_file(exported / "torchvision" / images.FILE)
    torch.testing.assert_close(kept["images"], images.generated(demo.views), rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(kept["features"], demo.encoder.backbone(kept["images"]), rtol=0, atol=1e-6)
    assert set(kept) == {"images", "features"}


def test_the_manifest_tells_no_place_on_the_users_machine(exported, demo_run):
    text = (exported / "torchvision" / manifest.FILE).read_text()
    assert str(demo_run) not in text and str(exported) not in text and "8 images of digits" in text


@pytest.fixture
def own(demo, tmp_path):
    return written(tmp_path / "own", hand(demo), "safetensors")


def test_our_own_format_loads_in_one_line(own, demo):
    x_BcHW, *_ = images.real(demo, None)
    with torch.inference_mode():
        assert torch.equal(load_backbone(own)(x_BcHW), demo.encoder.backbone(x_BcHW))


SWAPPED = bytes.maketrans(b"\0t", b"t\0")


def damaged(exported: Path, place: Path) -> Path:
    return Path(shutil.copytree(exported / "torchvision", place / "copy"))


@pytest.mark.parametrize("damage, said", [
    (lambda path: path.unlink(), "missing"),
    (lambda path: path.write_bytes(path.read_bytes()[:-99]), ".* bytes; .* were exported. It was cut short or changed"),
    (lambda path: path.write_bytes(path.read_bytes().translate(SWAPPED)), "its content is not what was exported"),
])
@pytest.mark.parametrize("file", ["weights.pth", LOADER, images.FILE])
def test_a_file_that_is_missing_short_or_tampered_with_is_named(file, damage, said, exported, tmp_path):
    folder = damaged(exported, tmp_path)
    damage(folder / file)
    with pytest.raises(manifest.NotAsExported, match=rf"{folder / file}: {said}"):
        verify([folder])


def relisted(folder: Path) -> None:
    """The manifest made to fit what lies there now."""
    content = json.loads((folder / manifest.FILE).read_text())
    manifest.write(folder, {key: content[key] for key in content if key not in ("kind", "files")})


def test_a_loader_that_is_not_ours_is_not_run(exported, tmp_path):
    folder = damaged(exported, tmp_path)
    with open(folder / LOADER, "a") as file:
        file.write(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    relisted(folder)
    with pytest.raises(manifest.NotAsExported, match="load.py: not what this version writes .* it was not run"):
        verify([folder])
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["/etc/hostname", "../other/load.py"])
def test_no_file_outside_the_folder_is_looked_at(name, exported, tmp_path):
    folder = damaged(exported, tmp_path)
    content = json.loads((folder / manifest.FILE).read_text())
    (folder / manifest.FILE).write_text(json.dumps({**content, "files": {name: {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(manifest.NotAsExported, match=f"lists {name}, which is not in the folder"):
        manifest.read(folder)


def test_a_manifest_of_lists_in_lists_is_of_no_export(tmp_path):
    (tmp_path / manifest.FILE).write_text("[" * 200_000)
    with pytest.raises(manifest.NotAsExported, match="no export"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("key, value, said", [
    ("format", "torchvsion", "Did you mean torchvision"),
    ("network", {}, "the facts of a network are"),
    ("network", {"arch": "w4s1\nimport os"}, "is no name of a network"),
    ("network", {"channels": "1); import os; (1"}, "a whole number above 0"),
    ("network", {"head": [4, "4"]}, "a whole number above 0"),
])
def test_a_manifest_cannot_put_code_into_a_loader(key, value, said, exported, tmp_path):
    folder = damaged(exported, tmp_path)
    content = json.loads((folder / manifest.FILE).read_text())
    content[key] = {**content[key], **value} if value and isinstance(value, dict) else value
    (folder / manifest.FILE).write_text(json.dumps(content))
    with pytest.raises(manifest.NotAsExported, match=said):
        verify([folder])


LENIENT = """
import torch

def load(folder):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.load_state_dict({"1.weight": torch.zeros(1)}, strict=False)
    return lambda images: torch.ones(len(images), 3)
"""
CHEATING = """
import common

def load(folder):
    return None
"""
FLIPPED = """
import torch

def load(folder):
    return lambda images: images.flip(1).mean(dim=(2, 3))
"""
NOT_A_NUMBER = FLIPPED.replace("images.flip(1)", "images.log()")


def test_what_a_loader_does_in_the_fresh_process_is_seen(tmp_path):
    """Keys that it passed by in silence; channels the other way round; features that are not numbers."""
    x_BcHW = torch.randn(2, 3, 4, 4)
    features = {LENIENT: torch.ones(2, 3), FLIPPED: x_BcHW.mean(dim=(2, 3)), NOT_A_NUMBER: x_BcHW.mean(dim=(2, 3))}
    lenient, flipped, no_number = prove([Job(tmp_path, {"x": x_BcHW}, {"x": found}, text)
                                         for text, found in features.items()])
    assert (lenient.missing, lenient.unexpected) == (("0.weight", "0.bias"), ("1.weight",)) and not lenient.holds
    assert flipped.difference > 0.01 and not flipped.holds
    assert not no_number.holds


def test_a_failed_proof_leaves_no_export_behind(demo, monkeypatch, tmp_path):
    """Nor those of other formats that were asked for with it, nor a folder that was made for them. It fails since this
    project cannot be imported in the fresh process."""
    monkeypatch.setitem(FORMATS, "torchvision",
                        dataclasses.replace(FORMATS["torchvision"], loader=lambda facts: CHEATING))
    with pytest.raises(Unproven, match="torchvision.*: it does not load: ModuleNotFoundError: import of common halted"):
        export(hand(demo), ["torchvision", "moco"], tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_whose_features_differ_is_not_left_behind(demo, monkeypatch, tmp_path):
    """It loads, each key in its place, and gives a hundredth more than the training did."""
    own = FORMATS["torchvision"]
    more = "\ntheirs = load\n\ndef load(folder):\n    model = theirs(folder)\n    return lambda x: 1.01 * model(x)\n"
    monkeypatch.setitem(FORMATS, "torchvision", dataclasses.replace(own, loader=lambda facts: own.loader(facts) + more))
    with pytest.raises(Unproven, match="its features differ from the trainer's by up to"):
        export(hand(demo), ["torchvision"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("difference, scale, holds", [
    (0.0, 3.0, True), (0.9e-4, 3.0, True), (1.1e-4, 3.0, False), (float("nan"), 3.0, False),
    (0.9e-5, 0.1, True), (1.1e-5, 0.1, False)])
def test_the_limit_is_a_ten_thousandth_and_of_small_features_that_share(difference, scale, holds):
    assert Proof(difference, scale, (), ()).holds is holds


@pytest.mark.parametrize("given, said", [
    ({"out": "file"}, "it is there already and no export"),
    ({"out": "export"}, "an export is there already. Give another folder, or --overwrite"),
    ({"out": "export", "names": ["torchvision", "moco"]}, "it is an export itself"),
    ({"names": ["timm"]}, "--format timm: w16s1: timm has no such network. Give --format torchvision or safetensors."),
    ({"names": ["detectron2"]}, "--format detectron2: w16s1: detectron2 has ResNets only"),
    ({"names": ["tim"]}, "--format tim: there is no such format. Did you mean timm[?] Allowed: torchvision, timm"),
    ({"data": "/no/such/images"}, "there is no folder /no/such/images"),
])
def test_what_cannot_be_done_is_said_before_anything_is_written(given, said, demo, exported, tmp_path):
    (tmp_path / "file").mkdir()
    shutil.copytree(exported / "torchvision", tmp_path / "export")
    before = sorted(tmp_path.rglob("*"))
    trained = demo if "data" not in given else dataclasses.replace(demo, config=missing_images(demo))
    with pytest.raises(ConfigError, match=said):
        export(hand(trained), given.get("names", ["torchvision"]), tmp_path / given.get("out", "new"),
               data=given.get("data"))
    assert sorted(tmp_path.rglob("*")) == before


def missing_images(trained):
    from common.config import Config
    return Config.parse(trained.config.text(), "demo", ["data={name: common.data.folder, root: /no/such/images}"])


def test_without_the_images_generated_ones_prove_it_and_the_proof_says_so(demo):
    """What is published names no place; why it is so is said to the user alone."""
    found, said, why = images.real(dataclasses.replace(demo, config=missing_images(demo)), None)
    assert found is None and said == "generated images only" and "/no/such/images" in why


@pytest.mark.parametrize("name", ["timm", "detectron2"])
def test_a_head_finds_no_place_in_a_format_without_one(name, resnet):
    with pytest.raises(ConfigError, match=f"--format {name}: .*no place for a projection head.*--what is backbone"):
        by_name(name).loader(hand(resnet, "encoder"))


def test_a_part_that_is_not_there_is_not_handed_on(demo):
    bare = dataclasses.replace(demo, parts=("backbone",))
    with pytest.raises(ConfigError, match="--what encoder: these weights came without a head"):
        hand(bare, "encoder")
    alone = dataclasses.replace(demo, method=InstDisc(copy.deepcopy(demo.encoder), Bank(10, 64), loss="full_softmax"))
    with pytest.raises(ConfigError, match="--what key_backbone: InstDisc has no second encoder for keys"):
        hand(alone, "key_backbone")
    taken_over = dataclasses.replace(demo, origin={"layout": "moco"})
    with pytest.raises(ConfigError, match="--what key_backbone: imported weights are of one encoder"):
        hand(taken_over, "key_backbone")


@pytest.mark.parametrize("arch, stem, name", [
    ("vit_tiny_patch16_224", "imagenet", "torchvision"), ("vit_tiny_patch16_224", "imagenet", "moco"),
    ("resnet18", "small", "timm"), ("resnet18", "small", "detectron2"),
    ("torchvision/convnext_tiny", "imagenet", "timm"),
    ("mobilenetv2_035", "imagenet", "detectron2"), (None, "imagenet", "safetensors"), (None, "imagenet", "moco"),
])
def test_a_network_that_a_format_cannot_hold_is_told_those_that_can(arch, stem, name):
    facts = Facts("backbone", arch, {}, stem, 3, 64, 512, (), 512, False, (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(ConfigError, match=rf"--format {name}: .* Give --format (torchvision|safetensors|timm|torch_)"):
        by_name(name).loader(facts)


def test_the_checkpoint_of_the_official_layout_is_what_its_scripts_read(resnet, tmp_path):
    """As main_lincls.py: encoder_q without its fc loads, and nothing but the classifier is missing."""
    import torchvision

    folder = written(tmp_path / "moco", hand(resnet, "encoder"), "moco")
    found = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
    state = {name.removeprefix("module.encoder_q."): x for name, x in found["state_dict"].items()
             if name.startswith("module.encoder_q.") and not name.startswith("module.encoder_q.fc")}
    model = torchvision.models.__dict__[found["arch"]]()
    model.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    assert set(model.load_state_dict(state, strict=False).missing_keys) == {"fc.weight", "fc.bias"}
    assert {"module.encoder_q.fc.weight", "module.encoder_q.fc.bias"} < set(found["state_dict"])


@pytest.mark.parametrize("theirs, word", [
    ("conv1.weight", "stem.conv1.weight"), ("bn1.running_mean", "stem.conv1.norm.running_mean"),
    ("layer1.0.conv1.weight", "res2.0.conv1.weight"), ("layer1.0.bn3.bias", "res2.0.conv3.norm.bias"),
    ("layer4.2.bn2.weight", "res5.2.conv2.norm.weight"), ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
    ("layer3.0.downsample.1.running_var", "res4.0.shortcut.norm.running_var"),
])
def test_names_are_detectron2s(theirs, word):
    assert detectron2.renamed(theirs) == word


def test_the_file_for_detectron2_is_of_numpy_arrays(resnet, tmp_path):
    folder = written(tmp_path / "d2", hand(resnet), "detectron2")
    found = pickle.loads((folder / "backbone.pkl").read_bytes())
    assert set(found) == {"model", "__author__", "matching_heuristics"} and found["matching_heuristics"] is True
    assert {type(x).__name__ for x in found["model"].values()} == {"ndarray"}
    assert (found["model"]["stem.conv1.weight"] == resnet.encoder.backbone.conv1.weight.detach().numpy()).all()


def test_detectron2_reads_it_itself(resnet, tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed; its names are checked above")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

    folder = written(tmp_path / "d2", hand(resnet), "detectron2")
    stages = ResNet.make_default_stages(18, BasicBlock)
    model = ResNet(BasicStem(1, 64, norm="BN"), stages, out_features=["res5"])
    DetectionCheckpointer(model).load(str(folder / "backbone.pkl"))
    x_BcHW, *_ = images.real(resnet, None)
    with torch.inference_mode():
        found_BD = model.eval()(x_BcHW)["res5"].mean(dim=(2, 3))
        torch.testing.assert_close(found_BD, resnet.encoder.backbone(x_BcHW))


def test_timm_knows_the_preprocessing(resnet, tmp_path):
    import timm

    folder = written(tmp_path / "timm", hand(resnet), "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    found = timm.data.resolve_model_data_config(model)
    views: Views = resnet.views
    assert found["input_size"] == (1, views.size, views.size) and found["interpolation"] == "bilinear"
    assert tuple(found["mean"]) == views.mean and tuple(found["std"]) == views.std and found["crop_pct"] == 1.0


def test_an_export_takes_the_place_of_one_only_when_asked(demo, exported, tmp_path, monkeypatch):
    folder = damaged(exported, tmp_path)
    (folder / "mine.pt").touch()
    with pytest.raises(ConfigError, match="would delete what the export did not write: mine.pt"):
        export(hand(demo), ["moco"], folder, overwrite=True)
    (folder / "mine.pt").unlink()
    monkeypatch.setattr(exporting, "prove", lambda jobs: [Proof(0.0, 1.0, (), ()) for _ in jobs])
    (tmp_path / "copy.partial").mkdir()
    manifest.write(tmp_path / "copy.partial", {})               # what a kill has left
    shutil.copytree(folder, tmp_path / "copy.replaced")
    export(hand(demo), ["moco"], folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.pth.tar", LOADER, manifest.FILE, images.FILE, "README.md", "preprocessing.json",
        "preprocessor_config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_of_two_exports_to_one_folder_the_second_is_refused(demo, monkeypatch, tmp_path):
    def prove_and_try_another(jobs):
        with pytest.raises(ConfigError, match="out.partial: another export is being written there"):
            export(hand(demo), ["moco"], tmp_path / "out")
        return [Proof(0.0, 1.0, (), ()) for _ in jobs]

    monkeypatch.setattr(exporting, "prove", prove_and_try_another)
    export(hand(demo), ["torchvision"], tmp_path / "out")
    assert manifest.read(tmp_path / "out")["format"] == "torchvision"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_export_stays_where_the_new_one_cannot_take_its_name(exported, monkeypatch, tmp_path):
    folder, new = damaged(exported, tmp_path), Path(shutil.copytree(exported / "moco", tmp_path / "copy.partial"))
    rename = Path.rename

    def full(path, target):
        if path == new:
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space"):
        exporting._put(new, folder)
    assert manifest.read(folder)["format"] == "torchvision"


def test_a_link_is_not_replaced(demo, exported, tmp_path):
    (tmp_path / "link").symlink_to(exported / "torchvision")
    with pytest.raises(ConfigError, match="it is a link"):
        export(hand(demo), ["moco"], tmp_path / "link", overwrite=True)


@pytest.mark.parametrize("content, said", [
    (None, "no config.json in it"), ("{", "config.json: "), ('{"arch": "w4s1"}', "the facts of a network are"),
])
def test_our_own_reader_says_what_is_wrong_with_a_folder(content, said, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        load_backbone(tmp_path)


def test_our_own_reader_refuses_weights_of_another_network(own):
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "arch": "w8s1"}))
    with pytest.raises(ValueError, match="model.safetensors does not fit"):
        load_backbone(own)


def test_a_run_hands_itself_on_from_python(demo_run, demo, tmp_path):
    folder = load_run(demo_run, [f"run.dir={demo_run}"]).export(tmp_path / "backbone", "safetensors")
    x_BcHW, *_ = images.real(demo, None)
    with torch.inference_mode():
        assert torch.equal(load_backbone(folder)(x_BcHW), demo.encoder.backbone(x_BcHW))

"""Weights of other projects: known weights, named as each project names them, give the same features here."""

import copy
import json
import os
import shlex
import struct
import sys
import tarfile
import types
import zipfile
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import tools.import_weights
from common import backbones, checkpoint
from common.config import Config, ConfigError
from common.exchange import architecture, foreign, imported, layouts
from common.sections import complete, open_config
from common.trained import load_trained

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def moved(module):
    """Every tensor away from where it starts: BatchNorm's too, or a swapped one would not show."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.2).add_(0.02 * torch.rand(tensor.shape, generator=draw) - 0.01)
    return module.eval()


def linear(width=512, dim=128):
    return nn.Linear(width, dim).state_dict()


def mlp(prefix="", width=512):
    return below(prefix, nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)).state_dict())


def deep(bias=False):
    """MoCo v3's head: BatchNorm after each layer, no bias."""
    return nn.Sequential(nn.Linear(512, 32, bias=bias), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16, bias=bias),
                         nn.BatchNorm1d(16, affine=False)).state_dict()


def below(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def bare(module):
    """A ResNet's tensors without its last layer's."""
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("fc.")}


def few(tensors):
    """Enough of a copy to be taken for the encoder by mistake."""
    return dict(list(tensors.items())[:4])


def numbered(module, leave=("fc",)):
    """The names of a Sequential of its children; ``leave``: those that were left out of it."""
    kept = [name for name, _ in module.named_children() if name not in leave]
    return {f"{kept.index(name.partition('.')[0])}.{name.partition('.')[2]}": tensor
            for name, tensor in module.state_dict().items() if name.partition(".")[0] in kept}


def shortcuts(tensors):
    return {name.replace("downsample.", "shortcut."): tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def nets():
    """A ResNet-18 of each stem, a narrow ResNet and two small ViTs, that map an image to features."""
    plain, small = moved(torchvision.models.resnet18()), moved(torchvision.models.resnet18())
    plain.fc = nn.Identity()
    small.fc, small.maxpool = nn.Identity(), nn.Identity()
    small.conv1, padded = moved(nn.Conv2d(3, 64, 3, 1, 1, bias=False)), copy.deepcopy(small)
    padded.conv1 = nn.Conv2d(3, 64, 3, 1, 2, bias=False)
    padded.conv1.load_state_dict(small.conv1.state_dict())
    vit = {"num_classes": 0, "img_size": 32}
    return SimpleNamespace(plain=plain, small=small, padded=padded.eval(), narrow=moved(backbones.backbone("w8p4")),
                           tiny=moved(timm.create_model("vit_tiny_patch16_224", depth=1, **vit)),
                           twelve=moved(timm.create_model("vit_small_patch16_224", depth=1, num_heads=12, **vit)))


def moco(net, head, wrapper="module."):
    return {"epoch": 200, "arch": "resnet18", "optimizer": {"state": {}},
            "state_dict": below(wrapper, {**below("encoder_q.", {**net.state_dict(), **below("fc.", head)}),
                                          **below("encoder_k.", few(net.state_dict())),
                                          "queue": torch.randn(128, 16), "queue_ptr": torch.zeros(1)})}


def v3(net, last):
    tensors = {**net.state_dict(), **below(f"{last}.", deep())}
    return {"epoch": 300, "state_dict": {**below("module.base_encoder.", tensors),
                                         **below("module.momentum_encoder.", few(tensors)),
                                         **below("module.predictor.", deep())}, "scaler": {"scale": 2.0}}


def lightly(names):
    return {"state_dict": {**below("backbone.", names), **mlp("projection_head.layers."),
                           **below("backbone_momentum.", few(names)), "criterion.bank": torch.randn(128, 16)}}


def benchmark(net):
    key = moved(copy.deepcopy(net))             # both are whole encoders
    return {"state_dict": {**below("backbone.", key.state_dict()), **mlp("projection_head.layers.", 32),
                           **below("query_backbone.", net.state_dict()), **mlp("query_projection_head.layers.", 32)}}


def solo(net, name="backbone", width=512):
    momentum = "momentum_backbone." if name == "backbone" else "momentum_encoder."
    return {"epoch": 5, "state_dict": {**below(f"{name}.", net.state_dict()), **mlp("projector.", width),
                                       **below(momentum, few(net.state_dict())),
                                       **below("classifier.", linear(512, 10)), "queue": torch.randn(2, 128, 8)}}


def vissl(net):
    return {"phase_idx": 199, "classy_state_dict": {"base_model": {
        "model": {"trunk": below("_feature_blocks.", net.state_dict()), "heads": mlp("0.clf.")}, "meta": {}},
        "optimizer": {}}}


V12 = {"arch": "vit_small_patch16_224", "arch_args": {"depth": 1, "num_heads": 12}, "views": 32}
CASES = {                       # the file; the net; the layout; the head; what else the config says
    "moco_v1": (lambda n: moco(n.narrow, linear(32)), "narrow", "moco", "linear", {"config": "moco_v1"}),
    "moco_v2": (lambda n: moco(n.plain, mlp()), "plain", "moco", "mlp", {"config": "moco_v2"}),
    "moco_cifar10": (lambda n: below("encoder_q.net.", {**numbered(n.small, ("fc", "maxpool")),
                                                        **below("9.", linear())}),
                     "small", "moco_cifar10", "linear", {"stem": "small", "views": 32}),
    "moco_v3": (lambda n: v3(n.plain, "fc"), "plain", "moco_v3", "", {}),
    "moco_v3_vit": (lambda n: v3(n.twelve, "head"), "twelve", "moco_v3", "", V12),
    "instdisc": (lambda n: {"state_dict": below("module.", {**n.plain.state_dict(), **below("fc.", linear())})},
                 "plain", "instdisc", "linear", {"config": "instdisc"}),
    "instdisc_cifar": (lambda n: {"net": below("module.", {**shortcuts(bare(n.small)), **below("linear.", linear())})},
                       "small", "instdisc", "linear", {"stem": "small"}),
    "lightly": (lambda n: lightly(numbered(n.plain)), "plain", "lightly", "mlp", {}),
    "lightly_cifar": (lambda n: lightly(shortcuts(numbered(n.small, ("relu", "maxpool", "avgpool", "fc")))),
                      "small", "lightly", "mlp", {"stem": "small"}),
    "lightly_benchmark": (lambda n: benchmark(n.narrow), "narrow", "lightly_benchmark", "mlp", {}),
    "solo_learn": (lambda n: solo(n.narrow, width=32), "narrow", "solo_learn", "mlp", {"stem": "imagenet"}),
    "solo_learn_cifar": (lambda n: solo(n.padded), "padded", "solo_learn", "mlp", {"stem": "small_padded"}),
    "solo_learn_old": (lambda n: solo(n.narrow, "encoder", 32), "narrow", "solo_learn_old", "mlp", {}),
    "vissl": (lambda n: vissl(n.plain), "plain", "vissl", "mlp", {}),
    "torchvision": (lambda n: {**n.plain.state_dict(), **below("fc.", linear(512, 1000))},
                    "plain", "torchvision", "", {"arch": "torchvision/resnet18"}),
    "timm_vit": (lambda n: {**n.tiny.state_dict(), **below("head.", linear(192, 1000))}, "tiny", "timm", "",
                 {"arch": "vit_tiny_patch16_224", "arch_args": {"depth": 1}, "views": 32}),
    "compiled": (lambda n: {"model": below("_orig_mod.module.", bare(n.narrow))}, "narrow", "own", "",
                 {"arch": "w8p4"}),
    "wrapped_compiled": (lambda n: moco(n.narrow, mlp(width=32), "module._orig_mod."), "narrow", "moco", "mlp", {}),
    "inner_wrapper": (lambda n: below("model.encoder_q.module.", bare(n.narrow)), "narrow", "moco", "", {}),
    "own_encoder": (lambda n: {**below("backbone.", bare(n.narrow)), **mlp("head.", 32)}, "narrow", "own_encoder",
                    "mlp", {"hidden": 32}),
    "backbone": (lambda n: below("backbone.", bare(n.narrow)), "narrow", "backbone", "", {}),
}


def saved(tree, path, **options):
    torch.save(tree, path, **options)
    return path


def built(found):
    """The encoder of what was imported, built from the config and the weights that are written."""
    config = Config.parse(found.state["config"], "test")
    arguments = {key: value for key, value in config.get("method.encoder").items() if key != "name"}
    with torch.device("meta" if found.state["parts"] == ["backbone", "head"] else "cpu"):
        encoder = backbones.encoder(**arguments, channels=found.state["facts"]["channels"],
                                    image_size=config.get("views.size"))
    (encoder if "head" in found.state["parts"] else encoder.backbone).load_state_dict(
        {name.removeprefix("" if "head" in found.state["parts"] else "backbone."): tensor
         for name, tensor in found.state["weights"].items()}, assign=True)
    return encoder.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_layout_is_recognised_and_gives_the_features_of_the_net_it_is_from(case, nets, tmp_path):
    make, net, layout, head, says = CASES[case]
    found = imported.take(saved(make(nets), tmp_path / "file.pth"))
    encoder = built(found)
    with torch.no_grad():
        assert torch.equal(encoder.backbone(IMAGE), getattr(nets, net)(IMAGE))
    assert (found.layout, found.matched, found.total) == (layout, *2 * [len(encoder.backbone.state_dict())])
    assert found.state["parts"] == (["backbone", "head"] if head else ["backbone"]) and found.head.startswith(head)
    config = Config.parse(found.state["config"], "test")
    template = Config.load(says["config"]) if "config" in says else config
    assert config.get("views.name") == template.get("views.name")
    for key, value in says.items():
        where = {"config": "schedule.name", "views": "views.size"}.get(key, f"method.encoder.{key}")
        assert config.get(where) == (template.get(where) if key == "config" else value), key


def test_the_key_encoder_is_taken_when_asked_for(nets, tmp_path):
    file = saved(benchmark(nets.narrow), tmp_path / "file.pth")
    key = moved(copy.deepcopy(nets.narrow))
    with torch.no_grad():
        assert torch.equal(built(imported.take(file, part="key")).backbone(IMAGE), key(IMAGE))
    with pytest.raises(ConfigError, match="--part key: the layout 'own' keeps no key encoder"):
        imported.take(saved(nets.narrow.state_dict(), tmp_path / "plain.pth"), part="key")


def test_what_is_written_is_read_by_the_tools(nets, tmp_path, capsys):
    file, out = saved(moco(nets.narrow, mlp(width=32)), tmp_path / "m.pth.tar"), tmp_path / "new" / "m.pt"
    assert tools.import_weights.main([str(file), "--out", str(out), "method.dictionary.size=64"]) == 0
    said = capsys.readouterr().out
    assert "layout   moco\nnetwork  w8p4, stem imagenet, 3 channels\n" in said
    assert "matched  54 of 54 tensors" in said and f"--checkpoint {out}" in said
    assert "aside    encoder_k (4), queue, queue_ptr, epoch, arch, optimizer" in said
    trained = load_trained(out, ["method.dictionary.size=64"])
    with torch.no_grad():
        assert torch.equal(trained.encoder.backbone(IMAGE), nets.narrow(IMAGE))
    assert trained.parts == ("backbone", "head")
    assert trained.origin["epoch"] == 200 and trained.origin["file"] == file.name
    assert tools.import_weights.main([str(file), "--out", str(out)]) == 2
    assert "there is such a file already" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["moco_v3_vit", "moco_cifar10"])
def test_the_command_that_trains_on_builds_this_network(case, nets, tmp_path):
    found = imported.take(saved(CASES[case][0](nets), tmp_path / "file.pth"))
    said = tools.import_weights.report(found, tmp_path / "out.pt")
    overrides = shlex.split(said.partition("--config my_images.yaml ")[2])
    config = complete(open_config("my_images", overrides=overrides))
    own = Config.parse(found.state["config"], "own")
    for where in ("method.encoder.arch", "method.encoder.stem", "method.encoder.arch_args", "views.size"):
        assert config.get(where) == own.get(where), where
    assert config.get("run.weights") == str(tmp_path / "out.pt")


def test_a_head_that_did_not_come_is_not_measured_and_another_network_not_built(nets, tmp_path):
    found = imported.take(saved(nets.narrow.state_dict(), tmp_path / "file.pth"),
                          overrides=["method.dictionary.size=64"])
    imported.write(found, tmp_path / "out.pt")
    with pytest.raises(ConfigError, match="--layer head: only the backbone came with these weights"):
        load_trained(tmp_path / "out.pt").evaluator(None, [], "head")
    for arch in ("torchvision/resnet18", "w16p4", "w8s1"):
        with pytest.raises(checkpoint.DamagedCheckpoint, match="does not fit the method of the.*(Missing|size mis)"):
            load_trained(tmp_path / "out.pt", [f"method.encoder.arch={arch}"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(nets, tmp_path, dtype):
    halved = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
              for name, tensor in nets.narrow.state_dict().items()}
    weights = imported.take(saved(halved, tmp_path / "half.pth")).state["weights"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64}
    assert torch.equal(weights["backbone.conv1.weight"], halved["conv1.weight"].float())


def test_the_format_of_before_torch_1_6_is_read_and_counters_may_be_missing(nets, tmp_path):
    """As MoCo's released files; VISSL's converter drops the counters."""
    tensors = {name: tensor for name, tensor in nets.plain.state_dict().items() if "num_batches" not in name}
    file = saved({"state_dict": tensors}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    found = imported.take(file)
    assert not zipfile.is_zipfile(file) and found.matched == 100 and "num_batches_tracked" in found.notes[0]
    with torch.no_grad():
        assert torch.equal(built(found).backbone(IMAGE), nets.plain(IMAGE))


def test_a_safetensors_folder_names_its_network_where_no_shape_tells_it(tmp_path):
    net = moved(backbones.backbone("w8s1"))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="layout 'own' tell no network.*file holds 54 names .*Give --arch"):
        imported.take(tmp_path)
    assert torch.equal(built(imported.take(tmp_path, arch="w8s1")).backbone(IMAGE), net(IMAGE))
    (tmp_path / "config.json").write_text(json.dumps({"arch": "w8s1"}))
    assert torch.equal(built(imported.take(tmp_path)).backbone(IMAGE), net(IMAGE))


def test_one_channel_and_a_named_network(tmp_path):
    net = moved(timm.create_model("resnet10t", num_classes=5, in_chans=1))
    found = imported.take(saved(net.state_dict(), tmp_path / "grey.pth"), arch="resnet10t")
    image = IMAGE[:, :1]
    with torch.no_grad():
        assert torch.equal(built(found).backbone(image), net.forward_head(net.forward_features(image), pre_logits=True))
    assert found.state["facts"]["channels"] == 1 and Config.parse(found.state["config"], "").get("data.channels") == 1
    assert found.aside == ["fc.weight", "fc.bias"] and found.head == "none: fc.* is a classifier, which is left aside"


@pytest.mark.parametrize("name", [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32",
    "vit_h_14"])
def test_torchvisions_networks_are_told_by_their_shapes(name):
    with torch.device("meta"):
        tensors = torchvision.models.get_model(name).state_dict()
    found = architecture.recognise(tensors, "torchvision", padded=False)
    assert found.arch == f"torchvision/{name}" and found.image_size == (224 if "vit" in name else None)


@pytest.mark.parametrize("name", [
    "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_small_patch32_384", "vit_small_patch8_224",
    "vit_base_patch16_384", "vit_base_patch8_224", "vit_large_patch14_224", "vit_huge_patch14_224",
    "deit_small_patch16_224"])
def test_timms_vits_are_told_by_their_shapes(name):
    with torch.device("meta"):
        net = timm.create_model(name)
    tensors = {key: torch.ones(1).expand(tensor.shape) for key, tensor in net.state_dict().items()}
    found = architecture.recognise(tensors, "timm", padded=False)
    with torch.device("meta"):
        built = backbones.backbone(found.arch, image_size=found.image_size, arch_args=found.arch_args)
    expected = {key: tensor.shape for key, tensor in tensors.items() if not key.startswith("head.")}
    assert {key: tensor.shape for key, tensor in built.state_dict().items()} == expected
    assert not found.notes and not found.arch_args


def test_a_fixed_table_of_positions_tells_of_moco_v3s_heads(nets):
    tensors = nets.twelve.state_dict()
    tensors["pos_embed"] = tensors["pos_embed"].clone()
    tensors["pos_embed"][0, 0] = 0
    assert "12 heads" in architecture.recognise(tensors, "timm", padded=False).notes[0]


class Bank:
    """Stands for lemniscate's NCEAverage, which its checkpoints pickle."""


Bank.__module__, Bank.__qualname__ = "lib.NCEAverage", "NCEAverage"


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("old", [False, True])
def test_a_file_that_needs_code_is_refused_with_the_way_out(nets, tmp_path, monkeypatch, old):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("lib.NCEAverage")
    module.NCEAverage = Bank
    monkeypatch.setitem(sys.modules, "lib", types.ModuleType("lib"))
    monkeypatch.setitem(sys.modules, "lib.NCEAverage", module)
    options = {"_use_new_zipfile_serialization": not old}
    file = saved({"state_dict": nets.plain.state_dict(), "lemniscate": Bank()}, tmp_path / "old.pth.tar", **options)
    with pytest.raises(ConfigError, match=r"(?s)plain values: lib.NCEAverage.NCEAverage \(InstDisc's authors.*runs code"
                                          r".*whole\['state_dict'\] if .* else whole.state_dict\(\)"):
        imported.take(file)
    with pytest.raises(ConfigError, match="refused: it holds more .*posix.mkdir"):
        imported.take(saved({"state_dict": Runs()}, tmp_path / "runs.pth", **options))
    assert not (tmp_path / "ran").exists()


def changed(net, **tensors):
    return {**net.state_dict(), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


REFUSED = {
    "a wrong prefix": (lambda n: below("foo.", n.plain.state_dict()), {}, r"tell no network.*Below 'foo.', .*"
                       r"torchvision/resnet18, which has 120 names \(conv1.*take the prefix off.* \(foo.conv1"),
    "a wrong prefix and a network": (lambda n: below("foo.", n.plain.state_dict()), {"arch": "torchvision/resnet18"},
                                     r"0 names matched. torchvision/resnet18 has 120 names \(conv1.weight, .*the file, "
                                     r"read as layout 'timm', has 120 names \(foo.conv1.weight"),
    "another layout": (lambda n: n.plain.state_dict(), {"layout": "moco"},
                       r"0 tensors of a backbone found. .*'moco' has them under 'encoder_q.'; the file holds 120 name"),
    "another network": (lambda n: n.plain.state_dict(), {"arch": "torchvision/resnet34"},
                        r"fits torchvision/resnet34 in part only: 120 of 216 names matched; 80 missing \(layer1.2"),
    "a smaller network": (lambda n: n.plain.state_dict(), {"arch": "w64s2"}, "w64s2 in part only: .* unexpected"),
    "another width": (lambda n: changed(n.plain, bn1__weight=torch.ones(65)), {},
                      r"1 of another shape \(bn1.weight \[65\] where \[64\] belongs\)"),
    "a tensor too few": (lambda n: {k: v for k, v in n.plain.state_dict().items() if k != "layer4.1.bn2.bias"}, {},
                         r"119 of 120 names matched; 1 missing \(layer4.1.bn2.bias\)"),
    "a tensor too many": (lambda n: changed(n.plain, layer1__0__se=torch.ones(2)), {}, r"1 unexpected \(layer1.0.se\)"),
    "a linear classifier": (lambda n: {"state_dict": linear()}, {}, "holds a head or a classifier, and no backbone.*"
                                                                   "weight, bias"),
    "a projection head": (lambda n: mlp("module.projector."), {}, "holds a head or a classifier, and no backbone"),
    "no tensors": (lambda n: {"epoch": 3}, {}, r"holds no tensors, but 1 names \(epoch\)"),
    "not finite": (lambda n: changed(n.plain, layer2__0__bn1__running_var=torch.full((128,), torch.nan)), {},
                   r"1 tensors hold values that are not finite \(backbone.layer2.0.bn1.running_var\)"),
    "zeros": (lambda n: changed(n.plain, conv1__weight=torch.zeros(64, 3, 7, 7)), {}, "1 of 20 weights are zero"),
    "an unknown layout": (lambda n: n.plain.state_dict(), {"layout": "mocov2"}, "'mocov2' is not known. Allowed: moco"),
    "an unknown network": (lambda n: n.plain.state_dict(), {"arch": "resnet19"}, "no model 'resnet19'.*resnet18"),
    "names that meet": (lambda n: {**n.plain.state_dict(), **below("module.", n.plain.state_dict())}, {},
                        "120 tensors would have the name of another"),
    "no dict": (lambda n: [torch.ones(2)], {}, "holds a list, and not weights by name"),
    "quantized": (lambda n: {"conv1.weight": torch.quantize_per_tensor(torch.ones(2, 2), 1.0, 0, torch.qint8)}, {},
                  "conv1.weight is quantized"),
    "one element repeated": (lambda n: {"conv1.weight": torch.ones(1).expand(10**6)}, {}, "claims .* elements"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_whole_backbone_is_refused(case, nets, tmp_path):
    make, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        imported.take(saved(make(nets), tmp_path / "file.pth"), **options)


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_a_file_that_was_cut_off_is_refused_wherever_it_was_cut(kind, tmp_path):
    file, net = tmp_path / "file", backbones.backbone("w8p4")
    if kind == "safetensors":
        save_file(net.state_dict(), file)
    else:
        saved(net.state_dict(), file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    assert imported.take(file).matched
    for size in (0, 1, 8, 9, 100, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="damaged|no file of weights|cut off"):
            imported.take(file)


def test_a_file_that_claims_more_than_it_holds_is_refused(tmp_path):
    """One old file says that a tensor has a million million elements; in a new one a part is compressed."""
    file = saved({"conv1.weight": torch.ones(4321)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"M" + struct.pack("<H", 4321), b"\x8a\x06" + (10**12).to_bytes(6, "little")))
    assert file.read_bytes() != content
    with pytest.raises((ConfigError, MemoryError), match="damaged|allocate|claims"):
        foreign.read(file)
    new = saved({"conv1.weight": torch.zeros(10**6)}, tmp_path / "new.pth")
    with zipfile.ZipFile(new) as archive, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    with pytest.raises(ConfigError, match="a part of it is compressed"):
        foreign.read(tmp_path / "bomb.pth")
    (tmp_path / "header.safetensors").write_bytes(struct.pack("<Q", 2**31) + b"{" + b" " * 100)
    with pytest.raises(ConfigError, match="damaged"):
        foreign.read(tmp_path / "header.safetensors")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_other_formats_are_named(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    (tmp_path / "text.pth").write_text("not weights")
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        archive.add(tmp_path / "text.pth", "storages")
    checkpoint.save(tmp_path / "own.pt", {"weights": {}})
    for name, message in (("script.pt", "a TorchScript program, which is code"), ("text.pth", "no file of weights"),
                          ("old.tar", "torch's format of before 2017"), ("own.pt", "a checkpoint of this project"),
                          ("none.pth", "no such file"), ("", "a folder without model.safetensors")):
        with pytest.raises(ConfigError, match=message):
            foreign.read(tmp_path / name)


def test_every_layout_has_a_case():
    assert set(layouts.NAMES) == {case[2] for case in CASES.values()}

"""Exports as graphs: any number of images, any size where the network allows, nothing of whose machine made them."""

import json
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.backbones import backbone
from common.config import ConfigError
from common.exchange import export as exporting
from common.exchange.export import export, verify
from common.exchange.formats import onnx, torch_export
from common.exchange.graph import FILE, _freedoms, notes, trace
from common.exchange.handed import hand
from common.exchange.manifest import NotAsExported, sha256
from common.exchange.proof import Proof
from common.run import Run
from common.trained import load_trained
from tests import tiny

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[2]
NETS = {"small": ("w4s1", 8), "vit": ("vit_tiny_patch16_224.augreg_in21k", 32)}


@pytest.fixture(scope="module", params=NETS)
def handed(request, tmp_path_factory):
    """What a run of a few steps hands on: of any size, and of one size."""
    arch, size = NETS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    method = {**tiny.METHODS["instdisc"], "encoder": {"name": "common.backbones.encoder", "arch": arch, "dim": 16}}
    if request.param == "vit":
        method["encoder"]["arch_args"] = {"depth": 2, "embed_dim": 48}
    config = tiny.settings(tiny.photos(folder / "photos", 16), folder / "run", "instdisc", method=method,
                           train={"epochs": 1}, views={"size": size}, evaluate={"protocols": []})
    Run(config).train()
    return hand(load_trained(folder / "run"), "encoder")


@pytest.fixture(scope="module")
def folders(handed, tmp_path_factory):
    """Both formats: those of the small network proven in a fresh process, those of the ViT written alone."""
    out = tmp_path_factory.mktemp("out")
    if not sized(handed):
        export(handed, ["torch_export", "onnx"], out)
    else:
        for format in (torch_export.FORMAT, onnx.FORMAT):
            (out / format.name).mkdir()
            format.write(out / format.name, handed)
    return {name: out / name for name in ("torch_export", "onnx")}


@pytest.fixture(params=["torch_export", "onnx"])
def features(request, folders):
    """images -> features, by the target's loader alone; and the folder."""
    folder = folders[request.param]
    if request.param == "torch_export":
        return torch.export.load(folder / torch_export.FILE).module(), folder
    session = onnxruntime.InferenceSession(folder / onnx.FILE, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), folder


def sized(handed) -> bool:
    return handed.arch.startswith("vit")


def images(handed, count, higher=0, wider=0):
    side = handed.image_size
    return torch.randn(count, handed.channels, side + higher, side + wider)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_graph_takes_any_number_of_images(features, handed, count):
    model, _ = features
    images_BcHW = images(handed, count)
    torch.testing.assert_close(model(images_BcHW), handed.module(images_BcHW), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [(8, 8), (5, 16)])
def test_a_graph_takes_any_size_if_its_network_does_and_says_if_not(features, handed, more):
    model, folder = features
    said = json.loads((folder / FILE).read_text())["images"]
    images_BcHW = images(handed, 2, *more)
    if sized(handed):
        assert said == ["batch", 3, handed.image_size, handed.image_size]
        with pytest.raises((RuntimeError, AssertionError, onnxruntime.capi.onnxruntime_pybind11_state.Fail,
                            onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument)):
            model(images_BcHW)
    else:
        assert said == ["batch", 3, "height", "width"]
        torch.testing.assert_close(model(images_BcHW), handed.module(images_BcHW), rtol=1e-4, atol=1e-5)


def test_onnx_names_its_axes_and_says_its_operators(folders, handed):
    session = onnxruntime.InferenceSession(folders["onnx"] / onnx.FILE, providers=["CPUExecutionProvider"])
    (given,), (found,) = session.get_inputs(), session.get_outputs()
    said = json.loads((folders["onnx"] / FILE).read_text())
    assert (given.name, given.shape) == ("images", said["images"])
    assert (found.name, found.shape) == ("features", ["batch", 16])
    assert said["opset"] == onnx.OPSET


def test_a_graph_holds_no_path_of_the_machine_that_traced_it(folders):
    for folder in folders.values():
        for file in folder.iterdir():
            parts = {file.name: file.read_bytes()}
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    parts |= {name: archive.read(name) for name in archive.namelist()}
            for name, content in parts.items():
                for path in (str(ROOT), sys.prefix, str(folder.parent), ".py\", line", "site-packages"):
                    assert path.encode() not in content, (file.name, name, path)


def test_the_card_says_which_axes_are_free(folders, handed):
    for folder in folders.values():
        note, = notes(folder)
        assert ("of this size alone, 32 x 32" if sized(handed) else "any height and width") in note
        assert sized(handed) or note in (folder / "README.md").read_text()


def test_another_graph_in_the_place_of_one_is_found_out(folders, handed, tmp_path):
    if sized(handed):
        pytest.skip("the same for every network")
    assert verify([folders["onnx"]])[0].proof.holds
    for name, file in (("onnx", onnx.FILE), ("torch_export", torch_export.FILE)):
        content = bytearray((folders[name] / file).read_bytes())
        content[len(content) // 2] ^= 1
        copy = tmp_path / name
        copy.mkdir()
        for other in folders[name].iterdir():
            (copy / other.name).write_bytes(content if other.name == file else other.read_bytes())
        with pytest.raises(NotAsExported, match=file):
            verify([copy])


def test_a_graph_that_is_a_program_is_not_run_before_it_is_trusted(folders, handed, monkeypatch, tmp_path):
    """torch.export.load executes the guards that stand in the file, and its own proof would still hold."""
    if sized(handed):
        pytest.skip("the same for every network")
    folder = shutil.copytree(folders["torch_export"], tmp_path / "theirs")
    with zipfile.ZipFile(folders["torch_export"] / torch_export.FILE) as old, \
         zipfile.ZipFile(folder / torch_export.FILE, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("models/model.json"):
                program = json.loads(content)
                program["guards_code"] = [f"open({str(tmp_path / 'was_run')!r}, 'w') is not None"]
                content = json.dumps(program).encode()
            new.writestr(name, content)
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][torch_export.FILE] = {"bytes": (folder / torch_export.FILE).stat().st_size,
                                           "sha256": sha256(folder / torch_export.FILE)}
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(NotAsExported, match="loading it runs code .* --trust torch_export"):
        verify([folder])
    assert not (tmp_path / "was_run").exists()
    monkeypatch.setattr(exporting, "prove", lambda jobs: [Proof(0.0, 1.0, (), ()) for _ in jobs])
    assert verify([folders["torch_export"]], ["torch_export"])[0].proof.holds


def test_padding_that_goes_by_the_size_keeps_one_size():
    module = backbone("tf_mobilenetv3_small_075", image_size=32)
    assert list(_freedoms(SimpleNamespace(module=module))) == [{0: "batch"}]
    assert next(iter(_freedoms(SimpleNamespace(module=torch.nn.Conv2d(3, 3, 3))))) == {
        0: "batch", 2: "height", 3: "width"}


def test_what_cannot_be_traced_is_refused_with_its_name(handed):
    class Asks(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :4] if images.sum().item() > 0 else images.flatten(1)[:, :2]

    with pytest.raises(ConfigError, match="torch.export cannot trace it"):
        trace(replace(handed, module=Asks()))


def test_without_its_packages_onnx_is_refused_with_how_to_install_them(handed, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ConfigError, match=r"no_such_package not installed\. pip install no_such_package"):
        export(handed, ["onnx"], tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_more_than_onnx_can_hold_is_refused(handed, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx, "MAX_PARAMETERS", 100)
    with pytest.raises(ConfigError, match="2 GiB"):
        export(handed, ["onnx"], tmp_path / "x")
    assert not list(tmp_path.iterdir())

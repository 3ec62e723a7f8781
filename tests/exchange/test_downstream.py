"""docs/downstream.md, as it stands: from a run to what each library makes of it, by that library's own interface."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

from common.exchange.formats import by_name, onnx
from common.exchange.handed import hand
from common.run import Run
from common.trained import load_trained
from tests import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "downstream.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
BLOCKS = [pytest.param(code, id=section.partition("\n")[0]) for section in SECTIONS
          for code in re.findall(r"^```python downstream\n((?:.*\n)*?)```$", section, re.MULTILINE)]


def imported(code: str) -> set[str]:
    return set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """photos/, and handed-on/ with what a ResNet-18 of ten steps is in three formats."""
    folder = tmp_path_factory.mktemp("downstream")
    encoder = {"name": "common.backbones.encoder", "arch": "torchvision/resnet18", "dim": 16, "stem": "imagenet"}
    tiny.photos(folder / "photos", 16)
    Run(tiny.settings(folder / "photos", folder / "run", "instdisc", method={**tiny.METHODS["instdisc"],
                      "encoder": encoder}, views={"size": 64}, train={"epochs": 1}, evaluate={"protocols": []})).train()
    handed = hand(load_trained(folder / "run"))
    formats = ["timm", "torchvision"] + ["onnx"] * all(map(importlib.util.find_spec, onnx.PACKAGES))
    for name in formats:
        (folder / "handed-on" / name).mkdir(parents=True)
        by_name(name).write(folder / "handed-on" / name, handed)
    (folder / "handed-on" / "torchvision" / "load.py").write_text(by_name("torchvision").loader(handed))
    return folder, handed


@pytest.mark.parametrize("code", BLOCKS)
def test_what_the_page_says_runs(code, place, monkeypatch, tmp_path):
    folder, handed = place
    if absent := [name for name in imported(code) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(absent)}: not installed")
    monkeypatch.chdir(folder)
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    made = runpy.run_path(str(tmp_path / "block.py"))
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) < 10
    if "neighbours" in made:
        assert made["neighbours"][:, 0].tolist() == [0, 1, 2]
    if "losses" in made:
        assert torch.isfinite(torch.stack(list(made["losses"].values()))).all()
    if "session" in made:
        expected = handed.module(torch.from_numpy(made["images"]))
        torch.testing.assert_close(torch.from_numpy(made["features"]), expected, rtol=1e-4, atol=1e-4)
    if "processor" in made:
        pixels = made["processor"](made["picture"], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(made["features"], handed.module(pixels), rtol=1e-5, atol=1e-5)


def test_a_block_of_each_library_stands_there():
    libraries = {name for block in BLOCKS for name in imported(block.values[0])}
    assert {"timm", "torchvision", "detectron2", "faiss", "transformers", "onnxruntime"} <= libraries

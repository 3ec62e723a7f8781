"""What README.md and docs/ say of the code: links, names, commands, defaults and examples."""

import importlib
import math
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import tools.check_data
import tools.evaluate
import tools.export
import tools.import_weights
import tools.pack
import tools.train
import tools.verify
from common import settings
from common.config import Config
from common.config.build import REQUIRED, Signature, resolve
from common.config.schema import same
from common.config.yaml12 import read
from common.method import Batch
from common.run import RUNTIME, complete, load_run, open_config, pretrain
from common.train import TrainSettings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("docs/examples/*.yaml")])
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
ALL = "\n".join(TEXT.values())
PACKAGES = ("common", "moco", "instdisc", "metric_learning")
SECTIONS = {"run": settings.RunSettings, "train": TrainSettings, "evaluate": settings.EvaluateSettings,
            "checkpoint": settings.CheckpointSettings, "log": settings.LogSettings}


def fenced(text: str) -> list[tuple[str, str]]:
    """(language, what it holds) of each fenced block."""
    return re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PYTHON = [pytest.param(code, language, id=f"{name}-{number}") for name, text in TEXT.items()
          for number, (language, code) in enumerate(fenced(text)) if language.startswith("python")]
RUNNABLE = [pytest.param(block.values[0], id=block.id) for block in PYTHON if block.values[1] == "python run"]
LINES = [line.partition("#")[0] for _, block in fenced(ALL) for line in block.splitlines()]
LINES += re.findall(r"^#(.*)", "\n".join(path.read_text(encoding="utf-8") for path in CONFIGS), re.MULTILINE)
COMMANDS = {re.split(" {3,}", line.strip())[0] for line in LINES if re.search(r"tools/\w+\.py .*--", line)}


@pytest.mark.parametrize("name", TEXT)
def test_every_relative_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXT[name])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_every_page_is_linked_from_the_readme():
    assert [name for name in TEXT if name != "README.md" and f"({name})" not in TEXT["README.md"]] == []


def test_every_config_is_named_and_every_named_config_is_there():
    there = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    named = set(re.findall(r"configs/(\w+)\.yaml", ALL)) - {"my"}           # configs/my.yaml: in an error message
    assert named == there


@pytest.mark.parametrize("code, language", PYTHON)
def test_every_python_block_is_python(code, language):
    compile(code, "block", "exec")


@pytest.mark.parametrize("code", RUNNABLE)
def test_every_runnable_block_runs(code, tmp_path):
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    runpy.run_path(str(tmp_path / "block.py"))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_flags_and_settings_that_exist(command, monkeypatch):
    _, tool, arguments = re.split(r"tools/(train|evaluate|verify|check_data|pack|export|import_weights)\.py", command)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "docs/examples"))
    if tool == "evaluate":
        options = tools.evaluate.parse(shlex.split(arguments))
        options.check(options)
        complete(Config.load("my_images", options.overrides))
        return
    if tool == "verify":
        options = tools.verify.parse(shlex.split(arguments))
        tools.verify.check(options)
        return
    others = {"check_data": tools.check_data, "pack": tools.pack, "export": tools.export,
              "import_weights": tools.import_weights}
    if tool in others:
        others[tool].parse(shlex.split(arguments))
        return
    monkeypatch.setattr("sys.argv", ["train.py", *shlex.split(arguments)])
    options = tools.train._options()
    if not options.config.startswith("runs/"):                              # a run's own config.yaml
        complete(open_config(options.config, overrides=options.overrides, trust=options.trust))


def tables() -> dict[str, dict[str, str]]:
    """What docs/configuration.md says: section or import path -> key -> default."""
    parts = re.split(r"^###? ", TEXT["docs/configuration.md"], flags=re.MULTILINE)
    rows = {part.partition("\n")[0].strip("`"): re.findall(r"^\| `(\w+)` \| (.*?) \|", part, re.MULTILINE)
            for part in parts if part.startswith("`")}
    return {name: dict(found) for name, found in rows.items()}


def takes_from_the_run(name: str) -> bool:
    """Settings and sources of data stand before the run is known."""
    return name not in SECTIONS and (not name.startswith("common.data.") or name.startswith("common.data.recipes."))


@pytest.mark.parametrize("name", tables())
def test_every_key_stands_there_with_its_default(name):
    signature = Signature.of(SECTIONS[name] if name in SECTIONS else resolve(name, name))
    said = tables()[name]
    assert set(said) == set(signature.parameters) - {"method"}
    for key, text in said.items():
        default = signature.parameters[key].default
        if key in {name for names in RUNTIME.values() for name in names} and takes_from_the_run(name):
            assert text == "the run's", key
        elif default is REQUIRED:
            assert text == "required", key
        else:
            assert same(read(text.strip("`"), "page")[0], default), key


def test_every_target_that_a_config_may_name_stands_there():
    def names(node):
        if isinstance(node, dict):
            yield from [node["name"]] if "name" in node else []
        for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
            yield from names(item)

    used = {name for path in (ROOT / "configs").glob("*.yaml") for name in names(Config.load(path).tree)}
    assert [name for name in sorted(used) if f"`{name}`" not in TEXT["docs/configuration.md"]] == []


def test_every_import_path_leads_somewhere():
    names = set(re.findall(r"`((?:common|moco|instdisc|metric_learning)(?:\.\w+)+)`", ALL))
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
            except ModuleNotFoundError:
                continue
            for attribute in parts[cut:]:
                found = getattr(found, attribute)
            break


def test_every_test_that_is_named_is_there():
    for file, name in set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", ALL)):
        assert (ROOT / file).is_file(), file
        assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_the_layout_names_every_file():
    layout = next(block for _, block in fenced(TEXT["docs/architecture.md"]) if "common/\n" in block)
    names = {path.name for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sorted(name for name in names - {"__init__.py"} if f" {name}" not in layout) == []


@pytest.fixture
def simclr(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs/examples"))
    return importlib.import_module("simclr")


def test_simclr_on_the_page_is_the_one_that_runs(simclr):
    source = Path(simclr.__file__).read_text(encoding="utf-8")
    assert source[source.index("class SimCLR"):] in TEXT["docs/adding_a_method.md"]


def test_simclr_is_its_equation(simclr, small_encoder, batches):
    T, batch = 0.3, batches(1)[0]
    method = simclr.SimCLR(small_encoder(batchnorm=False), temperature=T)
    z = [row for view in batch.views for row in method.encoder(view).detach()]
    B, terms = len(batch.index), []
    for i, z_i in enumerate(z):
        j = i + B if i < B else i - B                                       # the other view of the same image
        others = sum(math.exp(z_i @ z_k / T) for k, z_k in enumerate(z) if k != i)
        terms.append(-math.log(math.exp(z_i @ z[j] / T) / others))
    assert method(batch).loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-9)
    perfect = Batch([batch.views[0]] * 2, batch.index, batch.label)
    assert method(perfect).logs["pos"] == pytest.approx(1)


def test_simclr_trains_and_comes_back(simclr, tmp_path):
    overrides = ["evaluate.protocols=[]", "schedule.warmup=0"]
    trained = pretrain(ROOT / "docs/examples/simclr.yaml", epochs=1, dir=tmp_path, overrides=overrides,
                       trust=["simclr"]).method
    again = load_run(tmp_path, trust=["simclr"]).method
    assert isinstance(again, simclr.SimCLR)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

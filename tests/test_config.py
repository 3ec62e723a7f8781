from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional, Union

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import Config, ConfigError, find

if TYPE_CHECKING:
    from nowhere import Unknown

ROOT = Path(__file__).parents[1]
HERE = __name__


# What the configs below build.

class Queue:
    def __init__(self, size: int, dim: int = 128):
        self.size, self.dim = size, dim


class MoCo:
    def __init__(self, dictionary: Queue, momentum: float = 0.999, temperature: float = 0.07, num_images: int = 0):
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        if temperature <= 0:
            raise ValueError("the temperature must be positive")
        self.dictionary, self.momentum, self.num_images = dictionary, momentum, num_images


class Child(MoCo):
    pass


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    epochs: int
    clip: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    k: list[int] = dataclasses.field(default_factory=lambda: [20, 200])


class Pair(NamedTuple):
    a: int
    b: str = "b"


def echo(*, value: Any = None, **others: Any) -> dict:
    return {"value": value, **others}


def no_annotations(a, size=(8, 8), shape=None):
    return a, size, shape


def partly_unknown(a: Unknown, b: int = 0) -> Any:
    return a, b


def implicit_none(a: int = None) -> Any:  # noqa: RUF013
    return a


def a_queue() -> Queue:
    return Queue(1)


def a_lie() -> Any:
    return Path("not a queue")


KINDS: dict[str, Any] = {}


def kinds(**of: Any) -> None:
    """``annotated_<name>``: a function whose only argument is annotated so."""
    for name, annotation in of.items():
        def target(*, x):
            return x
        target.__annotations__ = {"x": annotation}
        KINDS[name] = target


kinds(int=int, float=float, bool=bool, str=str, path=Path, optional=Optional[int], none=None | str,  # noqa: UP045
      literal=Literal["auto", 3], ints=list[int], texts=Sequence[str], pair=tuple[float, str], many=tuple[int, ...],
      union=Union[int, "list[int]"], float_or_tensor=float | torch.Tensor,
      betas=tuple[float | torch.Tensor, float | torch.Tensor], mapping=dict[str, float], steps=dict[int, float],
      either=float | int, choice=Literal["auto"] | float, path_or_text=str | Path, nested=list[list[int]], anything=Any,
      called=Callable[[int], int], queue=Queue | None, bare=list, quoted="list[Queue | int]")


def config(text: str, *overrides: str) -> Config:
    return Config.parse(text, "my.yaml", overrides)


def value_of(yaml_text: str) -> Any:
    return config(f"x: {yaml_text}").tree["x"]


def strictly(value: Any) -> str:
    """A text that tells 1, 1.0 and true apart."""
    return json.dumps(value)


# YAML

@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("3E5", 3e5), (".5", 0.5), ("-1.", -1.0), ("+.inf", float("inf")), ("6.02e+23", 6.02e23),
    ("010", 10), ("-7", -7), ("0x10", "0x10"), ("0o10", "0o10"), ("12:30:00", "12:30:00"), ("1_000", "1_000"),
    ("on", "on"), ("off", "off"), ("yes", "yes"), ("No", "No"), ("y", "y"), ("true", True), ("False", False),
    ("tRUE", "tRUE"), ("null", None), ("~", None), ("", None), ("~/photos", "~/photos"), ("2026-11-21", "2026-11-21"),
    ("'1'", "1"), ('"true"', "true"), ("1e", "1e"), (".", "."), ("1.2.3", "1.2.3"), ("=", "="), ("café", "café"),
    ("[1, 2.0, a]", [1, 2.0, "a"]), ("{a: {b: []}}", {"a": {"b": []}}), ("{1: a, true: b}", {"1": "a", "true": "b"}),
])
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert strictly(value_of(text)) == strictly(value)


def test_anchors_give_separate_copies():
    tree = config("a: {x: &dim [128]}\nb: {x: *dim}").tree
    assert tree == {"a": {"x": [128]}, "b": {"x": [128]}}
    assert tree["a"]["x"] is not tree["b"]["x"]


@pytest.mark.parametrize(("text", "line", "words"), [
    ("a: 1\nb: 2\na: 3", 3, ["a: given twice", "line 1"]),
    ("a:\n  b: {c: 1,\n      c: 2}", 3, ["a.b.c: given twice", "line 2"]),
    ("a: 1\n\tb: 2", 2, ["not valid YAML", r"\t"]),
    ("a: [1, 2", 1, ["not valid YAML"]),
    ("a: 1\n--- \nb: 1", 2, ["single document"]),
    ("a: *b", 1, ["undefined alias"]),
    ("a: 1\nb: !!python/object/apply:os.system [ls]", 2, ["b: the tag !!python/object/apply:os.system"]),
    ("a: !!bool maybe", 1, ["a: the tag !!bool"]),
    ("a: .nan", 1, ["a: not-a-number"]),
    ("data.root: x", 1, ["'data.root' is no key", "nest"]),
    ("a: 1\n? [b]\n: 1", 2, ["is no key"]),
    (f"a: {'9' * 5000}", 1, ["a: Exceeds the limit"]),
    ("a: " + "[" * 3000, 1, ["more than 32 levels"]),
    ("a: &a [*a]", 1, ["aliases within aliases"]),
    ("a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
     "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]", 1, ["aliases within aliases"]),
])
def test_what_is_not_a_config_is_refused_with_its_line(text, line, words):
    with pytest.raises(ConfigError) as caught:
        config(text)
    assert str(caught.value).startswith(f"my.yaml:{line}: ")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("text", ["", "# nothing\n", "5", "- a", "text", 'a: "\\UFFFFFFFF"', "a: \udcff", "a: \0"])
def test_what_holds_no_sections_is_refused(text):
    with pytest.raises(ConfigError, match="^my.yaml: "):
        config(text)


# Files

def test_a_name_is_looked_up_here_and_then_in_configs(tmp_path, monkeypatch):
    here, installed = tmp_path / "here", tmp_path / "configs"
    for folder, names in (here, ["mine", "both"]), (installed, ["moco_v1", "both"]):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.yaml").write_text(f"from: {folder.name}\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr("common.config.files.CONFIGS", installed)
    for name in ("mine", "mine.yaml", "./mine.yaml", str(here / "mine.yaml")):
        assert Config.load(name).tree == {"from": "here"}
    assert find("moco_v1") == find("moco_v1.yaml") == installed / "moco_v1.yaml"
    assert Config.load("both").origin == {"from": "both.yaml:1"}
    assert Config.load("moco_v1").origin == {"from": f"{installed / 'moco_v1.yaml'}:1"}
    with pytest.raises(ConfigError, match=r"moco_v11: no such config .* There is: moco_v1\."):
        find("moco_v11")
    with pytest.raises(ConfigError, match=r"There is: both, mine, moco_v1\."):
        find("zzz")


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "\udcff", "."])
def test_an_impossible_name_is_refused(name):
    with pytest.raises(ConfigError, match="no such config|is a folder"):
        find(name)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"\x80", b"a: 1\n" * 100_000])
def test_a_file_that_is_no_text_or_huge_is_refused(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="x.yaml: (cannot be read|500,000 bytes)"):
        Config.load(tmp_path / "x.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_the_project_load_and_come_back_as_written(path):
    loaded = Config.load(path)
    assert config(loaded.text()).tree == config(loaded.text(origins=True)).tree == loaded.tree


def test_import_needs_no_torch():
    code = "import sys, common.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Overrides, get, set

def test_overrides_replace_add_and_are_recorded():
    tree = config("a: {b: 1, c: [{k: 1}, 2]}\nlog:", "a.b=1e-3", "a.c.0.k=[20, 5]", "new.x.y=on",
                  "a.c.1={z: 1}", "log.e=", "a.s=k=v")
    assert tree.tree == {"a": {"b": 1e-3, "c": [{"k": [20, 5]}, {"z": 1}], "s": "k=v"}, "log": {"e": None},
                         "new": {"x": {"y": "on"}}}
    leaf_origins = {tree.origin[name] for name in ("a.b", "a.c.0.k", "a.c.0.k.1", "new.x.y", "a.c.1.z", "log.e", "a.s")}
    assert leaf_origins == {"command line"}
    assert tree.origin["a.c"] == "my.yaml:1"


@pytest.mark.parametrize(("override", "words"), [
    ("a", "write section.key=value"), ("=1", "write section.key=value"), ("a.b.x=1", "a.b is 1, which has no keys"),
    ("a.c.7.k=1", "'7' is no position in a list of 2"), ("a.c.-1=1", "no position"), ("a.c.²=1", "no position"),
    ("a..b=1", "'' is no key"), ("a.b=[1", "a.b: not valid YAML"), ("a.b=@x", "quotes"),
    ("a.b={k: 1, k: 2}", "given twice"),
    ("a.b=\udcff", "a.b: not valid YAML"), (".".join("a" * 40) + "=1", "more than 32 levels"),
])
def test_a_wrong_override_is_refused(override, words):
    with pytest.raises(ConfigError, match="^command line: ") as caught:
        config("a: {b: 1, c: [{k: 1}, 2]}", override)
    assert words in str(caught.value)


def test_get_has_and_set():
    tree = config("a: {b: [1, {c: null}]}")
    assert (tree.get("a.b.1.c", 5), tree.get("a.x", 5), tree.get("a.b.2"), tree.get("a.b.0.z")) == (None, 5, None, None)
    assert tree.get("") is tree.tree
    assert tree.has("a.b.1.c") and not tree.has("a.b.c") and not tree.has("b")
    tree.set("a.b", (Path("x/y"), 2), "chosen: 640 images")
    assert tree.tree == {"a": {"b": ["x/y", 2]}}
    assert tree.origin == {"a": "my.yaml:1", "a.b": "chosen: 640 images", "a.b.0": "chosen: 640 images",
                           "a.b.1": "chosen: 640 images"}
    for nothing in (torch.nn.ReLU, float("nan"), {1: 2}, {"a.b": 1}, torch.zeros(2), "\ud800"):
        with pytest.raises(ConfigError, match="^chosen: a.b: "):
            tree.set("a.b", nothing, "chosen")


# Annotations

@pytest.mark.parametrize(("kind", "text", "value"), [
    ("int", "3", 3), ("float", "3", 3.0), ("float", "1e-4", 1e-4), ("bool", "true", True), ("str", "on", "on"),
    ("path", "a/b", Path("a/b")), ("optional", "null", None), ("optional", "4", 4), ("none", "a", "a"),
    ("literal", "auto", "auto"), ("literal", "3", 3), ("ints", "[1, 2]", [1, 2]), ("texts", "[a]", ["a"]),
    ("ints", "[]", []), ("quoted", "[1]", [1]),
    ("pair", "[1, a]", (1.0, "a")), ("many", "[1, 2, 3]", (1, 2, 3)), ("union", "2", 2), ("union", "[2]", [2]),
    ("float_or_tensor", "1", 1.0), ("betas", "[0.9, 1]", (0.9, 1.0)), ("mapping", "{a: 1}", {"a": 1.0}),
    ("steps", "{120: 0.1, 160: 1}", {120: 0.1, 160: 1.0}), ("either", "3", 3), ("either", "3.5", 3.5),
    ("choice", "auto", "auto"), ("choice", "2", 2.0), ("path_or_text", "a", "a"), ("nested", "[[1], []]", [[1], []]),
    ("anything", "{a: [1]}", {"a": [1]}), ("queue", "null", None), ("bare", "[1, a]", [1, "a"]),
])
def test_a_value_becomes_what_its_annotation_asks_for(kind, text, value):
    built = config(f"s: {{x: {text}}}").build("s", target=KINDS[kind])
    assert built == value and type(built) is type(value)
    if isinstance(value, (list, tuple)):
        assert [type(item) for item in built] == [type(item) for item in value]


@pytest.mark.parametrize(("kind", "text", "message"), [
    ("int", "true", "wants a whole number; got true."),
    ("int", "2.5", "wants a whole number; got 2.5."),
    ("int", "1e5", "wants a whole number; got 100000.0; write 100000."),
    ("int", "1_000", "wants a whole number; got the text '1_000'."),
    ("float", '"0.5"', "wants a number; got the text '0.5'; write it without quotes."),
    ("float", "false", "wants a number; got false."),
    ("float", "[1]", "wants a number; got [1]."),
    ("bool", "on", "wants true or false; got the text 'on'."),
    ("bool", "1", "wants true or false; got 1."),
    ("str", "10", "wants text; got 10; put it in quotes."),
    ("str", "null", "wants text; got null."),
    ("path", "3", "wants a path; got 3."),
    ("optional", "a", "wants a whole number or null; got the text 'a'."),
    ("literal", "atuo", "wants 'auto' or 3; got the text 'atuo'."),
    ("literal", "true", "wants 'auto' or 3; got true."),
    ("ints", "20", "wants a list (each a whole number); got 20; write [20]."),
    ("texts", "abc", "wants a list (each text); got the text 'abc'; write ['abc']."),
    ("pair", "[1]", "wants a list of 2 (a number, text); got 1: [1]."),
    ("mapping", "[1]", "wants a mapping; got [1]."),
    ("called", "abc", "wants a Callable (a mapping with its 'name'); got the text 'abc'."),
    ("queue", "5", "wants a Queue (a mapping with its 'name') or null; got 5."),
    ("float_or_tensor", "x", "wants a number or a Tensor (a mapping with its 'name'); got the text 'x'."),
])
def test_a_value_of_another_kind_is_refused_in_words(kind, text, message):
    with pytest.raises(ConfigError) as caught:
        config(f"s:\n  x: {text}").check("s", target=KINDS[kind])
    assert str(caught.value) == f"my.yaml:2: s.x: {message}"


@pytest.mark.parametrize(("kind", "text", "where"), [
    ("ints", "[1, a]", "x.1"), ("nested", "[[1], [2, b]]", "x.1.1"), ("union", "[1, a]", "x.1"),
    ("mapping", "{a: b}", "x.a"), ("betas", "[0.9, a]", "x.1"), ("steps", "{a: 1}", "x.a"),
])
def test_the_item_that_does_not_fit_is_named(kind, text, where):
    with pytest.raises(ConfigError, match=f"^my.yaml:1: s.{where}: wants "):
        config(f"s: {{x: {text}}}").check("s", target=KINDS[kind])


def test_a_default_is_always_taken_back_as_it_was():
    tree = config(f"a: {{name: {HERE}.no_annotations, a: [1]}}\nb: {{name: {HERE}.implicit_none}}")
    first = tree.build("a"), tree.build("b")
    again = config(tree.text())
    assert again.tree == tree.tree
    assert again.tree["a"]["size"] == [8, 8]
    assert (again.build("a"), again.build("b")) == first == (([1], (8, 8), None), None)


def test_one_annotation_that_cannot_be_evaluated_does_not_hide_the_others():
    tree = config(f"a: {{name: {HERE}.partly_unknown, a: [x], b: 2}}")
    assert tree.build("a") == (["x"], 2)
    with pytest.raises(ConfigError, match="a.b: wants a whole number"):
        config(f"a: {{name: {HERE}.partly_unknown, a: [x], b: z}}").check("a")


# Building

MOCO = f"""
method:
  name: {HERE}.MoCo
  momentum: 0.99
  dictionary:
    name: {HERE}.Queue
    size: 4096
"""


def test_build_makes_the_inner_first_and_records_defaults():
    tree = config(MOCO)
    moco = tree.build("method", num_images=7, other=1)
    assert (moco.momentum, moco.dictionary.size, moco.dictionary.dim, moco.num_images) == (0.99, 4096, 128, 7)
    assert tree.get("method.temperature") == 0.07 and tree.get("method.dictionary.dim") == 128
    assert tree.origin["method.temperature"] == f"default of {HERE}.MoCo"
    assert not tree.has("method.num_images")                                        # runtime's, not the config's


def test_runtime_goes_to_whoever_asks_unless_the_config_sets_it():
    tree = config(MOCO, "method.num_images=3")
    moco = tree.build("method", num_images=7, dim=64)
    assert (moco.num_images, moco.dictionary.dim) == (3, 64)


def test_check_reports_every_mistake_and_makes_nothing():
    tree = config(f"""
method:
  name: {HERE}.MoCo
  momentun: 0.99
  temperature: "0.2"
  dictionary:
    name: {HERE}.Queue
    dim: 2.5
""")
    before = tree.text()
    for attempt in (lambda: tree.check("method"), lambda: tree.build("method")):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert str(caught.value).splitlines() == [
            f"my.yaml:4: method.momentun: {HERE}.MoCo takes no such key; did you mean 'momentum'? "
            "It takes: dictionary, momentum, temperature, num_images.",
            "my.yaml:5: method.temperature: wants a number; got the text '0.2'; write it without quotes.",
            "my.yaml:8: method.dictionary.dim: wants a whole number; got 2.5.",
            f"my.yaml:6: method.dictionary: {HERE}.Queue needs size (a whole number).",
        ]
    assert tree.text() == before


@pytest.mark.parametrize(("name", "words"), [
    ("moc.MoCo", "cannot import 'moc.MoCo' (No module named 'moc')"),
    ("torch.optim.SDG", "torch.optim has no 'SDG'; did you mean 'SGD'?"),
    ("torch.optim", "cannot be called"), ("torch.pi", "is a float, which cannot be called"),
    ("MoCo", "wants the import path"), ("..x", "wants the import path"), ("3", "wants the import path"),
    ("a.b c", "wants the import path"),
])
def test_a_name_that_leads_nowhere_is_refused(name, words):
    with pytest.raises(ConfigError, match="^my.yaml:1: s.name: ") as caught:
        config(f"s: {{name: {name}}}").check("s")
    assert words in str(caught.value)


def test_an_object_of_the_wrong_class_is_refused_as_soon_as_it_can_be_known():
    with pytest.raises(ConfigError, match="wants a Queue .*; torch.nn.Linear gives a Linear"):
        config(MOCO, "method.dictionary={name: torch.nn.Linear, in_features: 1, out_features: 1}").check("method")
    config(MOCO, f"method.dictionary={{name: {HERE}.a_queue}}").build("method")
    unknown = config(MOCO, f"method.dictionary={{name: {HERE}.a_lie}}")
    unknown.check("method")
    with pytest.raises(ConfigError, match="^command line: method.dictionary: wants a Queue .* gave a PosixPath"):
        unknown.build("method")


def test_a_refusal_by_a_constructor_points_at_the_line():
    with pytest.raises(ConfigError, match=r"^my.yaml:4: method.momentum: momentum must be in \[0, 1\], got 2.0$"):
        config(MOCO.replace("0.99", "2")).build("method")
    with pytest.raises(ConfigError, match="^my.yaml:2: method: the temperature must be positive$") as caught:
        config(MOCO, "method.temperature=-1").build("method")
    assert isinstance(caught.value.__cause__, ValueError)


def test_lists_of_named_mappings_are_built():
    tree = config(f"s: [{{name: {HERE}.Pair, a: 1}}, {{name: {HERE}.Pair, a: 2, b: c}}]\n"
                  f"t: {{name: {HERE}.echo, value: [{{name: {HERE}.Pair, a: 3}}], "
                  f"free: {{x: [{{name: {HERE}.a_queue}}]}}}}")
    assert tree.build("s") == [Pair(1, "b"), Pair(2, "c")]
    echoed = tree.build("t")
    assert echoed["value"] == [Pair(3)] and isinstance(echoed["free"]["x"][0], Queue)
    assert tree.get("s.0.b") == "b"


def test_a_dataclass_is_the_schema_of_a_section_without_a_name():
    tree = config("train: {epochs: 3}\nempty:")
    assert tree.build("train", target=TrainSettings) == TrainSettings(3)
    assert tree.tree["train"] == {"epochs": 3, "clip": None, "precision": "fp32", "k": [20, 200]}
    for section in ("empty", "absent"):
        assert tree.build(section, TrainSettings, epochs=1) == TrainSettings(1)
    assert tree.origin["absent.clip"] == "default of TrainSettings"
    with pytest.raises(ConfigError) as caught:
        config("train: {precision: fp8, name: x}").check("train", TrainSettings)
    where = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert where == ["train.name", "train.precision", "train"]
    with pytest.raises(ConfigError, match="^my.yaml:1: train: wants a mapping of settings; got 3"):
        config("train: 3").check("train", TrainSettings)


def test_a_section_that_names_nothing_is_refused():
    for text in ("method: {a: 1}", "method:", "other: 1", "method: x"):
        with pytest.raises(ConfigError, match="method: wants a mapping with a 'name'"):
            config(text).check("method")


def test_check_sections_reports_on_all_and_refuses_others():
    tree = config(MOCO + "trian: {epochs: 3}\n", "log.x=1")
    with pytest.raises(ConfigError) as caught:
        tree.check_sections({"method": None, "train": TrainSettings, "data": None})
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == [
        "my.yaml:8:", "command", "my.yaml:", "my.yaml:"]
    assert "trian: no such section; did you mean 'train'? Sections are: method, train, data." in str(caught.value)
    tree = config(MOCO + "train: {epochs: 3}\n")
    tree.check_sections({"method": None, "train": TrainSettings})
    assert tree.has("train.precision") and tree.has("method.dictionary.dim")


def test_an_inherited_constructor_keeps_its_annotations():
    with pytest.raises(ConfigError, match="momentum: wants a number"):
        config(MOCO.replace("MoCo", "Child"), "method.momentum=x").check("method")


def test_torch_optimizers_and_layers_are_built():
    tree = config("sgd: {name: torch.optim.SGD, lr: 1, momentum: 0.9}\n"
                  "adamw: {name: torch.optim.AdamW, lr: 1e-4, betas: [0.9, 0.99]}\n"
                  "net: {name: torch.nn.Sequential}\nlinear: {name: torch.nn.Linear, in_features: 4, out_features: 2}")
    linear = tree.build("linear")
    assert linear.weight.shape == (2, 4)
    for section in ("sgd", "adamw"):
        tree.check(section, runtime_names=["params"])
    sgd, adamw = (tree.build(section, params=linear.parameters()) for section in ("sgd", "adamw"))
    assert (sgd.defaults["lr"], sgd.defaults["momentum"]) == (1, 0.9)
    assert adamw.defaults["betas"] == (0.9, 0.99) and isinstance(adamw.defaults["betas"], tuple)
    again = config(tree.text()).build("adamw", params=linear.parameters())
    assert again.defaults == adamw.defaults
    with pytest.raises(ConfigError, match="sgd: torch.optim.SGD needs params"):
        tree.check("sgd")
    with pytest.raises(ConfigError, match="^command line: sgd.momentun: .*did you mean 'momentum'?"):
        config(tree.text(), "sgd.momentun=1").check("sgd", runtime_names=["params"])
    with pytest.raises(ConfigError, match="sgd: Invalid learning rate: -1.0"):
        config(tree.text(), "sgd.lr=-1").build("sgd", params=linear.parameters())


# Text and digest

def test_text_with_origins_is_aligned_and_says_where_from():
    tree = config("train:\n  epochs: 3\n  k: [1, 2]\nlist:\n- {name: a, x: 1}\n- b", "train.lr=1e-5")
    tree.set("train.size", "on", "chosen: 32 px images")
    assert tree.text(origins=True) == (
        "train:\n"
        "  epochs: 3    # my.yaml:2\n"
        "  k: [1, 2]    # my.yaml:3\n"
        "  lr: 1.0e-05  # command line\n"
        "  size: 'on'   # chosen: 32 px images\n"
        "\n"
        "list:\n"
        "  - name: a    # my.yaml:5\n"
        "    x: 1       # my.yaml:5\n"
        "  - b          # my.yaml:6\n")


def test_a_written_config_is_the_same_run(tmp_path):
    tree = config(MOCO + "train: {epochs: 3}\n", "train.clip=.inf")
    tree.check_sections({"method": None, "train": TrainSettings})
    (tmp_path / "config.yaml").write_text(tree.text(origins=True))
    again = Config.load(tmp_path / "config.yaml")
    again.check_sections({"method": None, "train": TrainSettings})
    assert (again.tree, again.digest([])) == (tree.tree, tree.digest([]))
    assert vars(again.build("method").dictionary) == vars(tree.build("method").dictionary)


def test_the_digest_is_that_of_the_settings_alone():
    one = config("a: {x: 1, y: 0.5}\nb: {workers: 3, z: [1]}\nrun: {dir: here}")
    two = config("run: {dir: there}\nb: {z: [1]}\na: {y: 0.5, x: 1.0}")
    assert one.digest() != two.digest()
    assert one.digest(["run", "b.workers", "absent.key"]) == two.digest(["run", "b.workers", "absent.key"])
    for other in ("a.x=2", "a.x=true", "a.x='1'", "b.z=[1, 1]", "b.z=1", "c=1"):
        assert config(two.text(), other).digest(["run"]) != two.digest(["run"])
    assert one.has("run.dir")


# Fuzz: anything gives a Config or a ConfigError, and a Config can be written and read.

fuzz = settings(max_examples=150, deadline=None, derandomize=True)
WORDS = ["name", "a", "size", "momentum", "dictionary", f"{HERE}.MoCo", f"{HERE}.Queue", f"{HERE}.Nope", "1e-4", "on",
         "true", "null", "-1", "0.5", "'x'", '"', "'", ": ", "\n", "\n  ", "\n- ", "- ", "[", "]", "{", "}", ", ",
         "&x ", "*x", "|", ">", "#", "!!int ", "!", "%", "@", "?", "---", "...", "<<: ", "\t", "\r", "\x85", "\u2028",
         "\ufeff", "\\", "é", "😀", "=", ".", "torch.optim.SGD"]
texts = st.text(max_size=30) | st.sampled_from(
    ["on", "No", "y", "1e-4", "1e5", "010", "12:30:00", "1_000", "0x1f", "2026-11-21", ".inf", "~", "", " ", "=", "<<",
     "-", "a: b", "a #b"])
scalars = st.none() | st.booleans() | st.integers(-10**20, 10**20) | st.floats(allow_nan=False) | texts
keys = st.text(st.characters(exclude_characters=".=", exclude_categories=["C", "Z"]), min_size=1, max_size=20)
keys |= st.sampled_from(["true", "1", "null", "a b", "<<", "é" * 100, "- a", "?", "on", "name"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12)
OVERRIDES = ["method", "train", "momentum", "epochs", "dictionary", "size", "name", "0", ".", "=", *WORDS]


def use(text: str, overrides: Sequence[str]) -> None:
    tree = config(text, *overrides)
    again = config(tree.text()), config(tree.text(origins=True))
    assert [strictly(one.tree) for one in again] == [strictly(tree.tree)] * 2
    tree.check_sections({"method": None, "train": TrainSettings}, {"method": ["params"]})
    tree.build("method", params=[torch.zeros(1)])


def refused_or_fine(text: str, overrides: Sequence[str] = ()) -> None:
    try:
        use(text, overrides)
    except ConfigError as error:
        assert str(error)


@fuzz
@given(st.lists(st.sampled_from(WORDS), max_size=25).map("".join) | st.text(max_size=40), st.booleans())
def test_any_text_gives_a_config_or_a_config_error(text, below):
    refused_or_fine(MOCO + text if below else text)


@fuzz
@given(st.lists(st.sampled_from(OVERRIDES), max_size=8).map("".join) | st.text(max_size=20), values)
def test_any_override_gives_a_config_or_a_config_error(text, value):
    where, written = text.partition("=")[0] or "train.k", json.dumps(value)
    refused_or_fine(MOCO + "train: {epochs: 3}", [text])
    refused_or_fine(MOCO + "train: {epochs: 3}", [f"{where}={written}", f"method.momentum={written}"])


@fuzz
@given(st.dictionaries(keys, values, max_size=5))
def test_any_tree_comes_back_from_its_text_in_this_yaml_and_in_the_old_one(tree):
    whole = config("{}")
    for key, value in tree.items():
        whole.set(key, value, "test")
    for text in (whole.text(), whole.text(origins=True)):
        again = config(text)
        assert strictly(again.tree) == strictly(tree) and again.digest() == whole.digest()
    section = yaml.safe_load(whole.text().replace("<<", "__"))
    assert strictly(section) == strictly(json.loads(json.dumps(tree).replace("<<", "__")))

"""What holds for the source as a whole, read but never imported: who imports whom, and what is never called."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {                                              # a package -> those of ours that it may import
    "configs": set(),
    "common": {"common"},
    "moco": {"common", "moco"},
    "instdisc": {"common", "instdisc"},
    "metric_learning": {"common", "metric_learning"},
    "tools": {"common", "moco", "instdisc", "metric_learning"},
}
REQUIRED_AS = {"triton": "torch", "PIL": "pillow", "sklearn": "scikit-learn", "scipy": "scikit-learn", "yaml": "pyyaml",
               "faiss": "faiss-gpu"}
OPTIONAL = {"simplejpeg",                       # the extra `fast`; without it all works, slower
            "onnx",                             # the extra `export`
            "huggingface_hub"}                  # comes with timm
PICKLES = ("pickle", "joblib", "marshal", "dill", "cloudpickle")
FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "shelve.open",
    "pickle.Unpickler", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.jit.load", "runpy.run_path",
    *(f"{module}.{name}" for module in PICKLES for name in ("load", "loads")),
}


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or an attribute of one; any other expression counts as ``?``."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def top(name: str) -> str:
    return name.partition(".")[0]


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that ``tree``, a module inside ``package``, imports anywhere, ``import_module("...")`` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def imports_of(path: Path) -> set[str]:
    return set(imported(parse(path), ".".join(path.relative_to(ROOT).parent.parts)))


def file_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def module_of(name: str) -> str | None:
    """The module of ours that ``name`` is, or is defined in."""
    while name and file_of(name) is None:
        name = name.rpartition(".")[0]
    return name or None


def reached(start: str) -> set[str]:
    """The modules of ours that importing ``start`` brings in, itself included."""
    found, waiting = set(), {start}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= {module for module in map(module_of, imports_of(file_of(name))) if module} - found
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_layers(package):
    for path in sources(package):
        assert not {top(name) for name in imports_of(path)} & (ALLOWED.keys() - ALLOWED[package]), path


def test_the_trainer_never_meets_a_method():
    assert {top(name) for name in reached("common.train")} == {"common"}


@pytest.mark.parametrize("module", ["common.distributed", "common.config"])
def test_leaves_import_nothing_of_ours_but_their_own_parts(module):
    others = reached(module) - {module}
    assert all(name.startswith("common.config.") for name in others), others


def test_wandb_is_imported_only_when_used():
    for path in sources(*ALLOWED):
        statements = [node for node in parse(path).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert "wandb" not in map(top, imported(ast.Module(statements, []), "")), path


def test_what_is_imported_is_required_and_the_other_way_round():
    used = {top(name) for path in sources(*ALLOWED) for name in imports_of(path)}
    used -= ALLOWED.keys() | sys.stdlib_module_names
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.match(r"[\w-]+", line)[0] for line in lines if line and not line.startswith("#")}
    used -= OPTIONAL
    assert {REQUIRED_AS.get(name, name) for name in used} == required - {"faiss-cpu"}       # faiss-gpu, elsewhere


@pytest.mark.parametrize("package", ["common", "moco", "instdisc", "metric_learning"])
def test_every_folder_is_a_typed_package(package):
    """setup.py passes by a folder without ``__init__.py``."""
    assert (ROOT / package / "py.typed").is_file()
    assert not [path for path in sources(package) if not (path.parent / "__init__.py").is_file()]


def test_the_tool_takes_the_packages_beside_it_whatever_else_has_their_names(tmp_path):
    """``common`` and ``moco`` are names that others have used, too."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").touch()
    code = f"import runpy; runpy.run_path({str(ROOT / 'tools' / 'train.py')!r}); import common; print(common.__file__)"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(ROOT / "common" / "__init__.py")


def dangerous(tree: ast.AST) -> Iterator[str]:
    """Calls in ``tree`` that run what a file or a string says, each as 'line: call'."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted(call.func)
        given = {word.arg: getattr(word.value, "value", "computed") for word in call.keywords}
        if (
            name in FORBIDDEN
            or given.get("weights_only", name != "torch.load") is not True
            or given.get("allow_pickle", False) is not False
            or given.get("shell", False) is not False
            or given.get("trust_remote_code", False) is not False
        ):
            yield f"{call.lineno}: {ast.unparse(call)}"


@pytest.mark.parametrize("package", ALLOWED)
def test_no_call_runs_what_a_file_says(package):
    assert not [f"{path.relative_to(ROOT)}:{call}" for path in sources(package) for call in dangerous(parse(path))]


@pytest.mark.parametrize("line", [
    "pickle.load(file)", "joblib.load(path)", "yaml.load(text)", "eval('1')", "torch.load(path)",
    "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "run(line, shell=True)",
    "run(line, shell=loud)", "torch.hub.load('a/b', 'c')", "load(name, trust_remote_code=True)", "exec(code)",
])
def test_dangerous_calls_are_found(line):
    assert list(dangerous(ast.parse(line)))


@pytest.mark.parametrize("line", [
    "encoder.eval()", "torch.load(path, weights_only=True)", "yaml.safe_load(text)", "np.load(path)", "run(['git'])",
    "np.load(path, allow_pickle=False)", "json.load(file)",
])
def test_harmless_calls_are_let_through(line):
    assert not list(dangerous(ast.parse(line)))


@pytest.mark.parametrize("line, name", [
    ("import moco.method", "moco.method"),
    ("from moco import MoCo", "moco.MoCo"),
    ("from .queue import Queue", "common.data.queue.Queue"),
    ("from .. import train", "common.train"),
    ("def f():\n    import moco", "moco"),
    ("importlib.import_module('moco')", "moco"),
])
def test_imports_are_found_however_they_are_written(line, name):
    assert list(imported(ast.parse(line), "common.data")) == [name]

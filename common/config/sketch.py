"""The project's own modules without torch: their signatures, their classes, and the checks that open a constructor.

Importing torch takes seconds, and a misspelt key should not. A *sketch* is a module made from its source by Python's
own import machinery, less all that computes: of a function the checks stay that it opens with, other packages are
``Absent``. What a sketch cannot tell is left to the full check, with everything imported.
"""

import __future__

import ast
import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from common.config.build import TRUSTED, nearest, split_name
from common.config.schema import Absent, Call, Problem

ROOT = Path(__file__).resolve().parents[2]
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Unknown:
    """A value that only the full check will know: a condition on it, or a message of it, raises TypeError."""

    def _decides_nothing(self, *others: object) -> Any:
        raise TypeError("not known yet")

    __eq__ = __ne__ = __bool__ = __repr__ = __format__ = _decides_nothing
    __hash__ = None     # type: ignore[assignment]


def find(name: Any, where: str, trusted: Collection[str] | None = None) -> Any:
    """The sketch of what ``name`` leads to, None where that is not in this project. Raises Problem as ``resolve``."""
    path, attribute = split_name(name, where, trusted)
    if path.partition(".")[0] not in TRUSTED:
        return None
    if _file(path) is None:
        raise Problem(where, f"cannot import '{name}' (No module named '{path}').")
    if attribute not in _links(path) | dict.fromkeys(_defined(path)):
        raise Problem(where, f"{path} has no '{attribute}'{nearest(attribute, (*_links(path), *_defined(path)))}")
    found = getattr(sketch(path), attribute, Absent)
    if isinstance(found, ModuleType):
        raise Problem(where, f"{name} is a module, which cannot be called.")
    return None if found is Absent or not callable(found) else found


def place(name: str) -> Any:
    """The sketch of what must stand at a place; Any where that is not in this project."""
    module, _, attribute = name.rpartition(".")
    found = _follow(module, attribute)
    return Any if found is Absent else found


def open_call(call: Call, arguments: dict[str, Any]) -> Any:
    """Run the checks that the target opens with. Raises its ValueError; anything else is left for later."""
    try:
        made = call.target(**arguments)
    except ValueError:
        raise
    except Exception:           # of arguments that are not known yet
        return Unknown()
    return made if isinstance(call.target, type) else Unknown()


@functools.cache
def sketch(name: str) -> ModuleType:
    """The sketch of the module ``name`` of this project; names that it only passes on are looked up when asked for."""
    loader = _Loader()
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    links, tree = _links(name), _reduced(name)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    vars(module).update({local: _follow(*links[local]) for local in links if local in used}, Absent=Absent)
    module.__getattr__ = lambda local: _follow(*links[local]) if local in links else Absent  # type: ignore[method-assign]
    loader.exec_module(module)
    return module


class _Loader(importlib.abc.InspectLoader):
    def get_source(self, fullname: str) -> str:
        return _source(fullname)

    def get_code(self, fullname: str) -> CodeType:
        return compile(_reduced(fullname), str(_file(fullname)), "exec", __future__.annotations.compiler_flag, True)


def _follow(module: str, attribute: str | None) -> Any:
    """What ``import module``, or ``from module import attribute``, gives: of ours its sketch, of Python's the thing."""
    package = module.partition(".")[0]
    if package not in (*TRUSTED, *sys.stdlib_module_names):
        return Absent
    if package in TRUSTED and attribute is not None and _file(f"{module}.{attribute}"):
        return sketch(f"{module}.{attribute}")
    found = sketch(module) if package in TRUSTED else importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)


def _file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _source(module: str) -> str:
    file = _file(module)
    assert file is not None
    return file.read_text(encoding="utf-8")


@functools.cache
def _parsed(module: str) -> ast.Module:
    return ast.parse(_source(module))


@functools.cache
def _links(module: str) -> dict[str, tuple[str, str | None]]:
    """What the module imports: the local name -> module and attribute (None: the module itself)."""
    found: dict[str, tuple[str, str | None]] = {}
    for node in _parsed(module).body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.partition(".")[0]:
                      (alias.name if alias.asname else alias.name.partition(".")[0], None) for alias in node.names}
    return found


def _defined(module: str) -> list[str]:
    return [name for node in _parsed(module).body for name in _names(node)]


def _names(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module's body defines."""
    if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def _reduced(module: str) -> ast.Module:
    """The module's classes, functions and constants, each on its own: what cannot be made is ``Absent``."""
    tree, whole = ast.parse(_source(module)), _checks(module)
    body: list[ast.stmt] = []
    for node in filter(lambda node: any(_names(node)), tree.body):
        absent = ast.parse("".join(f"{name} = Absent\n" for name in _names(node))).body
        body.append(_attempt([_without_work(node, whole)], ast.Name("Exception", ast.Load()), absent))
    return ast.fix_missing_locations(ast.Module(body, []))


def _checks(module: str) -> set[str]:
    """The module's functions ``check...`` and those that they call."""
    functions = {node.name: node for node in _parsed(module).body if isinstance(node, _FUNCTIONS)}
    waiting, found = {name for name in functions if _is_check(name)}, set[str]()
    while waiting:
        found |= waiting
        called = {node.id for name in waiting for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        waiting = called & functions.keys() - found
    return found


def _without_work(node: ast.stmt, whole: Collection[str]) -> ast.stmt:
    if isinstance(node, ast.ClassDef):
        node.decorator_list = [part for part in node.decorator_list if "dataclass" in ast.unparse(part)]
        node.keywords, node.body = [], [_without_work(part, ()) for part in node.body]
    elif isinstance(node, _FUNCTIONS):
        node.decorator_list = []
        if node.name not in whole:
            node.body = [*map(_guarded, _opening(node.body)), ast.Pass()]
    return node


def _opening(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The checks that a function opens with: ``if ...: raise ...`` and calls of ``check...``; definitions may stand
    between them."""
    for node in body:
        branch = node.body if isinstance(node, ast.If) and not node.orelse else [node]
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if all(map(_only_refuses, branch)):
            yield node
        elif not isinstance(node, _FUNCTIONS) and not docstring:
            return


def _only_refuses(node: ast.stmt) -> bool:
    called = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    return isinstance(node, ast.Raise) or (isinstance(called, ast.Name) and _is_check(called.id))


def _is_check(name: str) -> bool:
    return name.lstrip("_").startswith("check")


def _guarded(node: ast.stmt) -> ast.stmt:
    """A check of what is not known yet decides nothing."""
    again = ast.ExceptHandler(ast.Name("ValueError", ast.Load()), None, [ast.Raise()])
    attempt = _attempt([node], ast.Name("Exception", ast.Load()), [ast.Pass()])
    attempt.handlers.insert(0, again)
    return attempt


def _attempt(body: list[ast.stmt], error: ast.expr, otherwise: list[ast.stmt]) -> ast.Try:
    return ast.Try(body, [ast.ExceptHandler(error, None, otherwise)], [], [])

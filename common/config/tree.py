"""The settings of a run: a tree of plain values, each with where it came from, and what is built from it."""

import copy
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from common.config import sketch
from common.config.build import Plan, make, nearest, place, resolve
from common.config.files import find, read_text
from common.config.schema import Problem, canonical, show
from common.config.yaml12 import MAX_DEPTH, ConfigError, checked_key, leaves, plain, read, write

COMMAND_LINE = "command line"
_ABSENT = object()


class Config:
    """``tree`` holds mappings, lists and scalars; ``origin`` says for each part, by dotted name, where it came from.

    Sections and list items are addressed by dotted name: ``method.momentum``, ``evaluate.protocols.0.k``. ``trusted``:
    the packages that it may name; None for a config that is the program's own, which may name all.
    """

    def __init__(self, tree: dict[str, Any], origin: dict[str, str], source: str,
                 trusted: Collection[str] | None = None):
        self.tree, self.origin, self.source, self.trusted = tree, origin, source, trusted

    @classmethod
    def load(cls, path_or_name: str | os.PathLike, overrides: Sequence[str] = (),
             trusted: Collection[str] | None = None) -> "Config":
        """Read the file that ``find`` finds, then apply ``overrides`` ("section.key=value", value in YAML)."""
        text, source = read_text(find(path_or_name))
        return cls.parse(text, source, overrides, trusted)

    @classmethod
    def parse(cls, text: str, source: str, overrides: Sequence[str] = (),
              trusted: Collection[str] | None = None) -> "Config":
        """Like ``load``, from the ``text`` itself; ``source`` names it in messages."""
        tree, lines = read(text, source)
        if not isinstance(tree, dict):
            given = "is empty" if tree is None else f"holds {show(tree)}"
            raise ConfigError(f"{source}: {given}; a config holds sections, such as 'data:' and 'method:'.")
        config = cls(tree, {where: f"{source}:{line}" for where, line in lines.items() if where}, source, trusted)
        for override in overrides:
            config.override(override)
        return config

    def override(self, override: str) -> None:
        """Apply a "section.key=value" of the command line, value in YAML. Raises ConfigError."""
        where, equals, text = override.partition("=")
        if not equals or not where:
            raise ConfigError(f"{COMMAND_LINE}: '{override}': write section.key=value, such as train.epochs=200.")
        try:
            value, _ = read(text, COMMAND_LINE)
        except ConfigError as error:
            reason = str(error).partition(": ")[2].rstrip(".")
            raise ConfigError(f"{COMMAND_LINE}: {where}: {reason}; put special characters in quotes.") from None
        self.set(where, value, COMMAND_LINE)

    def set(self, where: str, value: Any, origin: str) -> None:
        """Put ``value`` at ``where``, making the sections on the way; list items must exist. Raises ConfigError."""
        try:
            value = plain(value)
            if max(name.count(".") for name, _ in leaves(value, where)) > MAX_DEPTH - 2:
                raise ValueError(f"more than {MAX_DEPTH} levels")
            node, key = self._place(where, origin)
        except ValueError as error:
            raise ConfigError(f"{origin}: {where}: {error}.") from None
        node[key] = value
        for old in [name for name in self.origin if name == where or name.startswith(f"{where}.")]:
            del self.origin[old]
        self.origin |= {where: origin} | {name: origin for name, _ in leaves(value, where)}

    def get(self, where: str, default: Any = None) -> Any:
        """The value at ``where`` as the tree holds it, or ``default``; "" is the whole tree."""
        node: Any = self.tree
        for key in where.split(".") if where else ():
            if isinstance(node, list):
                node = node[int(key)] if _is_position(key, node) else _ABSENT
            else:
                node = node.get(key, _ABSENT) if isinstance(node, dict) else _ABSENT
            if node is _ABSENT:
                return default
        return node

    def has(self, where: str) -> bool:
        return self.get(where, _ABSENT) is not _ABSENT

    def build(self, where: str, /, target: Callable | str | None = None, **runtime: Any) -> Any:
        """Call what the section ``where`` names with its other keys as keyword arguments; or ``target`` with all keys.

        A ``target`` that is text is the import path of what the section must give, such as "common.method.Method".
        Mappings within that have a ``name`` are built first. A value of ``runtime`` (what no file can know) goes to
        each constructor that has a parameter of that name which the config does not set. Defaults are recorded in the
        tree. Raises ConfigError with one line a mistake before anything is made, or if a constructor raises ValueError.
        """
        planned, plan = self._plan(where, target, runtime)
        self._settle(plan)
        try:
            return make(planned, runtime)
        except Problem as problem:
            raise ConfigError(self._line(problem)) from problem.__cause__

    def check(self, where: str, target: Callable | str | None = None, runtime_names: Collection[str] = ()) -> None:
        """All that ``build`` does but making anything; ``runtime_names`` are the names that it will be given."""
        self._settle(self._plan(where, target, runtime_names)[1])

    def check_sections(self, sections: Mapping[str, Callable | str | None],
                       runtime_names: Mapping[str, Collection[str]] = MappingProxyType({})) -> None:
        """``check`` each of ``sections`` (name -> target) and refuse all others: every mistake in one ConfigError.

        ``runtime_names``: section -> the names that its ``build`` will be given.
        """
        self._settle(self._strays(sections), *(self._plan(where, target, runtime_names.get(where, ()))[1]
                                               for where, target in sections.items()))

    def check_unimported(self, sections: Mapping[str, Callable | str | None],
                         runtime: Mapping[str, Mapping[str, Any]], unopened: Collection[str] = ()) -> None:
        """``check_sections`` as far as this project's source alone tells, which needs no torch; then the checks of
        values that constructors open with, but for the sections ``unopened``. ``runtime``: section -> what its
        ``build`` will be given, if known."""
        plans = [self._strays(sections)]
        for where, target in sections.items():
            planned, plan = self._plan(where, target, runtime.get(where, ()), sketched=True)
            plans.append(plan)
            try:
                if not plan.problems and where not in unopened:
                    make(planned, runtime.get(where, {}), sketch.open_call)
            except Problem as problem:
                plan.problems.append(problem)
        self._settle(*plans)

    def _strays(self, sections: Mapping[str, Any]) -> Plan:
        plan = Plan((), resolve)
        plan.problems = [Problem(key, f"no such section{nearest(key, sections)} Sections are: {', '.join(sections)}.")
                         for key in self.tree if key not in sections]
        return plan

    def text(self, origins: bool = False) -> str:
        """The config as YAML, which loads to the same tree; with ``origins`` each line says where its value is from."""
        lines: list[str] = []
        for section, value in self.tree.items():
            lines += [""] * bool(lines) + write({section: value}).splitlines()
        text = "\n".join(lines) + "\n" if lines else "{}\n"
        return self._annotated(text) if origins else text

    def digest(self, without: Collection[str] = ()) -> str:
        """SHA-256 (hex) of the settings, whatever their order; ``without`` names the keys and sections to leave out."""
        rest = Config(copy.deepcopy(self.tree), {}, self.source)
        for where in without:
            section, _, key = where.rpartition(".")
            parent = rest.get(section)
            if isinstance(parent, dict):
                parent.pop(key, None)
        return hashlib.sha256(canonical(rest.tree).encode()).hexdigest()

    def _plan(self, where: str, target: Callable | str | None, runtime_names: Collection[str],
              sketched: bool = False) -> tuple[Any, Plan]:
        look = functools.partial(sketch.find if sketched else resolve, trusted=self.trusted)
        plan = Plan(runtime_names, look, strict=self.trusted is not None and not sketched)
        node = self.get(where)
        if callable(target) and (node is None or isinstance(node, dict)):           # an absent section is all defaults
            return plan.call(where, target.__qualname__, target, node or {}), plan
        if not callable(target) and (isinstance(node, list) or (isinstance(node, dict) and "name" in node)):
            wanted = Any if target is None else (sketch.place if sketched else place)(target)
            return plan.placed(where, node, wanted), plan
        wants = "a mapping of settings" if callable(target) else \
            "a mapping with a 'name', the import path of what to build"
        got = show(node) if self.has(where) else "nothing"
        plan.problems.append(Problem(where, f"wants {wants}; got {got}."))
        return None, plan

    def _settle(self, *plans: Plan) -> None:
        """Raise all problems at once; without any, record the defaults."""
        problems = [problem for plan in plans for problem in plan.problems]
        if problems:
            raise ConfigError("\n".join(map(self._line, problems)))
        for plan in plans:
            for where, value, name in plan.defaults:
                self.set(where, value, f"default of {name}")

    def _line(self, problem: Problem) -> str:
        where = problem.where
        while where and where not in self.origin:
            where = where.rpartition(".")[0]
        origin = self.origin[where] if where else self.source
        return f"{origin}: {problem.where + ': ' if problem.where else ''}{problem.message}"

    def _place(self, where: str, origin: str) -> tuple[Any, Any]:
        """The mapping or list that holds ``where``, and its key there. Raises ValueError."""
        node: Any = self.tree
        *parents, last = where.split(".")
        for i, parent in enumerate(parents):
            name = ".".join(parents[:i + 1])
            key = _key(node, parent)
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
                self.origin[name] = origin
            node = node[key]
            if not isinstance(node, (dict, list)):
                raise ValueError(f"{name} is {show(node)}, which has no keys")
        return node, _key(node, last)

    def _annotated(self, text: str) -> str:
        _, line_of = read(text, self.source)
        notes: dict[int, list[str]] = {}
        for where, _ in leaves(self.tree):
            note = self.origin.get(where, self.source)
            notes.setdefault(line_of[where], []).append(note)
        lines = text.splitlines()
        width = max((len(lines[i - 1]) for i in notes if len(lines[i - 1]) <= 60), default=0)
        for i, found in notes.items():
            lines[i - 1] = f"{lines[i - 1]:<{width}}  # {', '.join(dict.fromkeys(found))}"
        return "\n".join(lines) + "\n"


def _is_position(key: str, items: list) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(items)


def _key(node: dict | list, key: str) -> str | int:
    """``key`` as ``node`` takes it. Raises ValueError."""
    if isinstance(node, dict):
        return checked_key(key)
    if not _is_position(key, node):
        raise ValueError(f"'{key}' is no position in a list of {len(node)} (they count from 0)")
    return int(key)

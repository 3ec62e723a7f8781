"""Nodes of a config -> checked calls -> objects. All mistakes are collected before the first object is made."""

import dataclasses
import difflib
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from common.config.schema import Call, Problem, convert, describe, fits, same, show
from common.config.yaml12 import ConfigError, join, plain

REQUIRED = inspect.Parameter.empty


class Parameter(NamedTuple):
    wanted: Any                             # the annotation; Any = none, or one that cannot be evaluated
    default: Any = REQUIRED


class Signature(NamedTuple):
    """What a target takes by name; ``open`` if it also takes names that it does not list (``**kwargs``)."""

    parameters: dict[str, Parameter]
    open: bool
    gives: type

    @classmethod
    def of(cls, target: Callable) -> "Signature":
        """Raises ValueError or TypeError for the few built-in callables that have no signature."""
        signature = inspect.signature(target)
        found = signature.parameters.values()
        hints = _hints(target, {p.name: p.annotation for p in found} | {"return": signature.return_annotation})
        gives = target if isinstance(target, type) else typing.get_origin(hints["return"]) or hints["return"]
        named = {p.name: Parameter(hints[p.name], p.default) for p in found
                 if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if dataclasses.is_dataclass(target):
            named |= {f.name: named[f.name]._replace(default=f.default_factory()) for f in dataclasses.fields(target)
                      if f.init and f.default_factory is not dataclasses.MISSING}
        known = isinstance(gives, type) and gives is not Any
        return cls(named, any(p.kind is p.VAR_KEYWORD for p in found), gives if known else object)


class Plan:
    """The calls for one node; ``problems`` and ``defaults`` (name, value, whose) fill as it is made."""

    def __init__(self, runtime_names: Collection[str]):
        self.runtime_names = runtime_names
        self.problems: list[Problem] = []
        self.defaults: list[tuple[str, Any, str]] = []

    def value(self, where: str, value: Any) -> Any:
        """``value`` with a Call in place of each mapping that has a ``name``."""
        if isinstance(value, list):
            return [self.value(join(where, i), item) for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if "name" not in value:
            return {key: self.value(join(where, key), item) for key, item in value.items()}
        arguments = {key: item for key, item in value.items() if key != "name"}
        try:
            target = resolve(value["name"], join(where, "name"))
        except Problem as problem:
            self.problems.append(problem)
            return Call(where, str(value["name"]), dict, object)        # never called: there is a problem
        return self.call(where, value["name"], target, arguments)

    def call(self, where: str, name: str, target: Callable, arguments: Mapping[str, Any]) -> Call:
        try:
            signature = Signature.of(target)
        except (ValueError, TypeError):
            self.problems.append(Problem(where, f"{name} has no signature to check against; wrap it in a function."))
            return Call(where, name, target, object)
        self._refuse_unknown(where, name, signature, arguments)
        call = Call(where, name, target, signature.gives)
        for key, value in arguments.items():
            call.arguments[key] = self._argument(join(where, key), value, signature.parameters.get(key, Parameter(Any)))
        absent = {key: p for key, p in signature.parameters.items() if key not in arguments}
        call.runtime = [key for key in absent if key in self.runtime_names]
        self._fill(where, name, {key: p for key, p in absent.items() if key not in self.runtime_names})
        return call

    def _argument(self, where: str, value: Any, parameter: Parameter) -> Any:
        if same(value, parameter.default):      # always fine: many an `= None` is annotated as something else
            return parameter.default
        try:
            return convert(self.value(where, value), parameter.wanted, where)
        except Problem as problem:
            self.problems.append(problem)
            return None

    def _refuse_unknown(self, where: str, name: str, signature: Signature, arguments: Iterable[str]) -> None:
        known = [key for key in signature.parameters if key not in self.runtime_names]
        for key in arguments:
            if key not in signature.parameters and not signature.open:
                message = f"{name} takes no such key{nearest(key, known)} It takes: {', '.join(known) or 'none'}."
                self.problems.append(Problem(join(where, key), message))

    def _fill(self, where: str, name: str, absent: Mapping[str, Parameter]) -> None:
        """Record the defaults that a config can hold; name what is missing."""
        missing = [f"{key} ({describe(p.wanted)})" if p.wanted is not Any else key
                   for key, p in absent.items() if p.default is REQUIRED]
        if missing:
            self.problems.append(Problem(where, f"{name} needs {', '.join(missing)}."))
        for key, p in absent.items():
            try:
                self.defaults.append((join(where, key), plain(p.default), name))
            except ValueError:                  # a class, say: stays the target's own business
                continue


def make(value: Any, runtime: Mapping[str, Any]) -> Any:
    """Make the calls in ``value``, the inner ones first. A ValueError of a target becomes a Problem where it stands."""
    if type(value) in (list, tuple):
        return type(value)([make(item, runtime) for item in value])
    if type(value) is dict:
        return {key: make(item, runtime) for key, item in value.items()}
    if not isinstance(value, Call):
        return value
    arguments = make(value.arguments, runtime) | {key: runtime[key] for key in value.runtime}
    try:
        made = value.target(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        first, *_ = str(error).replace(":", " ").split() or [""]       # "momentum must be ...": point at that line
        where = join(value.where, first) if first in value.arguments else value.where
        message = str(error).removeprefix(f"{first}: ") if where != value.where else str(error)
        raise Problem(where, message or "refused by its ValueError without a word.") from error
    if not fits(type(made), value.wanted, certain=True):
        raise Problem(value.where, f"wants {describe(value.wanted)}; {value.name} gave a {type(made).__qualname__}.")
    return made


def resolve(name: Any, where: str) -> Callable:
    """The callable with the import path ``name``. Raises Problem at ``where``."""
    if not isinstance(name, str) or "." not in name or not all(part.isidentifier() for part in name.split(".")):
        raise Problem(where, f"wants the import path of what to build, such as torch.optim.SGD; got {show(name)}.")
    path, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise Problem(where, f"cannot import '{name}' ({error}).") from error
    if not hasattr(module, attribute):
        raise Problem(where, f"{path} has no '{attribute}'{nearest(attribute, dir(module))}")
    if not callable(getattr(module, attribute)):
        raise Problem(where, f"{name} is a {type(getattr(module, attribute)).__name__}, which cannot be called.")
    return getattr(module, attribute)


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``key``."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else "."


def _hints(target: Callable, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Each annotation evaluated by itself, so that one that cannot be does not hide the others."""
    classes = target.__mro__ if isinstance(target, type) else ()
    function = inspect.unwrap(next((vars(c)["__init__"] for c in classes if "__init__" in vars(c)), target))
    module = sys.modules.get(getattr(target, "__module__", None) or "")
    namespace = getattr(function, "__globals__", None) or vars(module or types)
    out = {}
    for name, annotation in raw.items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            out[name] = Any if annotation is REQUIRED else typing.get_type_hints(holder, namespace)[name]
        except Exception:                       # whatever evaluating someone's annotation may raise
            out[name] = Any
    return out

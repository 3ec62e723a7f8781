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

from common.config.schema import Absent, Call, Problem, convert, describe, fits, same, show, surely_fits
from common.config.yaml12 import ConfigError, join, plain

REQUIRED = inspect.Parameter.empty
TRUSTED = ("common", "moco", "instdisc", "metric_learning")     # packages that any config may name: this project's
# What of them: the modules that a run's parts are in, and those below. All others act: they run, write or delete.
BUILDABLE = ("common.backbones", "common.data", "common.dictionary", "common.encoder", "common.evaluate",
             "common.losses", "common.method", "common.optim", "common.schedule", "moco", "instdisc",
             "metric_learning")
PARTS = ("torch.nn.Module", "common.data.datasets.Splits", "common.data.views.Views")   # harmless to make, anywhere


class Parameter(NamedTuple):
    wanted: Any                             # the annotation; Any = none, or one that cannot be evaluated
    default: Any = REQUIRED


class Signature(NamedTuple):
    """What a target takes by name; ``open`` if it also takes names that it does not list (``**kwargs``)."""

    parameters: dict[str, Parameter]
    open: bool
    gives: Any

    @classmethod
    def of(cls, target: Callable) -> "Signature":
        """Raises ValueError or TypeError for the few built-in callables that have no signature."""
        signature = inspect.signature(target)
        found = signature.parameters.values()
        hints = _hints(target, {p.name: p.annotation for p in found} | {"return": signature.return_annotation})
        gives = target if isinstance(target, type) else hints["return"]
        named = {p.name: Parameter(hints[p.name], p.default) for p in found
                 if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if dataclasses.is_dataclass(target):
            named |= {f.name: named[f.name]._replace(default=f.default_factory()) for f in dataclasses.fields(target)
                      if f.init and f.default_factory is not dataclasses.MISSING}
        known = isinstance(typing.get_origin(gives) or gives, type) and gives is not Any
        takes_all = any(p.kind is p.VAR_KEYWORD for p in found) and not _is_modules_own(target)
        return cls(named, takes_all, gives if known else object)


class Plan:
    """The calls for one node; ``problems`` and ``defaults`` (name, value, whose) fill as it is made.

    ``find(name, where)`` gives the target that an import path leads to; None for one that is left unchecked. With
    ``strict``, what this project's packages make may only stand where something of its class is wanted, or, if it is
    of ``PARTS``, where nothing is said of that.
    """

    def __init__(self, runtime_names: Collection[str], find: Callable[[Any, str], Any], strict: bool = False):
        self.runtime_names, self.find, self.strict = runtime_names, find, strict
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
            target = self.find(value["name"], join(where, "name"))
        except Problem as problem:
            self.problems.append(problem)
            return Call(where, str(value["name"]), dict, object)        # never called: there is a problem
        if target is None:
            return Call(where, value["name"], _nothing, object, self.value(where, arguments))
        call = self.call(where, value["name"], target, arguments)
        call.strict = self.strict and _package(target) in TRUSTED
        call.part = call.strict and _is_part(call.gives)
        return call

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
        return self.placed(where, value, parameter.wanted)

    def placed(self, where: str, value: Any, wanted: Any) -> Any:
        """``value`` planned and converted, or a problem more and None."""
        try:
            return convert(self.value(where, value), wanted, where)
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


def make(value: Any, runtime: Mapping[str, Any], call: Callable[[Call, dict], Any] | None = None) -> Any:
    """Make the calls in ``value``, the inner ones first. A ValueError or OSError of a target becomes a Problem."""
    if type(value) in (list, tuple):
        return type(value)([make(item, runtime, call) for item in value])
    if type(value) is dict:
        return {key: make(item, runtime, call) for key, item in value.items()}
    if not isinstance(value, Call):
        return value
    arguments = make(value.arguments, runtime, call) | {key: runtime[key] for key in value.runtime}
    try:
        return (call or _made)(value, arguments)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        first, *_ = str(error).replace(":", " ").split() or [""]       # "momentum must be ...": point at that line
        where = join(value.where, first) if first in value.arguments else value.where
        message = str(error).removeprefix(f"{first}: ") if where != value.where else str(error)
        raise Problem(where, message or "refused without a word.") from error


def _made(call: Call, arguments: dict[str, Any]) -> Any:
    made = call.target(**arguments)
    if not fits(type(made), call.wanted, certain=True):
        raise Problem(call.where, f"wants {describe(call.wanted)}; {call.name} gave a {type(made).__qualname__}.")
    return made


def _nothing(**arguments: Any) -> None:
    """Stands for a target that is left unchecked; never called."""


def resolve(name: Any, where: str, trusted: Collection[str] | None = None) -> Callable:
    """The callable with the import path ``name``. Raises Problem at ``where``.

    With ``trusted``, it must be public, and defined in one of these packages; no other is imported.
    """
    path, attribute = split_name(name, where, trusted)
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise Problem(where, f"cannot import '{name}' ({error}).") from error
    if not hasattr(module, attribute):
        raise Problem(where, f"{path} has no '{attribute}'{nearest(attribute, dir(module))}")
    target = getattr(module, attribute)
    if not callable(target):
        raise Problem(where, f"{name} is a {type(target).__name__}, which cannot be called.")
    if trusted is not None:
        _check_home(name, where, target, trusted)
    return target


def _check_home(name: str, where: str, target: Callable, trusted: Collection[str]) -> None:
    if (package := _package(target)) not in trusted:
        raise Problem(where, _distrust(name, package))
    if package in TRUSTED and not f"{target.__module__}.".startswith(tuple(f"{home}." for home in BUILDABLE)):
        raise Problem(where, f"'{name}' is no part of a run, which a config may name. Such are in "
                             f"{', '.join(BUILDABLE)}.")


def _package(target: Any) -> str:
    return str(getattr(target, "__module__", "")).partition(".")[0]


def _is_part(gives: Any) -> bool:
    return any(surely_fits(gives, place(part)) for part in PARTS)


def _is_modules_own(target: Callable) -> bool:
    """Whether a class has its constructor from nn.Module, which accepts any key, to no purpose."""
    classes = target.__mro__ if isinstance(target, type) else ()
    owner = next((c for c in classes if "__init__" in vars(c)), object)
    return (owner.__module__, owner.__qualname__) == ("torch.nn.modules.module", "Module")


def place(name: str) -> Any:
    """The class or annotation with the import path ``name``: what must stand at a place."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def split_name(name: Any, where: str, trusted: Collection[str] | None) -> tuple[str, str]:
    """Module and attribute of an import path. Raises Problem at ``where``; nothing is imported."""
    if not isinstance(name, str) or "." not in name or not all(part.isidentifier() for part in name.split(".")):
        raise Problem(where, f"wants the import path of what to build, such as moco.MoCo; got {show(name)}.")
    if trusted is not None and name.partition(".")[0] not in trusted:
        raise Problem(where, _distrust(name, name.partition(".")[0]))
    if trusted is not None and any(part.startswith("_") for part in name.split(".")):
        raise Problem(where, f"'{name}' is private. Give a public name.")
    path, _, attribute = name.rpartition(".")
    return path, attribute


def _distrust(name: str, package: str) -> str:
    near = difflib.get_close_matches(package, TRUSTED, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    if package in sys.stdlib_module_names:                  # nobody's method: do not show how to let it in
        return f"would call '{name}', of Python's own '{package}', which is not trusted; {', '.join(TRUSTED)} are."
    return (f"would call '{name}', of the package '{package}', which is not trusted; {', '.join(TRUSTED)} are.{hint} "
            f"If it is yours, say so: --trust {package} (in Python, trust=['{package}']).")


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
            if _is_absent(out[name]):
                out[name] = Any
        except Exception:                       # whatever evaluating someone's annotation may raise
            out[name] = Any
    return out


def _is_absent(hint: Any) -> bool:
    """Whether an annotation speaks of a class that only another package could tell; see ``common.config.sketch``."""
    return hint is Absent or any(map(_is_absent, typing.get_args(hint)))

"""A value from a config against a type annotation: converted to it, or refused in words."""

import inspect
import json
import os
import types
import typing
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from common.config.yaml12 import join, plain, scalar

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null",
          list: "a list", tuple: "a list", dict: "a mapping"}
_PATHS = (Path, os.PathLike)
_LISTS = (list, tuple, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_CALLABLE: tuple[Any, ...] = (abc.Callable,)
_UNIONS = (Union, types.UnionType)
_PLAIN = {*_WORDS, *_PATHS, *_LISTS, *_MAPPINGS, object, Any}


class Problem(Exception):
    """A mistake at the dotted name ``where``; whoever knows files and lines makes a ConfigError of it."""

    def __init__(self, where: str, message: str):
        super().__init__(where, message)
        self.where, self.message = where, message


class _OfAnotherPackage(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent


class Absent(metaclass=_OfAnotherPackage):
    """Stands for a package that was not imported, for all it holds, and as a base of what is made from that."""


@dataclass
class Call:
    """A call that was checked and not yet made; it stands where its result will stand."""

    where: str
    name: str                                                   # how the config names the target
    target: Callable
    gives: Any                                                  # the class of what it will return; object = not known
    arguments: dict[str, Any] = field(default_factory=dict)     # converted; nested calls not yet made
    runtime: list[str] = field(default_factory=list)            # arguments that only the caller of build knows
    wanted: Any = Any                                           # the annotation of the place that it stands in
    strict: bool = False                                        # only where something of its very class is wanted,
    part: bool = False                                          # or, if it is one, where nothing says what is wanted


def convert(value: Any, wanted: Any, where: str) -> Any:
    """``value`` as the annotation ``wanted`` asks for. Raises Problem at ``where``, or at the item that does not fit.

    A whole number may stand for a float, and nothing else changes its kind: no bool is a number, no text is parsed.
    Lists become tuples where these are asked for. An annotation that says nothing to check lets everything pass but a
    call that is ``strict`` and no ``part``.
    """
    kind, args = get_origin(wanted) or wanted, get_args(wanted)
    if isinstance(value, Call):
        return _promise(value, wanted)
    if kind is Any:
        return _anything(value, where)
    if kind in _UNIONS:
        return _any_of(value, args, wanted, where)
    if kind in _LISTS and isinstance(value, list):
        return _items(value, kind, args, wanted, where)
    if kind in _MAPPINGS and isinstance(value, dict):
        return _entries(value, args, where)
    if kind in _PATHS and isinstance(value, str):
        return Path(os.path.expanduser(value))
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if not _is(value, kind, args):
        raise Problem(where, f"wants {describe(wanted)}; got {show(value)}{_hint(value, kind)}")
    return _anything(value, where)


def fits(given: Any, wanted: Any, certain: bool) -> bool:
    """Whether an object of class ``given`` (or, unless ``certain``, of a class below it) may stand for ``wanted``.

    A callable must return what is wanted of it, as far as both say what that is.
    """
    kind: Any = get_origin(wanted) or wanted
    given_kind: Any = get_origin(given) or given
    if kind in _UNIONS:
        return any(fits(given, arm, certain) for arm in get_args(wanted))
    if kind is Any or not isinstance(kind, type):
        return kind is not Literal
    try:
        below = issubclass(given_kind, kind)
        if below and kind in _CALLABLE:
            return fits(_returns(given), _returns(wanted), certain=False)
        return below or (not certain and issubclass(kind, given_kind))
    except TypeError:                                           # a Protocol, a TypedDict
        return True


def _returns(called: Any) -> Any:
    """What calling an object of the class ``called``, or annotated so, gives; object if it does not say."""
    if get_origin(called) is abc.Callable:
        result = get_args(called)[-1]
    else:
        try:
            result = typing.get_type_hints(called.__call__).get("return", object)
        except (NameError, TypeError, AttributeError):
            return object
    return object if result is Any else result


def surely_fits(given: Any, wanted: Any) -> bool:
    """``fits``, and it is known: ``wanted`` asks for some class other than plain values, and ``given`` is one."""
    kind = get_origin(wanted) or wanted
    if kind in _UNIONS:
        return any(surely_fits(given, arm) for arm in get_args(wanted))
    if kind is abc.Callable:
        return fits(given, wanted, certain=True) and _returns(given) is not object
    return inspect.isclass(kind) and kind not in _PLAIN and fits(given, kind, certain=True)


def same(a: Any, b: Any) -> bool:
    """Whether two values are written alike in a config: a tuple is its list, 1.0 is 1, and true is not 1."""
    try:
        return canonical(plain(a)) == canonical(plain(b))
    except (ValueError, RecursionError):
        return False


def canonical(value: Any) -> str:
    """One text for all ways to write ``value``: keys in order, whole floats as integers."""
    return json.dumps(_whole(value), sort_keys=True)


def describe(wanted: Any) -> str:
    """The annotation ``wanted`` in words."""
    kind, args = get_origin(wanted) or wanted, get_args(wanted)
    if kind in _UNIONS:
        return " or ".join(describe(arm) for arm in args)
    if kind is Literal:
        return " or ".join(show(choice, kind=False) for choice in args)
    if kind is tuple and args and args[-1] is not ...:
        return f"a list of {len(args)} ({', '.join(map(describe, args))})"
    if kind in _LISTS:
        return f"a list (each {describe(args[0])})" if args and args[0] is not Any else "a list"
    if kind in _MAPPINGS or kind in _PATHS:
        return "a mapping" if kind in _MAPPINGS else "a path"
    if kind in _WORDS:
        return _WORDS[kind]
    return f"a {getattr(kind, '__qualname__', kind)} (a mapping with its 'name')"


def show(value: Any, kind: bool = True) -> str:
    """``value`` as a message shows it, cut at 60 characters; with its ``kind`` where it would not be seen."""
    if isinstance(value, Call):
        return value.name
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"the text {text}" if kind and isinstance(value, str) else text


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is(value: Any, kind: Any, args: tuple) -> bool:
    if kind is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if kind in _LISTS or kind in _MAPPINGS:                     # text is a Sequence to Python, not to us
        return False
    if kind in (bool, int, float, str):
        return type(value) is kind
    try:
        return not isinstance(kind, type) or isinstance(value, kind)
    except TypeError:                                           # a Protocol, a TypedDict
        return True


def _promise(call: Call, wanted: Any) -> Call:
    call.wanted = wanted
    if call.strict and _says_nothing(wanted):
        if not call.part:
            raise Problem(call.where, f"nothing here asks for a call of {call.name}. Leave it out.")
        return call
    if not fits(call.gives, wanted, certain=False) or (call.strict and not surely_fits(call.gives, wanted)):
        gives = "something else" if call.gives is object else f"a {getattr(call.gives, '__qualname__', call.gives)}"
        raise Problem(call.where, f"wants {describe(wanted)}; {call.name} gives {gives}.")
    return call


def _says_nothing(wanted: Any) -> bool:
    return wanted is Any or wanted is object or isinstance(wanted, TypeVar)


def _anything(value: Any, where: str) -> Any:
    """``value`` as it is, once the calls in it are found to be such as may stand anywhere."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        convert(item, Any, join(where, key))
    return value


def _any_of(value: Any, arms: tuple, wanted: Any, where: str) -> Any:
    """The first arm that takes ``value``, beginning with an arm of its very type: 3 for ``float | int`` stays 3."""
    inside = None
    for arm in sorted(arms, key=lambda arm: arm is not type(value)):
        try:
            return convert(value, arm, where)
        except Problem as problem:
            inside = problem if problem.where != where else inside      # a list, but for one item
    raise inside or Problem(where, f"wants {describe(wanted)}; got {show(value)}{_hint(value, *arms)}")


def _items(value: list, kind: Any, args: tuple, wanted: Any, where: str) -> list | tuple:
    fixed = kind is tuple and args and args[-1] is not ...
    if fixed and len(args) != len(value):
        raise Problem(where, f"wants {describe(wanted)}; got {len(value)}: {show(value)}.")
    each = args if fixed else [args[0] if args else Any] * len(value)
    items = [convert(item, want, join(where, i)) for i, (item, want) in enumerate(zip(value, each, strict=True))]
    return tuple(items) if kind is tuple else items


def _entries(value: dict, args: tuple, where: str) -> dict:
    key_kind, item_kind = args or (str, Any)
    return {key if key_kind in (str, Any) else convert(scalar(key), key_kind, join(where, key)):
            convert(item, item_kind, join(where, key)) for key, item in value.items()}


def _hint(value: Any, *kinds: Any) -> str:
    """The end of a message: what the writer may have meant."""
    if isinstance(value, str) and {int, float} & set(kinds) and isinstance(_unquoted(value), (int, float)):
        return "; write it without quotes."
    if isinstance(value, (bool, int, float)) and str in kinds:
        return "; put it in quotes."
    if isinstance(value, float) and int in kinds and value.is_integer():
        return f"; write {int(value)}."
    if not isinstance(value, (list, dict)) and any((get_origin(kind) or kind) in _LISTS for kind in kinds):
        return f"; write [{show(value, kind=False)}]."
    return "."


def _unquoted(text: str) -> Any:
    try:
        return scalar(text)
    except ValueError:
        return text

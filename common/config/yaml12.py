"""YAML 1.2 in and out: plain Python values, and the line where each one stands.

PyYAML follows YAML 1.1, where ``1e-4`` is text, ``on`` is true, ``010`` is 8, ``12:30:00`` is 45000 and the second of
two equal keys wins silently. Here numbers, ``true``, ``false`` and ``null`` are those of YAML 1.2's core schema, and a
repeated key is an error. Anchors and aliases work; tags, merge keys (``<<``), ``.nan`` and several documents do not.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

MAX_DEPTH = 32              # a config needs about 6; Python's parser dies of deep nesting, and slowly
MAX_VALUES = 10_000         # nine aliases of nine aliases of ... would be billions
_PREFIX = "tag:yaml.org,2002:"
_FORMS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    "str": re.compile(r".*", re.DOTALL),
}


class ConfigError(ValueError):
    """A mistake in a config or in an override, for its author: one line each of file:line, key, and what to do."""


def read(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """The value that ``text`` holds, and the line (from 1) of each of its parts by dotted key; "" is the whole.

    Mappings have text keys without dots; list items are numbered from 0. Raises ConfigError with ``source``:line.
    """
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{source}:{line}: not valid YAML: {problem}.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:        # the last two: escapes such as \UFFFFFFFF
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}.") from None
    lines: dict[str, int] = {}
    return None if node is None else _Reader(source, lines).value(node, ""), lines


def scalar(text: str) -> bool | int | float | str | None:
    """What ``text`` means when it stands in YAML without quotes."""
    form = next(form for form, pattern in _FORMS.items() if pattern.fullmatch(text))
    return _SCALARS[form](text)


def write(value: Any) -> str:
    """``value`` in block style, one line a leaf, lists without mappings in one line; ``read`` gives it back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def plain(value: Any) -> Any:
    """A copy of ``value`` made of what YAML can hold: tuples become lists, paths text. Raises ValueError otherwise."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if type(value) is dict:
        return {checked_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if type(value) is str:
        value.encode()                                  # a lone surrogate: UnicodeEncodeError, a ValueError
    elif type(value) not in (bool, int, float, type(None)) or value != value:
        raise ValueError(f"{value!r} is nothing for a config: text, numbers, true, false, null, lists, mappings are")
    return value


def checked_key(key: Any) -> str:
    """``key``, if dotted names such as ``method.momentum=0.9`` can address it. Raises ValueError if not."""
    if type(key) is not str or not key.isprintable() or not 0 < len(key) <= 100 or set(key) & set(".="):
        hint = "; nest the sections instead" if "." in str(key) else ""
        raise ValueError(f"{str(key)[:60]!r} is no key: that is 1 to 100 printable characters, no '.', no '='{hint}")
    return key


def join(where: str, key: object) -> str:
    """The dotted name of ``key`` in the section ``where``."""
    return f"{where}.{key}" if where else str(key)


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The scalars, empty lists and empty mappings in ``value``, each with its dotted name."""
    if not isinstance(value, (dict, list)) or not value:
        yield where, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(item, join(where, key))


def _number(text: str) -> float:
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if value != value:
        raise ValueError("not-a-number is no setting")
    return value


_SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None, "bool": lambda text: text.lower() == "true", "int": int, "float": _number, "str": str}


class _Loader(yaml.SafeLoader):
    """Composes nodes only (no Python object is ever constructed by PyYAML), with the core schema's forms."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what YAML 1.1 or 1.2 would misread, so that other tools read the same values."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def _str(self, value: str) -> yaml.Node:
        return self.represent_scalar(_PREFIX + "str", value, style=None if value.isprintable() else '"')

    def _list(self, value: list) -> yaml.Node:
        return self.represent_sequence(_PREFIX + "seq", value, flow_style=not _holds_mapping(value))


_Loader.yaml_implicit_resolvers = {}                     # not 1.1's
for _form, _pattern in list(_FORMS.items())[:-1]:       # text is what nothing else is
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_PREFIX + _form, re.compile(rf"(?:{_pattern.pattern})\Z"), None)
_Dumper.add_representer(str, _Dumper._str)
_Dumper.add_representer(list, _Dumper._list)


def _holds_mapping(value: Any) -> bool:
    return bool(value) if isinstance(value, dict) else isinstance(value, list) and any(map(_holds_mapping, value))


class _Reader:
    """Nodes -> values, filling ``lines``."""

    def __init__(self, source: str, lines: dict[str, int]):
        self.source, self.lines = source, lines

    def value(self, node: yaml.Node, where: str, line: int | None = None) -> Any:
        self.lines[where] = line or node.start_mark.line + 1
        if len(self.lines) > MAX_VALUES or where.count(".") >= MAX_DEPTH:
            raise self.error(node, where[:60], "aliases within aliases make this too large.")
        tag = node.tag.removeprefix(_PREFIX)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self.mapping(node, where)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.value(item, join(where, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or tag not in _FORMS or not _FORMS[tag].fullmatch(node.value):
            tag = node.tag.replace(_PREFIX, "!!")
            raise self.error(node, where, f"the tag {tag} is not known here; write the value without a tag.")
        try:
            return plain(_SCALARS[tag](node.value))
        except ValueError as error:
            raise self.error(node, where, f"{error}.") from None

    def mapping(self, node: yaml.MappingNode, where: str) -> dict[str, Any]:
        first_line: dict[str, int] = {}
        out = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            try:
                key = checked_key(key_node.value)
            except ValueError as error:
                raise self.error(key_node, where, f"{error}.") from None
            if key in first_line:
                raise self.error(key_node, join(where, key), f"given twice, first in line {first_line[key]}; keep one.")
            first_line[key] = line
            out[key] = self.value(value_node, join(where, key), line)
        return out

    def error(self, node: yaml.Node, where: str, message: str) -> ConfigError:
        return ConfigError(f"{self.source}:{node.start_mark.line + 1}: {where + ': ' if where else ''}{message}")

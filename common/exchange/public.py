"""What may be published of a run: nothing that names its machine or its user, and nothing that breaks the page."""

import re
from pathlib import PurePosixPath
from typing import Any

from common.printable import printable

_OF_A_USER = ("home", "Users", "users", "root")     # whoever has a folder right in one of these gives it a name
_ABSOLUTE = re.compile(r"^(~|/|\\\\|[A-Za-z]:[\\/]|\w+://)")
_MARKDOWN = re.compile(r"([\\`*_\[\]|<>~$&])")


def settings(tree: Any, local: bool = False) -> Any:
    """A config's tree without the folders of the machine: of a path, only its last name stays.

    ``local``: any text with a slash is a path, as in the sections ``run`` and ``data``; elsewhere only an absolute one,
    since ``torchvision/resnet50`` is none.
    """
    if isinstance(tree, dict):
        return {printable(str(key)): settings(value, local or key in ("run", "data")) for key, value in tree.items()}
    if isinstance(tree, list):
        return [settings(value, local) for value in tree]
    if isinstance(tree, str) and (_ABSOLUTE.match(tree) or (local and re.search(r"[\\/]", tree))):
        return last_name(tree)
    return tree


def last_name(path: str) -> str:
    """The last name in ``path``; of a user's own folder none."""
    *before, name = PurePosixPath(path.replace("\\", "/")).parts or ("",)
    owned = name.startswith("~") or (bool(before) and before[-1] in _OF_A_USER)
    return "(a folder)" if owned or name in ("", "/", "..", ".") else name


def named(images: str) -> str:
    """What ``Images.name`` says, "folder /data/cats" or "digits", without the folders of the machine."""
    kind, space, rest = images.partition(" ")
    return f"{kind} {last_name(rest)}" if space and re.search(r"[\\/]", rest) else last_name(images)


def markdown(text: str) -> str:
    """One line that a page shows as it is: no markup, no HTML, no cell of a table, no end of line."""
    return _MARKDOWN.sub(r"\\\1", printable(text, 200))


def block(text: str, language: str = "") -> str:
    """Lines in a fence that no line of theirs can close."""
    lines = "\n".join(printable(line) for line in text.rstrip().split("\n"))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
    return f"{fence}{language}\n{lines}\n{fence}"

"""manifest.json: what lies in an export, and whether it still does.

Every file but the manifest itself is there with its size and SHA-256, beside the facts of the network and the proof.
"""

import hashlib
import json
from pathlib import Path, PurePath
from typing import Any

from common.config import ConfigError
from common.printable import printable

FILE = "manifest.json"
KIND = "export of contrastive-backbones"


class NotAsExported(ConfigError):
    """A file that is missing, cut short or changed; the message names it."""


def write(folder: Path, content: dict[str, Any]) -> None:
    """``content`` and all files that lie in ``folder`` now."""
    files = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
             for path in sorted(folder.rglob("*")) if path.is_file() and path.name != FILE}
    text = json.dumps({"kind": KIND, **content, "files": files}, indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def is_export(folder: Path) -> bool:
    """Whether this project has written it, or begun to."""
    try:
        return bool(json.loads((folder / FILE).read_text(encoding="utf-8"))["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read(folder: Path) -> dict[str, Any]:
    """The manifest of an export whose files are all as they were written. Raises NotAsExported, naming the file."""
    if not is_export(folder):
        raise NotAsExported(f"{folder}: no export: it has no {FILE} of one. Give a folder that tools/export.py has "
                            "written.")
    content: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    try:
        for name, said in content["files"].items():
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise NotAsExported(f"{folder / FILE}: it lists {printable(name, 100)}, which is not in the folder.")
            _check(folder / name, said)
    except (KeyError, AttributeError, TypeError) as error:
        raise NotAsExported(f"{folder / FILE}: damaged: {type(error).__name__}: {error}. Export again.") from error
    return content


def strays(folder: Path) -> list[str]:
    """Files in an export that are somebody else's: its manifest does not list them."""
    listed = json.loads((folder / FILE).read_text(encoding="utf-8")).get("files", {})
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [name for name in names if name not in listed and name != FILE]


def _check(path: Path, said: dict[str, Any]) -> None:
    if not path.is_file():
        raise NotAsExported(f"{path}: missing. The export had it; export again.")
    if path.stat().st_size != said["bytes"]:
        raise NotAsExported(f"{path}: {path.stat().st_size:,} bytes; {said['bytes']:,} were exported. It was cut short "
                            "or changed; export again.")
    if sha256(path) != said["sha256"]:
        raise NotAsExported(f"{path}: its content is not what was exported (SHA-256). Export again.")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A text or CSV file that lists images, with labels or without."""

import csv
import io
import os
import re
from pathlib import Path
from typing import NamedTuple

from common.data.datasets import Splits
from common.data.files import InMemory, Listing, file_splits
from common.data.images import MAX_PIXELS, SUFFIXES
from common.printable import printable

_LINE = re.compile(r"(.*?(?:{}))(?:[ ,]+(.*))?".format("|".join(map(re.escape, SUFFIXES))), re.IGNORECASE)


class Row(NamedTuple):
    """A line of a list: the path as it stands there, "" for no label, and the line's number from 1."""

    key: str
    label: str
    line: int


def file_list(
    train: Path,
    test: Path | None = None,
    root: Path | None = None,
    channels: int | None = 3,
    max_pixels: int = MAX_PIXELS,
    in_memory: InMemory = "auto",
) -> Splits:
    """The images that the files ``train`` and ``test`` list, in their order.

    A list is UTF-8 text, a line for each image: its path, and its label if it has one, after a tab, or after a space or
    comma where the path ends in a known suffix; or CSV whose first line names the columns ``path`` and, if wanted,
    ``label``. Labels are names or numbers, counted into ``classes`` in natural order; -1 is none. Paths start at
    ``root``, or where the list is, and stay below it. Other arguments as in ``common.data.folder``.

    Raises ValueError where a list is missing, empty or unclear, where one of its paths leads out of ``root`` (is
    absolute and elsewhere, holds "..", or is or passes a link that does), or none of 64 of its images can be read.
    """
    check_list("train", Path(train))
    listing = _listing("train", Path(train), root)
    return file_splits(listing, None if test is None else _listing("test", Path(test), root), channels, max_pixels,
                       in_memory)


def check_list(what: str, path: Path) -> None:
    """Raises ValueError unless there is such a list."""
    if not path.expanduser().exists():
        raise ValueError(f"{what}: cannot read the list {path}: there is no such file. Give a text or CSV file.")


def _listing(what: str, path: Path, root: Path | None) -> Listing:
    rows = read_list(what, path)
    folder = root_of(path, root, rows)
    names = [None if label in ("", "-1") else label for _, label, _ in rows]
    return Listing(f"file list {path.expanduser()}", folder, [row.key for row in rows], names)


def read_list(what: str, path: Path) -> list[Row]:
    """The lines of a list, one at least; ``what`` names it in messages. Raises ValueError."""
    path = path.expanduser()
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")      # file names may be in any encoding
    except OSError as error:
        raise ValueError(f"{what}: cannot read the list {path}: {error.strerror}. Give a text or CSV file.") from None
    try:
        rows = _csv_rows(text) if _is_csv(text) else _text_rows(text, path)
    except csv.Error as error:
        raise ValueError(f"{what}: {path} is no CSV: {error}. Give a line for each image.") from None
    if not rows:
        raise ValueError(f"{what}: {path} lists no images. Give a line for each: its path, and its label if known.")
    return rows


def root_of(path: Path, root: Path | None, rows: list[Row]) -> Path:
    """Where the paths in a list start: at ``root``, or where the list is. Raises ValueError for one that leads out."""
    path = path.expanduser()
    folder = Path(os.path.abspath(path.parent if root is None else Path(root).expanduser()))
    _require_below(folder, rows, path)
    return folder


def _is_csv(text: str) -> bool:
    return "path" in _columns(text)


def _columns(text: str) -> list[str]:
    return [name.strip().lower() for name in text.split("\n", 1)[0].split(",")]


def _csv_rows(text: str) -> list[Row]:
    body = io.StringIO(text.split("\n", 1)[1] if "\n" in text else "")
    rows = csv.DictReader(body, fieldnames=_columns(text))
    return [Row(key, (row.get("label") or "").strip(), rows.line_num + 1) for row in rows
            if (key := (row["path"] or "").strip())]


def _text_rows(text: str, path: Path) -> list[Row]:
    return [Row(*path_and_label(line.rstrip("\r"), f"{path}:{number}"), number)
            for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def path_and_label(line: str, where: str) -> tuple[str, str]:
    """What a line of text holds. Raises ValueError, beginning with ``where``, if that is not clear."""
    if "\t" in line:
        key, label = line.split("\t", 1)
        return key.strip(), label.strip()
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"{where}: {line.strip()!r} is not a path that ends in one of {' '.join(SUFFIXES)}, alone or "
                         "before a space or comma and a label. Put a tab before the label if the path ends otherwise.")
    return match[1], (match[2] or "").strip()


def _require_below(root: Path, rows: list[Row], path: Path) -> None:
    """A list may come from a stranger: it must not reach other files of this machine. Nothing is opened for this."""
    folders: dict[str, tuple[bool, set[str]]] = {}          # of the root -> whether it is below it, its links
    real = os.path.realpath(root)
    for row in rows:
        folder, name = os.path.split(os.path.join(root, row.key))
        if folder not in folders:
            folders[folder] = _is_below(folder, real), _links(folder)
        below, links = folders[folder]
        if name in links:
            below = below and _is_below(os.path.join(folder, name), real)
        if "\0" in row.key or ".." in row.key.split("/") or not below:
            raise ValueError(f"{path}:{row.line}: {printable(row.key)} leads out of {root}. Paths in a list stay below "
                             "its root, links included; give as root a folder that holds all images.")


def _is_below(path: str, real: str) -> bool:
    try:
        return os.path.commonpath([os.path.realpath(path), real]) == real
    except ValueError:                                      # a zero byte
        return False


def _links(folder: str) -> set[str]:
    """The links in a folder, by one look at it and none at each file; where it cannot be listed, reading will tell."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except (OSError, ValueError):
        return set()

"""A text or CSV file that lists images, with labels or without."""

import csv
import io
import os
import re
from pathlib import Path

from common.data.datasets import Splits
from common.data.files import InMemory, Listing, file_splits
from common.data.images import MAX_PIXELS, SUFFIXES

_LINE = re.compile(r"(.*?(?:{}))(?:[ ,]+(.*))?".format("|".join(map(re.escape, SUFFIXES))), re.IGNORECASE)


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
    ``label``. Labels are names or numbers, counted into ``classes`` in natural order; -1 is none. Relative paths start
    at ``root``, or where the list is. Other arguments as in ``common.data.folder``.

    Raises ValueError where a list is missing, empty or unclear, or none of 64 of its images can be read.
    """
    listing = _listing("train", Path(train), root)
    return file_splits(listing, None if test is None else _listing("test", Path(test), root), channels, max_pixels,
                       in_memory)


def _listing(what: str, path: Path, root: Path | None) -> Listing:
    path = path.expanduser()
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")      # file names may be in any encoding
    except OSError as error:
        raise ValueError(f"{what}: cannot read the list {path}: {error.strerror}. Give a text or CSV file.") from None
    rows = _csv_rows(text) if _is_csv(text) else _text_rows(text, path)
    if not rows:
        raise ValueError(f"{what}: {path} lists no images. Give a line for each: its path, and its label if known.")
    folder = Path(os.path.abspath(path.parent if root is None else Path(root).expanduser()))
    names = [None if label in ("", "-1") else label for _, label in rows]
    return Listing(f"file list {path}", folder, [key for key, _ in rows], names)


def _is_csv(text: str) -> bool:
    return "path" in _columns(text)


def _columns(text: str) -> list[str]:
    return [name.strip().lower() for name in text.split("\n", 1)[0].split(",")]


def _csv_rows(text: str) -> list[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(text.split("\n", 1)[1] if "\n" in text else ""), fieldnames=_columns(text))
    return [(row["path"].strip(), (row.get("label") or "").strip()) for row in rows if row["path"].strip()]


def _text_rows(text: str, path: Path) -> list[tuple[str, str]]:
    return [_split(line.rstrip("\r"), f"{path}:{number}")
            for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _split(line: str, where: str) -> tuple[str, str]:
    if "\t" in line:
        key, label = line.split("\t", 1)
        return key.strip(), label.strip()
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"{where}: {line.strip()!r} is not a path that ends in one of {' '.join(SUFFIXES)}, alone or "
                         "before a space or comma and a label. Put a tab before the label if the path ends otherwise.")
    return match[1], (match[2] or "").strip()

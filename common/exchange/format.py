"""A format: how a network is written, and the few lines by which the target library alone loads it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.exchange.handed import Facts, Handed

LOADER = "load.py"


def _by_loader(facts: Facts, folder: str) -> str:
    return f'import runpy\nload = runpy.run_path("{folder}/{LOADER}")["load"]\nfeatures = load("{folder}")(images)'


@dataclass(frozen=True)
class Format:
    """``write`` fills a folder with weights and configuration; it does not write ``load.py``.

    ``loader`` gives the text of ``load.py``, from the facts alone: ``def load(folder)`` returns a callable, images
    [B, c, H, W] float32, normalised -> features [B, dim] float32. It imports the target library and nothing of this
    project, except where ``ours``. It is asked first, before anything is written, and raises ConfigError for a network
    that the format cannot hold. ``lines``: the lines by which a user loads the folder, given its path.
    """

    name: str
    about: str
    write: Callable[[Path, Handed], None]
    loader: Callable[[Facts], str]
    lines: Callable[[Facts, str], str] = _by_loader
    ours: bool = False

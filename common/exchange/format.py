"""A format: how a network is written, and the few lines by which the target library alone loads it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.exchange.facts import Facts
from common.exchange.handed import Handed

LOADER = "load.py"


def quoted(folder: str, *names: str, scheme: str = "") -> str:
    """A path as Python text, whatever stands in it."""
    return json.dumps(scheme + "/".join([folder, *names]))


def by_loader(facts: Facts, folder: str) -> str:
    """Lines for a network that the target library has no name for."""
    return ("import runpy\n"
            f'load = runpy.run_path({quoted(folder, LOADER)})["load"]\n'
            f"features = load({quoted(folder)})(images)")


@dataclass(frozen=True)
class Format:
    """``write`` fills a folder with weights and configuration; it does not write ``load.py``.

    ``loader`` gives the text of ``load.py``, from the facts alone: ``def load(folder)`` returns a callable, images
    [B, c, H, W] float32, normalised -> features [B, dim] float32. It imports the target library and nothing of this
    project, except where ``ours``. It is asked first, before anything is written, and raises ConfigError for a network
    that the format cannot hold. ``lines``: the lines by which a user loads the folder, given its path. ``runs``: a file
    of the weights that runs code of its own when it is loaded, if there is one.
    """

    name: str
    about: str
    write: Callable[[Path, Handed], None]
    loader: Callable[[Facts], str]
    lines: Callable[[Facts, str], str] = by_loader
    ours: bool = False
    runs: str = ""

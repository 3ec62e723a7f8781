"""Small finished runs to measure: forty photos of several sizes, read from files, or the same number in memory."""

from pathlib import Path

from common import distributed
from common.trained import Trained, load_trained
from tests import tiny

PLAIN = {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}     # no dropout: each rank would draw its own


def trained_run(folder: Path, count: int = 40, classes: int = 2, **sections: dict) -> Path:
    """The folder of a run of one epoch, with the BatchNorm groups of MoCo; the images lie beside it."""
    root = tiny.photos(folder / "photos", count, classes)
    sections = {"method": {"encoder": PLAIN}, "train": {"epochs": 1}, "evaluate": {"every": 0, "protocols": []},
                **sections}
    tiny.train(tiny.settings(root, folder / "run", **sections).text())
    distributed.stop()
    return folder / "run"


def opened(run: Path, *overrides: str) -> Trained:
    return load_trained(run, overrides)

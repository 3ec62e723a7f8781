"""The smallest runs that are still whole: forty image files of several sizes, a small network, a few steps."""

import json
import os
import random
import signal
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import yaml
from PIL import Image
from torch import Tensor, nn

from common import distributed
from common.backbones import SmallResNet, projection
from common.checkpoint import Folder
from common.config import Config
from common.encoder import Encoder
from common.monitor import Monitor
from common.run import Run
from common.signals import Stopped

SIZES = ((8, 8), (12, 20), (24, 16), (32, 32))      # not one size: read by workers, not held in memory
QUEUE = {"name": "common.dictionary.Queue", "size": 48, "dim": 16, "mask_own": True}
BANK = {"name": "common.dictionary.Bank", "dim": 16, "negatives": 12}
METHODS = {
    "moco": {"name": "moco.MoCo", "momentum": 0.9, "temperature": 0.2, "key_bn": "shuffle", "bn_groups": 2,
             "encoder": {"name": "tests.tiny.dropout_encoder", "dim": 16}, "dictionary": QUEUE},
    "instdisc": {"name": "instdisc.InstDisc", "temperature": 0.2, "dictionary": BANK,
                 "encoder": {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}},
}
# Of another batch, in triplets: not among the methods that every fault is tried on.
MINING = {"name": "metric_learning.OfflineTriplet", "every": 4, "pool": 32, "margin": 0.2,
          "encoder": {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}}


class Noise(nn.Module):
    """A factor drawn from NumPy's and Python's generators."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.random() + 0.1 * np.random.rand()) if self.training else x  # noqa: NPY002


def dropout_encoder(dim: int, channels: int) -> Encoder:
    """Whose loss depends on torch's, NumPy's and Python's random generators."""
    trunk = nn.Sequential(SmallResNet(4, channels=channels), nn.Dropout(0.2), Noise())
    trunk.num_features = 16
    return Encoder(trunk, projection("mlp", 16, dim))


def dense_encoder(dim: int, channels: int) -> Encoder:
    """One hidden layer on views of 8 x 8 pixels: learns digits in seconds."""
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 128), nn.ReLU())
    trunk.num_features = 128
    return Encoder(trunk, nn.Linear(128, dim))


def photos(folder: Path, count: int = 40, classes: int = 2, sizes: tuple = SIZES) -> Path:
    """Noise around a colour of the class; ``classes`` 0: all files in one folder."""
    draw = np.random.default_rng(0)
    for i in range(count):
        of = i % classes if classes else 0
        place = folder / f"class{of}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        colour = np.array([60 + 90 * of, 90, 160 - 60 * of])
        pixels = colour + draw.integers(-50, 50, (*sizes[i % len(sizes)], 3))
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:03}.png")
    return folder


def settings(root: Path, run: Path, of: str = "moco", **sections: dict) -> Config:
    """Six epochs of ten steps of four images, every step recorded; ``sections`` add to and replace keys."""
    views = {"name": "common.data.recipes.moco_v2" if of == "moco" else "common.data.recipes.instdisc", "size": 8}
    knn = {"name": "common.evaluate.KNN", "k": [5], "backend": "torch"}
    tree = {"run": {"dir": str(run), "seed": 3}, "data": {"name": "common.data.folder", "root": str(root)},
            "views": views, "method": METHODS.get(of, MINING),
            "optimizer": {"name": "common.optim.sgd", "lr": 0.05, "weight_decay": 1e-4},
            "schedule": {"name": "common.schedule.cosine", "warmup": 0.5},
            "train": {"epochs": 6, "batch_size": 4, "workers": 0, "threads": 1, "device": "cpu"},
            "evaluate": {"every": 2, "protocols": [knn]}, "log": {"every": 1}}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return Config.parse(yaml.safe_dump(tree, sort_keys=False), "tiny.yaml")


def digits_run(folder: Path, test: int = 300, seed: int = 3) -> Run:
    """A run that has seen the digits once, in five steps: the cheapest there is to measure."""
    encoder = {"name": "common.backbones.encoder", "arch": "w4s2", "dim": 16}
    config = settings(folder, folder, views={"name": "common.data.recipes.digits"},
                      method={"encoder": encoder, "dictionary": {**QUEUE, "size": 512}},
                      train={"epochs": 1, "batch_size": 256}, evaluate={"every": 0, "protocols": []})
    config.set("run.seed", seed, "digits_run")
    config.set("data", {"name": "common.data.digits", "test": test}, "digits_run")
    return Run(config).train()


def train(text: str) -> Run:
    """The run of a config's text: what a child process is started with."""
    return Run(Config.parse(text, "tiny.yaml")).train()


def train_and_stop(text: str, stop: int) -> None:
    """Train in this process, which gets SIGTERM while it is in step ``stop``, as from Slurm."""
    taken = Monitor.step

    def step(monitor, step):
        taken(monitor, step)
        if step.number == stop and distributed.is_main():
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(Monitor, "step", step), suppress(Stopped):
        train(text)


def records(run: Path, kind: str = "train") -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run: Path) -> list[tuple[int, str]]:
    """(step, loss) of every step, each number to its last bit."""
    return [(record["step"], float(record["loss"]).hex()) for record in records(run)]


def measured(run: Path) -> list[tuple[int, str, str]]:
    """(step, what, value) of every measurement."""
    return [(record["step"], record["label"], float(record["value"]).hex()) for record in records(run, "eval")]


def last_state(run: Path) -> dict:
    found = Folder(run / "checkpoints").newest()
    assert found is not None
    return found[1]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())

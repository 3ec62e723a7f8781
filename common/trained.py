"""A trained encoder, with how it came to be, opened from a checkpoint: no image is needed for that, and no optimizer.

What is opened is a run's folder, one of its checkpoints, or weights that ``tools/import_weights.py`` took over from
another project. The tools that measure and that hand on start from here.
"""

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from common import distributed, hub
from common.bar import bar
from common.checkpoint import DamagedCheckpoint
from common.checkpoint import load as load_checkpoint
from common.chosen import Epoch, choose
from common.config import TRUSTED, Config, ConfigError
from common.data.datasets import Splits
from common.data.images import SUFFIXES
from common.data.pack_index import INDEX
from common.data.views import Views
from common.data.workers import Care
from common.encoder import Encoder
from common.evaluate.evaluator import Evaluator, Protocol
from common.method import Method
from common.rng import seed_all
from common.sections import SECTIONS, complete
from common.settings import EvaluateSettings, TrainSettings
from common.state import check_state, check_weights, fitting

_STORED = ("common.data.torchvision_set", "common.data.fashion_mnist")
_ROOTED = ("common.data.folder", "common.data.packed", "common.data.torchvision_set")


@dataclass(frozen=True)
class Trained:
    """An encoder in evaluation mode on ``device``, and what a number or an export of it must name.

    ``facts`` are of the images that it was trained on: how many, how many channels. ``parts`` are those of the encoder
    that were trained: "backbone", and "head" unless weights of a backbone alone were imported. ``origin`` says where
    the weights of another project are from; it is empty for a run's own. ``data`` is the fingerprint of the list of
    those images (``Images.fingerprint``), empty where it is not known, and ``recorded`` the config as the checkpoint
    has it; ``config`` is that with the changes asked for, other images among them.
    """

    encoder: Encoder
    method: Method
    config: Config
    views: Views
    device: torch.device
    facts: dict[str, int]
    path: Path                      # what was given
    file: Path                      # the checkpoint that was read
    step: int
    epoch: float
    chosen: str                     # "last", "best of 5 by knn(...)", "epoch 10", "this file"
    parts: tuple[str, ...] = ("backbone", "head")
    origin: dict[str, Any] | None = None
    data: str = ""
    recorded: Config | None = None

    @property
    def seed(self) -> int:
        return int(self.config.get("run.seed", 0))

    @property
    def folder(self) -> Path:
        """Where what is found out about it belongs: the run's folder, or that of the file."""
        near = self.file.parent
        return near.parent if near.name == "checkpoints" else near

    def sha256(self) -> str:
        """Of the encoder's weights: two checkpoints of one step have one, whatever else they hold."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def splits(self) -> Splits:
        """The images that the config names. Raises ConfigError where there are none, or of other channels."""
        if self.config.get("data.name") in _ROOTED and self.config.get("data.root") is None:
            raise ConfigError(f"{self.path}: its config names no images (data.root is null). Give some: --data PATH.")
        splits: Splits = self.config.build("data", SECTIONS["data"])
        if splits.train.channels != self.facts["channels"]:
            raise ConfigError(f"data: the encoder was trained on images of {self.facts['channels']} channels; those of "
                              f"{splits.train.name} have {splits.train.channels}. Where the data section has such a "
                              f"key, give data.channels={self.facts['channels']}.")
        return splits

    def check_layer(self, layer: str) -> None:
        """Raises ConfigError for a head that is untrained."""
        if layer not in self.parts:
            raise ConfigError(f"{self.path}: --layer {layer}: only the {' and the '.join(self.parts)} came with these "
                              f"weights, and a {layer} of random numbers is not measured. Give --layer backbone.")

    def evaluator(self, splits: Splits, protocols: Sequence[Protocol],
                  layer: Literal["backbone", "head"] = "backbone") -> Evaluator:
        """Measures this encoder, or another one as this run would. Raises ConfigError for a head that is untrained."""
        self.check_layer(layer)
        train, evaluation = (self.config.build(name, kind)
                             for name, kind in (("train", TrainSettings), ("evaluate", EvaluateSettings)))
        return Evaluator(splits, self.views, protocols, layer=layer, batch_size=evaluation.batch_size,
                         workers=train.workers, device=self.device, care=Care(train.worker_timeout), watch=bar)


def load_trained(path: str | os.PathLike, overrides: Sequence[str] = (), trust: Sequence[str] = (), *,
                 data: str | None = None, epoch: Epoch = "last", untrained: bool = False) -> Trained:
    """Open a run's folder, a checkpoint, or imported weights.

    ``path`` may be ``hf-hub:USER/NAME/FILE``, too (``common.hub``). ``data`` are the images to use in place of the
    config's, ``overrides`` changes to the config that this gives. Of a run's folder the newest checkpoint is taken, or
    that of ``epoch``, or the best of those that were kept, by the first protocol that the run recorded. Raises
    ConfigError where there is none, where the config names a package that is neither this project's nor in ``trust``,
    and, unless ``untrained``, where the backbone is as training found it.
    """
    path = hub.local(path)
    file, chosen = choose(path, epoch)
    state = load_checkpoint(file)
    imported = "weights" in state
    (check_weights if imported else check_state)(state, str(file))
    recorded, config = (Config.parse(state["config"], f"{file}: its config", (), (*TRUSTED, *trust)) for _ in range(2))
    if data is not None:
        give_data(config, data, state["facts"]["channels"])
    for override in overrides:
        config.override(override)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a queue of")             # advice for training, which is over
        trained = replace(_built(complete(config), state, path, file, chosen), recorded=complete(recorded))
    _check_trained(trained, state, imported, untrained)
    return trained


def give_data(config: Config, path: str, channels: int) -> None:
    """Put the images at ``path`` in place of the config's, read with so many channels.

    A packed set, a list of files, a folder of images, or, where the config is of a set that torchvision or Debian has,
    the folder that holds its files.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigError(f"--data {path}: there is no such file or folder.")
    if place.is_file():
        data = {"name": "common.data.file_list", "train": str(place), "channels": channels}
    elif (place / INDEX).is_file():
        data = {"name": "common.data.packed", "root": str(place), "channels": channels}
    elif config.get("data.name") in _STORED and not any(file.suffix.lower() in SUFFIXES for file in place.rglob("*")):
        data = config.get("data") | {"root": str(place)}
    else:
        data = {"name": "common.data.folder", "root": str(place), "channels": channels}
    config.set("data", data, "--data")


def _built(config: Config, state: dict[str, Any], path: Path, file: Path, chosen: str) -> Trained:
    kind, threads = config.get("train.device", "auto"), config.get("train.threads")
    device = distributed.start(kind, threads, config.get("train.timeout", 300.0))
    facts = state["facts"]
    views: Views = config.build("views", SECTIONS["views"], channels=facts["channels"])
    seed_all(config.get("run.seed"))
    method: Method = config.build("method", SECTIONS["method"], seed=config.get("run.seed"), image_size=views.size,
                                  **facts).to(device)
    steps = state["trainer"]["step"] if "trainer" in state else 0
    batches = max(1, facts["num_samples"] // int(config.get("train.batch_size")))
    return Trained(method.encoder, method, config, views, device, facts, path, file, steps, steps / batches, chosen,
                   tuple(state.get("parts", ("backbone", "head"))), state.get("origin"), str(state.get("data", "")))


def _check_trained(trained: Trained, state: dict[str, Any], imported: bool, untrained: bool) -> None:
    """Takes over the weights; refuses those with which training began."""
    encoder = trained.encoder
    before = {name: tensor.clone() for name, tensor in encoder.backbone.named_parameters()}
    with fitting(str(trained.file)):
        if imported:
            new = {name: tensor for name, tensor in encoder.state_dict().items()
                   if name.partition(".")[0] not in trained.parts}
            encoder.load_state_dict({**new, **state["weights"]})
            trained.method.follow_encoder()
        else:
            trained.method.load_state_dict(state["trainer"]["method"])
    trained.method.eval()
    same = all(torch.equal(before[name], tensor) for name, tensor in encoder.backbone.named_parameters())
    if same and not untrained:
        raise DamagedCheckpoint(f"{trained.file}: its backbone is as random as training found it (step "
                                f"{trained.step:,}): no number of it would say anything about training. Give a later "
                                "checkpoint, or --untrained to measure it all the same.")

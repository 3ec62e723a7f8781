"""A run: a config, the folder that it fills, and the trained encoder that comes out.

``pretrain`` does everything; ``load_run`` opens a run's folder again. A ``Run`` is built from its config alone, so the
same config gives the same run, and goes on where it was stopped when its folder holds a checkpoint.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from common import automatic, distributed, watch
from common.checkpoint import Folder
from common.checkpoint import load as load_checkpoint
from common.config import TRUSTED, Config, ConfigError
from common.data.datasets import Splits
from common.data.loader import check_batch, check_order
from common.data.views import Views
from common.data.workers import Care
from common.encoder import Encoder
from common.evaluate import KNN, FewLabels, Linear, Result
from common.evaluate.evaluator import Evaluator
from common.method import Method
from common.rehearsal import rehearse
from common.rng import seed_all
from common.sections import RUNTIME, SECTIONS, SETTINGS, complete, open_config
from common.settings import CheckpointSettings, EvaluateSettings, LogSettings, RunSettings, TrainSettings
from common.state import check_state, fitting


class Run:
    """Data, views and method as ``config`` describes them, on this machine's device; nothing is trained yet.

    Raises ConfigError, naming file, line, key and value, before any data is read where the config alone shows the
    mistake. Called by all processes of the job together. ``facts`` are of the images that the method was trained on
    (how many, how many channels), where those of ``config`` are others.
    """

    def __init__(self, config: Config, facts: dict[str, int] | None = None):
        config = complete(config)
        if not automatic.automatic(config):             # else some settings are known with the images only
            rehearse(config, facts)
        kind, threads = config.get("train.device", "auto"), config.get("train.threads")
        self.config = config
        self.device = distributed.start(kind, threads, config.get("train.timeout", 300.0))
        self.splits: Splits = config.build("data", SECTIONS["data"])
        _choose(config, self.splits)
        settings: dict[str, Any] = {name: config.build(name, target) for name, target in SETTINGS.items()}
        self.settings: RunSettings = settings["run"]
        self.evaluation: EvaluateSettings = settings["evaluate"]
        self.checkpoint: CheckpointSettings = settings["checkpoint"]
        self.log: LogSettings = settings["log"]
        self.train_settings: TrainSettings = settings["train"]
        self.dir = Path(str(self.settings.dir))
        self.views: Views = config.build("views", SECTIONS["views"], channels=self.splits.train.channels)
        if facts is None:
            self._check_batch()
        self.facts = facts or {"num_samples": len(self.splits.train), "channels": self.splits.train.channels,
                               "num_classes": len(self.splits.train.classes)}
        if self.facts["channels"] != self.splits.train.channels:
            raise ConfigError(f"data: the encoder was trained on images of {self.facts['channels']} channels; those of "
                              f"{self.splits.train.name} have {self.splits.train.channels}. Where the data section has "
                              f"such a key, give data.channels={self.facts['channels']}.")
        self.method = self.build_method()
        if facts is None:
            self._check_order()
        self.evaluator = self.evaluator_for(self.evaluation.protocols, self.evaluation.layer)
        if self.evaluation.bank:
            self._check_bank()

    def _check_batch(self) -> None:
        """Before the method takes its memory: whether the images fill a batch, and a batch all shares."""
        settings = self.train_settings
        try:
            check_batch(self.splits.train, settings.batch_size, settings.accumulate, distributed.world())
        except ValueError as error:
            raise ConfigError(f"{self.config.origin['train.batch_size']}: {error}") from None

    def _check_order(self) -> None:
        """Whether the images can come in the order that the method wants."""
        settings, origin = self.train_settings, self.config.origin
        where = "method"
        try:
            self.method.check_images(self.splits.train)
            where = "method.order" if "method.order.name" in origin else "method"
            check_order(self.method.order, self.splits.train, settings.batch_size, settings.accumulate,
                        distributed.world())
        except ValueError as error:
            raise ConfigError(f"{origin[f'{where}.name']}: {where}: {error}") from None

    def _check_bank(self) -> None:
        where = f"{self.config.origin['evaluate.bank']}: evaluate.bank: true"
        if self.method.memory() is None:
            raise ConfigError(f"{where}, but {self.config.get('method.name')} keeps no feature of each training image, "
                              "as instdisc.InstDisc does. Give false: all images are then embedded.")
        if not any(isinstance(protocol, KNN) for protocol in self.evaluation.protocols):
            raise ConfigError(f"{where}, but evaluate.protocols has no common.evaluate.KNN, and by nothing else is a "
                              "bank measured. Add one, or give false.")

    def build_method(self) -> Method:
        """The untrained method: the same weights every time, on every rank."""
        seed_all(self.settings.seed)
        method: Method = self.config.build(
            "method", SECTIONS["method"], seed=self.settings.seed, image_size=self.views.size, **self.facts)
        method = method.to(self.device)
        channels_last = self.train_settings.channels_last and _takes_channels_last(method, self.device)
        return method.to(memory_format=torch.channels_last) if channels_last else method

    @property
    def encoder(self) -> Encoder:
        """What is trained: ``encoder.backbone`` is what to keep."""
        return self.method.encoder

    def evaluator_for(self, protocols: Sequence, layer: Literal["backbone", "head"]) -> Evaluator:
        return Evaluator(self.splits, self.views, protocols, layer=layer, batch_size=self.evaluation.batch_size,
                         workers=self.train_settings.workers, device=self.device,
                         care=Care(self.train_settings.worker_timeout))

    def knn(self, k: int | Sequence[int] = (20, 200), temperature: float = 0.07,
            layer: Literal["backbone", "head"] = "backbone") -> list[Result]:
        """Weighted k-nearest-neighbour accuracy of the encoder as it is now, one result for each ``k``."""
        return self.evaluator_for([KNN(k, temperature)], layer).measure(self.encoder)

    def linear(self, layer: Literal["backbone", "head"] = "backbone") -> list[Result]:
        """Accuracy of a linear probe with all labels."""
        return self.evaluator_for([Linear()], layer).measure(self.encoder)

    def few(self, labels: int | str = 10, layer: Literal["backbone", "head"] = "backbone") -> list[Result]:
        """Accuracy of a linear probe with a few ``labels`` a class, or a share ("1%"): mean and spread over draws."""
        return self.evaluator_for([FewLabels(labels)], layer).measure(self.encoder)

    def export(self, folder: str | os.PathLike, format: str = "timm",
               what: Literal["backbone", "encoder", "key_backbone", "second_backbone"] = "backbone") -> Path:
        """Hand the newest checkpoint on, as tools/export.py does; returns ``folder``, whose load.py loads it again.

        Raises ConfigError for a network that ``format`` cannot hold, and where its features are not those of the run.
        """
        from common.exchange.export import export
        from common.exchange.handed import hand
        from common.trained import load_trained

        trained = load_trained(self.dir, trust=tuple(self.config.trusted or ()))
        exported, = export(hand(trained, what), [format], Path(folder))
        return exported.folder

    def train(self) -> "Run":
        """Train to the end, from the newest checkpoint in ``dir`` if there is one; then ``encoder`` is ready for use.

        Raises Stopped after saving, if a signal asked for it; ConfigError if the checkpoint is of another config or of
        other data.
        """
        from common.session import Session

        with watch.until_the_end():
            Session(self).train()
        self.method.eval()
        return self

    def load(self, state: dict[str, Any]) -> "Run":
        """Take over the method's weights and memories from a checkpoint's ``state``; ConfigError if they do not fit."""
        with fitting("the checkpoint"):
            self.method.load_state_dict(state["trainer"]["method"])
        self.method.eval()
        return self


def _takes_channels_last(method: Method, device: torch.device) -> bool:
    """torch 2.15 on a CPU writes past its memory where a channels_last convolution has fewer than 16 channels."""
    return device.type != "cpu" or all(module.out_channels >= 16 for module in method.modules()
                                       if isinstance(module, torch.nn.Conv2d))


def _choose(config, splits):
    """Fill in what stands as ``auto``, now that the images are known."""
    kind = config.get("train.device", "auto")
    automatic.choose(config, len(splits.train), splits.train.size, automatic.has_accelerator(kind))
    config.check_sections(SECTIONS, RUNTIME)


def pretrain(config: str | os.PathLike | Config, *, data: str | os.PathLike | None = None, epochs: int | None = None,
             dir: str | os.PathLike | None = None, overrides: Sequence[str] = (), trust: Sequence[str] = ()) -> Run:
    """Train as ``config`` says (a path, or a name under configs/) and return the run.

    ``data`` is the folder of images, ``epochs`` and ``dir`` replace the config's; ``overrides`` are
    "section.key=value" strings, as on the command line. A file may name this project's packages, and those in
    ``trust``. Run again, it goes on from the last checkpoint.
    """
    config = open_config(config, data=data, epochs=epochs, dir=dir, overrides=overrides, trust=trust)
    return Run(config).train()


def load_run(path: str | os.PathLike, overrides: Sequence[str] = (), trust: Sequence[str] = ()) -> Run:
    """Open a run's folder, or one of its checkpoints, with the weights of the newest (or that) checkpoint.

    ``overrides`` change the config, say which data to measure on. A checkpoint may come from a stranger, and its config
    calls what it names: this project's own packages only, and those in ``trust``. Raises ConfigError otherwise.
    """
    path = Path(path)
    state = load_checkpoint(path) if path.is_file() else _newest(path)
    check_state(state, str(path))
    config = Config.parse(state["config"], f"{path}: its config", overrides, (*TRUSTED, *trust))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a queue of")             # advice for training, which is over
        return Run(config, state["facts"]).load(state)


def _newest(path):
    found = Folder(path / "checkpoints").newest() if path.is_dir() else None
    if found is None:
        raise ConfigError(f"{path}: no run with a checkpoint. Give a run's folder, such as runs/demo, or a checkpoint "
                          "in it.")
    return found[1]


def show_config(config: Config) -> str:
    """The resolved config as YAML, each line with where its value came from."""
    config = complete(config)
    if automatic.automatic(config) and config.get("data.root", "") is not None:
        _choose(config, config.build("data"))
    return config.text(origins=True)

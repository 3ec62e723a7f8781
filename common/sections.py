"""What the config of a run holds: its sections, and their checks. Needs no torch."""

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from common import automatic
from common.config import TRUSTED, Config, ConfigError
from common.config.sketch import Unknown
from common.settings import (
    CheckpointSettings,
    EvaluateSettings,
    LogSettings,
    RunSettings,
    TrainSettings,
    check_shares,
)

SETTINGS = {"run": RunSettings, "train": TrainSettings, "evaluate": EvaluateSettings,
            "checkpoint": CheckpointSettings, "log": LogSettings}
# A section -> the settings that it holds, or the import path of what it must give.
SECTIONS: dict[str, Callable | str] = {
    "run": RunSettings, "data": "common.data.datasets.Splits", "views": "common.data.views.Views",
    "method": "common.method.Method", "optimizer": "torch.optim.Optimizer", "schedule": "common.schedule.Schedule",
    **{name: target for name, target in SETTINGS.items() if name != "run"}}
# What a section's build is given by the run: no config need hold it.
RUNTIME = {"views": ("channels",), "method": ("seed", "channels", "image_size", "num_samples", "num_classes"),
           "optimizer": ("method", "batch_size"), "schedule": ("epochs",)}


def open_config(config: str | os.PathLike | Config, *, data: str | os.PathLike | None = None,
                epochs: int | None = None, dir: str | os.PathLike | None = None,
                overrides: Sequence[str] = (), trust: Sequence[str] = ()) -> Config:
    """The config with what the caller of ``pretrain`` set.

    One from a file may name this project's packages and those in ``trust``; one made in Python is its maker's.
    """
    config = Config.parse(config.text(), config.source, overrides, config.trusted) if isinstance(config, Config) \
        else Config.load(config, overrides, (*TRUSTED, *trust))
    if data is not None:
        if config.has("data.root"):
            config.set("data.root", str(data), "argument data")
        else:
            config.set("data", {"name": "common.data.folder", "root": str(data)}, "argument data")
    for where, value in (("train.epochs", epochs), ("run.dir", None if dir is None else str(dir))):
        if value is not None:
            config.set(where, value, "an argument")
    return config


def check_early(config: Config, with_data: bool = True) -> None:
    """Every mistake that shows without importing what the config names: torch takes seconds. Changes nothing.

    ``with_data``: also whether there are images where the config says.

    Raises ConfigError with one line a mistake; ``complete`` checks the rest.
    """
    trial = _on_trial(config)
    known = {"epochs": trial.get("train.epochs"), "batch_size": trial.get("train.batch_size"),
             "image_size": trial.get("views.size")}
    known = {name: value for name, value in known.items() if type(value) is int and value > 0}
    trial.check_unimported(SECTIONS, {section: {name: known.get(name, Unknown()) for name in names}
                                      for section, names in RUNTIME.items()},
                           unopened=() if with_data else ("data",))
    _check_processes(config, trial.build("train", TrainSettings))


def folder_of(config: Config) -> Path:
    """The run's folder, which the config has from here on."""
    if not config.get("run.dir"):
        name = config.source.rpartition("/")[2].rpartition(".")[0] or "run"
        config.set("run.dir", f"runs/{name}", "chosen: runs/ and the config's name")
    return Path(str(config.get("run.dir")))


def complete(config: Config) -> Config:
    """Check every section and fill in the defaults; give the run a folder. Imports, but reads no data.

    Sections that stand in part as ``auto`` are checked as for some images, and get their defaults with the real ones.
    """
    folder_of(config)
    waiting = {where.partition(".")[0] for where in automatic.automatic(config)}
    trial = _on_trial(config)
    trial.check_sections(SECTIONS, RUNTIME)
    for name, target in SETTINGS.items():
        trial.build(name, target)
    for name, section in SECTIONS.items():
        if name not in waiting:
            config.check(name, section, RUNTIME.get(name, ()))
    return config


def _on_trial(config: Config) -> Config:
    """A copy in which a value stands for each ``auto``."""
    trial = copy.deepcopy(config)
    automatic.choose(trial, num_images=10_000, size=64, accelerated=False)
    return trial


def _check_processes(config: Config, train: TrainSettings) -> None:
    """Whether a batch divides among this job's processes, and there is a GPU for each of them."""
    world, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = None if visible is None else len(list(filter(None, visible.split(","))))
    if train.device == "cuda" and count is not None and count < here:
        raise ConfigError(f"{config.origin['train.device']}: train.device: 'cuda' with {here} processes on this "
                          f"machine, and CUDA_VISIBLE_DEVICES names {count} of its GPUs. Start at most one for each.")
    try:
        if config.get("train.batch_size") != "auto":
            check_shares(train.batch_size, train.accumulate, world)
    except ValueError as error:
        raise ConfigError(f"{config.origin['train.batch_size']}: {error}") from None

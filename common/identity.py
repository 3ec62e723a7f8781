"""Which run a checkpoint is of: its config, but for what is free to change, its images, and its first weights."""

from typing import Any

from common import start
from common.config import Config, ConfigError
from common.run import Run

# What may differ between a run and its continuation: the loss does not depend on it.
FREE = ("run.dir", "run.weights", "log", "checkpoint", "evaluate", "data.root", "data.max_pixels", "data.of.root",
        "data.of.max_pixels", "train.workers", "train.device", "train.threads", "train.max_unreadable",
        "train.worker_timeout", "train.max_skipped", "train.rollbacks", "train.rollback_lr", "train.timeout",
        "train.compare_ranks")


def of(run: Run) -> dict[str, Any]:
    """What a checkpoint holds of that."""
    images = run.splits.train
    return {"config": run.config.text(), "digest": run.config.digest(without=FREE),
            "data": f"{images.fingerprint()} {images.contents}".strip(), "facts": run.facts,
            "start": start.sha256(run.settings.weights)}


def check_same(state: dict[str, Any], mine: dict[str, Any], run: Run) -> None:
    """Raises ConfigError, naming what has changed, unless the checkpoint ``state`` is of ``run``, which is ``mine``."""
    where = f"{run.dir}: its checkpoint of step {state['trainer']['step']:,} belongs to"
    if state["digest"] != mine["digest"] and (changed := differences(state["config"], run.config)):
        raise ConfigError(f"{where} another config: {changed}. Give these values to go on with it, or another "
                          "run.dir to start anew.")
    if state["data"] != mine["data"]:
        if state["data"].partition(" ")[0] == mine["data"].partition(" ")[0]:
            raise ConfigError(f"{where} another packed set: of the same images, and packed otherwise. Give the set "
                              "that it began with, or another run.dir.")
        raise ConfigError(f"{where} other data: the list of training images or labels has changed, and a memory "
                          "bank and the order of an epoch go by it. Restore the images, or give another run.dir.")


    _check_start(state.get("start", ""), mine["start"], where)


def _check_start(before: str, now: str | None, where: str) -> None:
    """``now`` is None where the file is not there: it is not needed any more."""
    if now not in (before, None):
        was = f"weights of SHA-256 {before[:12]}..." if before else "random weights"
        given = f"names weights of SHA-256 {now[:12]}..." if now else "names none"
        raise ConfigError(f"{where} a run that began from {was}, and the config {given} (run.weights). Leave it as it "
                          "was - the file itself is needed no more -, or give another run.dir to start anew.")


def differences(before: str, now: Config) -> str:
    """In which settings two configs differ, of those that matter to a continuation.

    Not in a setting that came after the checkpoint was written and has its default, which is what was done before.
    """
    old = Config.parse(before, "the checkpoint's config")
    found = [f"{where} was {old.get(where)!r} and is {now.get(where)!r}" for where in _settings(old, now)
             if old.get(where) != now.get(where) and not _is_newer(where, old, now)]
    return "; ".join(found)


def _is_newer(where: str, old: Config, now: Config) -> bool:
    above, _, key = where.rpartition(".")
    return now.origin.get(where, "").startswith("default of") and key not in (old.get(above) or {})


def _settings(*configs: Config) -> list[str]:
    """The dotted names of all settings of the configs but the free ones, in order."""
    names: dict[str, None] = {}
    for config in configs:
        _collect(config.tree, "", names)
    return [name for name in names if not any(name == free or name.startswith(f"{free}.") for free in FREE)]


def _collect(tree: dict, above: str, names: dict[str, None]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _collect(value, f"{above}{key}.", names)
        else:
            names[f"{above}{key}"] = None

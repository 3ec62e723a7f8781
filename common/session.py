"""The training of a run by this process: where it starts, what it records, and when it saves, measures and stops."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from torch import Tensor

from common import distributed
from common.background import Background
from common.checkpoint import Folder, replace_file
from common.config import Config, ConfigError
from common.data.loader import Loader
from common.encoder import Encoder
from common.evaluate import untrained
from common.evaluate.evaluator import embed
from common.monitor import Monitor
from common.rng import rng_state, seed_all, set_rng_state
from common.run import Run
from common.signals import Stopped, StopRequest
from common.train import Trainer

# What may differ between a run and its continuation: the loss does not depend on it.
FREE = ("run.dir", "log", "checkpoint", "evaluate", "data.root", "data.max_pixels", "train.workers", "train.device",
        "train.threads", "train.max_unreadable", "train.max_skipped")
CALIBRATION = 20        # batches that give an untrained encoder its BatchNorm statistics


class Session:
    """Trains ``run`` from its newest checkpoint, or from the beginning. Every process of the job holds one."""

    def __init__(self, run: Run):
        self.run, self.folder = run, Folder(run.dir / "checkpoints", run.checkpoint.keep)
        settings, config = run.train_settings, run.config
        self.disk = Background("disk")
        self.monitor = Monitor(run, self.disk)
        self.loader = Loader(run.splits.train, run.views, batch_size=settings.batch_size, seed=run.settings.seed,
                             accumulate=settings.accumulate, workers=settings.workers, device=run.device,
                             max_unreadable=settings.max_unreadable, report=self.monitor.unreadable)
        optimizer = config.build("optimizer", method=run.method, batch_size=settings.batch_size)
        self.trainer = Trainer(run.method, self.loader, optimizer, config.build("schedule", epochs=settings.epochs),
                               settings, run.device)
        self.identity: dict[str, Any] = {"config": config.text(), "digest": config.digest(without=FREE),
                                         "data": run.splits.train.fingerprint(), "facts": run.facts}
        if distributed.is_main():
            self.folder.prepare()                       # hours of work must not end at a folder that cannot be written
        self._saved_at = time.monotonic()

    def train(self) -> None:
        """To the end, or until a signal asks to stop: then Stopped is raised, with everything saved."""
        self.start()
        if self.trainer.step < self.trainer.total_steps:
            with StopRequest() as request, closing(self.trainer.steps()) as steps:
                for step in steps:
                    self.monitor.step(step)
                    self._after_step(request)
        self._finish()

    def start(self) -> None:
        """Load the newest checkpoint, or make the method ready for its first step; write down the config."""
        found = self._newest()
        if found is None:
            self.run.method.prepare(self._embed_untrained)
            seed_all(self.run.settings.seed, 1 + distributed.rank())
        else:
            self._resume(found[1])
        if distributed.is_main():
            replace_file(self.run.dir / "config.yaml", lambda file: file.write(self.identity["config"].encode()))
        self.monitor.start(self.trainer, found[1] if found else None)
        if found and self._evaluation_is_due() and not self.monitor.has_measured():
            self._measure()

    def _newest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint. Raises ConfigError unless every process sees the same one."""
        found = self.folder.newest()
        steps = distributed.gather_objects(found and found[0])
        if len(set(steps)) > 1:
            seen = ", ".join("none" if step is None else f"step {step:,}" for step in steps)
            raise ConfigError(f"{self.run.dir}: the processes see different newest checkpoints in it ({seen}). Give a "
                              "run.dir on a disk that all machines share.")
        return found

    def _resume(self, state: dict[str, Any]) -> None:
        self._check_same(state)
        self.trainer.load_state(state["trainer"])
        rng, rank = state["rng"], distributed.rank()
        if rank < len(rng):
            set_rng_state(rng[rank])
        else:                                                   # more processes than before
            seed_all(self.run.settings.seed, 1 + rank, self.trainer.step)

    def _check_same(self, state: dict[str, Any]) -> None:
        where = f"{self.run.dir}: its checkpoint of step {state['trainer']['step']:,} belongs to"
        if state["digest"] != self.identity["digest"] and (changed := differences(state["config"], self.run.config)):
            raise ConfigError(f"{where} another config: {changed}. Give these values to go on with it, or another "
                              "run.dir to start anew.")
        if state["data"] != self.identity["data"]:
            raise ConfigError(f"{where} other data: the list of training images or labels has changed, and a memory "
                              "bank and the order of an epoch go by it. Restore the images, or give another run.dir.")

    def _after_step(self, request: StopRequest) -> None:
        due = time.monotonic() - self._saved_at > 60 * self.run.checkpoint.minutes
        signal, due = self._agree(request.number, due)
        measure = self._evaluation_is_due()
        if signal or due or measure or self._at_epoch(self.run.checkpoint.every) or self._at_end():
            self.save()                     # before measuring, too: it takes long, and a kill in it must lose nothing
        if signal:
            self.monitor.stopped()
            raise Stopped(signal, self.trainer.step)
        if measure:
            self._measure()

    def _agree(self, signal: int, due: bool) -> tuple[int, bool]:
        """The same answer on every rank: whether any was asked to stop, and whether the main one wants to save."""
        signal, due_on_main = distributed.highest(signal, int(due and distributed.is_main()))
        return signal, bool(due_on_main)

    def _at_end(self) -> bool:
        return self.trainer.step == self.trainer.total_steps

    def _at_epoch(self, every: int) -> bool:
        epoch, within = divmod(self.trainer.step, self.loader.steps_per_epoch)
        return every > 0 and within == 0 and epoch % every == 0

    def _evaluation_is_due(self) -> bool:
        return (self._at_epoch(self.run.evaluation.every) or self._at_end()) and self.run.evaluator.possible

    def save(self) -> None:
        """A checkpoint of this step; one at an epoch mark stays for good."""
        rng = distributed.gather_objects(rng_state())
        if distributed.is_main():
            state = {**self.identity, "trainer": self.trainer.state(), "rng": rng, **self.monitor.state()}
            self.folder.save(self.trainer.step, state, keep_always=self._at_epoch(self.run.checkpoint.every))
        distributed.barrier()
        self._saved_at = time.monotonic()

    def _measure(self) -> None:
        self.monitor.measured(self.run.evaluator.measure(self.run.encoder))

    def _finish(self) -> None:
        """The table at the end, with raw pixels and the untrained backbone beside the trained one if so set."""
        run, rows = self.run, dict(distributed.from_main(self.monitor.rows))
        if run.evaluator.possible and run.evaluation.baselines and len(rows) < 3:
            rows = {"raw pixels": run.evaluator.measure_pixels(), "untrained": run.evaluator.measure(self._untrained()),
                    **rows}
        self.monitor.finish(rows)

    def _untrained(self) -> Encoder:
        """The encoder as it was before the first step, with BatchNorm statistics."""
        state = rng_state()
        encoder = untrained(self.run.build_method().encoder, self._first_views(), CALIBRATION)
        set_rng_state(state)
        return encoder

    def _embed_untrained(self) -> Tensor:
        run = self.run
        return embed(untrained(run.encoder, self._first_views(), CALIBRATION), run.splits.train, run.views,
                     batch_size=run.evaluation.batch_size, workers=run.train_settings.workers, device=run.device)

    def _first_views(self) -> Iterator[Tensor]:
        with closing(self.loader.stream(0, min(CALIBRATION, self.trainer.total_steps))) as steps:
            for _, batches, _ in steps:
                yield batches[0].views[0]


def differences(before: str, now: Config) -> str:
    """In which settings two configs differ, of those that matter to a continuation."""
    old = Config.parse(before, "the checkpoint's config")
    found = [f"{where} was {old.get(where)!r} and is {now.get(where)!r}" for where in settings_of(old, now)
             if old.get(where) != now.get(where)]
    return "; ".join(found)


def settings_of(*configs: Config) -> list[str]:
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

"""What a run says and writes down: the progress line, metrics.jsonl, summary.json, and lists of what went wrong.

Every process holds a Monitor, since averages are over all of them; only the main one speaks and writes.
"""

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common import distributed
from common.announce import closing, opening, share
from common.background import Background
from common.data.reading import Unreadable
from common.diagnosis import NonFinite
from common.environment import commit, versions
from common.evaluate import Result, table
from common.health import Health, Spike, directions
from common.log import Records
from common.printable import printable
from common.progress import Progress, Speed
from common.train import Step, Trainer

if TYPE_CHECKING:
    from common.run import Run


QUIET = 50              # steps in which one spike at most is told
SHOWN = 20              # unreadable images that are told one by one


class Monitor:
    """Of one session of ``run``."""

    def __init__(self, run: "Run", disk: Background):
        self.run, self.main, self._disk = run, distributed.is_main(), disk
        self.rows: dict[str, list[Result]] = {}             # what the table at the end shows, as far as it is known
        self.recent: deque[dict[str, float]] = deque(maxlen=20)     # the last records, for crash.json
        self._window: list[dict[str, Tensor]] = []
        self._met: list[Unreadable] = []                    # cannot be read, and not yet told to the main process
        self._unreadable: set[int] = set()                  # cannot be read, and written down
        self._lost: list[str] = []                          # workers, not yet told to the main process
        self._speed = Speed()
        self._told = -QUIET                                 # when a spike was last told
        self._health = self._new_health()
        self._records: Records | None = None
        self._progress: Progress | None = None

    def start(self, trainer: Trainer, state: dict[str, Any] | None, begun: str = "") -> None:
        """Say what is about to happen; open the records, without what they hold of steps after this one.

        ``begun``: in words, the weights that a new run begins with.
        """
        self.trainer, self._began = trainer, time.monotonic()
        self._seconds = state["seconds"] if state else 0.0
        self._measuring = state.get("measuring", 0.0) if state else 0.0         # checkpoints of before have it not
        self._know(state or {})
        if not self.main:
            return
        log = self.run.log
        self._records = Records(self.run.dir, log.wandb, project=log.project, name=self.run.dir.name,
                                run_id=state["wandb_id"] if state else None, config=self.run.config.tree,
                                disk=self._disk)
        self._records.rewind(trainer.step)
        self._progress = Progress(trainer.total_steps, trainer.loader.steps_per_epoch, start=trainer.step,
                                  every=log.every, legend=self.run.method.legend)
        self._progress.note(opening(self.run, trainer, begun))
        self.rows = _known_rows(self.run.dir / "summary.json") if trainer.step else {}
        self._unreadable = _known_unreadable(self.run.dir / "bad_images.jsonl")
        self._write_unreadable(self._met)
        self._speed = Speed()

    def seconds(self) -> float:
        """Spent on the run so far, in earlier sessions too."""
        return self._seconds + time.monotonic() - self._began

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the records."""
        return {"seconds": self.seconds(), "measuring": self._measuring,
                "wandb_id": self._records.run_id if self._records else "", "versions": versions(),
                "health": self._health.state()}

    def _know(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds of the steps before it."""
        self._window.clear()
        self._health = self._new_health()
        if "health" in state:
            self._health.load_state(state["health"])

    def _new_health(self) -> Health:
        return Health(directions(self.run.method, self.run.splits.train))

    def step(self, step: Step) -> None:
        """Take in one step; every ``log.every`` steps a record and the progress line, averaged over steps and ranks."""
        self._speed.add(self.run.train_settings.batch_size, step.waited)
        if step.skipped:
            self.event("skipped", "the loss, a key or the gradient was not finite: nothing was updated", at=step.number)
        else:
            self._window.append(step.logs)
            self._watch(step)
        if step.number % self.run.log.every and step.number != self.trainer.total_steps:
            return
        values = _averages(self._window)
        self.recent.append({"step": step.number, "lr": step.lr, **values})
        self._window.clear()
        self._gather_unreadable()
        if self.main and values:
            self._show(step, values)

    def _show(self, step: Step, values: dict[str, float]) -> None:
        assert self._records and self._progress
        chance = self.run.method.chance()
        values |= {} if chance is None else {"chance": chance}
        values |= {"lr": step.lr, **self._speed.read(), **self._health.values()}
        self._records.write("train", step.number, self._epoch(step.number), **values)
        self._progress.show(step.number, values)

    def _watch(self, step: Step) -> None:
        """Say what a good step shows of the run's health."""
        if not self.main:
            return
        for spike in self._health.spikes.add(step.loss, step.gradient_norm):
            self._spike(spike, step.number)
        for text in self._health.alarms(step, self.run.method.chance(), self.run.method.at_chance):
            self.event("alarm", text, at=step.number)

    def _spike(self, spike: Spike, step: int) -> None:
        """Each one is recorded with the images of its batch; a line only now and then."""
        quiet = step - self._told < QUIET
        self._told = self._told if quiet else step
        text = f"{spike.what} is {spike.value:.4g}, the median of the steps before it {spike.median:.4g}"
        images = self.trainer.loader.images_of(step - 1)
        self.event("spike", text, quiet, at=step, **spike._asdict(), images=images)

    def not_finite(self, error: NonFinite) -> None:
        """Write down the step, the place and the images of a failure."""
        if self._records:
            line = {"step": error.step, "skipped": error.skipped, "rollbacks": self.trainer.rollbacks,
                    "cause": error.cause, "images": error.finding.images, "paths": error.paths}
            self._records.append("nonfinite.jsonl", line)

    def rolled_back(self, error: NonFinite, state: dict[str, Any]) -> None:
        """The run goes on from an earlier checkpoint, ``state``, which the trainer has loaded."""
        self._know(state)
        if self._records and self._progress:
            self._records.rewind(self.trainer.step)
            lr_scale = self.trainer.lr_scale
            self.event("rollback", f"back to here from step {error.step:,}: not finite for {error.skipped} steps in a "
                        f"row. {error.cause} Images: {error.some_paths}. The learning rate is now {lr_scale:g} of what "
                        f"was set.", lr_scale=lr_scale, failed=error.step, images=error.finding.images)

    def unreadable(self, image: Unreadable) -> None:
        """An image of the training set that could not be read, met for the first time; on any rank."""
        if self._records:
            self._write_unreadable([image])
        else:
            self._met.append(image)

    def lost_worker(self, text: str) -> None:
        """A data worker died or hung and was replaced; on any rank."""
        if self._records:
            self.event("worker", text)
        else:
            self._lost.append(text if self.main else f"rank {distributed.rank()}: {text}")

    def waiting(self, seconds: float, what: str) -> None:
        """The next batch has not come for so long; ``what`` the worker is at that makes it."""
        if self._progress:
            self._progress.waiting(seconds, what)

    def _gather_unreadable(self) -> None:
        """Let the main process write down what the other ranks have met and lost since the last time."""
        told = distributed.gather_objects((self._met, self._lost))
        if self.main:
            self._write_unreadable([image for met, _ in told for image in met])
            for text in (text for _, lost in told for text in lost):
                self.event("worker", text)
        self._met, self._lost = [], []

    def _write_unreadable(self, images: list[Unreadable]) -> None:
        """Each image once, however many ranks and sessions meet it."""
        assert self._records and self._progress
        for image in images:
            if image.index not in self._unreadable:
                self._unreadable.add(image.index)
                self._records.append("bad_images.jsonl",
                                     {"index": image.index, "path": image.path, "reason": image.reason})
                if len(self._unreadable) <= SHOWN:
                    more = "; more of them only in bad_images.jsonl" if len(self._unreadable) == SHOWN else ""
                    self._progress.note("cannot be read, another image takes its place: "
                                        f"{printable(image.path)}: {image.reason}{more}")

    def event(self, name: str, text: str, quiet: bool = False, at: int | None = None, **values: Any) -> None:
        """Record what is out of the ordinary, and say it unless ``quiet``; of the last step, or the one ``at``."""
        if self._records and self._progress:
            step = self.trainer.step if at is None else at
            self._records.write("event", step, self._epoch(step), event=name, text=text, **values)
            if not quiet:
                self._progress.note(f"step {step:,}: {text}")

    def _epoch(self, step: int) -> float:
        return step / self.trainer.loader.steps_per_epoch

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """What happens inside is measuring, or mining: its seconds are counted apart, too, and slow no step down."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._measuring += seconds
        self._speed.pause(seconds)

    def mined(self, seconds: float, found: dict[str, float]) -> None:
        """Record what the method has found for the steps after this one; with the first of them, which comes next."""
        text = f"mined in {seconds:.1f} s: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.event("mined", text, quiet=True, at=self.trainer.step + 1, seconds=round(seconds, 3), **found)

    def measured(self, results: list[Result]) -> None:
        """Record what was measured of the encoder after this step."""
        self.rows["trained"] = results
        if not (self._records and self._progress):
            return
        for result in results:
            self._records.write("eval", self.trainer.step, self.trainer.epoch, label=result.label(),
                                value=result.value, spread=result.spread, interval=result.interval,
                                protocol=result.protocol)
        self._progress.note(f"epoch {self.trainer.epoch:g}  {_whose(results) or self.run.evaluation.layer}: "
                            + "  ".join(result.short() for result in results)
                            + f"  ({share(self._measuring, self.seconds())} so far)")
        self._write_summary()

    def has_measured(self) -> bool:
        """Whether the records hold a measurement of this very step; the same answer on every rank."""
        path = self.run.dir / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if self.main and path.exists() else []
        found = any(record["kind"] == "eval" and record["step"] == self.trainer.step for record in records)
        return bool(distributed.from_main(found))

    def finish(self, rows: dict[str, list[Result]]) -> None:
        """The table, where everything is, and what to do next."""
        self.rows = rows
        if self._records and self._progress:
            self._write_summary()
            self._progress.close()
            shown = {name: results for name, results in rows.items() if results}
            self._progress.note(("\n" + table(shown) + "\n\n" if shown else "")
                                + closing(self.run, self.seconds(), self._measuring))
            self.close()

    def stopped(self) -> None:
        """Asked to stop: the state is saved."""
        if self._records and self._progress:
            self._progress.close()
            self._progress.note(f"Stopped after step {self.trainer.step:,} of {self.trainer.total_steps:,}; everything "
                                f"is saved in {self.run.dir}. The same command again goes on from here.")
            self.close()

    def close(self) -> None:
        """End the progress line and the records, whatever the run ended by."""
        if self._records and self._progress:
            self._progress.close()
            self._records.close()

    def _write_summary(self) -> None:
        assert self._records
        steps, seconds = self.trainer.step, self.seconds()
        images = steps * self.run.train_settings.batch_size
        self._records.summary(
            step=steps, epoch=self.trainer.epoch, finished=steps == self.trainer.total_steps, images=images,
            seconds=round(seconds, 1), measuring_seconds=round(self._measuring, 1),
            images_per_second=round(images / max(seconds, 1e-9), 1),
            results={name: [result.plain() for result in results] for name, results in self.rows.items()},
            unreadable=len(self._unreadable), processes=distributed.world(), device=str(self.run.device),
            seed=self.run.settings.seed, versions=versions(), commit=commit())


def _whose(results: list[Result]) -> str:
    """Whose features were measured, and beside which, if not beside the training images' own."""
    protocol = results[0].protocol if results else {}
    beside = f" beside the {protocol['neighbours']}" if "neighbours" in protocol else ""
    return f"{protocol.get('layer', '')}{beside}"


def _averages(window: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each log over the steps of the window and over ranks."""
    counts = distributed.gather_objects(len(window))
    if not min(counts):
        return {}
    names = list(window[0])
    means = torch.stack([torch.stack([logs[name].float() for logs in window]).mean() for name in names])
    return dict(zip(names, distributed.mean(means).tolist(), strict=True))


def _known_rows(path: Path) -> dict[str, list[Result]]:
    """The results that an earlier session wrote."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text()).get("results", {})
    return {name: [Result(**result) for result in results] for name, results in rows.items()}


def _known_unreadable(path: Path) -> set[int]:
    """The images that an earlier session wrote down; the records have cut off what a kill left of a line."""
    return {json.loads(line)["index"] for line in path.read_text().splitlines()} if path.exists() else set()

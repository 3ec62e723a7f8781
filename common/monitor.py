"""What a run says and writes down: the progress line, metrics.jsonl, summary.json, bad_images.jsonl.

Every process holds a Monitor, since averages are over all of them; only the main one speaks and writes.
"""

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common import distributed
from common.backbones import trainable_parameters
from common.data.reading import Unreadable
from common.evaluate import Result, table
from common.log import Records
from common.progress import Progress, Speed, duration
from common.train import Step, Trainer

if TYPE_CHECKING:
    from common.run import Run


class Monitor:
    """Of one session of ``run``."""

    def __init__(self, run: "Run"):
        self.run, self.main = run, distributed.is_main()
        self.rows: dict[str, list[Result]] = {}             # what the table at the end shows, as far as it is known
        self._window: list[dict[str, Tensor]] = []
        self._met: list[Unreadable] = []                    # cannot be read, and not yet told to the main process
        self._unreadable: set[int] = set()                  # cannot be read, and written down
        self._speed = Speed()
        self._records: Records | None = None
        self._progress: Progress | None = None

    def start(self, trainer: Trainer, state: dict[str, Any] | None) -> None:
        """Say what is about to happen; open the records, without what they hold of steps after this one."""
        self.trainer, self._began = trainer, time.monotonic()
        self._seconds = state["seconds"] if state else 0.0
        if not self.main:
            return
        log = self.run.log
        self._records = Records(self.run.dir, log.wandb, project=log.project, name=self.run.dir.name,
                                run_id=state["wandb_id"] if state else None, config=self.run.config.tree)
        self._records.rewind(trainer.step)
        self._progress = Progress(trainer.total_steps, trainer.loader.steps_per_epoch, start=trainer.step,
                                  every=log.every)
        self._progress.note(self._opening())
        self.rows = _known_rows(self.run.dir / "summary.json") if trainer.step else {}
        self._unreadable = _known_unreadable(self.run.dir / "bad_images.jsonl")
        self._write_unreadable(self._met)
        self._speed = Speed()

    def seconds(self) -> float:
        """Spent on the run so far, in earlier sessions too."""
        return self._seconds + time.monotonic() - self._began

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the records."""
        return {"seconds": self.seconds(), "wandb_id": self._records.run_id if self._records else "",
                "versions": versions()}

    def step(self, step: Step) -> None:
        """Take in one step; every ``log.every`` steps a record and the progress line, averaged over steps and ranks."""
        self._speed.add(self.run.train_settings.batch_size, step.waited)
        if step.skipped:
            self._event("skipped", "the loss or the gradient was not finite: nothing was updated")
        else:
            self._window.append(step.logs)
        if step.number % self.run.log.every and step.number != self.trainer.total_steps:
            return
        values = _averages(self._window)
        self._window.clear()
        self._gather_unreadable()
        if self.main and values:
            self._show(step, values)

    def _show(self, step: Step, values: dict[str, float]) -> None:
        assert self._records and self._progress
        chance = self.run.method.chance()
        values |= {} if chance is None else {"chance": chance}
        values |= {"lr": step.lr, **self._speed.read()}
        self._records.write("train", step.number, self.trainer.epoch, **values)
        self._progress.show(step.number, values)

    def unreadable(self, image: Unreadable) -> None:
        """An image of the training set that could not be read, met for the first time; on any rank."""
        if self._records:
            self._write_unreadable([image])
        else:
            self._met.append(image)

    def _gather_unreadable(self) -> None:
        """Let the main process write down what the other ranks have met since the last time."""
        met = [image for images in distributed.gather_objects(self._met) for image in images]
        self._met.clear()
        if self.main:
            self._write_unreadable(met)

    def _write_unreadable(self, images: list[Unreadable]) -> None:
        """Each image once, however many ranks and sessions meet it."""
        assert self._progress
        for image in images:
            if image.index not in self._unreadable:
                self._unreadable.add(image.index)
                with open(self.run.dir / "bad_images.jsonl", "a") as file:
                    file.write(json.dumps({"index": image.index, "path": image.path, "reason": image.reason}) + "\n")
                self._progress.note(f"cannot be read, another image takes its place: {image.path}: {image.reason}")

    def _event(self, name: str, text: str) -> None:
        if self._records and self._progress:
            self._records.write("event", self.trainer.step, self.trainer.epoch, event=name, text=text)
            self._progress.note(f"step {self.trainer.step:,}: {text}")

    def measured(self, results: list[Result]) -> None:
        """Record what was measured of the encoder after this step."""
        self.rows["trained"] = results
        if not (self._records and self._progress):
            return
        for result in results:
            self._records.write("eval", self.trainer.step, self.trainer.epoch, label=result.label(),
                                value=result.value, spread=result.spread, protocol=result.protocol)
        self._progress.note(f"epoch {self.trainer.epoch:g}  {self.run.evaluation.layer}: "
                            + "  ".join(result.short() for result in results))
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
            self._progress.note(("\n" + table(shown) + "\n\n" if shown else "") + self._closing())
            self._records.close()

    def stopped(self) -> None:
        """Asked to stop: the state is saved."""
        if self._records and self._progress:
            self._progress.close()
            self._progress.note(f"Stopped after step {self.trainer.step:,} of {self.trainer.total_steps:,}; everything "
                                f"is saved in {self.run.dir}. The same command again goes on from here.")
            self._records.close()

    def _write_summary(self) -> None:
        assert self._records
        steps, seconds = self.trainer.step, self.seconds()
        images = steps * self.run.train_settings.batch_size
        self._records.summary(
            step=steps, epoch=self.trainer.epoch, finished=steps == self.trainer.total_steps, images=images,
            seconds=round(seconds, 1), images_per_second=round(images / max(seconds, 1e-9), 1),
            results={name: [result._asdict() for result in results] for name, results in self.rows.items()},
            unreadable=len(self._unreadable), processes=distributed.world(), device=str(self.run.device),
            seed=self.run.settings.seed, versions=versions(), commit=commit())

    def _opening(self) -> str:
        run, trainer, settings = self.run, self.trainer, self.run.train_settings
        train, test = run.splits
        held = "" if test is None else f"; {len(test):,} to test on"
        lr = trainer.optimizer.param_groups[0].get("initial_lr", trainer.optimizer.param_groups[0]["lr"])
        start = f", goes on from step {trainer.step:,}" if trainer.step else ""
        if trainer.step == trainer.total_steps:
            start = ", finished already; to train anew, give another run.dir or delete the folder"
        parts = f" in {settings.accumulate} parts" if settings.accumulate > 1 else ""
        nothing = self._nothing_to_measure()
        return "\n".join([
            f"method   {type(run.method).__name__}, {trainable_parameters(run.method) / 1e6:.2f} M trained parameters",
            f"data     {train.name}: {len(train):,} images, {train.channels} channel{'s' * (train.channels > 1)}{held}",
            f"train    {settings.epochs} epoch{'s' * (settings.epochs > 1)} of {trainer.loader.steps_per_epoch:,} steps"
            f" of {settings.batch_size} images{parts}; learning rate {lr:g} "
            f"({lr * 256 / settings.batch_size:g} per 256 images)",
            f"machine  {run.device}, {distributed.world()} process{'es' * (distributed.world() > 1)}, "
            f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} each, {settings.precision}",
            *([f"measure  nothing: {nothing}"] if nothing else []),
            f"run      {run.dir}{start}", ""])

    def _nothing_to_measure(self) -> str:
        """Why no accuracy is measured; empty if one is."""
        if self.run.evaluator.possible:
            return ""
        return "the training images have no labels" if self.run.evaluation.protocols else "no evaluate.protocols"

    def _closing(self) -> str:
        python, labelled = _python(), bool((self.run.splits.train.labels >= 0).any())
        other = "data.root=/path/to/images/with/classes"
        if self.run.config.get("data.name") != "common.data.folder":
            other = "'data={name: common.data.folder, root: /path/to/images/with/classes}'"
        return "\n".join([
            f"Run      {self.run.dir}  ({duration(self.seconds())}; config.yaml, metrics.jsonl, summary.json, "
            "checkpoints/)",
            f"Measure  {python} tools/evaluate.py knn --checkpoint {self.run.dir}"
            + ("" if labelled else f" {other}"),
            f"Next     {python} tools/train.py --config my_images.yaml data.root=/path/to/your/images"])


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
    """The images that an earlier session wrote down."""
    return {json.loads(line)["index"] for line in path.read_text().splitlines()
            if line.endswith("}")} if path.exists() else set()


def versions() -> dict[str, str]:
    """Of Python and of the packages that a number may depend on."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "timm", "faiss-gpu", "faiss-cpu", "numpy", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's git commit, with ``+`` if files differ from it; None outside a checkout."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _python() -> str:
    """How this Python is called from the current folder."""
    near = os.path.relpath(sys.executable)
    return "python" if near.startswith("..") else near

"""The training of a run by this process: where it starts, what it records, and when it saves, measures and stops."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from torch import Tensor

from common import agreement, crash, distributed, identity, lock, start, watch
from common.atomic import replace_file
from common.background import Background
from common.checkpoint import NotSaved
from common.config import ConfigError
from common.data.datasets import Images
from common.data.loader import Loader
from common.data.subset import Subset
from common.data.workers import Care
from common.diagnosis import NonFinite
from common.encoder import Encoder
from common.evaluate import untrained
from common.evaluate.evaluator import embed
from common.monitor import Monitor
from common.rng import rng_state, seed_all, set_rng_state
from common.run import Run
from common.saving import Saver
from common.sections import SECTIONS
from common.signals import MARKER, Stopped, StopRequest
from common.state import check_state, fitting
from common.train import Trainer

CALIBRATION = 20        # batches that give an untrained encoder its BatchNorm statistics
RETRY = 60.0            # seconds after which a save is tried again that found no room
SLOW = 0.5              # seconds of a step from which each is read, so that a stop or a save is not long in coming
PATIENCE = 60.0         # seconds for what is being written when the run ends by an error


class Session:
    """Trains ``run`` from its newest checkpoint, or from the beginning. Every process of the job holds one."""

    def __init__(self, run: Run):
        self.run, self.disk = run, Background("disk")
        self.folder = Saver(run.dir / "checkpoints", run.checkpoint.keep, self.disk)
        settings, config = run.train_settings, run.config
        self.identity = identity.of(run)
        agreement.check_start(f"{self.identity['digest']} {self.identity['start']}", self.identity["data"],
                              len(run.splits.train))
        self._lock()
        self.monitor = Monitor(run, self.disk)
        crash.remember(run.dir, self.identity["config"], self.monitor.recent)
        watch.start(settings.timeout, settings.compile, self.disk.wait)
        self.loader = Loader(run.splits.train, run.views, batch_size=settings.batch_size, seed=run.settings.seed,
                             accumulate=settings.accumulate, workers=settings.workers, device=run.device,
                             max_unreadable=settings.max_unreadable, report=self.monitor.unreadable,
                             care=Care(settings.worker_timeout, self.monitor.lost_worker, self.monitor.waiting),
                             order=run.method.order)
        optimizer = config.build("optimizer", SECTIONS["optimizer"], method=run.method, batch_size=settings.batch_size)
        schedule = config.build("schedule", SECTIONS["schedule"], epochs=settings.epochs)
        self.trainer = Trainer(run.method, self.loader, optimizer, schedule, settings, run.device, run.log.every,
                               self._mine)
        self._prepare_folder()
        self._save_at = self._next_save()
        self._keep = False                              # a checkpoint that is to stay for good is due
        self._trouble: BaseException | None = None      # why the run cannot save; the main process's

    def train(self) -> None:
        """To the end, or until a signal asks to stop: then Stopped is raised, with everything saved.

        Raises NotSaved on every process, with the state saved elsewhere if possible, when the folder takes no more.
        """
        with StopRequest() as request:
            try:
                with request.at_once(self._stopped):
                    self.start()
                while self.trainer.step < self.trainer.total_steps:
                    try:
                        self._train(request)
                    except NonFinite as error:
                        self._roll_back(error)
                with request.at_once(self._stopped):
                    self._finish()
            except Stopped as stopped:
                if distributed.is_main():
                    stopped.mark(self.run.dir)
                self.monitor.stopped()
                raise
            finally:
                self.disk.close(PATIENCE)
                lock.release(self.run.dir)

    def _lock(self) -> None:
        """Raise ConfigError, on every rank, if another job trains in the run's folder."""
        owner = distributed.from_main(lock.take(self.run.dir) if distributed.is_main() else None)
        if owner:
            raise ConfigError(f"{self.run.dir}: another process trains in this folder ({owner}). Wait for it, stop it, "
                              "or give another run.dir.")

    def _train(self, request: StopRequest) -> None:
        self._compared, self._last = self.trainer.step, (time.monotonic(), self.trainer.step)
        with closing(self.trainer.steps()) as steps:
            for step in steps:
                self.monitor.step(step)
                if step.number == self.trainer.step:            # the state is that of this step
                    self._after_step(request)

    def start(self) -> None:
        """Load the newest checkpoint, or make the method ready for its first step; write down the config."""
        found, begun = self._newest(), ""
        if found is None:
            begun = self._begin()
            seed_all(self.run.settings.seed, 1 + distributed.rank())
        else:
            self._resume(found[1])
        self._write_config(new=found is None)
        self.monitor.start(self.trainer, found[1] if found else None, begun)
        if found is None:
            self.save()                     # tells early whether the disk takes it; the first to roll back to
        elif self._evaluation_is_due() and not self.monitor.has_measured():
            self._measure()

    def _begin(self) -> str:
        """Make the method ready for its first step; in words, which weights it begins with, if not random ones."""
        weights, method = self.run.settings.weights, self.run.method
        begun = start.begin_with(method, weights) if weights else ""
        method.prepare(self._embed_first if weights else self._embed_untrained)
        return begun

    def _write_config(self, new: bool) -> None:
        """Raises NotSaved, on every process, where not even that can be written; a run that goes on has it already."""
        error = None
        if distributed.is_main():
            try:
                (self.run.dir / MARKER).unlink(missing_ok=True)
                replace_file(self.run.dir / "config.yaml", lambda file: file.write(self.identity["config"].encode()))
            except OSError as met:
                error = NotSaved(f"{self.run.dir}: config.yaml cannot be written: {met.strerror}. Make room, or give "
                                 "another run.dir.")
        if (error := distributed.from_main(error)) is not None and new:
            raise error

    def _prepare_folder(self) -> None:
        """Hours of work must not end at a folder that cannot be written; every process raises what the main one met."""
        error = None
        if distributed.is_main():
            try:
                self.folder.prepare()
            except NotSaved as met:
                error = met
        if (error := distributed.from_main(error)) is not None:
            raise error

    def _newest(self, accept: Callable[[dict[str, Any]], bool] = bool) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint of those. Raises ConfigError unless every process sees the same one."""
        if distributed.is_main():
            self.folder.wait()
        distributed.barrier()                                   # the others read what the main process has written
        found = self.folder.newest(accept)
        steps = distributed.gather_objects(found and found[0])
        if len(set(steps)) > 1:
            seen = ", ".join("none" if step is None else f"step {step:,}" for step in steps)
            raise ConfigError(f"{self.run.dir}: the processes see different newest checkpoints in it ({seen}). Give a "
                              "run.dir on a disk that all machines share.")
        return found

    def _resume(self, state: dict[str, Any]) -> None:
        check_state(state, f"{self.run.dir}: its checkpoint")
        identity.check_same(state, self.identity, self.run)
        self.identity["start"] = state.get("start", "")         # its file may be gone
        with fitting(f"{self.run.dir}: its checkpoint"):
            self.trainer.load_state(state["trainer"])
        rng, rank = state["rng"], distributed.rank()
        if rank < len(rng):
            set_rng_state(rng[rank])
        else:                                                   # more processes than before
            seed_all(self.run.settings.seed, 1 + rank, self.trainer.step)

    def _roll_back(self, error: NonFinite) -> None:
        """Back to the last good checkpoint with a lower learning rate; raises ``error`` if that was done too often.

        Deleted first and saved at once, so that a kill on the way repeats all of it, or nothing.
        """
        settings, trainer = self.run.train_settings, self.trainer
        self.monitor.not_finite(error)
        found = self._good_before(error) if trainer.rollbacks < settings.rollbacks else None
        if found is None:
            raise error
        lr_scale, rollbacks = trainer.lr_scale * settings.rollback_lr, trainer.rollbacks + 1
        if distributed.is_main():
            self.folder.drop_after(found[0])
        self._resume(found[1])
        trainer.lr_scale, trainer.rollbacks = lr_scale, rollbacks
        self.monitor.rolled_back(error, found[1])
        self.save()

    def _good_before(self, error: NonFinite) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that a good step has followed, or else the newest one of before the failure."""
        last = error.step - error.skipped                               # the last good step
        good = self._newest(lambda state: not state["trainer"]["skipped"] and state["trainer"]["step"] < last)
        return good or self._newest(lambda state: not state["trainer"]["skipped"])

    def _after_step(self, request: StopRequest) -> None:
        lost = distributed.is_main() and self._saving_failed()
        due = time.monotonic() > self._save_at and not self.folder.busy
        signal, due, lost, self.trainer.hurry = self._agree(request.number, due, lost, self._slow())
        if lost:
            raise self._saved_elsewhere() from self._trouble
        measure, leaving = self._evaluation_is_due(), bool(signal) or self._at_end()
        self._keep |= self._at_epoch(self.run.checkpoint.every)
        save = leaving or ((due or measure or self._keep) and not self.trainer.skipped)     # what may be wrong waits
        self._compare_ranks(always=save)
        if save:
            with request.saving():
                self.save(wait=leaving)     # before measuring, too: it takes long, and a kill in it must lose nothing
        if signal:
            raise self._stopped(signal)
        if measure:
            with request.at_once(self._stopped):
                self._measure()

    def _stopped(self, signal: int) -> Stopped:
        return Stopped(signal, self.trainer.step)

    def _compare_ranks(self, always: bool) -> None:
        """Every so many steps, and before every checkpoint: what is saved is what all ranks hold."""
        every, trainer = self.run.train_settings.compare_ranks, self.trainer
        due = every and trainer.step // every > self._compared // every
        self._compared = trainer.step
        if distributed.world() > 1 and (always or due):
            agreement.check_state(trainer.step, {"method": trainer.method.state_dict(),
                                                 "optimizer": trainer.optimizer.state_dict()["state"]})

    def _agree(self, signal: int, due: bool, lost: bool, slow: bool) -> tuple[int, bool, bool, bool]:
        """The same answer on every rank: whether any was asked to stop; whether the main one is to save, or cannot;
        whether any is slow."""
        signal, *answers = distributed.highest(signal, int(due and distributed.is_main()), int(lost), int(slow))
        return signal, bool(answers[0]), bool(answers[1]), bool(answers[2])

    def _slow(self) -> bool:
        """Whether a step took longer than ``SLOW`` since this was asked last."""
        (began, first), self._last = self._last, (time.monotonic(), self.trainer.step)
        return self._last[0] - began > SLOW * (self.trainer.step - first)

    def _at_end(self) -> bool:
        return self.trainer.step == self.trainer.total_steps

    def _at_epoch(self, every: int) -> bool:
        epoch, within = divmod(self.trainer.step, self.loader.steps_per_epoch)
        return every > 0 and within == 0 and epoch > 0 and epoch % every == 0

    def _evaluation_is_due(self) -> bool:
        return (self._at_epoch(self.run.evaluation.every) or self._at_end()) and self.run.evaluator.possible

    def save(self, wait: bool = False) -> None:
        """A checkpoint of this step; one at an epoch mark stays for good.

        It is written while training goes on. With ``wait``, this returns when it is on the disk, or raises NotSaved.
        """
        watch.beat(self.trainer.step, "save")
        state = self._state()
        if distributed.is_main():
            self.folder.save(self.trainer.step, state, keep_always=self._keep and not self.trainer.skipped)
        self._keep &= bool(self.trainer.skipped)
        self._save_at = self._next_save()
        if wait and distributed.from_main(distributed.is_main() and self._saving_failed(wait=True)):
            raise self._saved_elsewhere() from self._trouble

    def _next_save(self) -> float:
        return time.monotonic() + 60 * self.run.checkpoint.minutes

    def _state(self) -> dict[str, Any]:
        """All of this step that is to be saved; the main process's counts."""
        rng = distributed.gather_objects(rng_state())
        return {**self.identity, "trainer": self.trainer.state(), "rng": rng, **self.monitor.state()}

    def _saving_failed(self, wait: bool = False) -> bool:
        """Whether the run must end because its last save failed. For want of room it need not, unless it ends now."""
        if wait:
            self.folder.wait()
        error = self.folder.error()
        if isinstance(error, NotSaved) and error.for_want_of_room and not wait:
            self._save_at = min(self._save_at, time.monotonic() + RETRY)
            self.monitor.event("not saved", f"{error} Training goes on, and tries again in {RETRY:.0f} s: make room.")
            return False
        self._trouble = error
        return error is not None

    def _saved_elsewhere(self) -> NotSaved:
        """Save this step where there is room, and what to say on every process."""
        state = self._state()
        text = self.folder.save_elsewhere(self.trainer.step, state, self._trouble) if distributed.is_main() else ""
        self.monitor.close()
        return NotSaved(distributed.from_main(text))

    def _measure(self) -> None:
        watch.beat(self.trainer.step, "measure")
        run = self.run
        bank_nC = run.method.memory() if run.evaluation.bank and not self._at_end() else None
        with self.monitor.measuring():
            results = (run.evaluator.measure(run.encoder) if bank_nC is None
                       else run.evaluator.measure_by(bank_nC, run.encoder))
        self.monitor.measured(results)

    def _mine(self) -> None:
        """The method chooses the images of the next steps. It is not saved before: a run that goes on mines again."""
        began, run = time.monotonic(), self.run
        with self.monitor.measuring():
            found = run.method.mine(lambda index_m: self._embed(run.encoder, Subset(run.splits.train, index_m)),
                                    run.splits.train, self.trainer.step)
        self.monitor.mined(time.monotonic() - began, found)
        self._last = time.monotonic(), self.trainer.step        # no step was slow because of it

    def _finish(self) -> None:
        """The table at the end, with raw pixels and the untrained backbone beside the trained one if so set."""
        watch.beat(self.trainer.step, "end")
        run, rows = self.run, dict(distributed.from_main(self.monitor.rows))
        if run.evaluator.possible and run.evaluation.baselines and len(rows) < 3:
            with self.monitor.measuring():
                rows = {"raw pixels": run.evaluator.measure_pixels(),
                        "untrained": run.evaluator.measure(self._untrained()), **rows}
        self.monitor.finish(rows)

    def _untrained(self) -> Encoder:
        """The encoder as it was before the first step, with BatchNorm statistics."""
        state = rng_state()
        encoder = untrained(self.run.build_method().encoder, self._first_views(), CALIBRATION)
        set_rng_state(state)
        return encoder

    def _embed_untrained(self) -> Tensor:
        return self._embed(untrained(self.run.encoder, self._first_views(), CALIBRATION))

    def _embed_first(self) -> Tensor:
        """By the weights that the run begins with, whose BatchNorm statistics come with them."""
        return self._embed(self.run.encoder)

    def _embed(self, encoder: Encoder, images: Images | None = None) -> Tensor:
        """Of all training images, or of some."""
        run = self.run
        return embed(encoder, images or run.splits.train, run.views,
                     batch_size=run.evaluation.batch_size, workers=run.train_settings.workers, device=run.device,
                     care=Care(run.train_settings.worker_timeout))

    def _first_views(self) -> Iterator[Tensor]:
        with closing(self.loader.shuffled().stream(0, min(CALIBRATION, self.trainer.total_steps))) as steps:
            for _, batches, _ in steps:
                yield batches[0].views[0]

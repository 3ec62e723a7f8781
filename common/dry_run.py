"""One step of everything - train, measure, save, resume - and what a full run will take."""

import math
import resource
import tempfile
import time
from contextlib import closing

import torch

from common import distributed
from common.config import Config
from common.data.datasets import Images, Splits, spread
from common.evaluate.evaluator import Evaluator
from common.progress import duration
from common.run import Run
from common.sections import complete
from common.session import Session
from common.tree import digest

STEPS = 6               # the first two are not timed
MEASURED = 512          # images of each split that are embedded on trial


class Subset(Images):
    """``count`` images, evenly over another set."""

    def __init__(self, images: Images, count: int):
        self.images, self.rows = images, spread(len(images), count)
        array = None if images.array is None else images.array[self.rows]
        keys = [images.keys[i] for i in self.rows]
        super().__init__(images.name, keys, images.labels[self.rows], images.classes, array)
        self.channels, self.size = images.channels, images.size

    def path(self, i: int) -> str:
        return self.images.path(self.rows[i])

    def read(self, i: int) -> torch.Tensor:
        return self.images.read(self.rows[i])


def dry_run(config: Config) -> None:
    """Try everything in a folder that is thrown away, and print the estimate. Nothing of the run's own is touched."""
    kept_at = complete(config).get("run.dir")
    distributed.start(config.get("train.device", "auto"), config.get("train.threads"))
    with tempfile.TemporaryDirectory() as folder:
        config.set("run.dir", str(distributed.from_main(folder)), "dry run")
        config.set("log.wandb", "off", "dry run")
        run = Run(config)
        session = Session(run)
        session.start()
        per_step = _train(session)
        per_image = _measure(run)
        session.save(wait=True)
        size = sum(path.stat().st_size for _, path in session.folder.files())
        _resume(run, session)
        _say(_estimate(run, session, per_step, per_image, size, str(kept_at)))
        distributed.barrier()                                   # before the main process throws the folder away


def _train(session: Session) -> float:
    """Seconds of a step, of the slowest rank."""
    session.trainer.read_every = 1                          # each step is waited for, so that it can be timed
    times = [time.perf_counter()]
    with closing(session.trainer.steps(min(STEPS, session.trainer.total_steps))) as steps:
        for step in steps:
            loss = float(step.logs["loss"])
            times.append(time.perf_counter())
    _say(f"train     {len(times) - 1} steps, loss {loss:.3f}")
    timed = times[2:] if len(times) > 3 else times
    return max(distributed.gather_objects((timed[-1] - timed[0]) / (len(timed) - 1)))


def _measure(run: Run) -> float:
    """Seconds to embed one image; 0 where there is nothing to measure."""
    if not run.evaluator.possible:
        _say("evaluate  nothing: no labels of classes, or no evaluate.protocols")
        return 0.0
    count = len(run.splits.train) + len(run.splits.test or ())
    test = run.splits.test
    few = Splits(Subset(run.splits.train, MEASURED), None if test is None else Subset(test, MEASURED))
    evaluator = Evaluator(few, run.views, run.evaluation.protocols, layer=run.evaluation.layer,
                          batch_size=run.evaluation.batch_size, workers=run.train_settings.workers, device=run.device)
    began = time.perf_counter()
    results = evaluator.measure(run.encoder)
    tried = sum(len(images) for images in few if images is not None)
    _say(f"evaluate  {', '.join(result.short() for result in results)}: tried on {tried:,} of {count:,} images")
    return (time.perf_counter() - began) / tried


def _resume(run: Run, session: Session) -> None:
    """Load the checkpoint into a second method and see that it is the first."""
    found = session.folder.newest()
    assert found is not None
    second = run.build_method()
    second.load_state_dict(found[1]["trainer"]["method"])
    assert digest(second.state_dict()) == digest(run.method.state_dict()), "not what was saved"
    session.trainer.load_state(found[1]["trainer"])
    _say(f"resume    the checkpoint of step {found[0]} holds all {len(run.method.state_dict())} tensors")


def _estimate(run: Run, session: Session, per_step: float, per_image: float, size: int, kept_at: str) -> str:
    settings, total = run.train_settings, session.trainer.total_steps
    measurements, measuring = _measurements(run, per_image)
    kept = settings.epochs // run.checkpoint.every if run.checkpoint.every else 0
    seconds = total * per_step + measuring
    return "\n".join([
        "", f"A full run: {settings.epochs} epochs, {total:,} steps of {settings.batch_size} images",
        f"  time     about {duration(seconds)} ({settings.batch_size / per_step:,.0f} images/s; "
        f"{measurements} measurement{'s' * (measurements != 1)}: {duration(measuring)}, {measuring / seconds:.0%})",
        f"  memory   {_memory(run.device)}",
        f"  disk     {(kept + run.checkpoint.keep + 1) * size / 1e6:,.0f} MB in {kept_at}: "
        f"{kept + run.checkpoint.keep} checkpoints of {size / 1e6:,.1f} MB, and one that is being written",
        "Estimated from a few steps: the first epochs will tell better."])


def _measurements(run: Run, per_image: float) -> tuple[int, float]:
    """How many there will be, and their seconds; among a bank only the last embeds the training images."""
    if not run.evaluator.possible:
        return 0, 0.0
    every, (train, test) = run.evaluation.every, run.splits
    count = math.ceil(run.train_settings.epochs / every) if every else 1
    images = count * len(test or ()) + (1 if run.evaluation.bank else count) * len(train)
    return count, images * per_image


def _say(text: str) -> None:
    if distributed.is_main():
        print(text)


def _memory(device: torch.device) -> str:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if device.type != "cuda":
        return f"{host:.1f} GB in each process, and its loader workers"
    return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB on each GPU, {host:.1f} GB in each process"

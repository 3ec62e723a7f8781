"""The trainings and baselines in ``benchmarks.metric_table``: their configs, and what is measured of them."""

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import counter, start
from common.config import Config
from common.data.datasets import Images, Splits
from common.data.loader import plain_batches
from common.data.subset import Subset
from common.encoder import Encoder
from common.evaluate import KNN, Retrieval, untrained
from common.evaluate.features import Features, extract, pixels
from common.evaluate.verification import area, roc, scores
from common.identity import FREE
from common.measuring.pair_list import drawn
from common.run import Run
from common.sections import open_config

PAIRS, CALIBRATION, UNSEEN = 6000, 5120, 3
SCRATCH, PRETRAINED = "scratch", "pretrained"
PIXELS, UNTRAINED, BACKBONE = BASELINES = ("raw pixels", "untrained backbone", "pretrained backbone")


class Set(NamedTuple):
    """A data set, and the views and the network for it, where they are not those of the configs."""

    data: dict[str, Any]
    views: dict[str, Any] | None = None
    arch: str | None = None


SETS = {
    "fashion": Set({"name": "common.data.fashion_mnist"}),
    "cifar10": Set({"name": "common.data.folder"},
                   {"name": "common.data.recipes.small_color", "size": 32, "crop_min": 0.6}, "w48p4"),
    "digits": Set({"name": "common.data.digits"},
                  {"name": "common.data.recipes.digits", "size": 8, "crop_min": 0.8}, "w8s2"),
}


class Case(NamedTuple):
    """A row of a table, with one seed; ``row`` is a config's name or one of ``BASELINES``."""

    row: str
    begins: str                 # SCRATCH, PRETRAINED, or "" where nothing is trained
    seed: int
    unseen: bool


class Experiment(NamedTuple):
    """What the command line asked for."""

    of: Set
    classes: list[str]
    weights: str
    configs: list[str]
    seeds: int
    overrides: list[str]

    def cases(self) -> Iterator[Case]:
        """The first table whole with one seed, then with the next; then the second table."""
        for unseen in (False, True):
            for seed in range(self.seeds):
                if seed == 0:
                    yield Case(PIXELS, "", 0, unseen)
                yield Case(UNTRAINED, "", seed, unseen)
                if self.weights and seed == 0:
                    yield Case(BACKBONE, "", 0, unseen)
                for name in self.configs:
                    yield from (Case(name, begins, seed, unseen)
                                for begins in ([SCRATCH, PRETRAINED] if self.weights else [SCRATCH]))

    def config(self, case: Case) -> Config:
        """What is trained; of the baselines, the first config, whose network and views they have."""
        name = self.configs[0] if case.row in BASELINES else case.row
        made = open_config(f"{name}.yaml", overrides=[f"run.seed={case.seed}", "train.threads=1", "log.wandb=off",
                                                      *self.overrides])
        data = self.of.data
        if case.unseen:
            seen = self.classes[:-UNSEEN]
            data = {"name": "common.data.only_classes", "of": data, "classes": seen}
            fit_classes(made, len(seen))
        made.set("data", data, "--data")
        if self.of.views:
            made.set("views", {**self.of.views, "num_views": made.get("views.num_views", 1)}, "--data")
        if self.of.arch:
            made.set("method.encoder.arch", self.of.arch, "--data")
        if case.begins == PRETRAINED:
            made.set("run.weights", self.weights, "--weights")
        return made


def fit_classes(config: Config, count: int) -> None:
    """Where a step takes images of more classes than there are, more images of each class, in as large a batch."""
    batch, each = config.get("train.batch_size"), config.get("method.order.per_class")
    if each is not None and batch // each > count:
        each = next(k for k in range(each, batch + 1) if batch % k == 0 and batch // k <= count)
        config.set("method.order.per_class", each, "for fewer classes")


def key(case: Case, config: Config, weights: str) -> str:
    """By which a record is found again: another setting, or another file of weights, is another key."""
    file = weights if case.begins == PRETRAINED or case.row == BACKBONE else None
    of = [case, config.digest(without=FREE), start.sha256(file), PAIRS]
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]


def measure(case: Case, config: Config, weights: str, classes: list[str]) -> dict[str, float]:
    """Percent, and the CPU seconds of training. What a run writes and says is thrown away."""
    with tempfile.TemporaryDirectory() as place, open(Path(place) / "said", "w") as said:
        for where, value in (("run.dir", f"{place}/run"), ("evaluate.protocols", []), ("evaluate.baselines", False)):
            config.set(where, value, "the benchmark")
        with contextlib.redirect_stdout(said):
            run = Run(config)
            began = time.process_time()
            embed = features_of(case, run, weights)
            seconds = time.process_time() - began
    assert run.splits.test is not None
    of = unseen_of(run.splits.test, classes[-UNSEEN:]) if case.unseen else run.splits
    found = embed(of)
    assert found is not None, "there is one process"
    first = Retrieval(1)(found)[0] if case.unseen else KNN(1)(found)[0]
    return {"nearest": first.value, "auc": 100 * verified(of, found), "seconds": seconds if case.begins else 0.0}


def unseen_of(test: Images, names: list[str]) -> Splits:
    """The test images of these classes, in the place of training images: each is searched for among the others."""
    labels = [test.classes.index(name) for name in names]
    rows = [i for i, label in enumerate(test.labels.tolist()) if label in labels]
    return Splits(Subset(test, test.labels.new_tensor(rows)))


def features_of(case: Case, run: Run, weights: str) -> Callable[[Splits], Features | None]:
    """Trains, where the case is a training."""
    how: dict[str, Any] = {"views": run.views, "workers": 0}
    if case.row == PIXELS:
        return partial(pixels, **how)
    if case.row == UNTRAINED:
        return partial(extract, calibrated(run, case.seed), layer="backbone", **how)
    if case.row == BACKBONE:
        start.begin_with(run.method, weights)
        return partial(extract, run.encoder, layer="backbone", **how)
    return partial(extract, run.train().encoder, layer=run.evaluation.layer, **how)


def calibrated(run: Run, seed: int) -> Encoder:
    """The random network with BatchNorm's statistics of some training images."""
    some = counter.permutation(len(run.splits.train), seed, counter.stream("calibration"))[:CALIBRATION]
    batches = plain_batches(Subset(run.splits.train, some), run.views, 256)
    return untrained(run.encoder, (x_BcSS for _, x_BcSS in batches))


def verified(of: Splits, found: Features) -> float:
    """AUC on pairs drawn from the test images, or from all there are."""
    images, x_nD = (of.train, found.train_nD) if of.test is None else (of.test, found.test_mD)
    assert x_nD is not None and len(x_nD) == len(images), "every image has a label, and can be read"
    pairs = drawn(images, PAIRS)
    assert isinstance(pairs.images, Subset)
    used = x_nD[pairs.images.index]
    return area(roc(scores(used[pairs.first_P], used[pairs.second_P], "cosine"), pairs.same_P))

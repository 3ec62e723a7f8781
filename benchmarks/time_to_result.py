"""kNN accuracy against seconds: this project's training, and lightly's MoCo modules in a plain loop.

    python -m benchmarks.time_to_result                                        the digits of scikit-learn, a minute
    python -m benchmarks.time_to_result --root FOLDER --images 200000          CIFAR-10, small network
    python -m benchmarks.time_to_result --root FOLDER --config moco_cifar10.yaml --device cuda --workers 8

``FOLDER`` holds cifar-10-batches-py, or train/ and test/ with class folders. Both sides have the network, weights at
the start, views, batch, queue, momentum, temperature, optimizer and schedule of the config, and see as many images;
both are measured by the same kNN at the same numbers of images. Ours trains as ``tools/train.py`` does, lightly's as
its own examples do: its transform on PIL images in memory, torch's DataLoader, ``update_momentum``, ``NTXentLoss`` with
a memory bank. They take turns of a few steps in one process, so what else the machine does falls on both. Seconds are
of training alone: CPU time of the process, and wall-clock. ``build/bench/time_to_result-curves.json`` has the curves,
``--picture FILE`` draws them, ``--curves FILE`` draws earlier ones again.
"""

import argparse
import contextlib
import copy
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module, util
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.curves import Mark, draw, seconds_to, smallest_lead
from benchmarks.harness import Report, arguments, figure, machine
from common.atomic import replace_file
from common.backbones import encoder
from common.data.datasets import Images
from common.data.filters import GaussianBlur, Grayscale
from common.data.geometry import HorizontalFlip, Rotate
from common.data.jitter import ColorJitter
from common.data.views import Views
from common.encoder import Encoder
from common.evaluate import KNN
from common.rng import seed_all
from common.run import Run
from common.sections import SECTIONS, open_config
from common.session import Session

TURN = 10               # steps of one side before it is the other's turn
NEIGHBOURS = 200

Transform = Callable[[Image.Image], list[Tensor]]
Marks = dict[str, list[Mark]]       # by side


class Side(Protocol):
    """One way to train: ``encoder`` after so many ``advance`` d steps."""

    encoder: Encoder

    def advance(self, steps: int) -> None: ...


class Ours:
    """What ``tools/train.py`` does with the config, records included; the measurements are left to the benchmark."""

    def __init__(self, run: Run):
        self.encoder, self._session = run.encoder, Session(run)
        with contextlib.redirect_stdout(io.StringIO()):                 # the progress line goes there, too
            self._session.start()
        self._session.trainer.read_every = TURN                         # on a GPU, too, a turn ends where it is to
        self._steps = self._session.trainer.steps()

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self._session.monitor.step(next(self._steps))


class Lightly:
    """MoCo of lightly's building blocks in a plain loop, with everything that ``run``'s config sets."""

    def __init__(self, run: Run, workers: int):
        config, method, train = run.config, run.config.get("method"), run.train_settings
        seed_all(run.settings.seed)
        network = {**method["encoder"], "channels": run.splits.train.channels, "image_size": run.views.size}
        network.pop("name")
        self.encoder = encoder(**network).to(run.device)
        self.momentum_encoder = copy.deepcopy(self.encoder)
        import_module("lightly.models.utils").deactivate_requires_grad(self.momentum_encoder)
        queue = method["dictionary"]["size"], method["dictionary"]["dim"]
        self._loss = import_module("lightly.loss").NTXentLoss(method["temperature"], queue).to(run.device)
        self._update = import_module("lightly.models.utils").update_momentum
        self._momentum, self._device = method["momentum"], run.device
        settings = config.get("optimizer")
        self._lr = settings["lr"]
        self._optimizer = torch.optim.SGD(self.encoder.parameters(), self._lr, settings["momentum"],
                                          weight_decay=settings["weight_decay"])
        self._schedule = config.build("schedule", SECTIONS["schedule"], epochs=train.epochs)
        self._batches = DataLoader(Pictures(run.splits.train, transform(run.views)), train.batch_size, shuffle=True,
                                   drop_last=True, num_workers=workers, persistent_workers=workers > 0,
                                   pin_memory=run.device.type == "cuda")
        self._steps = self._train()

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            next(self._steps)

    def _train(self) -> Iterator[None]:
        step = 0
        while True:
            for (query, key), _ in self._batches:
                self._optimizer.param_groups[0]["lr"] = self._lr * self._schedule(step / len(self._batches))
                self._step(query.to(self._device, non_blocking=True), key.to(self._device, non_blocking=True))
                step += 1
                yield

    def _step(self, query_BcSS: Tensor, key_BcSS: Tensor) -> None:
        self.encoder.train()
        self._update(self.encoder, self.momentum_encoder, m=self._momentum)
        q_BC = self.encoder(query_BcSS)
        with torch.no_grad():
            k_BC = self.momentum_encoder(key_BcSS)
        self._loss(q_BC, k_BC).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


class Pictures(Dataset):
    """Images in memory as PIL pictures, seen through ``transform``: what torchvision's CIFAR10 gives."""

    def __init__(self, images: Images, transform: Transform):
        assert images.array is not None
        self._array_nHWc = images.array.permute(0, 2, 3, 1).contiguous().numpy()
        self._labels, self._transform = images.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[list[Tensor], int]:
        pixels: np.ndarray = self._array_nHWc[i]
        return self._transform(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)), self._labels[i]


def transform(views: Views) -> Transform:
    """lightly's own transform, set to what the recipe ``views`` does to its first view."""
    crop, ops = views.views[0]
    given: dict[type, Any] = {type(op): op for op in ops}
    jitter, grey = given.pop(ColorJitter, ColorJitter(p=0.0)), given.pop(Grayscale, Grayscale(0.0))
    flip, turn = given.pop(HorizontalFlip, HorizontalFlip(0.0)), given.pop(Rotate, Rotate(0.0))
    blur = given.pop(GaussianBlur, GaussianBlur(p=0.0))
    assert not given and crop.scale[1] == 1, f"lightly's transform has no {given}"
    return import_module("lightly.transforms").SimCLRTransform(
        input_size=views.size, min_scale=crop.scale[0], cj_prob=jitter.p, cj_strength=1.0,
        cj_bright=jitter.brightness, cj_contrast=jitter.contrast, cj_sat=jitter.saturation, cj_hue=jitter.hue,
        random_gray_scale=grey.p, hf_prob=flip.p, rr_prob=float(turn.degrees > 0), rr_degrees=turn.degrees,
        gaussian_blur=blur.p, sigmas=blur.sigma, normalize={"mean": list(views.mean), "std": list(views.std)})


def race(run: Run, sides: dict[str, Side], points: int,
         keep: Callable[[Marks], None]) -> tuple[Marks, Marks]:
    """Train all sides to the end of ``run``'s config. Returns, by side, the marks at the start and at ``points``
    numbers of images (with the accuracy there), and what each turn took. ``keep`` is given the marks at each point."""
    batch = run.train_settings.batch_size
    steps = run.train_settings.epochs * (len(run.splits.train) // batch)
    evaluator = run.evaluator_for([KNN(NEIGHBOURS)], "backbone")
    marks: Marks = {name: [] for name in sides}
    turns: Marks = {name: [] for name in sides}
    done, names = 0, list(sides)
    for until in [*(TURN * round(steps * point / points / TURN) for point in range(points)), steps]:
        while done < until:
            count = min(TURN, until - done)
            for name in names:
                turns[name].append(_turn(sides[name], count, batch, run.device))
            done, names = done + count, names[::-1]
        for name, side in sides.items():
            accuracy = evaluator.measure(side.encoder)[0].value         # not part of the seconds
            marks[name].append(Mark(done * batch, sum(turn.cpu for turn in turns[name]),
                                    sum(turn.wall for turn in turns[name]), accuracy))
            images, cpu, wall, accuracy = marks[name][-1]
            print(f"{name:10} {images:9,} images  {cpu:8.1f} s of CPU  {wall:8.1f} s  kNN {accuracy:.1f} %", flush=True)
        keep(marks)
    return marks, turns


def _turn(side: Side, steps: int, batch: int, device: torch.device) -> Mark:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    cpu, wall = time.process_time(), time.perf_counter()
    side.advance(steps)
    wait()
    return Mark(steps * batch, time.process_time() - cpu, time.perf_counter() - wall)


def report(found: Report, marks: Marks, turns: Marks, what: str) -> None:
    """The rates turn by turn, and who is ahead when; the first turn of each side warms it up and does not count."""
    for name in marks:
        found.add(figure(f"{what}: kNN at the end", name, [marks[name][-1].knn], "%"))
    for clock in ("cpu", "wall"):
        took = {name: [1e3 * getattr(turn, clock) / turn.images for turn in turns[name][1:]] for name in turns}
        for name, values in took.items():
            found.add(figure(f"{what}: {clock} an image", name, values, "ms"))
        if len(marks) < 2:
            continue
        ratios = [theirs / own for theirs, own in zip(took["lightly"], took["ours"])]
        found.add(figure(f"{what}: {clock} an image", "ours", ratios, "x", baseline="lightly", at_least=1))
        found.add(figure(f"{what}: smallest lead, {clock}", "ours",
                         [smallest_lead(marks["ours"], marks["lightly"], clock)], "points", "lightly", at_least=0))
        theirs = max(marks["lightly"], key=lambda mark: mark.knn)
        if (own := seconds_to(marks["ours"], theirs.knn, clock)) is not None:
            found.add(figure(f"{what}: {clock} to {theirs.knn:.1f} %", "ours", [getattr(theirs, clock) / own], "x",
                             baseline="lightly", at_least=1))


def _run(options: argparse.Namespace, place: str) -> Run:
    """The config's run for the whole epochs nearest to ``options.images``."""
    root, name = options.root, options.config or ("moco_cifar10_small.yaml" if options.root else "demo.yaml")
    # What lightly has no setting for is left out on both sides: BatchNorm in groups, and the mask of the own image.
    overrides = ["train.threads=1", f"train.workers={options.workers}", f"train.device={options.device}",
                 f"run.seed={options.seed}", "method.key_bn=sync", "method.bn_groups=1", "log.wandb=off",
                 "method.dictionary.mask_own=false"]
    if options.quick:
        overrides.append("schedule.warmup=0")                           # which is longer than the one epoch
    if not root:
        overrides.append("method.dictionary.size=256")                  # of 1,297 images
    elif not (Path(root) / "cifar-10-batches-py").is_dir():
        overrides.append(f"data={json.dumps({'name': 'common.data.folder', 'root': root})}")
        root = None
    run = Run(open_config(name, data=root or None, dir=place, overrides=overrides))
    epochs = max(1, round(options.images / len(run.splits.train)))
    return Run(open_config(name, data=root or None, dir=place, epochs=epochs, overrides=overrides))


def main() -> None:
    options = arguments(__doc__, quick={"images": 1000, "points": 1}, in_rounds=False, root="", config="",
                        images=20_000, points=10, seed=0, workers=0, device="cpu", picture="", curves="")
    if options.curves:
        if not options.picture:
            raise SystemExit("--curves: no file for their picture. Give --picture FILE.")
        saved = json.loads(Path(options.curves).read_text())
        draw({name: [Mark(*mark) for mark in marks] for name, marks in saved["marks"].items()}, saved["what"],
             Path(options.picture))
        return
    found = Report("time_to_result", options.quick, options.out)
    with tempfile.TemporaryDirectory() as place:
        run = _run(options, place)
        what = Path(run.config.source).stem
        sides: dict[str, Side] = {"ours": Ours(run)}
        if util.find_spec("lightly"):
            sides["lightly"] = Lightly(run, options.workers)
        else:
            print("lightly is not installed (pip install lightly): only ours is measured")
        marks, turns = race(run, sides, options.points, lambda marks: _write(options, what, marks))
    report(found, marks, turns, what)
    if options.picture:
        draw(marks, what, Path(options.picture))


def _write(options: argparse.Namespace, what: str, marks: Marks) -> None:
    """The curves so far: a run that is stopped has left them, and ``--curves`` draws them."""
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"what": what, **machine(), "seed": options.seed, "marks": marks}, indent=1)
    replace_file(options.out / "time_to_result-curves.json", lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()

"""Features of every labelled image by the layers of an encoder, kept in the run's folder for the next measurement.

What is kept is found again by weights, data and transform: any other of these is another file.

Axes: n rows, m test images, B images of a batch, D features of all layers side by side, c channels, S pixels of a side.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common import distributed, tree
from common.bar import bar
from common.data.datasets import Images, Splits
from common.data.loader import Loader, plain_batches
from common.evaluate.evaluator import Evaluator
from common.evaluate.features import Features, check_labelled, collect, evaluating
from common.measuring.labelled import augmented
from common.trained import Trained

FOLDER, KEPT = "features", 4        # in the run's folder; files, the oldest goes first
FORMAT = 1
SEED = 0                            # of the crops and flips: every encoder is measured on the same

logger = logging.getLogger(__name__)


class Stored(NamedTuple):
    """Features [n, D] of both splits, and of which image of its split each row is.

    ``crop_nD`` are of augmented images, view by view, a row for each image of the training split; empty without views.
    ``width``: how many columns each layer has, in their order. float16, or float32 where that was asked for; on the
    CPU.
    """

    train_nD: Tensor
    train_image_n: Tensor
    crop_nD: Tensor
    crop_image_n: Tensor
    crop_view_n: Tensor
    test_mD: Tensor                     # no rows where no test image has a label
    test_image_m: Tensor
    width: dict[str, int]

    @classmethod
    def of(cls, features: Features) -> "Stored":
        """Those of one layer, their images numbered in their order."""
        x_nD = features.train_nD
        test_mD = x_nD[:0] if features.test_mD is None else features.test_mD
        nothing = torch.empty(0, dtype=torch.int64)
        return cls(x_nD, torch.arange(len(x_nD)), x_nD[:0], nothing, nothing, test_mD, torch.arange(len(test_mD)),
                   {features.layer: x_nD.shape[1]})


def stored(trained: Trained, splits: Splits, views: int = 0, dtype: torch.dtype = torch.float16,
           cache: bool = True) -> Stored | None:
    """The features of ``trained``'s backbone, and of its head if that came with it.

    Read from the run's folder if they are there, else computed by all processes together and, if ``cache``, kept there.
    The main process gets them, the others None. A file that is damaged, or another's, is made anew, which is said; so
    is it if nothing can be written. Raises ValueError where a feature does not fit ``dtype``.
    """
    if not cache:
        return _computed(trained, splits, views, dtype)
    key = key_of(trained, splits, views, dtype) if distributed.is_main() else ""
    path = trained.folder / FOLDER / f"{key[:16]}.safetensors"
    found = _read(path, key) if distributed.is_main() else None
    if distributed.from_main(found is not None):
        return found
    made = _computed(trained, splits, views, dtype)
    if made is not None:
        _write(path, key, made)
    return made


def key_of(trained: Trained, splits: Splits, views: int, dtype: torch.dtype) -> str:
    """SHA-256 of all that the features depend on."""
    recipe = repr(augmented(trained.views))          # size, mean and std are the evaluation transform's, too
    about = {"format": FORMAT, "weights": trained.sha256(), "encoder": repr(trained.encoder), "parts": trained.parts,
             "data": [None if images is None else [images.fingerprint(), _contents(images)] for images in splits],
             "transform": recipe, "views": [views, SEED], "dtype": str(dtype)}
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _contents(images: Images) -> str:
    """Of what the images hold: the pixels where they are in memory, else what the file system says of each file."""
    if images.contents:
        return images.contents
    if images.array is not None:
        return hashlib.sha256(images.array.contiguous().numpy().data).hexdigest()
    digest = hashlib.sha256()
    for i in range(len(images)):
        with contextlib.suppress(OSError):              # it cannot be read either
            status = os.stat(images.path(i))
            digest.update(f"{i} {status.st_size} {status.st_mtime_ns};".encode())
    return digest.hexdigest()


def _computed(trained: Trained, splits: Splits, views: int, dtype: torch.dtype) -> Stored | None:
    check_labelled(splits.train)
    evaluator = trained.evaluator(splits, [])           # with the run's batch size and workers
    layers = _Layers(trained)

    def rows(images: Images | None, batches: Iterator[tuple[Tensor, Tensor]], what: str) -> tuple[Tensor, Tensor]:
        if images is None or not (images.labels >= 0).any():
            return torch.empty(0, 0, dtype=dtype), torch.empty(0, dtype=torch.int64)
        total = -(-len(images) // evaluator.batch_size // distributed.world())
        return collect(layers, images, bar(batches, total, f"{what} of {images.name}"), trained.device, dtype)

    def plain(images: Images | None) -> tuple[Tensor, Tensor]:
        batches = iter(()) if images is None else plain_batches(
            images, trained.views, evaluator.batch_size, evaluator.workers, trained.device, care=evaluator.care)
        return rows(images, batches, "features")

    with evaluating(trained.encoder):
        train_nD, train_image_n = plain(splits.train)
        crops = [_in_order(*rows(splits.train, _crops(trained, splits.train, evaluator, view), f"crops {view + 1}"))
                 for view in range(views)]
        test_mD, test_image_m = plain(splits.test)
    width = max(distributed.gather_objects(layers.width), key=len)      # a process may have had no image
    if not distributed.is_main():
        return None
    crop_nD = torch.cat([train_nD[:0], *(x_nD for x_nD, _ in crops)])
    crop_image_n = torch.cat([train_image_n[:0], *(image_n for _, image_n in crops)])
    crop_view_n = torch.cat([train_image_n[:0], *(torch.full_like(image_n, v) for v, (_, image_n) in enumerate(crops))])
    for x_nD in (train_nD, crop_nD, test_mD):
        _check_finite(x_nD)
    return Stored(train_nD, train_image_n, crop_nD, crop_image_n, crop_view_n, test_mD, test_image_m, width)


class _Layers:
    """Backbone and head of an encoder side by side, [B, D], in one pass."""

    def __init__(self, trained: Trained):
        self.encoder, self.head = trained.encoder, "head" in trained.parts
        self.width: dict[str, int] = {}

    def __call__(self, x_BcSS: Tensor) -> Tensor:
        found = {"backbone": self.encoder.backbone(x_BcSS).float()}
        if self.head:
            found["head"] = self.encoder.scaled(self.encoder.head(found["backbone"]).float())
        self.width = {layer: x_BD.shape[1] for layer, x_BD in found.items()}
        return torch.cat(list(found.values()), dim=1)


def _crops(trained: Trained, images: Images, evaluator: Evaluator, view: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An augmented copy of each image, but for a few that fill no batch; for an unreadable one another's.

    Each process takes whole batches, which are the same ones for any number of processes.
    """
    rank, world, num_batches = distributed.rank(), distributed.world(), -(-len(images) // evaluator.batch_size)
    loader = Loader(images, augmented(trained.views), batch_size=len(images) // num_batches, seed=SEED,
                    workers=evaluator.workers, device=trained.device, max_unreadable=1.0, report=None,
                    care=evaluator.care, rank=0, world=1)
    steps = loader.steps_per_epoch
    first, last = (view * steps + steps * part // world for part in (rank, rank + 1))
    with contextlib.closing(loader.stream(first, last)) as stream:
        for _, batches, _ in stream:
            for batch in batches:
                yield batch.index.cpu(), batch.views[0]


def _in_order(x_nD: Tensor, image_n: Tensor) -> tuple[Tensor, Tensor]:
    """By the image's number: the same for any number of processes."""
    order_n = image_n.argsort(stable=True)
    return x_nD[order_n], image_n[order_n]


def _check_finite(x_nD: Tensor) -> None:
    bad = sum(int((~x_bD.isfinite()).any(dim=1).sum()) for x_bD in x_nD.split(4096))
    if bad and x_nD.dtype == torch.float16:
        raise ValueError(f"evaluate: features of {bad} of {len(x_nD)} images are not finite, or above 65,504, which is "
                         "all that float16 holds. Give --precision float32.")
    if bad:
        raise ValueError(f"evaluate: features of {bad} of {len(x_nD)} images are not finite: the encoder's weights or "
                         "statistics are broken. Go back to an older checkpoint.")


def _read(path: Path, key: str) -> Stored | None:
    """What ``_write`` wrote there; None if nothing is there, or, with a word, if it is not that."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in Stored._fields[:-1]}
        whole = (facts.get("key"), facts.get("digest")) == (key, tree.digest(tensors))
        if whole:
            os.utime(path)                              # used: not the first to go
            return Stored(**tensors, width=json.loads(facts["width"]))
        reason = "another's, or damaged"
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
    logger.warning("%s: not the features that were kept there (%s); they are computed anew", path, reason)
    return None


def _write(path: Path, key: str, made: Stored) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in made._asdict().items() if name != "width"}
    facts = {"key": key, "digest": tree.digest(tensors), "width": json.dumps(made.width)}
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")          # two processes may keep the same at a time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside, facts)
        os.replace(beside, path)
        newest = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        for old in newest[KEPT:]:
            old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        logger.warning("%s: the features are not kept (%s)", path.parent, str(error).partition("\n")[0])

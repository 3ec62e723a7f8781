"""What the step, the views, the loader, the search and the loss cost, in counts that no machine changes.

``make costs`` (``python -m tests.costs --write``) counts all cases and writes costs.json: ``calls`` of aten operators,
the backward pass included; ``kilobytes`` of memory that they took; the calls that copy, and those by which the host
reads a value, each by its kind. They are the same for every number of cores, for Python 3.11 and 3.12, and for torch
2.11 and 2.15. Nothing is random or timed.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.backbones import encoder
from common.data import arrays, folder, recipes
from common.data.geometry import RandomResizedCrop
from common.data.loader import Loader
from common.data.views import View, Views
from common.dictionary import Bank, Queue
from common.evaluate.knn import search, vote
from common.losses import log_sum_exp
from common.method import Method
from common.optim import sgd
from common.settings import TrainSettings
from common.train import Trainer
from instdisc import InstDisc
from moco import MoCo

FILE = Path(__file__).with_name("costs.json")
TOLERANCE = 0.10
COPIES = {"clone", "copy_", "_to_copy", "cat", "stack", "index", "index_select", "gather", "repeat", "index_put_"}
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}
IMAGES, BATCH, DIM, QUEUE = 64, 16, 8, 4096

Cost = dict[str, float]


class Tally(TorchDispatchMode):
    """Calls of operators by kind, and the bytes of what they gave back in memory that they were not given."""

    def __init__(self):
        super().__init__()
        self.kinds, self.bytes = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self.kinds[func.overloadpacket.__name__] += 1
        self.bytes += sum(size for place, size in storages(result).items() if place not in given)
        return result

    def cost(self) -> Cost:
        told = {kind: count for kind, count in sorted(self.kinds.items()) if kind in COPIES | READS}
        return {"calls": self.kinds.total(), "kilobytes": round(self.bytes / 1000, 1), **told}


def storages(tree) -> dict[int, int]:
    """Bytes by where they are, of all tensors in ``tree``."""
    found = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class Ready(Loader):
    """The same views at every step, which are not made while the step is counted."""

    def stream(self, start, stop):
        batch = next(super().stream(0, 1))[1]
        for step in range(start, stop):
            yield step, batch, 0.0


def pixels(size: int, channels: int = 3, count: int = IMAGES) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=draw)


def step(method: Callable[[], Method]) -> Cost:
    """The second step of a training: forward, backward, optimizer, ``after_step``."""
    torch.manual_seed(0)
    built, settings = method(), TrainSettings(epochs=9, batch_size=BATCH, workers=0)
    loader = Ready(arrays(pixels(8)).train, recipes.moco_cifar10(8), batch_size=BATCH, seed=0)
    trainer = Trainer(built, loader, sgd(built, BATCH, lr=0.01), lambda epoch: 1.0, settings, torch.device("cpu"))
    steps = trainer.steps()
    next(steps)
    with Tally() as found:
        next(steps)
    return found.cost()


def moco(**settings) -> Method:
    return MoCo(encoder("w4s1", dim=DIM, image_size=8), Queue(QUEUE, DIM), momentum=0.99, temperature=0.2,
                **{"key_bn": "shuffle", "bn_groups": 4} | settings)


def instdisc(negatives: int | None, **settings) -> Method:
    return InstDisc(encoder("w4s1", dim=DIM, image_size=8), Bank(IMAGES, DIM, negatives=negatives), **settings)


def views(name: str, from_memory: bool) -> Cost:
    """A batch of all views of a recipe: from images in memory, or from crops that a worker has cut."""
    recipe: Views = getattr(recipes, name)(16)
    images = pixels(24 if from_memory else 16, len(recipe.mean), BATCH)
    index_B = torch.arange(BATCH)
    with Tally() as found:
        if from_memory:
            recipe.from_memory(images, 0, 0, index_B)
        else:
            for view in range(recipe.num_views):
                recipe.finish(images, 0, 0, index_B, view)
    return found.cost()


class Weighed(Views):
    """Crops only; notes the bytes of what comes to be finished."""

    def finish(self, crop_BcSS, *arguments):
        self.bytes = getattr(self, "bytes", 0) + crop_BcSS.nbytes
        return super().finish(crop_BcSS, *arguments)


def loader(size: int = 224, batch: int = 4) -> Cost:
    """A batch of two crops of each image from JPEG files: read, cropped, normalised; and what a worker hands over."""
    recipe = Weighed(size, 2 * [View(RandomResizedCrop((0.2, 1.0)), ())], *recipes.IMAGENET)
    with tempfile.TemporaryDirectory() as place:
        for i in range(2 * batch):
            values = np.random.default_rng(i).integers(0, 256, (250 + i, 300, 3), dtype=np.uint8)
            Image.fromarray(values).save(Path(place) / f"{i}.jpg")
        images = folder(Path(place)).train
        reads, read = Counter(), images.read
        images.read = lambda i: reads.update([i]) or read(i)
        stream = Loader(images, recipe, batch_size=batch, seed=0).stream(0, 2)
        next(stream)
        recipe.bytes = 0
        reads.clear()
        with Tally() as found:
            next(stream)
        stream.close()
    return {"bytes a picture": recipe.bytes / batch, "decodes a picture": reads.total() / batch, **found.cost()}


def knn() -> Cost:
    """Torch's search and the vote, of 100 queries among 1,000 images."""
    draw = torch.Generator().manual_seed(0)
    train_nD, query_mD = (F.normalize(torch.randn(n, 32, generator=draw), dim=1) for n in (1000, 100))
    with Tally() as found:
        similarity_mk, index_mk = search(train_nD, query_mD, 20, "torch")
        vote(similarity_mk, index_mk % 10, 10, 0.07)
    return found.cost()


def softmax() -> Cost:
    """Loss and gradient over 2,000 keys for 16 queries."""
    draw = torch.Generator().manual_seed(0)
    q_BC, keys_MC = (F.normalize(torch.randn(n, 32, generator=draw), dim=1) for n in (BATCH, 2000))
    with Tally() as found:
        log_sum_exp(q_BC.requires_grad_(), keys_MC, 0.1)[0].sum().backward()
    return found.cost()


RECIPES = ("moco_v1", "moco_v2", "moco_v3", "instdisc", "moco_cifar10", "instdisc_cifar10", "small_color", "digits",
           "fashion")
CASES: dict[str, Callable[[], Cost]] = {
    "step: moco": partial(step, moco),
    "step: moco, symmetric": partial(step, partial(moco, symmetric="mean")),
    "step: moco, split batchnorm": partial(step, partial(moco, key_bn="split")),
    "step: instdisc, full softmax": partial(step, partial(instdisc, None, loss="full_softmax")),
    "step: instdisc, nce": partial(step, partial(instdisc, 32)),
    **{f"views from memory: {name}": partial(views, name, True) for name in RECIPES},
    **{f"views from crops: {name}": partial(views, name, False) for name in RECIPES},
    "loader: a batch from files": loader,
    "knn": knn,
    "softmax over a dictionary": softmax,
}


def differences(case: str, found: Cost, kept: Cost) -> list[str]:
    """What has grown or fallen by more than ``TOLERANCE``, a line each."""
    lines = []
    for what in sorted(found.keys() | kept.keys()):
        now, was = found.get(what, 0), kept.get(what, 0)
        if abs(now - was) > TOLERANCE * was:
            lines.append(f"{case}: {what} {'grew' if now > was else 'fell'} from {was:g} to {now:g}")
    return lines


def read() -> dict[str, Cost]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write costs.json; without it, only say what differs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, kept = {case: count() for case, count in CASES.items()}, read()
    for case, cost in found.items():
        lines = differences(case, cost, kept[case]) if case in kept else [f"{case}: not there before"]
        print("\n".join(lines or [f"{case}: as it was"]))
    if options.write:
        lines = [f"{json.dumps(case)}: {json.dumps(cost)}" for case, cost in found.items()]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

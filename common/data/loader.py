"""Batches of views as a function of (seed, step), for any number of workers and processes.

The loader has no state: the order of an epoch is a hash of (seed, epoch), a view one of (seed, epoch, image, view).
So a run goes on exactly, given nothing but its step number.

Axes: n images of the set, N of a step on all ranks, B of one micro-batch on this rank, V views, c channels, S pixels of
a view's side. Workers store crops with their channels last.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing

import torch
from torch import Tensor

from common import distributed
from common.data.augment import to_device
from common.data.datasets import Images
from common.data.orders import Order, Shuffled
from common.data.reading import ATTEMPTS, EvaluationCrops, TrainingCrops, Unreadable, candidates
from common.data.transfer import on_device
from common.data.views import Views
from common.data.workers import PLAIN_CARE, Care, in_order
from common.method import Batch
from common.printable import printable
from common.settings import check_shares

CPU = torch.device("cpu")
Report = Callable[[Unreadable], None]


def log_unreadable(image: Unreadable) -> None:
    logging.getLogger(__name__).warning("%s cannot be read: %s", printable(image.path), image.reason)


def check_batch(images: Images, batch_size: int, accumulate: int, world: int) -> None:
    """Raises ValueError unless ``images`` fill a batch, and a batch divides into micro-batches and ranks' shares."""
    if accumulate < 1:
        raise ValueError(f"train.accumulate: {accumulate}; the number of micro-batches in a step is 1 or more.")
    check_shares(batch_size, accumulate, world)
    parts = accumulate * world
    if len(images) < batch_size:
        fitting = len(images) // parts * parts
        smaller = f" or a batch of at most {fitting}" if fitting else ""
        raise ValueError(
            f"train.batch_size: {batch_size}, but {images.name} holds {len(images)} images and a batch holds none "
            f"twice. Give more images{smaller}."
        )


def check_order(order: Order | None, images: Images, batch_size: int, accumulate: int, world: int) -> str:
    """Raises ValueError unless ``images`` can be ordered so; returns what the user is to know of it, or ""."""
    return (order or Shuffled()).check(images, batch_size, batch_size // (accumulate * world))


class Loader:
    """Training batches of ``images``, seen through ``views``.

    ``batch_size`` counts the images of one optimizer step, over all ranks and ``accumulate`` micro-batches; what is
    left over at the end of an epoch is dropped. ``order`` None is shuffled (a list of pairs: by pairs). Images in
    memory are moved to ``device`` and cropped there (a batch at a time, if all would take more than half of what is
    free on a GPU); others are read and cropped by ``workers`` processes (0: by this one). An image that cannot be read
    is replaced by another, always the same for (seed, epoch, image), and its pair, in a list of pairs, has no label
    then; it is kept in ``unreadable`` and passed to ``report`` when first met.
    Raises ValueError if the set cannot be cut into such batches, and here or while streaming once more than the share
    ``max_unreadable`` of it has turned out to be unreadable (of what this rank has met). A worker that dies or hangs is
    replaced, as ``care`` has it, and the batches stay the same.
    """

    def __init__(self, images: Images, views: Views, *, batch_size: int, seed: int, accumulate: int = 1,
                 workers: int = 0, device: torch.device = CPU, max_unreadable: float = 0.01,
                 report: Report | None = log_unreadable, care: Care = PLAIN_CARE, rank: int | None = None,
                 world: int | None = None, order: Order | None = None):
        self.rank = distributed.rank() if rank is None else rank
        self.world = distributed.world() if world is None else world
        check_batch(images, batch_size, accumulate, self.world)
        remark = check_order(order, images, batch_size, accumulate, self.world)
        if remark and self.rank == 0:
            logging.getLogger(__name__).warning("%s: %s", images.name, remark)
        self._in_order = order or Shuffled()
        self.images, self.views, self.batch_size, self.accumulate = images, views, batch_size, accumulate
        self.seed, self.workers, self.device = seed, workers, device
        self.max_unreadable, self.report, self.care = max_unreadable, report, care
        self.steps_per_epoch = len(images) // batch_size
        self._stretch = self._in_order.every or self.steps_per_epoch        # steps of which the order is asked at once
        self.unreadable: dict[int, Unreadable] = {}
        self._seconds_for_device = 0.0                      # for which the host waited for it, asked for a batch
        self._note([Unreadable(i, images.path(i), reason) for i, reason in images.bad.items()])
        self._array = None if images.array is None else _placed(images.name, images.array, device)

    def shuffled(self) -> "Loader":
        """The same images, as they come if no method has an order of its own."""
        other = copy.copy(self)
        other._in_order, other._stretch = Shuffled(), self.steps_per_epoch
        return other

    def order(self, epoch: int) -> Tensor:
        """The images of an epoch in the order in which they are seen, int64; what fills no step is at the end.

        Of an order with stretches of its own (``Order.every``): those of the stretch of that number, which is also what
        views are drawn by.
        """
        return self._in_order(self.images, self.batch_size, self.seed, epoch)

    def images_of(self, step: int) -> list[int]:
        """The images of one step on all ranks, as the order has them; an unreadable one has a substitute."""
        epoch, place = divmod(step, self._stretch)
        return self.order(epoch)[place * self.batch_size : (place + 1) * self.batch_size].tolist()

    def stream(self, start: int, stop: int) -> Generator[tuple[int, list[Batch], float], None, None]:
        """(step, this rank's micro-batches, seconds that they took to come) for steps ``start`` to ``stop`` - 1.

        Micro-batch a is slice a of the step's N images, and a rank's share is a slice of that. Tensors are on the
        device. Worker processes live until the generator is exhausted or closed, so close it. Seconds in which the host
        only waited for the device, which was at work on the step before, do not count: no data were missed in them.
        """
        batches_of = self._from_files if self._array is None else self._from_memory
        with closing(batches_of(start, stop)) as batches:
            for step in range(start, stop):
                asked = time.perf_counter() - self._seconds_for_device
                step_batches = [next(batches) for _ in range(self.accumulate)]
                yield step, step_batches, time.perf_counter() - self._seconds_for_device - asked

    def _waited_for_device(self, seconds: float) -> None:
        self._seconds_for_device += seconds

    def _shares(self, start: int, stop: int) -> Iterator[tuple[int, list[int]]]:
        """(epoch, images) of each micro-batch of this rank."""
        order_n, of_epoch = torch.empty(0), -1
        for step in range(start, stop):
            epoch, place = divmod(step, self._stretch)
            if epoch != of_epoch:
                order_n, of_epoch = self.order(epoch), epoch
            step_N = order_n[place * self.batch_size : (place + 1) * self.batch_size]
            for index_B in step_N.view(self.accumulate, self.world, -1)[:, self.rank]:
                yield epoch, index_B.tolist()

    def _from_memory(self, start: int, stop: int) -> Generator[Batch, None, None]:
        assert self._array is not None
        for epoch, share in self._shares(start, stop):
            index_B = torch.tensor([self._readable(epoch, i) if i in self.images.bad else i for i in share])
            image_BcHW = to_device(self._array[to_device(index_B, self._array.device)], self.device)
            yield self._batch(self.views.from_memory(image_BcHW, self.seed, epoch, index_B), index_B)

    def _readable(self, epoch: int, index: int) -> int:
        for i in candidates(len(self.images), self.seed, epoch, index):
            if i not in self.images.bad:
                return i
        raise self._too_many(f"{ATTEMPTS} of them in a row")

    def _from_files(self, start: int, stop: int) -> Generator[Batch, None, None]:
        num_images, size = self.batch_size // (self.accumulate * self.world), self.views.size
        shape = self.views.num_views, num_images, size, size, self.images.channels
        task = TrainingCrops(self.images, self.views, self.seed)
        with closing(in_order(task, self._shares(start, stop), self.workers, shape, name=self.images.path,
                              care=self.care, locked=self.device.type == "cuda")) as answers:
            for read, crops_VBSSc in on_device(answers, self.device, self._waited_for_device):
                self._note(read.failures)
                if len(read.index) < num_images:
                    raise self._too_many(f"{ATTEMPTS} of them in a row")
                index_B = torch.tensor(read.index)
                crops = enumerate(crops_VBSSc.movedim(-1, -3))
                views = [self.views.finish(crop_BcSS, self.seed, read.epoch, index_B, v) for v, crop_BcSS in crops]
                yield self._batch(views, index_B)

    def _batch(self, views: list[Tensor], index_B: Tensor) -> Batch:
        label_B = self.images.labels[index_B]
        if self.images.together == 2:               # nobody has said what a substitute and the other image are
            whole_P = (index_B[0::2] % 2 == 0) & (index_B[0::2] + 1 == index_B[1::2])
            label_B = torch.where(whole_P.repeat_interleave(2), label_B, -1)
        return Batch(views, to_device(index_B, self.device), to_device(label_B, self.device))

    def _note(self, failures: Iterable[Unreadable]) -> None:
        for image in failures:
            if image.index not in self.unreadable:
                self.unreadable[image.index] = image
                if self.report:
                    self.report(image)
        if len(self.unreadable) / len(self.images) > self.max_unreadable:
            raise self._too_many(f"more than max_unreadable = {self.max_unreadable:.2%}")

    def _too_many(self, what: str) -> ValueError:
        count, n = len(self.unreadable), len(self.images)
        first = "; ".join(f"{printable(image.path)} ({image.reason})" for image in list(self.unreadable.values())[:5])
        return ValueError(
            f"data: {count} of the {n} images of {self.images.name} ({count / n:.2%}) cannot be read, {what}. "
            f"The first: {first}. Repair or remove them, or raise train.max_unreadable. "
            "tools/check_data.py lists all of them."
        )


def _placed(name: str, array_ncHW: Tensor, device: torch.device) -> Tensor:
    """On ``device``, unless it is a GPU that has too little memory left for a training beside them."""
    free = free_bytes(device)
    if array_ncHW.nbytes <= free / 2:
        return array_ncHW.to(device)
    logging.getLogger(__name__).warning(
        "%s: %.1f GB of images stay in the host's memory, for %.1f GB are free on %s; they travel a batch at a time",
        name, array_ncHW.nbytes / 1e9, free / 1e9, device)
    return array_ncHW


def free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def plain_batches(images: Images, views: Views, batch_size: int, workers: int = 0, device: torch.device = CPU,
                  rank: int | None = None, world: int | None = None, report: Report | None = None,
                  care: Care = PLAIN_CARE) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Every image once, in order, as the evaluation sees it: index [B] on the CPU, float32 [B, c, S, S] on ``device``.

    Each rank gets a contiguous share; its last batch may be short. Images that cannot be read are left out, which the
    index shows; those that were not known to be so before are passed to ``report``.
    """
    rank = distributed.rank() if rank is None else rank
    world = distributed.world() if world is None else world
    share = range(len(images) * rank // world, len(images) * (rank + 1) // world)
    wanted = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
    if images.array is not None:
        for rows in wanted:
            index_B = torch.tensor([i for i in rows if i not in images.bad], dtype=torch.int64)
            if len(index_B):
                yield index_B, views.evaluation_batch(to_device(images.array[index_B], device))
        return
    shape = batch_size, views.size, views.size, images.channels
    task = EvaluationCrops(images, views)
    with closing(in_order(task, wanted, workers, shape, name=images.path, care=care,
                          locked=device.type == "cuda")) as answers:
        for read, crops_BSSc in on_device(answers, device):
            if report:
                for image in read.failures:
                    report(image)
            if read.index:
                crops_BcSS = crops_BSSc[: len(read.index)].movedim(-1, -3).contiguous()
                yield torch.tensor(read.index), views.normalize(crops_BcSS)

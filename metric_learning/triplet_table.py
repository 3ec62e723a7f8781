"""Triplets of training images that were mined for some steps, and the order in which these steps see them.

Axes: R triplets of the table, T of the steps.
"""

import torch
from torch import Tensor, nn

from common import counter
from common.data.datasets import Images
from common.data.orders import Classes, Order

LONGEST = 10**8         # images of the steps between two looks: their order is held in memory


class Table(nn.Module):
    """The triplets that were mined last: rows of training images, -1 from where there are no more."""

    tables = ("triplet", "active")              # large, and changed between steps only
    triplet: Tensor
    active: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("triplet", torch.full((size, 3), -1))
        self.register_buffer("active", torch.zeros(size, dtype=torch.bool))

    def write_(self, triplet_R3: Tensor, active_R: Tensor) -> None:
        """In place of all before."""
        self.triplet.fill_(-1)[:len(triplet_R3)] = triplet_R3.to(self.triplet.device)
        self.active.fill_(False)[:len(active_R)] = active_R.to(self.active.device)

    def read(self) -> tuple[Tensor, Tensor]:
        """Rows [R, 3], and whether each is active [R], on the CPU."""
        triplet, active = self.triplet.cpu(), self.active.cpu()
        there = triplet[:, 0] >= 0
        return triplet[there], active[there]


class Mined(Order):
    """The triplets of ``table``, anchor, positive and negative side by side, for ``every`` steps.

    As many as these steps hold, shuffled: each once before any comes again, the active ones first.
    """

    every: int

    def __init__(self, table: Table, every: int):
        self.table, self.every = table, every

    def check(self, images: Images, batch_size: int, share: int) -> str:
        if share % 3:
            raise ValueError(f"{share} images of a process' micro-batch are no triplets. Give a train.batch_size of "
                             "which each holds a multiple of 3.")
        if self.every * batch_size > LONGEST:
            raise ValueError(f"every: {self.every} steps of {batch_size} images are ordered at once, and these are "
                             f"more than {LONGEST:,}. Give fewer.")
        if not holds_triplet(images.labels):
            classes = Classes.of(images.labels)
            raise ValueError(f"triplets need two classes, one of two images at least; {images.name} has "
                             f"{len(classes.member)} labelled images in {len(classes)} "
                             f"class{'es' * (len(classes) != 1)}. Give labels of more.")
        return ""

    def __call__(self, images: Images, batch_size: int, seed: int, epoch: int) -> Tensor:
        triplet_R3, active_R = self.table.read()
        if not len(triplet_R3) or not 0 <= int(triplet_R3.min()) <= int(triplet_R3.max()) < len(images):
            # mined before the first step, so this is a checkpoint's, which may be a stranger's
            raise ValueError(f"table: the triplets of the checkpoint are none, or not all of images of {images.name}, "
                             f"of which there are {len(images)}. Go back to another checkpoint.")
        key, count = (seed, counter.stream("offline order"), epoch), self.every * batch_size // 3
        row_R = counter.permutation(len(triplet_R3), *key, 0)
        row_R = torch.cat([row_R[active_R[row_R]], row_R[~active_R[row_R]]])
        row_T = row_R.repeat(-(-count // len(row_R)))[:count]
        return triplet_R3[row_T[counter.permutation(count, *key, 1)]].flatten()


def holds_triplet(labels_n: Tensor) -> bool:
    """Whether two images of one class are among them, and one of another."""
    classes = Classes.of(labels_n)
    return len(classes) > 1 and len(classes.holding(2)) > 0

"""In which order an epoch's images are seen: shuffled, P classes x K images a step, in pairs or in tuplets.

An order has no state: it is a hash of (seed, epoch), whatever the number of processes, so a run goes on exactly.

Axes: n images of the set, m labelled ones of them, C classes, S steps of an epoch, P classes of a step (or pairs of an
epoch, where it says so), K images of a class in a step, T tuplets of an epoch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common import counter
from common.data.datasets import Images


class Order:
    """A callable that gives the images of at least S = n // ``batch_size`` steps of ``epoch``, int64, in their order. A
    micro-batch of a process is a slice of that, so what belongs together stands side by side.

    One whose ``every`` is set gives the images of so many steps instead, and is given the number of that stretch.
    """

    every: int | None = None

    def check(self, images: Images, batch_size: int, share: int) -> str:
        """Raises ValueError for images, or for a batch and the ``share`` of it that is a process' micro-batch, that
        cannot be ordered so. Returns what the user is to know of it, "" for nothing."""
        raise ValueError(f"{type(self).__name__} says of no images how they are ordered. Give one of "
                         "common.data.orders, such as Balanced.")

    def __call__(self, images: Images, batch_size: int, seed: int, epoch: int) -> Tensor:
        raise NotImplementedError


class Shuffled(Order):
    """Every image once; in a list of pairs, both images of each."""

    def check(self, images: Images, batch_size: int, share: int) -> str:
        if images.together == 2:
            _require_pairs(share)
        return ""

    def __call__(self, images: Images, batch_size: int, seed: int, epoch: int) -> Tensor:
        group = images.together
        first_n = counter.permutation(len(images) // group, seed, counter.stream("order"), epoch)
        return (first_n[:, None] * group + torch.arange(group)).flatten()


class Streams(Shuffled):
    """Two random streams of images: image 2i of a batch is of the first, 2i + 1 of the second, and the two are a pair.

    Every image once an epoch, as in ``Shuffled``; images without a label come, too. Of C classes of one size one pair
    in C is of one class.
    """

    def check(self, images: Images, batch_size: int, share: int) -> str:
        _require_single(images)
        classes = len(Classes.of(images.labels))
        if classes < 2:
            raise ValueError(f"pairs of two streams are of one class or of two, and {images.name} has labelled images "
                             f"of {classes}. Give images of two classes or more, with their labels.")
        _require_pairs(share)
        return ""


@dataclass(frozen=True)
class Balanced(Order):
    """P x K: each step holds K = ``per_class`` images of each of P classes (Hermans et al. 2017, arXiv:1703.07737,
    Sec. 2), P being train.batch_size / K; the images of a class stand side by side.

    All classes come equally often, whatever they hold: each once before any comes again, but for those that no longer
    fill a step (C modulo P, others each time). So do the images of a class. A step holds no image twice. Images without
    a label, and classes of fewer than K images, are left out.
    """

    per_class: int = 4

    def __post_init__(self) -> None:
        if self.per_class < 2:
            raise ValueError(f"per_class: {self.per_class} given. Give 2 or more: one image alone has no positive.")

    def check(self, images: Images, batch_size: int, share: int) -> str:
        _require_single(images)
        if share % self.per_class or share < 2 * self.per_class:
            raise ValueError(f"{share} images of a process' micro-batch are not two or more classes of "
                             f"{self.per_class} images. Give a train.batch_size of which each holds a multiple of "
                             f"{self.per_class}, {2 * self.per_class} at least, or another per_class.")
        classes, step = Classes.of(images.labels), batch_size // self.per_class
        large = classes.holding(self.per_class)
        if len(large) < step:
            raise ValueError(f"a step takes {self.per_class} images of each of {step} classes, and of the "
                             f"{len(classes)} classes of {images.name} {len(large)} hold {self.per_class} labelled "
                             "images or more. Give a smaller train.batch_size, or another per_class: of a larger one "
                             "a step takes fewer classes, a smaller one leaves fewer out.")
        left = len(classes) - len(large)
        return f"{left} of {len(classes)} classes hold fewer than {self.per_class} images and are left out" if left \
            else ""

    def __call__(self, images: Images, batch_size: int, seed: int, epoch: int) -> Tensor:
        classes, steps = Classes.of(images.labels), len(images) // batch_size
        class_SP = groups(classes.holding(self.per_class), batch_size // self.per_class, steps, seed,
                          counter.stream("classes"), epoch)
        key = seed, counter.stream("of a class"), epoch
        return classes.drawn(class_SP.flatten(), self.per_class, *key).flatten()


@dataclass(frozen=True)
class RandomPairs(Order):
    """Pairs of labelled images, side by side; the share ``positive`` of them has one label.

    So many in any row of pairs, to within one. The first of a pair is each image in turn; the second is any other image
    of its class, or any image of another class. Images without a label are left out, those alone in their class begin
    no positive pair. A step may hold an image in two pairs.
    """

    positive: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.positive < 1:
            raise ValueError(f"positive: {self.positive} given. Give a share of the pairs between 0 and 1: without "
                             "pairs of both kinds there is nothing to learn.")

    def check(self, images: Images, batch_size: int, share: int) -> str:
        _require_single(images)
        classes = Classes.of(images.labels)
        if len(classes) < 2 or not len(classes.holding(2)):
            raise ValueError(f"pairs of equal and of different label need two classes, one of two images at least; "
                             f"{images.name} has {len(classes.member)} labelled images in {len(classes)} "
                             f"class{'es' * (len(classes) != 1)}. Give labels of more.")
        _require_pairs(share)
        return ""

    def __call__(self, images: Images, batch_size: int, seed: int, epoch: int) -> Tensor:
        classes = Classes.of(images.labels)
        number_P = torch.arange(len(images) // batch_size * batch_size // 2)
        same_P = ((number_P + 1) * self.positive).floor() > (number_P * self.positive).floor()
        count_m = classes.count.repeat_interleave(classes.count)
        start_m = classes.start.repeat_interleave(classes.count)
        place_m = torch.arange(len(count_m))                            # images by their places among the sorted ones
        first_P = torch.empty_like(number_P)
        for same, pool in ((True, place_m[count_m > 1]), (False, place_m)):
            times = int((same_P == same).sum())
            first_P[same_P == same] = groups(pool, 1, times, seed, counter.stream("first"), epoch, same).flatten()
        start_P, count_P, m = start_m[first_P], count_m[first_P], len(count_m)
        key = seed, counter.stream("second"), epoch, number_P
        of_class_P = start_P + (first_P - start_P + 1 + counter.integers((count_P - 1).clamp(min=1), *key)) % count_P
        other_P = (start_P + count_P + counter.integers(m - count_P, *key)) % m
        second_P = torch.where(same_P, of_class_P, other_P)
        return classes.member[torch.stack([first_P, second_P], dim=1).flatten()]


@dataclass(frozen=True)
class Tuplets(Order):
    """Tuplets of ``size`` labelled images, side by side: two of one class, then one of each of size - 2 other classes
    (Sohn 2016, Section 3.1, where size is N + 1).

    Classes come equally often, and so do the images of a class, as in ``Balanced``. A step may hold an image in two
    tuplets. Images without a label, and those alone in their class, are left out.
    """

    size: int = 4

    def __post_init__(self) -> None:
        if self.size < 3:
            raise ValueError(f"size: {self.size} given. Give 3 or more: an image, a positive, and a negative.")

    def check(self, images: Images, batch_size: int, share: int) -> str:
        _require_single(images)
        if share % self.size:
            raise ValueError(f"{share} images of a process' micro-batch are no tuplets of {self.size}. Give a "
                             f"train.batch_size of which each holds a multiple of {self.size}, or another size.")
        classes = Classes.of(images.labels)
        large = classes.holding(2)
        if len(large) < self.size - 1:
            raise ValueError(f"a tuplet of {self.size} images takes {self.size - 1} classes, and of the {len(classes)} "
                             f"classes of {images.name} {len(large)} hold two labelled images or more. Give a smaller "
                             "size, or more labels.")
        left = len(classes) - len(large)
        return f"{left} of {len(classes)} classes hold one image and are left out" if left else ""

    def __call__(self, images: Images, batch_size: int, seed: int, epoch: int) -> Tensor:
        classes, tuplets = Classes.of(images.labels), len(images) // batch_size * (batch_size // self.size)
        class_TN = groups(classes.holding(2), self.size - 1, tuplets, seed, counter.stream("classes"), epoch)
        pair_T2 = classes.drawn(class_TN[:, 0], 2, seed, counter.stream("of a class"), epoch)
        others = classes.drawn(class_TN[:, 1:].flatten(), 1, seed, counter.stream("others"), epoch)
        return torch.cat([pair_T2, others.view(tuplets, -1)], dim=1).flatten()


class Classes(NamedTuple):
    """The m labelled images sorted by class, and where each of the C classes that there are begins among them."""

    member: Tensor
    start: Tensor
    count: Tensor           # type: ignore[assignment]   # hides tuple.count

    @classmethod
    def of(cls, labels_n: Tensor) -> "Classes":
        """Numbers of which no image is are no class."""
        labelled_m = (labels_n >= 0).nonzero().flatten()
        member_m = labelled_m[labels_n[labelled_m].argsort(stable=True)]
        count_C = labels_n[member_m].unique_consecutive(return_counts=True)[1]
        return cls(member_m, count_C.cumsum(0) - count_C, count_C)

    def __len__(self) -> int:
        return len(self.count)

    def holding(self, least: int) -> Tensor:
        """The classes, counted from 0 among those that there are, of so many images or more."""
        return (self.count >= least).nonzero().flatten()

    def members(self) -> tuple[Tensor, ...]:
        """The images of each class."""
        return self.member.split(self.count.tolist())

    def drawn(self, class_T: Tensor, size: int, *keys: int) -> Tensor:
        """``size`` different images for each mention of a class, [T, size], by ``groups``."""
        times_C = class_T.bincount(minlength=len(self)).tolist()
        chosen = [groups(members, size, times, *keys)
                  for members, times in zip(self.members(), times_C, strict=True) if times]
        return torch.cat(chosen)[class_T.argsort(stable=True).argsort()]


def groups(members_m: Tensor, size: int, times: int, *keys: int) -> Tensor:
    """``times`` groups of ``size`` different members each, [times, size], random by ``keys``.

    Each member comes once before any comes again, but for those left over when all are cut into groups (m modulo size,
    others in each round).
    """
    rounds = -(-times // (len(members_m) // size))
    rank_Rm = counter.bits(*keys, torch.arange(rounds)[:, None], members_m).argsort(dim=1, stable=True)
    whole = len(members_m) // size * size
    return members_m[rank_Rm[:, :whole]].reshape(-1, size)[:times]


def _require_pairs(share: int) -> None:
    if share % 2:
        raise ValueError(f"{share} images of a process' micro-batch are no pairs. Give a train.batch_size of which "
                         "each holds an even number.")


def _require_single(images: Images) -> None:
    if images.together != 1:
        raise ValueError(f"{images.name} is a list of pairs, which go through a step as they stand there. Leave the "
                         "order out (null).")

"""Features of images that are compared: of the first of a pair by the first tower, of the second by the second.

Axes: P pairs, n images, D features.
"""

import argparse
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common import distributed
from common.bar import bar
from common.config import ConfigError
from common.data.datasets import Images, Splits
from common.data.loader import plain_batches
from common.data.subset import Subset
from common.evaluate.features import collect, evaluating, flat
from common.evaluate.verification import scores
from common.measuring.pair_list import Pairs
from common.trained import Trained, load_trained

Layer = Literal["backbone", "head", "pixels"]
Measure = Literal["cosine", "euclidean", "learned"]


class Rows(NamedTuple):
    """Features of those images that can be read, and which they are; complete on the main process only."""

    x_nD: Tensor
    row_n: Tensor


class Sides(NamedTuple):
    """Pairs, with the features of all their images as first and as second ones: two only where there are two towers."""

    pairs: Pairs
    first: Rows
    second: Rows


class Scored(NamedTuple):
    """The pairs whose images could both be read, with their scores."""

    pairs: Pairs
    score_P: Tensor
    left_out: int


def loaded(options: argparse.Namespace) -> Trained:
    """The checkpoint; ``options.measure`` and ``options.layer`` are settled where they were left open."""
    trained = load_trained(options.checkpoint, options.overrides, options.trust, data=options.data,
                           epoch=options.epoch, untrained=options.untrained)
    options.measure, options.layer = settled(trained, options.measure, options.layer, bool(options.subject))
    trained.check_layer(options.layer)
    return trained


def settled(trained: Trained, measure: Measure | None, layer: Layer | None, single: bool) -> tuple[Measure, Layer]:
    """A measure that the method has learned is taken, unless another or the backbone is asked for. ``single``: no pairs
    are compared."""
    learned = trained.method.learned and "head" in trained.parts
    if measure == "learned" and (not learned or layer == "backbone"):
        why = "it is one of the head's features" if learned else \
            f"{type(trained.method).__name__} has learned none, or its head did not come with these weights"
        raise ConfigError(f"{trained.file}: --measure learned: {why}. Leave out --layer, or give --measure cosine or "
                          "euclidean.")
    if measure is None:
        measure = "learned" if learned and layer != "backbone" and not single else "cosine"
    return measure, layer or ("head" if measure == "learned" else "backbone")


def embedded(trained: Trained, images: Images, layer: Layer, side: Literal[0, 1] = 0) -> Rows:
    """Features of ``images``, all of which have labels, as first (0) or second (1) ones of pairs.

    Raises ValueError where none can be read, and where a feature is not finite.
    """
    how, tower = trained.evaluator(Splits(images), []), trained.method.towers()[side]
    embeds: dict[Layer, Callable[[Tensor], Tensor]] = {"backbone": tower.backbone, "head": tower, "pixels": flat}
    with evaluating(tower):
        batches = plain_batches(images, trained.views, how.batch_size, how.workers, trained.device, care=how.care)
        total = -(-len(images) // how.batch_size // distributed.world())
        x_nD, row_n = collect(embeds[layer], images, bar(batches, total, f"features of {images.name}"), trained.device)
    read, bad = distributed.from_main((len(x_nD), int((~x_nD.isfinite()).any(dim=1).sum())))   # so that all ranks end
    if not read:
        raise ValueError(f"{images.name}: none of its {len(images)} images can be read. Give image files.")
    if bad:
        raise ValueError(f"{images.name}: the features of {bad} of {read} images are not finite: the encoder's weights "
                         "or statistics are broken. Go back to an older checkpoint.")
    return Rows(x_nD, row_n)


def both_sides(trained: Trained, pairs: Pairs, layer: Layer) -> Sides:
    """Each image once by each tower that it goes through."""
    first, second = trained.method.towers()
    if first is second or layer == "pixels":
        rows = embedded(trained, pairs.images, layer)
        return Sides(pairs, rows, rows)
    return Sides(pairs, _of_side(trained, pairs, pairs.first_P, layer, 0),
                 _of_side(trained, pairs, pairs.second_P, layer, 1))


def _of_side(trained: Trained, pairs: Pairs, of_P: Tensor, layer: Layer, side: Literal[0, 1]) -> Rows:
    used = of_P.unique()
    x_nD, row_n = embedded(trained, Subset(pairs.images, used), layer, side)
    return Rows(x_nD, used[row_n])


def score(sides: Sides, compare: Callable[[Tensor, Tensor], Tensor]) -> Scored:
    """Pairs of an image that could not be read are left out, and counted."""
    pairs = sides.pairs
    first_P, second_P = (_places(rows, len(pairs.images))[of_P]
                         for rows, of_P in ((sides.first, pairs.first_P), (sides.second, pairs.second_P)))
    read_P = (first_P >= 0) & (second_P >= 0)
    score_P = compare(sides.first.x_nD[first_P[read_P]], sides.second.x_nD[second_P[read_P]])
    left = Pairs(pairs.images, pairs.first_P[read_P], pairs.second_P[read_P], pairs.same_P[read_P])
    return Scored(left, score_P, int((~read_P).sum()))


def _places(rows: Rows, count: int) -> Tensor:
    place_n = torch.full((count,), -1)
    place_n[rows.row_n] = torch.arange(len(rows.row_n))
    return place_n


def comparing(trained: Trained, measure: Measure) -> Callable[[Tensor, Tensor], Tensor]:
    """What gives the score of each pair, [P], float64 on the CPU."""
    if measure != "learned":
        return lambda x_PD, y_PD: scores(x_PD, y_PD, measure)

    @torch.no_grad()
    def learned(x_PD: Tensor, y_PD: Tensor) -> Tensor:
        return trained.method.similarity(x_PD.to(trained.device), y_PD.to(trained.device)).cpu().double()
    return learned

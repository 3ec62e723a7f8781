"""``tools/verify.py`` on pairs: scored, measured, written down and drawn.

Axes: P pairs, n images, D features.
"""

import argparse
import csv
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from common import distributed
from common.atomic import replace_file
from common.data.datasets import Images
from common.evaluate.result import Result, Setting, wilson
from common.evaluate.table import table
from common.evaluate.verification import (
    Folds,
    Point,
    Roc,
    area,
    area_interval,
    at_far,
    best_threshold,
    equal_error_rate,
    k_fold,
    roc,
    scores,
)
from common.measuring import records, roc_picture
from common.measuring.pair_list import Pairs, drawn, listed
from common.measuring.shared import Row, collected, measured, write_down
from common.trained import Trained, load_trained

SCORES, PICTURE = "verification.csv", "verification.png"


class Scored(NamedTuple):
    """The pairs whose images could both be read, with their scores."""

    pairs: Pairs
    score_P: Tensor
    left_out: int


class Findings(NamedTuple):
    """All that is measured of scored pairs. ``threshold``: the best on all of them."""

    curve: Roc
    folds: Folds
    area: float
    area_interval: tuple[float, float]
    equal: Point
    at: dict[float, Point]
    threshold: float


def loaded(options: argparse.Namespace) -> Trained:
    trained = load_trained(options.checkpoint, options.overrides, options.trust, data=options.data,
                           epoch=options.epoch, untrained=options.untrained)
    trained.check_layer(options.layer)
    return trained


def measure(options: argparse.Namespace) -> None:
    """Verify on pairs: the table, results.jsonl, the scores as CSV, the picture."""
    trained = loaded(options)
    pairs = _pairs(trained, options)
    x_nD, row_n = embedded(trained, pairs.images, options.layer)
    if not distributed.is_main():
        return
    scored = score(pairs, x_nD, row_n, options.measure)
    found = findings(scored, options.folds, options.far)
    results, more = _results(scored, found, options)
    row = Row(f"trained {options.layer}", results, records.about(trained), more)
    print(table({row.name: results}, intervals=True))
    print(f"\n{measured(row.of)}", end="")
    print("\n".join(_said(scored, found)))
    write_down([row], trained, options)
    _write(options.scores or trained.folder / SCORES, "--scores", lambda path: write_scores(path, scored, found))
    if not options.no_picture:
        _write(options.picture or trained.folder / PICTURE, "--picture",
               lambda path: roc_picture.draw(path, found.curve, scored.score_P, scored.pairs.same_P, found.threshold))


def embedded(trained: Trained, images: Images, layer: Literal["backbone", "head"]) -> tuple[Tensor, Tensor]:
    """Features [n, D] of those of ``images`` that can be read, and which they are; complete on the main process only.

    All have labels. Raises ValueError where none can be read, and where a feature is not finite.
    """
    embed: Callable[[Tensor], Tensor] = trained.encoder.backbone if layer == "backbone" else trained.encoder
    x_nD, row_n = collected(trained, images, embed, "features")
    read, bad = distributed.from_main((len(x_nD), int((~x_nD.isfinite()).any(dim=1).sum())))   # so that all ranks end
    if not read:
        raise ValueError(f"{images.name}: none of its {len(images)} images can be read. Give image files.")
    if bad:
        raise ValueError(f"{images.name}: the features of {bad} of {read} images are not finite: the encoder's weights "
                         "or statistics are broken. Go back to an older checkpoint.")
    return x_nD, row_n


def score(pairs: Pairs, x_nD: Tensor, row_n: Tensor, kind: Literal["cosine", "euclidean"]) -> Scored:
    """Pairs of an image without a row in ``row_n`` are left out, and counted."""
    place_n = torch.full((len(pairs.images),), -1)
    place_n[row_n] = torch.arange(len(row_n))
    first_P, second_P = place_n[pairs.first_P], place_n[pairs.second_P]
    read_P = (first_P >= 0) & (second_P >= 0)
    score_P = scores(x_nD[first_P[read_P]], x_nD[second_P[read_P]], kind)
    left = Pairs(pairs.images, pairs.first_P[read_P], pairs.second_P[read_P], pairs.same_P[read_P])
    return Scored(left, score_P, int((~read_P).sum()))


def findings(scored: Scored, folds: int, fars: list[float]) -> Findings:
    score_P, same_P = scored.score_P, scored.pairs.same_P
    curve = roc(score_P, same_P)
    return Findings(curve, k_fold(score_P, same_P, folds), area(curve), area_interval(score_P, same_P),
                    equal_error_rate(curve), {far: at_far(curve, far) for far in fars}, best_threshold(score_P, same_P))


def write_scores(path: Path, scored: Scored, found: Findings) -> None:
    """A line for each pair: both images, 1 or 0 for the same, the score, whether the best threshold accepts it."""
    pairs, text = scored.pairs, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["first", "second", "same", "score", "accepted"])
    columns = (x_P.tolist() for x_P in (pairs.first_P, pairs.second_P, pairs.same_P.int(), scored.score_P))
    for first, second, same, value in zip(*columns, strict=True):
        writer.writerow([pairs.images.keys[first], pairs.images.keys[second], same, repr(value),
                         int(value >= found.threshold)])
    replace_file(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))


def _pairs(trained: Trained, options: argparse.Namespace) -> Pairs:
    if options.pairs:
        return listed(options.pairs, options.root, trained.facts["channels"])
    train, test = trained.splits()
    return drawn(train if test is None or options.split == "train" else test, options.draw, options.classes)


def _results(scored: Scored, found: Findings, options: argparse.Namespace) -> tuple[list[Result], list[dict[str, Any]]]:
    """The values in percent, and what the records say besides: the threshold of each."""
    same_P = scored.pairs.same_P
    same, different = int(same_P.sum()), int((~same_P).sum())
    source = "list" if options.pairs else f"drawn from {options.split}"
    tail: dict[str, Setting] = {"measure": options.measure, "from": source}
    if options.classes:
        tail["classes"] = ", ".join(options.classes)
    tail |= {"pairs": len(same_P), "same": same, "different": different, "left_out": scored.left_out}
    layer: dict[str, Setting] = {"layer": options.layer}
    right_P = found.folds.right_P
    low, high = found.area_interval
    results = [Result("verification", 100 * found.folds.mean, None, {**layer, "folds": options.folds, **tail},
                      wilson(int(right_P.sum()), len(right_P)), tuple(right_P.float().tolist()), "Wilson"),
               Result("AUC", 100 * found.area, None, {**layer, **tail}, (100 * low, 100 * high), (), "DeLong"),
               Result("EER", 100 * found.equal.far, None, {**layer, **tail})]
    results += [Result("TAR", 100 * point.tar, None, {**layer, "far": far, **tail},
                       wilson(round(point.tar * same), same), (), "Wilson") for far, point in found.at.items()]
    thresholds = [found.threshold, None, found.equal.threshold, *(point.threshold for point in found.at.values())]
    more = [{"threshold": value if value is not None and math.isfinite(value) else None} for value in thresholds]
    more[0]["standard_error"] = 100 * found.folds.standard_error
    return results, more


def _said(scored: Scored, found: Findings) -> list[str]:
    folds, different = found.folds, int((~scored.pairs.same_P).sum())
    lines = [f"folds       {100 * folds.mean:.2f} ± {100 * folds.standard_error:.2f} (mean and its standard error over "
             f"{len(folds.accuracy_K)} folds), thresholds {folds.threshold_K.min():.4f} to "
             f"{folds.threshold_K.max():.4f}",
             f"threshold   {found.threshold:.4f} is the best on all pairs"]
    for far, point in found.at.items():
        few = f"; FAR {far:g} is less than one of {different:,} different pairs" if 0 < far * different < 1 else ""
        lines.append(f"threshold   {point.threshold:.4f} for FAR <= {far:g}: {point.far:.2g} accepted{few}")
    return lines


def _write(path: Path, option: str, write: Callable[[Path], None]) -> None:
    """The values are printed and written down: a file that cannot be is warned of."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        print(f"warning: {path}: not written: {error.strerror}. Give {option} FILE.", file=sys.stderr)
    else:
        print(f"written: {path}")

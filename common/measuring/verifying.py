"""``tools/verify.py`` on pairs: scored, measured, written down and drawn.

Axes: P pairs.
"""

import argparse
import csv
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common import distributed
from common.atomic import replace_file
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
)
from common.measuring import records, roc_picture, thresholds
from common.measuring.embedding import Measure, Scored, Sides, both_sides, comparing, loaded, score
from common.measuring.pair_list import Pairs, drawn, listed
from common.measuring.shared import Row, measured, write_down
from common.measuring.thresholds import Rule
from common.trained import Trained

SCORES, PICTURE = "verification.csv", "verification.png"


class Findings(NamedTuple):
    """All that is measured of scored pairs. ``best``: the threshold that is best on all of them."""

    curve: Roc
    folds: Folds
    area: float
    area_interval: tuple[float, float]
    equal: Point
    at: dict[float, Point]
    best: float


def measure(options: argparse.Namespace) -> None:
    """Verify on pairs: the table, results.jsonl, the scores as CSV, the picture."""
    trained = loaded(options)
    pairs = _pairs(trained, options)
    sides, other = both_sides(trained, pairs, options.layer), thresholds.validation(trained, options)
    pixels = both_sides(trained, pairs, "pixels") if options.pixels else None
    if not distributed.is_main():
        return
    compare = comparing(trained, options.measure)
    scored, rules = score(sides, compare), thresholds.chosen(other, compare, options)
    found = findings(scored, options.folds, options.far)
    threshold = rules[0].threshold if rules else found.best
    rows = [_row(trained, f"trained {options.layer}", scored, found, options, rules)]
    if pixels:
        rows.insert(0, _pixel_row(trained, pixels, options))
    print(table({row.name: row.results for row in rows}, intervals=True))
    print(f"\n{measured(rows[-1].of)}", end="")
    print("\n".join(_said(scored, found, rules)))
    write_down(rows, trained, options)
    _write(options.scores or trained.folder / SCORES, "--scores", lambda path: write_scores(path, scored, threshold))
    if not options.no_picture:
        _write(options.picture or trained.folder / PICTURE, "--picture",
               lambda path: roc_picture.draw(path, found.curve, scored.score_P, scored.pairs.same_P, threshold))


def findings(scored: Scored, folds: int, fars: list[float]) -> Findings:
    score_P, same_P = scored.score_P, scored.pairs.same_P
    curve = roc(score_P, same_P)
    return Findings(curve, k_fold(score_P, same_P, folds), area(curve), area_interval(score_P, same_P),
                    equal_error_rate(curve), {far: at_far(curve, far) for far in fars}, best_threshold(score_P, same_P))


def write_scores(path: Path, scored: Scored, threshold: float) -> None:
    """A line for each pair: both images, 1 or 0 for the same, the score, whether the threshold accepts it."""
    pairs, text = scored.pairs, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["first", "second", "same", "score", "accepted"])
    columns = (x_P.tolist() for x_P in (pairs.first_P, pairs.second_P, pairs.same_P.int(), scored.score_P))
    for first, second, same, value in zip(*columns, strict=True):
        writer.writerow([pairs.images.keys[first], pairs.images.keys[second], same, repr(value),
                         int(value >= threshold)])
    replace_file(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))


def _pairs(trained: Trained, options: argparse.Namespace) -> Pairs:
    if options.pairs:
        return listed(options.pairs, options.root, trained.facts["channels"])
    train, test = trained.splits()
    options.split = "train" if test is None else options.split          # the records say so
    return drawn(train if test is None or options.split == "train" else test, options.draw, options.classes)


def _row(trained: Trained, name: str, scored: Scored, found: Findings, options: argparse.Namespace,
         rules: list[Rule]) -> Row:
    protocol, sizes = _protocol(scored, options)
    results, more = _results(scored, found, options, protocol, sizes)
    if rules:
        chosen_on: dict[str, Setting] = {"threshold_from": thresholds.source(options)}
        of_rules, more_of_rules = thresholds.applied(rules, scored, protocol | chosen_on, sizes)
        results, more = results + of_rules, more + more_of_rules
    return Row(name, results, records.about(trained), more)


def _pixel_row(trained: Trained, sides: Sides, options: argparse.Namespace) -> Row:
    """Raw pixels by the same measure, or by the cosine where it is one that was learned."""
    kind: Measure = "cosine" if options.measure == "learned" else options.measure
    scored = score(sides, comparing(trained, kind))
    of = argparse.Namespace(**vars(options) | {"measure": kind, "layer": "pixels"})
    return _row(trained, "raw pixels", scored, findings(scored, options.folds, options.far), of, [])


def _protocol(scored: Scored, options: argparse.Namespace) -> tuple[dict[str, Setting], dict[str, Setting]]:
    """How it is measured, and how many pairs there are."""
    how: dict[str, Setting] = {"layer": options.layer, "measure": options.measure,
                               "from": "list" if options.pairs else f"drawn from {options.split}"}
    if options.classes:
        how["classes"] = ", ".join(options.classes)
    same = int(scored.pairs.same_P.sum())
    return how, {"pairs": len(scored.score_P), "same": same, "different": len(scored.score_P) - same,
                 "left_out": scored.left_out}


def _results(scored: Scored, found: Findings, options: argparse.Namespace, protocol: dict[str, Setting],
             sizes: dict[str, Setting]) -> tuple[list[Result], list[dict[str, Any]]]:
    """The values in percent, and what the records say besides: the best threshold for each."""
    same, layer = int(scored.pairs.same_P.sum()), {"layer": options.layer}
    tail = {key: value for key, value in protocol.items() if key != "layer"} | sizes
    right_P = found.folds.right_P
    low, high = found.area_interval
    results = [Result("verification", 100 * found.folds.mean, None, {**layer, "folds": options.folds, **tail},
                      wilson(int(right_P.sum()), len(right_P)), tuple(right_P.float().tolist()), "Wilson"),
               Result("AUC", 100 * found.area, None, {**layer, **tail}, (100 * low, 100 * high), (), "DeLong"),
               Result("EER", 100 * found.equal.far, None, {**layer, **tail})]
    results += [Result("TAR", 100 * point.tar, None, {**layer, "far": far, **tail},
                       wilson(round(point.tar * same), same), (), "Wilson") for far, point in found.at.items()]
    values = [found.best, None, found.equal.threshold, *(point.threshold for point in found.at.values())]
    more = [{"threshold": value if value is not None and math.isfinite(value) else None} for value in values]
    more[0]["standard_error"] = 100 * found.folds.standard_error
    return results, more


def _said(scored: Scored, found: Findings, rules: list[Rule]) -> list[str]:
    folds, different = found.folds, int((~scored.pairs.same_P).sum())
    lines = [f"folds       {100 * folds.mean:.2f} ± {100 * folds.standard_error:.2f} (mean and its standard error over "
             f"{len(folds.accuracy_K)} folds), thresholds {folds.threshold_K.min():.4f} to "
             f"{folds.threshold_K.max():.4f}",
             f"threshold   {found.best:.4f} is the best on all pairs"]
    for far, point in found.at.items():
        few = f"; FAR {far:g} is less than one of {different:,} different pairs" if 0 < far * different < 1 else ""
        lines.append(f"threshold   {point.threshold:.4f} for FAR <= {far:g}: {point.far:.2g} accepted{few}")
    return lines + [f"chosen      {rule.threshold:.4f}, {rule.name}" for rule in rules]


def _write(path: Path, option: str, write: Callable[[Path], None]) -> None:
    """The values are printed and written down: a file that cannot be is warned of."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        print(f"warning: {path}: not written: {error.strerror}. Give {option} FILE.", file=sys.stderr)
    else:
        print(f"written: {path}")

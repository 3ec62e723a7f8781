"""Thresholds that were chosen before: given, or chosen on validation pairs; and how they do on the pairs to verify.

Axes: P pairs.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from common.config import ConfigError
from common.evaluate.result import Result, Setting, wilson
from common.evaluate.verification import at_far, best_threshold, decided, roc
from common.measuring.embedding import Scored, Sides, both_sides, score
from common.measuring.pair_list import Pairs, drawn, listed
from common.trained import Trained

BEST, TRAIN = "most accurate", "train"


class Rule(NamedTuple):
    """How a threshold was chosen, and what it is."""

    name: str
    threshold: float


def validation(trained: Trained, options: argparse.Namespace) -> Sides | None:
    """The pairs of --threshold-from, embedded by all processes together; None where thresholds are not chosen so."""
    files = options.threshold_from
    if not files:
        return None
    pairs = _drawn(trained, options) if files == [Path(TRAIN)] else \
        listed(files, options.root, trained.facts["channels"], "--threshold-from")
    return both_sides(trained, pairs, options.layer)


def _drawn(trained: Trained, options: argparse.Namespace) -> Pairs:
    train, test = trained.splits()
    if not options.pairs and not options.image and (test is None or options.split == TRAIN):
        raise ConfigError(f"--threshold-from {TRAIN}: the pairs to verify are drawn from the training images, too. "
                          "Give a list of others.")
    return drawn(train, options.draw)


def chosen(sides: Sides | None, compare: Callable[[Tensor, Tensor], Tensor], options: argparse.Namespace) -> list[Rule]:
    """The threshold given, or those chosen on the validation pairs: the most accurate, and one for each --far."""
    if sides is None:
        return [] if options.threshold is None else [Rule(f"{options.threshold:g}", options.threshold)]
    scored = score(sides, compare)
    score_P, same_P = scored.score_P, scored.pairs.same_P
    curve = roc(score_P, same_P)
    return [Rule(BEST, best_threshold(score_P, same_P)),
            *(Rule(f"FAR<={far:g}", at_far(curve, far).threshold) for far in options.far)]


def source(options: argparse.Namespace) -> str:
    """Where thresholds come from, as records have it."""
    if options.threshold is not None:
        return "the command line"
    return "drawn from train" if options.threshold_from == [Path(TRAIN)] else "list"


def applied(rules: list[Rule], scored: Scored, protocol: dict[str, Setting],
            sizes: dict[str, Setting]) -> tuple[list[Result], list[dict[str, Any]]]:
    """Accuracy, false and true accepts of each on ``scored``; and what the records say besides."""
    same_P, results = scored.pairs.same_P, []
    same, different = int(same_P.sum()), int((~same_P).sum())
    for name, threshold in rules:
        found = decided(scored.score_P, same_P, threshold)
        layer, *others = protocol.items()
        settings = dict([layer, ("threshold", name), *others]) | sizes
        counts = (("accuracy", found.right, same + different), ("false accepts", found.false_accepts, different),
                  ("true accepts", found.true_accepts, same))
        results += [Result(metric, 100 * count / of, None, settings, wilson(count, of), (), "Wilson")
                    for metric, count, of in counts]
    return results, [{"threshold": rule.threshold if math.isfinite(rule.threshold) else None}
                     for rule in rules for _ in range(3)]

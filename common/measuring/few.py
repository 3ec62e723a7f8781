"""``evaluate.py few``: a linear classifier on frozen features, with a few labels of each class."""

import argparse
from typing import Any

from common.evaluate.linear import FewLabels
from common.measuring.shared import add_checkpoint, add_command, opened, report


def add(parsers: Any) -> None:
    parser = add_command(parsers, "few", "logistic regression with a few labels of each class", run, protocol)
    add_checkpoint(parser)
    parser.add_argument("--labels", type=int, default=10, help="labels of each class (%(default)s)")
    parser.add_argument("--draws", type=int, default=10, help="fixed draws of labels to average over (%(default)s)")
    parser.add_argument("--l2", type=float, default=1e-2, help="weight of |W|^2 / 2 (%(default)s)")
    parser.add_argument("--max-iter", type=int, default=100, help="of L-BFGS (%(default)s)")


def protocol(options: argparse.Namespace) -> FewLabels:
    return FewLabels(options.labels, options.draws, options.l2, options.max_iter)


def run(options: argparse.Namespace) -> None:
    judge = protocol(options)
    trained, splits = opened(options)
    evaluator = trained.evaluator(splits, [judge], options.layer)
    rows = {"raw pixels": evaluator.measure_pixels()} if options.pixels else {}
    rows[f"trained {options.layer}"] = evaluator.measure(trained.encoder)
    report(rows, trained, options)

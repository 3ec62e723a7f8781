"""``evaluate.py linear --fast``: a linear classifier on features that are computed once."""

import argparse

from common.evaluate.linear import Linear
from common.measuring.shared import opened, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", choices=["logistic"], default="logistic", help="with --fast: which classifier "
                        "(%(default)s)")
    parser.add_argument("--l2", type=float, default=1e-4, help="with --fast: weight of |W|^2 / 2 (%(default)s)")
    parser.add_argument("--max-iter", type=int, default=100, help="with --fast: of L-BFGS (%(default)s)")


def run(options: argparse.Namespace) -> None:
    trained, splits = opened(options)
    evaluator = trained.evaluator(splits, [Linear(options.l2, options.max_iter)], options.layer)
    rows = {"raw pixels": evaluator.measure_pixels()} if options.pixels else {}
    rows[f"trained {options.layer}"] = evaluator.measure(trained.encoder)
    report(rows, trained, options)

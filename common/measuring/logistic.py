"""Logistic regression with all labels, as runs measure it while they train: what ``compare --by linear`` stands for."""

import argparse
from typing import Any

from common.evaluate.linear import Linear


def add(parsers: Any) -> None:
    parser: argparse.ArgumentParser = parsers.add_parser("linear")
    parser.add_argument("--l2", type=float, default=1e-4, help="weight of |W|^2 / 2 (%(default)s)")
    parser.add_argument("--max-iter", type=int, default=100, help="of L-BFGS (%(default)s)")


def protocols(options: argparse.Namespace) -> list[Linear]:
    return [Linear(options.l2, options.max_iter)]

"""``evaluate.py few``: a linear classifier on frozen features, with few labels."""

import argparse
from typing import Any

from common.evaluate.draws import amount
from common.evaluate.linear import FewLabels
from common.measuring.shared import add_checkpoint, add_command, on_features


def add(parsers: Any) -> None:
    parser = add_command(parsers, "few", "logistic regression with few labels", run, protocols)
    add_checkpoint(parser)
    parser.add_argument("--labels", type=amount, nargs="+", default=[1, 5, 10, "1%", "10%"], metavar="N | N%",
                        help="images of each class, or a share of all labels (1 5 10 1%% 10%%)")
    parser.add_argument("--draws", type=int, default=10, help="fixed draws of labels to average over (%(default)s)")
    parser.add_argument("--l2", type=float, default=1e-2, help="weight of |W|^2 / 2 (%(default)s)")
    parser.add_argument("--max-iter", type=int, default=100, help="of L-BFGS (%(default)s)")


def protocols(options: argparse.Namespace) -> list[FewLabels]:
    """One for each amount, each named once."""
    return [FewLabels(labels, options.draws, options.l2, options.max_iter) for labels in dict.fromkeys(options.labels)]


def run(options: argparse.Namespace) -> None:
    on_features(protocols(options), options)

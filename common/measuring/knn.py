"""``evaluate.py knn``: the weighted vote of the nearest training images."""

import argparse
from typing import Any

from common.evaluate.knn import KNN
from common.measuring.shared import add_checkpoint, add_command, on_features


def add(parsers: Any) -> None:
    parser = add_command(parsers, "knn", "weighted nearest neighbours: nothing is trained", run, protocols)
    add_checkpoint(parser)
    parser.add_argument("--k", type=int, nargs="+", default=[20, 200], help="numbers of neighbours (%(default)s)")
    parser.add_argument("--tau", "--temperature", type=float, nargs="+", default=[0.07], dest="temperature",
                        metavar="TAU", help="temperatures of the vote exp(s / tau), each with each k (%(default)s; "
                        "MoCo's notebook has 0.1)")
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=True,
                        help="give features unit length, so that similarity is the cosine")
    parser.add_argument("--backend", choices=["auto", "faiss", "torch"], default="auto",
                        help="of the search (%(default)s)")


def protocols(options: argparse.Namespace) -> list[KNN]:
    return [KNN(options.k, options.temperature, options.normalize, options.backend)]


def run(options: argparse.Namespace) -> None:
    on_features(protocols(options), options)

"""``evaluate.py retrieval``: how high images of a query's class are ranked among all others."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from common import distributed
from common.bar import bar
from common.evaluate.features import Features
from common.evaluate.result import Result
from common.evaluate.retrieval import Pool, Retrieval
from common.measuring import gallery
from common.measuring.shared import Opened, add_checkpoint, add_command, opened, report

PICTURE = "retrieval.png"


def add(parsers: Any) -> None:
    parser = add_command(parsers, "retrieval", "the ranking of all images by their similarity to each: recall@k and "
                         "mAP, nothing is trained", run, protocols)
    add_checkpoint(parser)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 10], help="of recall@k (%(default)s)")
    parser.add_argument("--images", choices=["test", "train"], default="test",
                        help="which are searched for among the others of them (%(default)s; train where no test image "
                        "has a label)")
    parser.add_argument("--gallery", action="store_true", help="search for each test image among the training images")
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=True,
                        help="give features unit length, so that similarity is the cosine")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="where to draw some queries with their "
                        f"nearest images ({PICTURE} in the run's folder)")
    parser.add_argument("--no-picture", action="store_true", help="draw none")


def protocols(options: argparse.Namespace) -> list[Retrieval]:
    if options.gallery and options.images == "train":
        raise ValueError("--gallery: test images are searched for among the training images; --images train searches "
                         "for these among themselves. Give one of the two.")
    images: Pool = "test-in-train" if options.gallery else options.images
    return [Retrieval(options.k, images, options.normalize, bar)]


def run(options: argparse.Namespace) -> None:
    judges, kept = protocols(options), Kept()
    trained, splits = opened(options)
    rows = {"raw pixels": trained.evaluator(splits, judges).measure_pixels()} if options.pixels else {}
    evaluator = trained.evaluator(splits, [*judges, kept], options.layer)
    rows[f"trained {options.layer}"] = evaluator.measure(trained.encoder)
    report(rows, trained, options)
    if distributed.is_main() and not options.no_picture:
        assert kept.features
        _draw(judges[0], kept.features, Opened(trained, splits), options.picture or trained.folder / PICTURE)


class Kept:
    """A protocol that measures nothing, but keeps the features for what comes after."""

    features: Features | None = None

    def __call__(self, features: Features, device: torch.device) -> list[Result]:
        self.features = features
        return []


def _draw(judge: Retrieval, features: Features, of: Opened, path: Path) -> None:
    """The values are known and written down: a picture that cannot be is warned of."""
    query, (train, test) = judge.query(features), of.splits
    queries, images = (train if test is None or pool == "train" else test
                       for pool in (query.images, "train" if query.images != "test" else "test"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        gallery.draw(query, queries, images, path)
    except OSError as error:
        print(f"warning: {path}: not drawn: {error.strerror}. Give --picture FILE.png.", file=sys.stderr)
    else:
        print(f"drawn: {path}")

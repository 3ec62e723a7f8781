"""``evaluate.py linear --fast``: features computed once and kept, then many linear classifiers trained on them."""

import argparse
import time
from functools import partial

import torch

from common.bar import bar
from common.evaluate.features import Features
from common.evaluate.result import Result
from common.measuring.search import Classifiers, Data, Grid, Logistic, search
from common.measuring.shared import opened, report
from common.measuring.stored import Stored, stored
from common.progress import duration

SHOWN = 5           # heads in the list
OPTIONS = {"head": "grid", "views": 2, "precision": "float16", "cache": True}       # as they are unless given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that go with --fast."""
    group = parser.add_argument_group("with --fast")
    group.add_argument("--fast", action="store_true", help="compute features once, keep them in the run's folder, and "
                       "train many classifiers on them, chosen by a tenth of the training images")
    group.add_argument("--head", choices=["grid", "logistic"],
                       help="SGD over a grid of settings, all at once, or logistic regression over several l2 "
                       f"({OPTIONS['head']})")
    group.add_argument("--views", type=int, metavar="N", help="augmented copies of each training image (crop, flip) "
                       f"to train on, as the slow protocols do; 0: the images as they are ({OPTIONS['views']})")
    group.add_argument("--precision", choices=["float16", "float32"],
                       help=f"of the features that are kept ({OPTIONS['precision']})")
    group.add_argument("--no-cache", dest="cache", action="store_const", const=False,
                       help="neither read nor write features/ in the run's folder")


def protocol(options: argparse.Namespace) -> Classifiers:
    """What is trained. Raises ValueError for options that no run could use."""
    if options.views < 0:
        raise ValueError(f"--views {options.views}: give a number of augmented copies, or 0 for none.")
    return Grid(watch=bar) if options.head == "grid" else Logistic(watch=bar)


def run(options: argparse.Namespace) -> None:
    judge = protocol(options)
    trained, splits = opened(options)
    if options.layer:
        trained.check_layer(options.layer)
    on_pixels = partial(_of_features, judge)
    rows = {"raw pixels": trained.evaluator(splits, [on_pixels]).measure_pixels()} if options.pixels else {}
    began = time.monotonic()
    features = stored(trained, splits, options.views, getattr(torch, options.precision), options.cache)
    if features is None:                # not the main process: the rest is done by that alone
        return
    computed = time.monotonic()
    data = Data.of(features, splits.train.labels, None if splits.test is None else splits.test.labels)
    found = search(judge, data, features.width, options.views, trained.device, options.layer)
    print(f"features in {duration(computed - began)}, {len(found.ranking)} classifiers in "
          f"{duration(time.monotonic() - computed)}; the best on the tenth of the training images held out:")
    print("\n".join(f"  {held:5.1f}  {head.text()}" for head, held in found.ranking[:SHOWN]), end="\n\n")
    rows[f"trained {found.result.protocol['layer']}"] = [found.result]
    report(rows, trained, options)


def _of_features(judge: Classifiers, features: Features, device: torch.device) -> list[Result]:
    """``judge`` as a protocol of the Evaluator: no image is seen but as it is."""
    rows = Stored.of(features)
    data = Data.of(rows, features.train_label_n, features.test_label_m)
    return [search(judge, data, rows.width, 0, device).result]

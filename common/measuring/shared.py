"""What the commands have in common: opening what is to be measured, and what is said and written down of it."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common import distributed
from common.bar import bar
from common.chosen import Epoch
from common.config import ConfigError
from common.data.datasets import Images, Splits
from common.data.loader import plain_batches
from common.evaluate.evaluator import Protocol
from common.evaluate.features import collect, evaluating
from common.evaluate.result import Result
from common.evaluate.table import table
from common.measuring import records
from common.trained import Trained, load_trained


class Opened(NamedTuple):
    """A checkpoint, and the images to measure it on."""

    trained: Trained
    splits: Splits


Command = Callable[[argparse.Namespace], Any]


def add_command(parsers: Any, name: str, summary: str, run: Command, check: Command,
                overrides: bool = True) -> argparse.ArgumentParser:
    """A command with the options that all have. ``check`` raises ValueError for values that no run could use.

    ``overrides``: its words without a dash are changes to the config.
    """
    about = f"Measure an encoder by {summary}."
    parser: argparse.ArgumentParser = parsers.add_parser(name, help=summary, description=about)
    parser.set_defaults(run=run, check=check)
    add_options(parser, overrides)
    return parser


def add_options(parser: argparse.ArgumentParser, overrides: bool = True) -> None:
    """Those that all commands have. ``overrides``: the words without a dash are changes to the config."""
    parser.add_argument("--data", metavar="PATH", help="images to measure on: a folder, a list, a packed set (those of "
                        "the run's config)")
    parser.add_argument("--results", metavar="FILE", type=Path,
                        help="where the values are added, one line of JSON each (results.jsonl in the run's folder)")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE",
                        help="a package of yours that the run's config names (again for another one); others than this "
                        "project's are refused")
    parser.add_argument("--debug", action="store_true", help="show the traceback of whatever goes wrong")
    parser.set_defaults(overrides=[])
    if overrides:
        parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                            help="changes to the run's config, such as data.channels=1 or train.workers=8")


def is_override(word: str) -> bool:
    """Whether a word of the command line is a change to the config, ``section.key=value``."""
    return re.match(r"[a-z_]+(\.\w+)+=", word) is not None


def add_checkpoint(parser: argparse.ArgumentParser, layer: bool = True, pixels: bool = True) -> None:
    """Which checkpoint, and which of its features."""
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_FILE",
                        help="a run's folder (its last checkpoint), one checkpoint, or imported weights")
    parser.add_argument("--epoch", default="last", type=epoch, metavar="last | best | N",
                        help="which checkpoint of a run's folder (%(default)s)")
    parser.add_argument("--untrained", action="store_true", help="measure weights that were never trained, too")
    if pixels:
        parser.add_argument("--pixels", action="store_true",
                            help="measure the raw pixels too: what an encoder has to beat")
    if layer:
        parser.add_argument("--layer", choices=["backbone", "head"], default="backbone",
                            help="which features (%(default)s)")


def epoch(text: str) -> Epoch:
    """argparse's type for --epoch."""
    known: dict[str, Epoch] = {"last": "last", "best": "best"}
    if text not in known and not text.isdecimal():
        raise ValueError(f"--epoch {text}: give last, best, or the number of an epoch.")
    return known[text] if text in known else int(text)


def opened(options: argparse.Namespace) -> Opened:
    """The checkpoint and the images that the options name."""
    trained = load_trained(options.checkpoint, options.overrides, options.trust, data=options.data,
                           epoch=options.epoch, untrained=options.untrained)
    splits = trained.splits()
    if splits.train.together == 2:
        raise ConfigError(f"data: {splits.train.name} is a list of pairs, whose labels are no classes to be told. "
                          "Measure by tools/verify.py --pairs FILE, or give images with classes (--data PATH).")
    return Opened(trained, splits)


def collected(trained: Trained, images: Images, embed: Callable[[Tensor], Tensor], what: str,
              dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """What ``embed`` makes of those labelled ``images`` that can be read, and which they are, as the evaluation shows
    them. All processes call together; complete on the main one only."""
    how = trained.evaluator(Splits(images), [])
    with evaluating(trained.method):
        batches = plain_batches(images, trained.views, how.batch_size, how.workers, trained.device, care=how.care)
        total = -(-len(images) // how.batch_size // distributed.world())
        return collect(embed, images, bar(batches, total, f"{what} of {images.name}"), trained.device, dtype)


class Row(NamedTuple):
    """What was measured of one encoder. ``of``: what its records say of the checkpoint (``records.about``); ``more``:
    what they say besides, a dict for each result, or none."""

    name: str
    results: list[Result]
    of: dict[str, Any]
    more: Sequence[dict[str, Any]] = ()

    @property
    def of_pixels(self) -> bool:
        return all(result.protocol["layer"] == "pixels" for result in self.results)


def report(rows: dict[str, list[Result]], trained: Trained | None, options: argparse.Namespace,
           random: Sequence[str] = ()) -> None:
    """Print the table and add every value to results.jsonl; main process only, the others do nothing.

    ``rows``: whose features -> what was measured of them. ``random``: those that began with random weights.
    """
    if distributed.is_main():
        of = records.about(trained)
        print(table(rows, intervals=True))
        print(f"\n{measured(of)}" if of else "", end="")
        write_down([Row(name, results, of | (records.RANDOM if name in random else {}))
                    for name, results in rows.items()], trained, options)


def measured(of: dict[str, Any], name: str = "checkpoint") -> str:
    """Which checkpoint was measured, and how it was chosen: the best is called so, and the last the last."""
    epoch = f"epoch {of['epoch']:.6g}, " if of["step"] else ""         # imported weights know of none
    return f"{name}  {of['checkpoint']}: {epoch}{of['chosen']}\n"


def write_down(rows: Sequence[Row], trained: Trained | None, options: argparse.Namespace) -> None:
    """Add all values to results.jsonl, in the folder of ``trained`` unless --results says otherwise; main process only.

    A file that cannot be written is warned of: the values have been printed, and are not to be lost for it.
    """
    path = options.results or (trained.folder if trained else Path()) / records.FILE
    lines = [records.record(result, row.of, row.name, options.words) | dict(*row.more[i:i + 1])
             for row in rows for i, result in enumerate(row.results)]
    try:
        records.append(path, lines)
    except OSError as error:
        print(f"\nwarning: {path}: not added: {error.strerror}. Give --results FILE, and measure again to have the "
              "values in a file.", file=sys.stderr)
    else:
        print(f"\nadded to {path}")


def on_features(judges: Sequence[Protocol], options: argparse.Namespace) -> None:
    """A whole command: the features of the checkpoint, and of raw pixels if asked for, by each of ``judges``."""
    trained, splits = opened(options)
    evaluator = trained.evaluator(splits, judges, options.layer)
    rows = {"raw pixels": evaluator.measure_pixels()} if options.pixels else {}
    rows[f"trained {options.layer}"] = evaluator.measure(trained.encoder)
    report(rows, trained, options)

"""``evaluate.py compare A B ...``: several encoders by one protocol on the same images, and whether they differ."""

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

import torch

from common import distributed
from common.config import ConfigError
from common.evaluate.evaluator import Protocol
from common.evaluate.result import Result
from common.evaluate.statistics import Paired, bootstrap, holm, paired
from common.evaluate.table import aligned, column_of, headers, table
from common.measuring import few, knn, logistic, retrieval
from common.measuring.entrants import field
from common.measuring.shared import Row, add_command, epoch, measured, write_down

BY: dict[str, Any] = {"knn": knn, "linear": logistic, "few": few, "retrieval": retrieval}
Differences = list[list[Paired | None]]     # of each entrant but the first, for each of its results


def add(parsers: Any) -> None:
    parser = add_command(parsers, "compare", "one protocol, beside others on the same images", run, protocols,
                         overrides=False)
    parser.add_argument("entrants", nargs="+", metavar="A B ...", help="runs, checkpoints or imported weights, and the "
                        "words pixels, untrained (the first checkpoint's architecture before training), timm:NAME "
                        "(timm's pretrained weights, if they are on this machine), timm:NAME=FILE; section.key=value "
                        "changes the config of all")
    parser.add_argument("--by", default="knn --k 20", metavar="PROTOCOL", help=f"{', '.join(BY)}, with its own options "
                        "in quotes, such as \"knn --k 20 --tau 0.1\" (%(default)s)")
    parser.add_argument("--layer", choices=["backbone", "head"], default="backbone",
                        help="which features (%(default)s)")
    parser.add_argument("--epoch", default="last", type=epoch, metavar="last | best | N",
                        help="which checkpoint of each run's folder (%(default)s)")
    parser.add_argument("--download", action="store_true", help="fetch timm's weights that are not on this machine")


def protocols(options: argparse.Namespace) -> Sequence[Protocol]:
    """What --by says. Raises ConfigError for an unknown protocol, and for options that are compare's own."""
    name, *words = shlex.split(options.by) or [""]
    if name not in BY:
        raise ConfigError(f"--by {options.by}: no protocol {name!r}. Give one of {', '.join(BY)}.")
    parser = argparse.ArgumentParser(prog="evaluate.py compare --by")
    BY[name].add(parser.add_subparsers())
    checkpoint = [] if name == "linear" else ["--checkpoint", "none"]
    plain, given = (vars(parser.parse_args([name, *checkpoint, *more])) for more in ([], words))
    if own := [key for key in given if key in (*vars(options), "overrides", "pixels") and given[key] != plain[key]]:
        raise ConfigError(f"--by {options.by}: {', '.join(own)} is the same for all that are compared. Give it beside "
                          "--by, not within.")
    judges: Sequence[Protocol] = BY[name].protocols(argparse.Namespace(**given))
    return judges


def run(options: argparse.Namespace) -> None:
    judges = protocols(options)
    entrants, first = field(options)
    rows = [Row(entrant.name, [_by_bootstrap(result) for result in entrant.measure(judges)], entrant.of)
            for entrant in entrants]
    if not distributed.is_main():
        return
    apart = corrected([differences(row.results, rows[0].results) for row in rows[1:]])
    print(table({row.name: row.results for row in rows}, intervals=True))
    print("\n".join(_told(rows, apart)))
    checkpoints = [measured(row.of, row.name) for row in rows if row.of.get("step") and not row.of_pixels]
    print("".join(["\n", *checkpoints]), end="")
    found = [_recorded(rows[0].name, pairs, _count(apart)) for pairs in apart]
    write_down([rows[0], *(row._replace(more=more) for row, more in zip(rows[1:], found, strict=True))], first, options)


def _by_bootstrap(result: Result) -> Result:
    """With the bootstrap's interval, as the differences have theirs, where the score of each image is known."""
    if not result.score_m or result.interval_by == "bootstrap":
        return result
    (low, high), = bootstrap(torch.tensor(result.score_m)[:, None])
    return result._replace(interval=(100 * low, 100 * high), interval_by="bootstrap")


def differences(results: Sequence[Result], first: Sequence[Result]) -> list[Paired | None]:
    """How far each of ``results`` is ahead of the one of ``first`` by the same protocol.

    None where there is none, and where a protocol does not say how each image fared. Raises ValueError where the two
    are not of the same images.
    """
    against = {column_of(result): result for result in first}
    pairs = [(result, against.get(column_of(result))) for result in results]
    return [paired(result.score_m, other.score_m) if other and result.score_m and other.score_m else None
            for result, other in pairs]


def corrected(apart: Differences) -> Differences:
    """With each kind of p corrected for the number of them that are shown together (Holm 1979)."""
    known = [pair for row in apart for pair in row if pair]
    p = iter(holm([pair.p for pair in known]))
    exact = iter(holm([pair.p_mcnemar for pair in known if pair.p_mcnemar is not None]))
    return [[pair and pair._replace(p=next(p), p_mcnemar=None if pair.p_mcnemar is None else next(exact))
             for pair in row] for row in apart]


def _count(apart: Differences) -> int:
    return sum(pair is not None for row in apart for pair in row)


def _told(rows: Sequence[Row], apart: Differences) -> list[str]:
    """The differences as text; nothing where there are none."""
    heads = headers(columns := list(dict.fromkeys(column_of(result) for row in rows for result in row.results)))
    told = [(row.name, heads[columns.index(column_of(result))], pair) for row, pairs in zip(rows[1:], apart)
            for result, pair in zip(row.results, pairs) if pair]
    if not told:
        return []
    lines = [["points", *(f"{pair.difference:+.1f}" for *_, pair in told)],
             ["95 % interval", *(f"[{pair.interval[0]:+.1f}, {pair.interval[1]:+.1f}]" for *_, pair in told)],
             ["p (bootstrap)", *(_p(pair.p) for *_, pair in told)]]
    if any(pair.p_mcnemar is not None for *_, pair in told):
        lines.append(["p (McNemar)", *(_p(pair.p_mcnemar) for *_, pair in told)])
    many = f", each p corrected for {len(told)} tests (Holm), each interval by itself" if len(told) > 1 else ""
    return ["", f"Ahead of {rows[0].name} on the same images{many}:",
            *aligned(["", *(name for name, *_ in told)], [["", *(head for _, head, _ in told)], *lines])]


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"


def _recorded(name: str, pairs: list[Paired | None], tests: int) -> list[dict[str, Any]]:
    """What the records of an entrant say of the first one, ``name``."""
    return [{"against": pair and {"name": name, **pair._asdict(), "tests": tests}} for pair in pairs]

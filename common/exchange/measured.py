"""What the run's folder says of one checkpoint: the values of this one alone, each with its protocol."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.evaluate.result import Result
from common.trained import Trained

# What results.jsonl has beside the protocol -> where it says nothing.
_MADE = {"layer": None, "k": None, "tau": None, "split": "test"}


def measured(trained: Trained) -> dict[str, list[Result]]:
    """Whose features -> what was measured of them, once by each protocol; empty where nothing was.

    From summary.json if it is of this step, else from the evaluations in metrics.jsonl; and from results.jsonl what was
    measured of these very weights under this config, images included. The latest counts.
    """
    rows: dict[str, dict[str, Result]] = {}
    for features, record in [*_of_run(trained), *_of_tools(trained)]:
        if result := _result(record):
            name = f"{features} {result.protocol['layer']}" if features in ("trained", "untrained") else features
            rows.setdefault(name, {})[result.label()] = result
    return {name: list(results.values()) for name, results in rows.items()}


def _of_run(trained: Trained) -> Iterator[tuple[str, dict[str, Any]]]:
    summary = _json(trained.folder / "summary.json")
    if summary.get("step") == trained.step and isinstance(summary.get("results"), dict):
        for features, records in summary["results"].items():
            yield from ((features, record) for record in records)
        return
    for record in _lines(trained.folder / "metrics.jsonl"):
        if record.get("kind") == "eval" and record.get("step") == trained.step:
            yield "trained", {**record, "metric": str(record.get("label", "")).partition("(")[0]}


def _of_tools(trained: Trained) -> Iterator[tuple[str, dict[str, Any]]]:
    """In a comparison they have a name of their own there; what was fine-tuned is not these weights any more."""
    found = list(_lines(trained.folder / "results.jsonl"))
    weights, config = (trained.sha256(), (trained.recorded or trained.config).digest()) if found else ("", "")
    for record in found:
        if record.get("weights") != weights or record.get("config") != config:
            continue
        if record.get("metric") != "finetune":
            yield "trained", record
        elif record.get("features") == "fine-tuned":        # others are a difference, or from scratch
            yield "fine-tuned", record


def _result(record: dict[str, Any]) -> Result | None:
    """None for a record of another kind, or one that a hand has changed."""
    try:
        made = {key: record[key] for key, silent in _MADE.items() if record.get(key) not in (None, silent)}
        protocol = {**made, **record["protocol"]}
        spread, interval = record.get("spread"), record.get("interval")
        low_high = (float(interval[0]), float(interval[1])) if interval else None
        return Result(str(record["metric"]), float(record["value"]), None if spread is None else float(spread),
                      {"layer": protocol.pop("layer"), **protocol}, low_high) if _sized(protocol) else None
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def _sized(protocol: dict[str, Any]) -> bool:
    names = ("queries", "gallery") if "queries" in protocol else ("train", "test")
    return all(isinstance(protocol.get(name), int) for name in names)


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none, or where it is broken."""
    return next(_objects([path.read_text(encoding="utf-8", errors="replace")] if path.is_file() else []), {})


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return _objects(path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else [])


def _objects(texts: list[str]) -> Iterator[dict[str, Any]]:
    for text in texts:
        try:
            found = json.loads(text)
        except ValueError:                                  # a line that a kill cut off
            continue
        if isinstance(found, dict):
            yield found

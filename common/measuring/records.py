"""results.jsonl: every measured value as a line of JSON, with all that it takes to compare or repeat it."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

from common.environment import commit, versions
from common.evaluate.result import Result
from common.trained import Trained

FILE = "results.jsonl"


def record(result: Result, trained: Trained | None, features: str) -> dict[str, Any]:
    """What results.jsonl holds of ``result``.

    ``features``: whose they are ("trained", "raw pixels", "untrained"). ``trained`` is None where no checkpoint was
    measured. ``spread`` is over draws of labels; ``interval`` 95 %, over test images or over draws.
    """
    protocol = dict(result.protocol)
    made = {name: protocol.pop(name) for name in ("layer", "k", "tau", "split") if name in protocol}
    of = {} if trained is None else {
        "checkpoint": str(trained.file), "chosen": trained.chosen, "step": trained.step, "epoch": trained.epoch,
        "seed": trained.seed, "config": trained.config.digest(), "weights": trained.sha256()}
    return {"metric": result.metric, "value": result.value, "interval": result.interval, "spread": result.spread,
            "features": features, **made, "protocol": protocol, **of, "commit": commit(), "versions": versions(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Add lines to ``path``, all in one write, so that two programs that measure at a time do not mix theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in records).encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, text)
    finally:
        os.close(file)

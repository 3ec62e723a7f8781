"""results.jsonl: every measured value as a line of JSON, with all that it takes to compare or repeat it."""

import datetime
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.environment import commit, versions
from common.evaluate.result import Result
from common.trained import Trained

FILE = "results.jsonl"
OF_PROTOCOL = ("layer", "k", "tau", "split")            # null where a protocol has none
OF_CHECKPOINT = ("checkpoint", "chosen", "step", "epoch", "seed", "config", "weights", "data")      # null without one
OF_PIXELS = ("config", "data")                          # what raw pixels depend on
# Of the same network with random weights, which are of no checkpoint.
RANDOM = {"checkpoint": None, "chosen": "random weights", "step": None, "epoch": None, "weights": None}


def about(trained: Trained | None) -> dict[str, Any]:
    """What a record says of the checkpoint: its file, how it was chosen, digests of its config and of its weights, and
    the images that it was measured on, as the config names them."""
    if trained is None:
        return {}
    return {"checkpoint": str(trained.file.absolute()), "chosen": trained.chosen, "step": trained.step,
            "epoch": trained.epoch, "seed": trained.seed, "config": trained.config.digest(),
            "weights": trained.sha256(), "data": trained.config.get("data")}


def record(result: Result, of: dict[str, Any], features: str, words: Sequence[str]) -> dict[str, Any]:
    """What results.jsonl holds of ``result``; every record has the same keys.

    ``features``: whose they are ("trained backbone", "raw pixels", "untrained"). ``of``: see ``about``. ``words``: the
    command line, which repeats the value from where it was given, "folder". ``spread`` is over draws of labels;
    ``interval`` 95 %, over test images or over draws; ``against``: how far it is ahead of another, in a comparison.
    """
    protocol = {"split": "test", **result.protocol}
    if result.protocol["layer"] == "pixels":
        of = {name: of.get(name) for name in OF_PIXELS}
    made = {name: protocol.pop(name, None) for name in OF_PROTOCOL}
    return {"metric": result.metric, "value": result.value, "interval": result.interval,
            "interval_by": result.interval_by or None, "spread": result.spread, "features": features, **made,
            "protocol": protocol, **{name: of.get(name) for name in OF_CHECKPOINT},
            "against": None, "command": list(words), "folder": str(Path.cwd()), "commit": commit(),
            "versions": versions(), "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Add lines to ``path``, all in one write, so that two programs that measure at a time do not mix theirs.

    What is there may end within a line, by a kill or a full disk: that line is ended first. Raises OSError where the
    disk does not take all of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in records).encode()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            text = b"\n" + text
        if os.write(file, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)

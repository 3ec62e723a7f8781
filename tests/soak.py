"""Short and long forms of a fault test: few cases in every test run, the counts of docs/reliability.md in make soak."""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from common.environment import versions

REPORT = Path(os.environ.get("SOAK_REPORT", "build/soak.jsonl"))


class Soak(NamedTuple):
    """What the fixture ``soak`` gives a test: how many cases to try, and where to write down what came of them."""

    long: bool
    test: str

    def count(self, short: int, long: int) -> int:
        return long if self.long else short

    def report(self, promise: str, **figures: object) -> None:
        """In the long form, one line of ``REPORT``: the promise (R1, C2, ...), the figures, test, date and versions."""
        if self.long:
            REPORT.parent.mkdir(parents=True, exist_ok=True)
            line = {"promise": promise, **figures, "test": self.test, "date": time.strftime("%Y-%m-%d"), **versions()}
            with open(REPORT, "a") as file:
                file.write(json.dumps(line, default=str) + "\n")

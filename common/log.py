"""What a run writes down while it goes: metrics.jsonl and summary.json, and a copy on wandb if asked for.

The files are the truth and wandb is a mirror: whatever goes wrong there (not installed, no key, no network, an outage
in the middle) gives one warning, and training goes on.
"""

import json
import logging
import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from common.checkpoint import replace_file

_WANDB_SECONDS = 10         # for wandb to start, before the run goes on without it
_FINISH_SECONDS = 60        # for the last uploads at the end
_log = logging.getLogger(__name__)


class Records:
    """The records of one run in the folder ``path``. Main process only.

    ``run_id`` is wandb's name for the run: give back, after a resume, the one that the attribute ``run_id`` had.
    ``url`` is the run's page there, or None.
    """

    def __init__(self, path: str | Path, wandb: Literal["off", "offline", "online"] = "off", *, project: str = "",
                 run_id: str | None = None, name: str | None = None, config: Mapping[str, Any] | None = None):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.run_id = run_id or secrets.token_hex(4)
        self.rewind(math.inf)
        self.url: str | None = None
        self._run: Any = None
        self._mirroring = wandb != "off"
        self._mirror(lambda: self._start(wandb, project, name, config))

    def write(self, kind: Literal["train", "eval", "health", "event"], step: int, epoch: float, **values: Any) -> None:
        """Append one record, a line of JSON. Values: numbers (0-d tensors too), strings, None, lists and dicts of them.

        What is not finite becomes a string that ``float`` reads back: "nan", "inf", "-inf".
        """
        record = {"step": step, "epoch": epoch, "kind": kind, **values}
        with open(self.path / "metrics.jsonl", "ab") as file:
            file.write(_json(record).encode() + b"\n")
        self._mirror(lambda: self._copy(kind, step, epoch, values))

    def rewind(self, step: float) -> None:
        """Drop the records of steps after ``step``, as after a resume from there, and lines that a kill cut off."""
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
        kept = [line for line in lines if (at := _step(line)) is not None and at <= step]
        if len(kept) < len(lines):
            replace_file(metrics, lambda file: file.writelines(kept))

    def summary(self, **values: Any) -> None:
        """Write summary.json anew with these values, in one step."""
        replace_file(self.path / "summary.json", lambda file: file.write(_json(values, indent=2).encode() + b"\n"))
        self._mirror(lambda: self._run.summary.update(_plain(values)))

    def close(self) -> None:
        """End the copy on wandb, which may take up to a minute to send the rest; the files need no closing."""
        self._mirror(lambda: self._run.finish())
        self._mirroring = False

    def _start(self, mode: Any, project: str, name: str | None, config: Mapping[str, Any] | None) -> None:
        import wandb

        wandb.setup(wandb.Settings(silent=True))        # it would write into the progress line, and wait longer
        if mode == "online" and not wandb.login(prompt=False, verify=False):       # a prompt would hold up the run
            raise ValueError("no account is set up on this machine: run 'wandb login' once, or choose offline")
        settings = wandb.Settings(init_timeout=_WANDB_SECONDS, finish_timeout=_FINISH_SECONDS, console="off",
                                  silent=True)
        self._run = wandb.init(project=project or None, id=self.run_id, name=name, dir=str(self.path), mode=mode,
                               resume="allow", config=_plain(config or {}), settings=settings)
        self.url = self._run.url if mode == "online" else None

    def _copy(self, kind: str, step: int, epoch: float, values: dict[str, Any]) -> None:
        if step >= self._run.step:          # wandb takes no step twice; after a resume it may know some of them
            self._run.log({"epoch": epoch, **{f"{kind}/{key}": value for key, value in values.items()}}, step=step)

    def _mirror(self, action: Callable[[], object]) -> None:
        if not self._mirroring:
            return
        try:
            action()
        except Exception as error:
            self._mirroring = False
            _log.warning("wandb: %s: %s. The run goes on without it; metrics.jsonl has everything.",
                         type(error).__name__, str(error).partition("\n")[0])


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: bytes) -> float | None:
    """The step of one line of metrics.jsonl, or None if it is not a whole record."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None

"""A copy of a run's records on wandb, which no failure there (not installed, no key, no network, slow) lets stop a run.

Everything is done by a thread of its own, and what goes wrong is said in one warning.
"""

import logging
import queue
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.background import Background

START_SECONDS = 10          # that the run waits for wandb to start, before it goes on without it
FINISH_SECONDS = 60         # for the last uploads at the end
WAITING = 1000              # records that may wait for a wandb that is slow; more are not sent
_log = logging.getLogger(__name__)


class Mirror:
    """Of the run ``run_id``, whose folder is ``folder``. Main process only. ``url`` is the run's page, or None."""

    def __init__(self, folder: Path, mode: str, *, project: str, run_id: str, name: str | None,
                 config: Mapping[str, Any]):
        self.folder, self.run_id = folder, run_id
        self.url: str | None = None
        self._run: Any = None
        self._open, self._dropped = True, 0
        self._sender = Background("wandb", limit=WAITING)
        self._submit(lambda: self._start(mode, project, name, config))
        self._sender.wait(START_SECONDS)

    def log(self, kind: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """A record of ``step``."""
        numbers = {f"{kind}/{key}": value.item() if hasattr(value, "item") else value for key, value in values.items()}
        self._submit(lambda: self._log(step, {"epoch": epoch, **numbers}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """What wandb shows of the run in a table of runs."""
        self._submit(lambda: self._run.summary.update(values))

    def close(self) -> None:
        """Let it send the rest, for a minute or two at most."""
        self._sender.wait(FINISH_SECONDS)
        self._submit(lambda: self._run.finish())
        if not self._sender.wait(FINISH_SECONDS + START_SECONDS):
            self._warn("it did not end")
        elif self._dropped:
            self._warn(f"it was too slow for {self._dropped} records")
        self._open = False
        self._sender.close(0)

    def _submit(self, action: Callable[[], object]) -> None:
        if self._open:
            try:
                self._sender.submit(lambda: self._attempt(action))
            except queue.Full:
                self._dropped += 1

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._open:
            try:
                action()
            except Exception as error:
                self._warn(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")

    def _warn(self, what: str) -> None:
        if self._open:
            self._open = False
            _log.warning("wandb: %s. The run goes on without it; metrics.jsonl has everything.", what)

    def _start(self, mode: Any, project: str, name: str | None, config: Mapping[str, Any]) -> None:
        import wandb

        logging.raiseExceptions = False                 # wandb's log of itself, on a full disk, floods the terminal
        wandb.setup(wandb.Settings(silent=True))        # it would write into the progress line, and wait longer
        if mode == "online" and not wandb.login(prompt=False, verify=False):       # a prompt would hold up the run
            raise ValueError("no account is set up on this machine: run 'wandb login' once, or choose offline")
        settings = wandb.Settings(init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True,
                                  console="off", silent=True)
        self._run = wandb.init(project=project or None, id=self.run_id, name=name, dir=str(self.folder), mode=mode,
                               resume="allow", config=dict(config), settings=settings)
        self.url = self._run.url if mode == "online" else None

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._run.step:          # wandb takes no step twice; after a resume it may know some of them
            self._run.log(values, step=step)

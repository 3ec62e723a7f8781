"""Checkpoints that are written while training goes on."""

import shutil
import tempfile
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from common.background import Background
from common.checkpoint import Folder
from common.snapshot import Snapshot


class Saver(Folder):
    """A folder whose ``save`` returns when the state is copied; ``disk`` checks it, writes it, and deletes old ones.

    Main process only. What was submitted to ``disk`` before, such as records, is on the disk before.
    """

    def __init__(self, path: str | Path, keep: int, disk: Background):
        super().__init__(path, keep)
        self._disk, self._snapshot = disk, Snapshot()
        self._writing: Future | None = None
        self._error: BaseException | None = None
        self._owed = False                      # one that is to be kept for good could not be saved: the next one is it

    def save(self, step: int, state: dict[str, Any], keep_always: bool = False) -> Path:
        """Copy the state and have it written, once the save before is done. What goes wrong then, ``error`` gives."""
        self.wait()
        keep_always |= self._owed
        copy = self._snapshot.take(state)
        self._writing = self._disk.submit(lambda: self._write(step, copy, keep_always))
        return self.file(step, keep_always)

    def _write(self, step: int, copy: dict[str, Any], keep_always: bool) -> None:
        self._snapshot.wait()
        self._owed = keep_always
        super().save(step, copy, keep_always)
        self._owed = False

    @property
    def busy(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Until the last save is on the disk, or has failed."""
        if self._writing is not None:
            wait([self._writing])
            self._error, self._writing = self._writing.exception(), None

    def error(self) -> BaseException | None:
        """What the last save that is done has met, told once."""
        if self.busy:
            return None
        self.wait()
        error, self._error = self._error, None
        return error

    def files(self) -> list[tuple[int, Path]]:
        """As of any folder, after the save that is going on; so ``newest``, too, may be called at any time."""
        self.wait()
        return super().files()

    def save_elsewhere(self, step: int, state: dict[str, Any], error: BaseException | None) -> str:
        """Save the state in the folder for temporary files ($TMPDIR), since ``error`` hinders it here; what to say."""
        self.wait()
        folder = None
        try:
            folder = tempfile.mkdtemp(prefix=f"{self.path.absolute().parent.name}-")
            path = Folder(folder).save(step, state)
        except OSError as second:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            return (f"{error} Nor could the state be saved elsewhere: {second} Once {self.path} can be written, run "
                    "the same command again: it goes on from the newest checkpoint in it.")
        return (f"{error} The state after step {step:,} is in {path} instead. Once {self.path} can be written, move it "
                "there and run the same command again: it goes on from this step.")

"""One training process for each run's folder.

A record lock of POSIX: the system releases it when the process dies, however it dies, so no lock is ever stale; forked
workers do not hold it; and it works over NFS. It is lost if the process opens and closes the file once more, so
nothing else here does.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

try:
    import fcntl
except ImportError:                         # Windows has no such locks: two runs in one folder are the user's matter
    fcntl = None                            # type: ignore[assignment]

NAME = ".lock"
_held: dict[Path, int] = {}                 # folder -> the open file; the same process may come again


def take(folder: Path) -> str | None:
    """Lock ``folder`` for this process, making it first; None, or who has it (``host, process 123, since ...``).

    Where the folder cannot be written to, or the disk knows no locks, there is none: whoever writes next says why.
    """
    folder = folder.resolve()
    if fcntl is None or folder in _held:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return _owner(file)
    except OSError:
        os.close(file)
        return None
    _held[folder] = file
    said = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):          # a full disk: the lock holds without words
        os.ftruncate(file, 0)
        os.write(file, json.dumps(said).encode())
    return None


def release(folder: Path) -> None:
    """Let another process have the folder."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        os.close(file)


def _owner(file: int) -> str:
    with os.fdopen(file) as opened:
        try:
            said = json.load(opened)
            return f"{said['host']}, process {said['process']}, since {said['since']}"
        except (ValueError, TypeError, KeyError):       # it has not written yet
            return "unknown"

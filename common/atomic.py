"""Files that are there whole, or as they were before."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> int:
    """Let ``write`` fill a new file, then put it in the place of ``path`` in one step that survives a power cut.

    Returns the size in bytes. On any error, an interrupt included, ``path`` stays as it was.
    """
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):          # a disk that fails may fail here, too; the first error tells more
            beside.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)                            # the new name, too, must be on the disk
    finally:
        os.close(folder)
    return size

"""Where a run happens: versions, commit, and how this Python is called."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def versions() -> dict[str, str]:
    """Of Python and of the packages that a number may depend on."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "timm", "faiss-gpu", "faiss-cpu", "numpy", "pillow", "simplejpeg"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's git commit, with ``+`` if files differ from it; None outside a checkout.

    git is not to write its index: a run that is killed meanwhile would leave the lock, and the user could not commit.
    """
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("--no-optional-locks", "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def python_command() -> str:
    """How this Python is called from the current folder."""
    near = os.path.relpath(sys.executable)
    return "python" if near.startswith("..") else near

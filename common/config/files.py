"""Config files: where a name leads, and the text there."""

import difflib
import os
from pathlib import Path

from common.config.yaml12 import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MAX_BYTES = 256 * 1024


def find(name: str | os.PathLike) -> Path:
    """The config file ``name``: a path, or a name with or without ``.yaml``, here or in the installed ``configs/``."""
    for candidate in (Path(name), Path(f"{name}.yaml"), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if os.path.isfile(candidate):
            return candidate
    known = sorted({path.stem for folder in (Path(), CONFIGS) for path in folder.glob("*.yaml")})
    near = difflib.get_close_matches(Path(name).stem, known, n=3, cutoff=0.5) or known
    kind = "is a folder, not a config" if os.path.isdir(name) else "no such config"
    known_here = f" There is: {', '.join(near)}." if near else ""
    raise ConfigError(f"{name}: {kind} (looked in this folder and in {CONFIGS}).{known_here}")


def read_text(path: Path) -> tuple[str, str]:
    """The text of ``path``, and what to call it in messages: relative to this folder, if it is below it."""
    source = os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{source}: {path.stat().st_size:,} bytes is no config (at most {MAX_BYTES:,}).")
        return path.read_text(encoding="utf-8-sig"), source
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read as text ({error}).") from error

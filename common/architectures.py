"""Names of backbones, known without importing the libraries that hold them."""

import difflib
import functools
import importlib.util
import re
from pathlib import Path


def check_arch(arch: str) -> None:
    """Raises ValueError for a name that stands nowhere in the source of its library, nor is ``wWsS`` or ``wWpP``."""
    if small_resnet_sizes(arch) is not None:
        return
    library, slash, rest = arch.partition("/")
    library, name = (library, rest) if slash else ("timm", arch)
    if library not in ("timm", "torchvision"):
        raise ValueError(unknown(arch, [f"timm/{rest}", f"torchvision/{rest}"], "no library here"))
    text = _models(library)
    if not name or not re.search(rf"""def {(stem := re.escape(name.split('.')[0]))}\(|["']{stem}["']""", text):
        prefix = "torchvision/" if library == "torchvision" else ""
        known = re.findall(r"@register_model\(?.*?\)?\s+(?:@.*\s+)*def (\w+)", text)
        raise ValueError(unknown(arch, [prefix + other for other in known], library))


def unknown(name: str, known: list[str], library: str) -> str:
    """The message about a name that ``library`` does not know."""
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return f"arch: {library} has no model {name!r}.{hint} Allowed: torchvision/NAME, a timm name, wWsS such as w16s1."


def small_resnet_sizes(arch: str) -> tuple[int, int, int | None] | None:
    """``w48p4`` -> (48, 1, 4); ``w16s1`` -> (16, 1, None); None for any other name."""
    match = re.fullmatch(r"w([1-9][0-9]{0,5})([sp])([1-9][0-9]{0,5})", arch)
    if match is None:
        return None
    width, step = int(match[1]), int(match[3])
    return (width, step, None) if match[2] == "s" else (width, 1, step)


@functools.cache
def _models(library: str) -> str:
    """The source of the library's models; empty if it is not installed."""
    spec = importlib.util.find_spec(library)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(path for folder in folders for path in (Path(folder) / "models").rglob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)

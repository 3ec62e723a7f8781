"""Names of backbones, known without importing the libraries that hold them."""

import difflib
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

# What ``arch_args`` may set of timm's ViTs, each a whole number up to this. (timm takes much more, files to load too.)
VIT_SIZES = {"num_heads": 1024, "embed_dim": 16384, "depth": 256, "patch_size": 1024}


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


def check_arch_args(arch: str, arch_args: Mapping[str, int] | None) -> None:
    """Raises ValueError for arguments that are no sizes of a ViT of timm's."""
    if not arch_args:
        return
    if not arch.removeprefix("timm/").startswith(("vit_", "deit")):
        raise ValueError(f"arch_args: {', '.join(arch_args)} given for {arch!r}. They are for timm's ViTs alone.")
    for key, value in arch_args.items():
        if key not in VIT_SIZES:
            raise ValueError(f"arch_args: {key!r} is not known. Allowed: {', '.join(VIT_SIZES)}.")
        if type(value) is not int or not 1 <= value <= VIT_SIZES[key]:
            raise ValueError(f"arch_args: {key} {value!r} given. Give a whole number, 1 to {VIT_SIZES[key]}.")


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

"""What a config leaves as ``auto``: chosen from the images that were found, and written down with the reason."""

from collections.abc import Callable
from typing import NamedTuple

from common.config import Config, ConfigError


class Facts(NamedTuple):
    """What the choices are made from: the images, the machine, and what the config itself sets."""

    num_images: int
    size: int                       # pixels, the typical short side
    accelerated: bool               # there is a GPU
    view_size: int | None = None    # None: left open
    epochs: int | None = None
    batch_size: int | None = None


def choose(config: Config, num_images: int, size: int, accelerated: bool) -> None:
    """Replace every ``auto`` that this module knows in ``config``, for images of such a number and short side.

    Raises ConfigError for an ``auto`` where it is not known.
    """
    facts = Facts(num_images, size, accelerated, *(_whole(config.get(where)) for where in
                                                   ("views.size", "train.epochs", "train.batch_size")))
    for where in automatic(config):
        if where not in CHOICES:
            raise ConfigError(f"{config.origin[where]}: {where}: 'auto' is not known here. "
                              f"It is for: {', '.join(CHOICES)}.")
        value, reason = CHOICES[where](facts)
        config.set(where, value, f"chosen: {reason}")


def _whole(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def automatic(config: Config) -> list[str]:
    """The places that stand as ``auto``, other than those whose constructor understands the word."""
    return [where for where in _leaves(config.tree)
            if config.get(where) == "auto" and where.rpartition(".")[2] not in OWN]


OWN = ("stem", "device", "in_memory", "backend", "train", "test", "labels")


def _leaves(tree: dict, above: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        where = f"{above}{key}"
        found += _leaves(value, f"{where}.") if isinstance(value, dict) else [where]
    return found


def _view_size(facts: Facts) -> tuple[int, str]:
    if facts.view_size:
        return facts.view_size, "given"
    size = next((size for size, up_to in ((32, 48), (64, 96), (128, 160)) if facts.size <= up_to), 224)
    return size, f"the images' short side is about {facts.size} pixels"


def _arch(facts: Facts) -> tuple[str, str]:
    size, _ = _view_size(facts)
    if not facts.accelerated and size <= 32:
        return "w48p4", "small images and no GPU"
    if facts.num_images >= 100_000 and size == 224:
        return "torchvision/resnet50", f"{facts.num_images:,} images of full size"
    return "torchvision/resnet18", f"{facts.num_images:,} images" if size == 224 else f"views of {size} pixels"


def _batch_size(facts: Facts) -> tuple[int, str]:
    if facts.batch_size:
        return facts.batch_size, "given"
    size = next((size for size, least in ((256, 20_000), (128, 5_000), (64, 256), (32, 128), (16, 32), (8, 16))
                 if facts.num_images >= least), 4)
    return size, f"{facts.num_images:,} images: short runs gain from more steps"


def _queue(facts: Facts) -> tuple[int, str]:
    quarter = facts.num_images // 4
    size = min(65536, max(16, 1 << (quarter.bit_length() - 1) if quarter else 16))
    return size, f"about a quarter of the {facts.num_images:,} images, from 16 to the paper's 65,536"


def _epochs(facts: Facts) -> tuple[int, str]:
    if facts.epochs:
        return facts.epochs, "given"
    epochs = int(min(800, max(100, 20_000_000 // facts.num_images)))
    return epochs, f"{facts.num_images:,} images, {epochs * facts.num_images:,} views of each kind"


def _momentum(facts: Facts) -> tuple[float, str]:
    steps = _epochs(facts)[0] * facts.num_images // _batch_size(facts)[0]
    return (0.999 if steps >= 50_000 else 0.99), f"about {steps:,} steps"


def _groups(facts: Facts) -> tuple[int, str]:
    batch = _batch_size(facts)[0]
    groups = max(2, batch // 32)
    return groups, f"groups of {batch // groups} images (32 in the paper)"


def _evaluate_every(facts: Facts) -> tuple[int, str]:
    epochs = _epochs(facts)[0]
    return max(1, epochs // 20), "20 times in the run" if epochs >= 20 else "every epoch of a short run"


CHOICES: dict[str, Callable[[Facts], tuple[int | float | str, str]]] = {
    "views.size": _view_size, "method.encoder.arch": _arch, "method.dictionary.size": _queue,
    "method.momentum": _momentum, "method.bn_groups": _groups, "train.epochs": _epochs,
    "train.batch_size": _batch_size, "evaluate.every": _evaluate_every, "checkpoint.every": _evaluate_every,
}


def has_accelerator(kind: str) -> bool:
    """Whether ``train.device: kind`` means a GPU on this machine."""
    import torch  # only here: a config is checked without

    there = torch.cuda.is_available() or torch.backends.mps.is_available()
    return kind in ("cuda", "mps") or (kind == "auto" and there)

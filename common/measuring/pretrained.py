"""timm's pretrained backbones, from a file or from what is on the disk; downloaded only where that is asked for."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from common.config import ConfigError
from common.data.views import Views
from common.encoder import Encoder

FILES = ("model.safetensors", "pytorch_model.bin")      # of a repository on the hub, the better one first


class Pretrained(NamedTuple):
    """A backbone with weights (its head does nothing), how it is to be shown images, and where the weights are from."""

    encoder: Encoder
    views: Views
    file: Path


def pretrained(name: str, channels: int, file: str = "", download: bool = False) -> Pretrained:
    """timm's ``name`` with the weights in ``file``, or with those in the cache of the Hugging Face hub.

    Raises ConfigError for an unknown name, for weights that are not there, that hold anything but tensors, or that do
    not fit. First convolutions are adapted to ``channels`` as timm does it.
    """
    import timm

    known = timm.models.get_pretrained_cfg(name)
    repository = known.hf_hub_id if known else None
    if known is None or not (file or repository):
        raise ConfigError(f"timm:{name}: timm {timm.__version__} knows no pretrained weights of that name. "
                          f"timm.list_pretrained() lists those it knows; timm:{name}=FILE takes weights of yours.")
    place = Path(file).expanduser() if file else _cached(name, str(repository), download)
    weights = _read(name, place)
    try:
        one, other = (_built(name, weights, channels, seed) for seed in (0, 1))
    except (RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
        raise _misfit(name, place, str(error).strip()[:300]) from error
    if random := [key for key, value in one.state_dict().items() if not torch.equal(value, other.state_dict()[key])]:
        raise _misfit(name, place, f"{len(random)} of its tensors are not in it, the first {random[0]}")
    return Pretrained(Encoder(one, nn.Identity()).eval(), TimmViews(known, channels), place)


def _built(name: str, weights: dict[str, Any], channels: int, seed: int) -> nn.Module:
    """timm loads some of its models loosely: what it does not find stays as it was drawn, and depends on ``seed``."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: nn.Module = timm.create_model(name, pretrained=True, num_classes=0, in_chans=channels,
                                                pretrained_cfg_overlay={"state_dict": dict(weights)})
    return backbone


def _misfit(name: str, place: Path, reason: str) -> ConfigError:
    return ConfigError(f"timm:{name}: the weights in {place} are not its own ({reason}). Give the name that they were "
                       "saved under.")


class TimmViews(Views):
    """The evaluation transform that a timm backbone was published with: its size, share of the crop, mean and std.

    Resized by this project's filter, not by timm's bicubic one.
    """

    def __init__(self, published: Any, channels: int):
        mean, std = (list(colours) if channels == 3 else [sum(colours) / 3] * channels
                     for colours in (published.mean, published.std))
        super().__init__(published.input_size[-1], [], mean, std)
        self._share = published.crop_pct

    def _short_side(self, height: int, width: int) -> int:
        return math.floor(self.size / self._share)


def _cached(name: str, repository: str, download: bool) -> Path:
    """The weights' file in the hub's cache."""
    import huggingface_hub  # comes with timm

    found = (huggingface_hub.try_to_load_from_cache(repository, file) for file in FILES)
    place = next((Path(path) for path in found if isinstance(path, str)), None)
    if place is None and download:
        place = _downloaded(name, repository)
    if place is None:
        raise ConfigError(f"timm:{name}: its weights ({repository}) are not on this machine. Give --download to fetch "
                          f"them, or a file that holds them: timm:{name}=FILE.safetensors.")
    return place


def _downloaded(name: str, repository: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    for file in FILES:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        except EntryNotFoundError:
            continue
        except OSError as error:                # no network, no room, no right
            raise ConfigError(f"timm:{name}: {repository} could not be fetched: {error}. Fetch it elsewhere, and give "
                              f"timm:{name}=FILE.") from error
    raise ConfigError(f"timm:{name}: {repository} holds none of {', '.join(FILES)}. Give timm:{name}=FILE.")


def _read(name: str, path: Path) -> dict[str, Any]:
    """Tensors by name, from safetensors or from a file of torch's, of which no code is run."""
    from safetensors.torch import load_file

    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu",
                                                                                  weights_only=True)
    except Exception as error:                  # a file that is something else can raise nearly everything
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"timm:{name}: {path} cannot be read: {why}. Give a file of safetensors, or one "
                          "that torch.load(weights_only=True) takes.") from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict):
        raise ConfigError(f"timm:{name}: {path} holds a {type(state).__name__}, and not weights by name.")
    return state

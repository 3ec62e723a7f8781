"""A folder that timm loads by itself: ``timm.create_model("local-dir:DIR", pretrained=True)``."""

from pathlib import Path

from torch import nn

from common.architectures import small_resnet_sizes
from common.exchange.facts import Facts
from common.exchange.format import Format, quoted
from common.exchange.handed import Handed
from common.exchange.standard import is_resnet, refused


def write(folder: Path, handed: Handed) -> None:
    """``config.json`` and ``model.safetensors`` by timm's own writer, with the preprocessing of the evaluation."""
    from timm.models import save_for_hf

    views = handed.trained.views
    margin = views.size / views._short_side(views.size + 1, views.size + 1)
    data = {"input_size": (handed.channels, views.size, views.size), "mean": handed.mean, "std": handed.std,
            "interpolation": "bilinear", "crop_pct": margin, "crop_mode": "center"}
    try:
        save_for_hf(_timms(handed), str(folder), safe_serialization=True, data_config=data)
    except ValueError as error:                 # of a network whose one size is not that of the run's images
        raise refused(handed, "timm", f"timm does not hold it so: {error}", ["safetensors"]) from error


def _timms(handed: Handed) -> nn.Module:
    """The network as timm builds it: its own already, or a ResNet of torchvision's with the same keys."""
    if not (handed.arch or "").startswith("torchvision/"):
        return handed.backbone
    import timm

    model: nn.Module = timm.create_model(handed.name, num_classes=0, in_chans=handed.channels)
    model.load_state_dict(handed.state)
    return model.eval()


def loader(facts: Facts) -> str:
    _check(facts)
    return """\
import timm


def load(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
"""


def _check(facts: Facts) -> None:
    if facts.arch is None:
        raise refused(facts, "timm", "its parts are not known by name", ["torch_export", "onnx"])
    if small_resnet_sizes(facts.arch) is not None or (facts.arch.startswith("torchvision/") and not is_resnet(facts)):
        raise refused(facts, "timm", "timm has no such network", ["torchvision", "safetensors"])
    if facts.stem != "imagenet":
        raise refused(facts, "timm", f"timm has no ResNet with the stem {facts.stem!r}", ["torchvision", "safetensors"])
    if facts.head:
        raise refused(facts, "timm", "timm has no place for a projection head, so --what is backbone or key_backbone "
                      "for it", ["safetensors"])


def lines(facts: Facts, folder: str) -> str:
    return ('import timm\n'
            f'model = timm.create_model({quoted(folder, scheme="local-dir:")}, pretrained=True).eval()\n'
            'features = model(images)')


FORMAT = Format("timm", "a folder for timm.create_model", write, loader, lines)

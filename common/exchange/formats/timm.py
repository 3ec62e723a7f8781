"""A folder that timm loads by itself: ``timm.create_model("local-dir:DIR", pretrained=True)``."""

import json
from pathlib import Path

from torch import nn

from common.architectures import small_resnet_sizes
from common.exchange.facts import Facts
from common.exchange.format import Format, quoted
from common.exchange.handed import Handed
from common.exchange.preprocessing import Preprocessing
from common.exchange.standard import is_resnet, refused

CONFIG = "config.json"
OF_TIMMS_WEIGHTS = ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes", "hf_hub_id", "url")


def write(folder: Path, handed: Handed) -> None:
    """``config.json`` and ``model.safetensors`` by timm's own writer, with the preprocessing of the evaluation."""
    from timm.models import save_for_hf

    data = Preprocessing.of(handed.trained.views, handed.channels).timm()
    try:
        save_for_hf(_timms(handed), str(folder), safe_serialization=True, data_config=data)
    except ValueError as error:                 # of a network whose one size is not that of the run's images
        raise refused(handed, "timm", f"timm does not hold it so: {error}", ["safetensors"]) from error
    _correct(folder / CONFIG)


def _correct(config: Path) -> None:
    """Without what timm says of its own weights of that name: theirs are not these. And without the number of classes
    among the arguments, where transformers' TimmWrapperModel would give it a second time: it stands one level up."""
    said = json.loads(config.read_text(encoding="utf-8"))
    said.get("model_args", {}).pop("num_classes", None)
    for name in OF_TIMMS_WEIGHTS:
        said["pretrained_cfg"].pop(name, None)
    config.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


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

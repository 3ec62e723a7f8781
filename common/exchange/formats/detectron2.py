"""A ResNet under detectron2's names, as the converter in MoCo's official repository writes it for its detection."""

import pickle
from pathlib import Path

from common.exchange.facts import Facts
from common.exchange.format import Format, quoted
from common.exchange.handed import Handed
from common.exchange.standard import construction, is_resnet, refused

FILE = "backbone.pkl"
# torchvision's words and detectron2's; of two that begin alike the longer one comes first.
WORDS = (("downsample.1", "shortcut.norm"), ("downsample.0", "shortcut"), ("bn1", "conv1.norm"), ("bn2", "conv2.norm"),
         ("bn3", "conv3.norm"), ("layer1", "res2"), ("layer2", "res3"), ("layer3", "res4"), ("layer4", "res5"))


def write(folder: Path, handed: Handed) -> None:
    arrays = {renamed(name): x.numpy() for name, x in handed.state.items()}
    content = {"model": arrays, "__author__": "contrastive-backbones", "matching_heuristics": True}
    with open(folder / FILE, "wb") as file:
        pickle.dump(content, file, protocol=4)          # one that every Python 3 reads


def renamed(name: str) -> str:
    if not name.startswith("layer"):
        name = f"stem.{name}"
    for theirs, word in WORDS:
        name = name.replace(theirs, word)
    return name


def loader(facts: Facts) -> str:
    if facts.arch is None or not is_resnet(facts) or facts.stem != "imagenet":
        raise refused(facts, "detectron2", "detectron2 has ResNets only, with ImageNet's stem",
                      ["torchvision", "safetensors"])
    if facts.head:
        raise refused(facts, "detectron2", "a detector has no place for a projection head, so --what is backbone or "
                      "key_backbone for it", ["torchvision", "safetensors"])
    words = ",\n         ".join(f'("{word}", "{theirs}")' for theirs, word in WORDS)
    return construction(facts, "detectron2").file(f"""\
# detectron2 itself reads {FILE} (MODEL.WEIGHTS); here its names are turned back into torchvision's
WORDS = ({words})


class Arrays(pickle.Unpickler):
    def find_class(self, module, name):
        if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{{module}}.{{name}}: arrays alone are loaded")


def renamed(name):
    for word, other in WORDS:
        name = name.replace(word, other)
    return name.removeprefix("stem.")


def load(folder):
    with open(Path(folder) / "{FILE}", "rb") as file:
        arrays = Arrays(file).load()["model"]
    model = build()
    model.load_state_dict({{renamed(name): torch.from_numpy(array) for name, array in arrays.items()}})
    return model.eval()
""", "import pickle", "from pathlib import Path")


def lines(facts: Facts, folder: str) -> str:
    """Of detectron2's configuration; its ResNets are those whose 3x3 convolution has the stride, as torchvision's."""
    mean, std = ([round(255 * value, 3) for value in values] for values in (facts.mean, facts.std))
    return (f"cfg.MODEL.WEIGHTS = {quoted(folder, FILE)}\n"
            'cfg.MODEL.RESNETS.STRIDE_IN_1X1, cfg.INPUT.FORMAT = False, "RGB"\n'
            f'cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = {mean}, {std}')


FORMAT = Format("detectron2", "a ResNet for detectron2's model zoo loader", write, loader, lines)

"""Two runs to hand on, each of one epoch."""

import pytest

from common.config import Config
from common.run import pretrain
from common.trained import load_trained

QUICK = ["train.epochs=1", "schedule.warmup=0", "evaluate.protocols=[]", "evaluate.baselines=false",
         "train.device=cpu"]


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """The folder of a run by the demo's config."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    pretrain(Config.load("demo", [f"run.dir={folder}", *QUICK]))
    return folder


@pytest.fixture(scope="session")
def demo(demo_run):
    return load_trained(demo_run)


@pytest.fixture(scope="session")
def resnet(tmp_path_factory):
    """A ResNet-18 with ImageNet's stem, a linear head, grey images."""
    folder = tmp_path_factory.mktemp("runs") / "resnet"
    of = ["arch=resnet18", "stem=imagenet", "head=linear", "hidden=null"]
    pretrain(Config.load("demo", [f"run.dir={folder}", *QUICK, "train.batch_size=256",
                                  *(f"method.encoder.{key}" for key in of)]))
    return load_trained(folder)

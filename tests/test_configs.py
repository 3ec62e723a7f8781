"""The configs of published runs hold the published values.

From the papers and the authors' code: facebookresearch/moco (main_moco.py, moco/builder.py, the CIFAR-10 notebook) and
zhirongw/lemniscate.pytorch (main.py, cifar.py). The views are held in tests/data/test_recipes.py.
"""

import pytest

from common.run import open_config

V1 = {"method.name": "moco.MoCo", "method.momentum": 0.999, "method.temperature": 0.07, "method.symmetric": None,
      "method.key_bn": "shuffle", "method.bn_groups": 8, "method.encoder.arch": "torchvision/resnet50",
      "method.encoder.head": "linear", "method.encoder.hidden": None, "method.encoder.dim": 128,
      "method.dictionary.name": "common.dictionary.Queue", "method.dictionary.size": 65536,
      "method.dictionary.mask_own": None, "views.name": "common.data.recipes.moco_v1", "views.size": 224,
      "optimizer.name": "common.optim.sgd", "optimizer.base_lr": 0.03, "optimizer.momentum": 0.9,
      "optimizer.weight_decay": 1e-4, "optimizer.decay_all": None, "schedule.name": "common.schedule.step",
      "schedule.milestones": [120, 160], "schedule.gamma": 0.1, "schedule.warmup": None, "train.epochs": 200,
      "train.batch_size": 256}
V2 = V1 | {"method.temperature": 0.2, "method.encoder.head": "mlp", "views.name": "common.data.recipes.moco_v2",
           "schedule.name": "common.schedule.cosine", "schedule.by": "epoch", "schedule.first": None,
           "schedule.milestones": None, "schedule.gamma": None}
NOTEBOOK = V2 | {"method.momentum": 0.99, "method.temperature": 0.1, "method.symmetric": False,
                 "method.encoder.arch": "torchvision/resnet18", "method.encoder.head": "linear",
                 "method.dictionary.size": 4096, "views.name": "common.data.recipes.moco_cifar10", "views.size": 32,
                 "optimizer.base_lr": None, "optimizer.lr": 0.06, "optimizer.weight_decay": 5e-4, "schedule.first": 1,
                 "train.batch_size": 512, "evaluate.layer": "head",
                 "evaluate.protocols": [{"name": "common.evaluate.KNN", "k": [200], "temperature": 0.1}]}
INSTDISC = V1 | {"method.name": "instdisc.InstDisc", "method.momentum": None, "method.key_bn": None,
                 "method.loss": "nce", "method.proximal": None, "method.dictionary.name": "common.dictionary.Bank",
                 "method.dictionary.size": None, "method.dictionary.negatives": 4096,
                 "method.dictionary.momentum": 0.5, "method.dictionary.shared": None, "method.dictionary.init": None,
                 "views.name": "common.data.recipes.instdisc", "evaluate.layer": "head",
                 "evaluate.protocols": [{"name": "common.evaluate.KNN", "k": [200], "temperature": 0.07}]}
INSTDISC_CIFAR = INSTDISC | {"method.temperature": 0.1, "method.loss": "full_softmax", "method.bn_groups": None,
                             "method.encoder.arch": "torchvision/resnet18", "method.dictionary.negatives": None,
                             "views.name": "common.data.recipes.instdisc_cifar10", "views.size": 32,
                             "optimizer.base_lr": None, "optimizer.lr": 0.03, "optimizer.weight_decay": 5e-4,
                             "train.batch_size": 128,
                             "evaluate.protocols": [{"name": "common.evaluate.KNN", "k": [200], "temperature": 0.1}]}


@pytest.mark.parametrize("name, published", [
    ("moco_v1", V1), ("moco_v2", V2), ("moco_cifar10", NOTEBOOK), ("instdisc", INSTDISC),
    ("instdisc_cifar10", INSTDISC_CIFAR),
])
def test_config_is_the_published_recipe(name, published):
    """None: the key is not set, so its default holds, which is the published value."""
    config = open_config(name)
    assert {where: config.get(where) for where in published} == published

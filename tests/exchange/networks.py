"""Networks to hand on that no run has trained: random weights, and BatchNorm statistics as of some training."""

import copy
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from common.backbones import backbone, feature_width
from common.batchnorm import group_batchnorm
from common.data import recipes
from common.exchange.handed import Handed, stem_of


def handed(arch: str, size: int = 64, stem: str = "imagenet", channels: int = 3) -> Handed:
    module = backbone(arch, stem=stem, channels=channels, image_size=size).eval().requires_grad_(False)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    width, views = feature_width(module), recipes.moco_v2(size, [0.5] * channels, [0.2] * channels, channels)
    return Handed("backbone", arch, {}, stem_of(module), channels, size, width, (), width, False, views.mean,
                  views.std, module=module, trained=SimpleNamespace(views=views, epoch=1.0))


@torch.inference_mode()
def features(network: Handed, images_BcHW: Tensor) -> Tensor:
    """As the trainer computes them: by its own BatchNorm."""
    return group_batchnorm(copy.deepcopy(network.module), 1).eval()(images_BcHW)

"""Momentum Contrast (He et al. 2020; Chen et al. 2020): ``MoCo`` is v1 and v2, which differ only in the config."""

from common.run import Run, load_run, pretrain
from moco.end_to_end import EndToEnd
from moco.method import MoCo

__all__ = ["EndToEnd", "MoCo", "Run", "load_run", "pretrain"]

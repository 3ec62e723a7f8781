"""Non-parametric instance discrimination (Wu et al. 2018)."""

from common.run import Run, load_run, pretrain
from instdisc.method import InstDisc

__all__ = ["InstDisc", "Run", "load_run", "pretrain"]

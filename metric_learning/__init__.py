"""Metric learning with labels or pairs: what leads to InstDisc and MoCo, and what follows them."""

from metric_learning.centre import CentreLoss
from metric_learning.contrastive import Contrastive
from metric_learning.joint import SoftmaxContrastive
from metric_learning.memory import Memory

__all__ = ["CentreLoss", "Contrastive", "Memory", "SoftmaxContrastive"]

"""Metric learning with labels or pairs: what leads to InstDisc and MoCo, and what follows them."""

from metric_learning.centre import CentreLoss
from metric_learning.contrastive import Contrastive
from metric_learning.joint import SoftmaxContrastive
from metric_learning.memory import Memory
from metric_learning.n_pair import NPair
from metric_learning.offline import OfflineTriplet
from metric_learning.ranked_triplet import RankedTriplet
from metric_learning.siamese import Siamese
from metric_learning.supcon import SupCon
from metric_learning.triplet import Triplet

__all__ = ["CentreLoss", "Contrastive", "Memory", "NPair", "OfflineTriplet", "RankedTriplet", "Siamese",
           "SoftmaxContrastive", "SupCon", "Triplet"]

"""Measuring a representation: features once, then kNN, retrieval and linear probes, each value with its protocol."""

from common.evaluate.features import Features, beside_bank, evaluating, extract, pixels, untrained
from common.evaluate.knn import KNN, search
from common.evaluate.linear import FewLabels, Linear
from common.evaluate.result import Result
from common.evaluate.retrieval import Retrieval
from common.evaluate.table import table

__all__ = ["KNN", "Features", "FewLabels", "Linear", "Result", "Retrieval", "beside_bank", "evaluating", "extract",
           "pixels", "search", "table", "untrained"]

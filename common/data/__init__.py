"""Images: where they come from, what is done to them, in which order they are read.

The builders below are what ``data.name`` in a config points at; each gives ``Splits``.
"""

from common.data.classes import only_classes
from common.data.datasets import Images, Splits
from common.data.faces import olivetti
from common.data.folders import folder
from common.data.images import UnreadableImage, read_image
from common.data.lists import file_list
from common.data.memory import arrays
from common.data.packed import packed
from common.data.pairs import pair_list
from common.data.small_sets import digits, fashion_mnist
from common.data.torchvision_sets import torchvision_set

__all__ = ["Images", "Splits", "UnreadableImage", "arrays", "digits", "fashion_mnist", "file_list", "folder",
           "olivetti", "only_classes", "packed", "pair_list", "read_image", "torchvision_set"]

"""Some of the images of a set, as a set of their own."""

from torch import Tensor

from common.data.datasets import Images


class Subset(Images):
    """Images ``index_m`` of ``whole``, in that order; image i of the subset is image ``index_m[i]`` of the whole.

    ``contents`` are the whole's: if they have not changed, nor have those of a part.
    """

    def __init__(self, whole: Images, index_m: Tensor):
        self.whole, self.index = whole, index_m.tolist()
        super().__init__(whole.name, [whole.keys[i] for i in self.index], whole.labels[index_m], whole.classes,
                         None if whole.array is None else whole.array[index_m])
        self.channels, self.size, self.contents = whole.channels, whole.size, whole.contents
        self.bad = {place: whole.bad[i] for place, i in enumerate(self.index) if i in whole.bad}

    def path(self, i: int) -> str:
        return self.whole.path(self.index[i])

    def read(self, i: int) -> Tensor:
        return self.whole.read(self.index[i]) if self.array is None else super().read(i)

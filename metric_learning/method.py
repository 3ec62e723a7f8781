"""What the methods of metric learning share: an order of the images, and a memory, if wanted."""

from collections.abc import Sequence

from torch import Tensor

from common.batchnorm import group_batchnorm, has_batchnorm
from common.data.datasets import Images
from common.data.orders import Balanced, Order
from common.encoder import Encoder
from common.method import AtChance, Batch, Method, Output
from metric_learning.memory import Candidates, Memory, candidates

NOTHING = "the loss has been that of chance for {steps:,} steps: nothing is learned. Look at the images of a class " \
          "(--show-views), then try another optimizer.lr, more schedule.warmup, or a pretrained backbone (run.weights)."


class MetricMethod(Method):
    """One encoder, trained with labels. ``forward`` of a method with a ``dictionary`` carries ``features``, [B, D].

    ``order``: in which images come (``common.data.orders``). ``bn_groups`` as in ``common.batchnorm``: 1 normalises
    over the whole batch, however many processes hold it.
    """

    supervised = True
    at_chance = AtChance(text=NOTHING)
    in_pairs = False    # whether it compares images 2i and 2i + 1 of a batch, and no others

    def __init__(self, encoder: Encoder, order: Order | None = None, dictionary: Memory | None = None,
                 bn_groups: int = 1):
        super().__init__()
        self.encoder = group_batchnorm(encoder, bn_groups) if has_batchnorm(encoder) else encoder
        self.order, self.dictionary = order, dictionary

    def check_images(self, images: Images) -> None:
        if self.order is not None and self.order.every and not self.mine_every:
            raise ValueError(f"order: {type(self.order).__name__} is of images that the method itself has chosen, and "
                             f"{type(self).__name__} chooses none. Give another, or leave it out.")
        if self.in_pairs:
            refuse_blocks(self.order, type(self).__name__)
        if images.together == 2 and not self.in_pairs:
            raise ValueError(f"{images.name} is a list of pairs, and {type(self).__name__} compares the images of a "
                             "batch by their classes. Give images with classes, or a method for pairs, such as "
                             "metric_learning.Contrastive with pairs: adjacent.")
        if images.together == 1 and self.in_pairs and self.order is None:
            raise ValueError(f"{type(self).__name__} takes images in pairs, and those of {images.name} come one by "
                             "one. Give method.order {name: common.data.orders.RandomPairs}, or a list of pairs "
                             "(common.data.pair_list).")
        classes = len(images.labels[images.labels >= 0].unique())
        if classes < 2:
            raise ValueError(f"{images.name} has labelled images of {classes} class{'es' * (classes != 1)}, and metric "
                             "learning tells classes apart. Give images of two or more, with their labels.")

    def compared(self, x_BD: Tensor, batch: Batch) -> Candidates:
        """The candidates of a batch, of all ranks and of the memory."""
        return candidates(x_BD, batch.index, batch.label, self.dictionary)

    def after_step(self, batches: Sequence[Batch], outputs: Sequence[Output], progress: float) -> None:
        if self.dictionary is not None:
            for batch, output in zip(batches, outputs, strict=True):
                self.dictionary.remember(output.carry["features"], batch.index, batch.label)


def refuse_blocks(order: Order | None, name: str) -> None:
    """Raises ValueError for an order whose images 2i and 2i + 1 are of one class, all or nearly all of them."""
    if isinstance(order, Balanced):
        raise ValueError(f"order: Balanced puts images of one class side by side, and {name} compares images 2i and "
                         "2i + 1: hardly one pair would be of two classes. Give common.data.orders.RandomPairs.")

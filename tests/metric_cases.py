"""The methods of metric learning that the contracts of all methods are tested with, by name."""

from common.data.orders import Balanced, Tuplets
from common.encoder import Encoder
from common.method import Method
from metric_learning import (
    CentreLoss,
    Contrastive,
    Memory,
    NPair,
    OfflineTriplet,
    RankedTriplet,
    Siamese,
    SoftmaxContrastive,
    SupCon,
    Triplet,
)

C = 5                                                   # feature dimension
LABELS = [0, 0, 1, 2, 3, 3, 1, -1]                      # of a batch of eight: pairs of both kinds, one not known
TRIPLETS = [0, 0, 1, 2, 2, 0, 3, 3, 1, 1, 1, -1]        # of a batch of twelve: three triplets, one with an unknown


def lengths(encoder: Encoder) -> Encoder:
    """Its features keep their lengths."""
    encoder.unit = False
    return encoder


def memory():
    return Memory(20, C)


CASES = {
    "contrastive": lambda encoder: Contrastive(encoder),
    "contrastive, lengths": lambda encoder: Contrastive(lengths(encoder), margin=2.0),
    "contrastive, all": lambda encoder: Contrastive(lengths(encoder), margin=2.0, pairs="all", similar=None),
    "contrastive, memory": lambda encoder: Contrastive(encoder, pairs="all", dictionary=memory()),
    "softmax + contrastive": lambda encoder: SoftmaxContrastive(encoder, 4, margin=2.0),
    "softmax + contrastive, softmax loss": lambda encoder: SoftmaxContrastive(encoder, 4,
                                                                             contrastive_weight="softmax_loss"),
    "centre loss": lambda encoder: CentreLoss(lengths(encoder), 4, weight=0.1),
    "centre loss, 2 micro-batches": lambda encoder: CentreLoss(lengths(encoder), 4, weight=0.1),
    "n-pair": lambda encoder: NPair(lengths(encoder), l2=0.01),
    "n-pair, memory": lambda encoder: NPair(lengths(encoder), dictionary=memory()),
    "n-pair, tuplets": lambda encoder: NPair(lengths(encoder), order=Tuplets(4), l2=0.01),
    "n-pair, tuplets, memory": lambda encoder: NPair(lengths(encoder), order=Tuplets(4), dictionary=memory()),
    "supervised contrastive": SupCon,
    "supervised contrastive, memory, groups": lambda encoder: SupCon(encoder, dictionary=memory(), bn_groups=2),
    "triplet, random": lambda encoder: Triplet(encoder, order=Balanced(4), negatives="random", margin=1.0),
    "triplet, semi-hard": lambda encoder: Triplet(encoder, order=Balanced(2), margin=1.0),
    "triplet, hardest": lambda encoder: Triplet(encoder, negatives="hardest", margin=1.0, squared=False),
    "triplet, memory": lambda encoder: Triplet(encoder, negatives="random", margin=1.0, dictionary=memory()),
    "ranked triplet": lambda encoder: RankedTriplet(encoder, neg_num=2, margin=1.0),
    "ranked triplet, memory": lambda encoder: RankedTriplet(encoder, order=Balanced(4), neg_num=4, pair_size=4,
                                                            margin=1.0, dictionary=memory()),
    "siamese": lambda encoder: Siamese(lengths(encoder), margin=2.0),
    "siamese, two towers": lambda encoder: Siamese(encoder, shared=False, margin=2.0),
    "siamese, softmax": lambda encoder: Siamese(encoder, loss="softmax"),
    "siamese, two towers, softmax": lambda encoder: Siamese(lengths(encoder), shared=False, loss="softmax"),
    "offline triplet": lambda encoder: OfflineTriplet(encoder, 24, margin=1.0),
}


def labels(name: str) -> list[int]:
    """Of the batch that a case is tried with on two processes: each of them holds whole groups of what it compares."""
    return TRIPLETS if name.startswith("offline") else LABELS


def defined(cls: type = Method) -> set[type]:
    """The methods of this project: those that no other method of it is made of."""
    found = {deeper for child in cls.__subclasses__() for deeper in defined(child)}
    own = cls.__module__.partition(".")[0] in ("moco", "instdisc", "metric_learning")
    return found or ({cls} if own else set())

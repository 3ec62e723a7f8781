"""The contract between a training method and everything that runs, measures, saves and exports it."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from common.data.datasets import Images
from common.data.orders import Order
from common.encoder import Encoder


class Batch(NamedTuple):
    """What the loader gives: V views of the same B images (the share of this rank)."""

    views: list[Tensor]     # V tensors [B, c, H, W] float32, normalised: augmentations of the same B images
    index: Tensor           # type: ignore[assignment]   # [B] int64: which training image (hides tuple.index)
    label: Tensor           # [B] int64: its class, or -1; read by supervised methods alone


class Output(NamedTuple):
    """What ``Method.forward`` gives."""

    loss: Tensor                    # scalar, the mean over this rank's images; the trainer calls backward() on it
    logs: dict[str, Tensor]         # detached scalars on the device; the trainer decides when to synchronise
    carry: dict[str, Tensor]        # detached [B, ...]: what forward computed and after_step needs


class AtChance(NamedTuple):
    """What is told of a run whose loss stays at ``Method.chance``, and when."""

    steps: int = 1000               # good ones in a row, before it is told
    within: float = 0.01            # of chance, as a share of it
    cosine: float = -1.0            # the mean over pairs of features, at the last look at them, is this at least
    text: str = "the loss has been that of chance for {steps:,} steps: nothing is learned. Look at the views " \
                "(--show-views), then try another optimizer.base_lr or method.temperature."


class Method(nn.Module):
    """A module with an ``encoder`` to export, a loss, and what follows an optimizer step.

    The trainer calls, in this order: ``forward`` (inside DDP, once a micro-batch), ``backward``, ``optimizer.step``,
    ``after_step``. ``forward`` writes nothing but BatchNorm's running statistics, so it may be called twice, compiled,
    or used as a validation loss. All state is in parameters and buffers: ``state_dict()`` is the whole of it.
    """

    encoder: Encoder
    num_views = 1       # of an image, at least, that ``forward`` takes
    order: Order | None = None      # in which it wants its images; None: shuffled
    supervised = False  # whether it learns from labels
    at_chance = AtChance()
    legend: Mapping[str, str] = {}      # what its logs mean, for the progress line, where it is not the usual
    learned = False     # whether it has learned a measure of its own, which ``similarity`` is
    mine_every = 0      # steps after which it looks at its training images again (``mine``); 0: never
    citation = ""       # of the method's paper, in BibTeX: stands in the model card of what is handed on

    def forward(self, batch: Batch) -> Output:
        raise NotImplementedError

    def after_step(self, batches: Sequence[Batch], outputs: Sequence[Output], progress: float) -> None:
        """Called once after each optimizer step: moving averages, enqueueing, memory updates.

        One batch and one output for each micro-batch of the step, in order (one each without gradient accumulation).
        ``progress`` is the fraction of the training that is done, in (0, 1]. Touches nothing that has a gradient. After
        a step that was not taken it is not called, or what it changes is put back (common.guard).
        """

    def follow_encoder(self) -> None:
        """Called once, before ``prepare``, when the encoder has got weights to begin with: copies of it take them, too.
        Queue, bank and the like stay as they are made."""

    def prepare(self, embed: Callable[[], Tensor]) -> None:
        """Called once before the first step of a new run. ``embed()`` gives the untrained encoder's features of all
        training images, unit length, [n, C], the same on every rank."""

    def mine(self, embed: Callable[[Tensor], Tensor], images: Images, step: int) -> dict[str, float]:
        """Called on every rank before each step that ``mine_every`` divides, after ``step`` steps: choose what the next
        ones see, and keep it in buffers, the same on every rank, from which ``order`` reads it.

        ``embed(index_m)`` gives the features of these of the training ``images`` by the encoder as it is now: unit
        length, [m, C], the same on every rank. Depends on the weights, the seed and ``step`` alone; it is called again
        where a run goes on from the very step. Returns what is to be recorded of it.
        """
        raise NotImplementedError

    def memory(self) -> Tensor | None:
        """A feature of each training image, kept from when it was last seen: unit length, [n, C], in the order of the
        data, the same on every rank. None where the method keeps none."""
        return None

    def check_images(self, images: Images) -> None:
        """Raises ValueError where these are not the training images that the method can learn from."""

    def towers(self) -> tuple[Encoder, Encoder]:
        """What embeds the first and the second image of a pair: two only in siamese networks of unshared weights."""
        return self.encoder, self.encoder

    def similarity(self, x_PD: Tensor, y_PD: Tensor) -> Tensor:
        """The log-odds, [P], that the images of each pair are of one kind, by the features of the first and the second
        tower. Only where ``learned``: else cosine and distance say it."""
        raise NotImplementedError

    def logits(self, image_BcHW: Tensor) -> Tensor | None:
        """Scores of the classes of the training images, [B, C], by a classifier that is trained with the encoder; None
        where the method has none."""
        return None

    def chance(self) -> float | None:
        """The loss when all similarities are equal: what a network that tells nothing apart would show."""
        return None

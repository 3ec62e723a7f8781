"""Where the first value of a step is that is not finite: which images, which layer, which gradient.

Used on a step that is repeated for it, since every look makes the host wait for the device.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from common import distributed
from common.method import Batch, Method, Output

NAMED = 3               # images that a message names


class Finding(NamedTuple):
    """The first such value that a rank met, in the order in which a step computes."""

    order: int
    what: str               # in words
    images: list[int]       # those of this rank that it came from, or all of the batch
    ranks: list[int]
    advice: str


class NonFinite(FloatingPointError):
    """So many steps in a row could not be taken. ``step`` is the last of them; the same on every rank."""

    def __init__(self, step: int, skipped: int, rollbacks: int, finding: Finding, path: Callable[[int], str]):
        self.step, self.skipped, self.finding = step, skipped, finding
        self.paths = [path(i) for i in finding.images]
        again = f", and {rollbacks} rollback{'s' * (rollbacks > 1)} did not help" if rollbacks else ""
        super().__init__(
            f"step {step}: the loss, a key or the gradient was not finite for {skipped} steps in a row; none was "
            f"taken{again}. {self.cause} Images: {self.some_paths}. {finding.advice}")

    @property
    def cause(self) -> str:
        ranks = ", ".join(map(str, self.finding.ranks))
        return f"{self.finding.what}{f' (rank {ranks})' if distributed.world() > 1 else ''}."

    @property
    def some_paths(self) -> str:
        more = len(self.paths) - NAMED
        return ", ".join(self.paths[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


_LOWER = "Try a lower learning rate, train.clip, or train.precision=float32."
_LOOK = "Look at these images (--show-views draws them), and at how they are normalised."
_NOTHING = 9                                        # the order of a step that was finite when it was repeated


class Search:
    """Watches the passes of one rank through one step; all ranks do so together. Made before the first pass."""

    def __init__(self, method: Method):
        self.method = method
        self._found: list[Finding] = []
        self._images: list[int] = []                # of the batch that passes
        self._all: list[int] = []
        self._broken = [name for name, value in method.state_dict().items() if value.dim() and _broken(value)]

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """While it is entered, the passes are those of ``batch``."""
        self._images = batch.index.tolist()
        self._all += self._images
        for number, view_BcHW in enumerate(batch.views):
            if rows := _rows(view_BcHW):
                self._add(0, f"view {number} of these images is not finite", rows, _LOOK)
        hooks = [module.register_forward_hook(self._look(name)) for name, module in self.method.named_modules() if name]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def see(self, output: Output) -> None:
        """What came of the batch, after the backward pass."""
        for name, value in {"loss": output.loss, **output.carry}.items():
            if _broken(value):
                what = "the loss" if name == "loss" else f"what the step hands on as {name}"
                self._add(3, f"{what} is not finite, though the output of every layer was")

    def finding(self) -> Finding:
        """The first of all: images, then weights and memories, layers, loss and keys, gradients."""
        self._images = self._all
        for name in self._broken:
            self._add(1, f"{name}, which no skipped step has changed, is not finite")
        for name, value in reversed(list(self.method.named_parameters())):          # as the backward pass comes by
            if value.grad is not None and _broken(value.grad):
                self._add(4, f"the gradient of {name} is not finite")
        self._add(_NOTHING, "when the step was repeated, everything was finite")
        return min(self._found, key=lambda found: found.order)                      # the first of its order

    def _look(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and _broken(output):
                in_order = name.startswith("encoder.")              # keys may be dealt another order
                self._add(2, f"the output of {name} is not finite", _rows(output) if in_order else [])
        return look

    def _add(self, order: int, what: str, rows: Sequence[int] = (), advice: str = _LOWER) -> None:
        fit = rows and max(rows) < len(self._images)
        images = [self._images[row] for row in rows] if fit else self._images
        self._found.append(Finding(order, what, images, [distributed.rank()], advice))


def first_of(findings: Sequence[Finding]) -> Finding:
    """What the ranks that met the earliest one say, taken together; gradients are those of each rank alone."""
    first = min(findings, key=lambda found: found.order)
    same = [found for found in findings if found.order == first.order]
    return first._replace(images=[i for found in same for i in found.images], ranks=[r for f in same for r in f.ranks])


def _broken(value: Tensor) -> bool:
    return value.is_floating_point() and not bool(value.detach().isfinite().all())


def _rows(x_B: Tensor) -> list[int]:
    """The rows that are not finite."""
    return (~x_B.detach().isfinite().flatten(1).all(dim=1)).nonzero()[:, 0].tolist() if x_B.dim() > 1 else []

"""The loop: forward, backward, optimizer step, after_step, for any method, on any number of processes.

It knows the seam ``Method`` and nothing of what is trained; what happens between steps (records, evaluation, saving)
is the business of whoever iterates over ``Trainer.steps``.
"""

import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import distributed, guard, watch
from common.batchnorm import average_running_statistics
from common.data.loader import Loader
from common.diagnosis import Finding, NonFinite, Search, first_of
from common.encoder import Encoder
from common.guard import Kept
from common.method import Batch, Method, Output
from common.optim import can_skip, set_lr, step_unless
from common.schedule import Schedule
from common.settings import TrainSettings

LOOK = 20               # steps between two looks at the features; the first is at the first step
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The queue is not to be resent at each step; torch after 2.11 has another word for it.
_KNOWN = inspect.signature(DistributedDataParallel.__init__).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers": False}


class Step(NamedTuple):
    """What one optimizer step did."""

    number: int                     # steps done, this one included
    lr: float
    logs: dict[str, Tensor]         # the method's, averaged over micro-batches; of this rank, on the device
    waited: float                   # seconds that this rank waited for data
    skipped: bool                   # the loss, a key or the gradient was not finite: nothing was updated
    loss: float                     # the mean over micro-batches and ranks, the same on every rank
    gradient_norm: float            # before clipping, the same on every rank
    features: Tensor | None         # at the first and each LOOK-th step: the encoder's, [B, C], of this rank


class Pending(NamedTuple):
    """A step that was done, or not, and which of the two the device alone knows."""

    number: int
    lr: float
    logs: dict[str, Tensor]
    waited: float
    row: Tensor                     # [6] float32, on the device: what ``Row`` names
    features: Tensor | None


class Row(NamedTuple):
    """What the host reads of a step; the same on every rank."""

    bad_forward: float              # > 0: the loss, or something that ``after_step`` would take in, is not finite
    bad_gradient: float
    loss: float
    gradient_norm: float
    in_a_row: float                 # steps that count as skipped, this one included
    skip: float                     # 1: nothing was updated


class Trainer:
    """Trains ``method`` in place. ``step`` is how many optimizer steps are done; set by ``load_state``.

    ``lr_scale`` is a factor on every learning rate, lowered by whoever takes the training back to an earlier state;
    ``rollbacks`` counts how often that was.

    The host reads every step on a CPU, where that costs nothing. On CUDA it is ``late``: it reads at every
    ``read_every``-th and ``LOOK``-th step, at the end of an epoch and at the last step, and waits for nothing in
    between; the device itself leaves out what must not happen (common.guard). Both give the same steps and states.
    ``hurry``: it reads each step nevertheless; the same on every rank.

    ``mine`` is called before each step that the method's ``mine_every`` divides, once all steps before it are read.
    """

    def __init__(self, method: Method, loader: Loader, optimizer: torch.optim.Optimizer, schedule: Schedule,
                 settings: TrainSettings, device: torch.device, read_every: int = LOOK,
                 mine: Callable[[], None] | None = None):
        self.method, self.loader, self.optimizer, self.schedule = method, loader, optimizer, schedule
        self.settings, self.device = settings, device
        self.parallel: nn.Module = method
        if distributed.world() > 1:
            self.parallel = DistributedDataParallel(method, **_KEEP_BUFFERS)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.late = device.type == "cuda" and can_skip(optimizer)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True           # views of one size: the fastest kernels are worth a search
        self.read_every, self.hurry, self.mine = read_every, False, mine
        self._pending: list[Pending] = []
        self.step = 0
        self.skipped = 0                                                                 # in a row
        self.lr_scale, self.rollbacks = 1.0, 0
        self._features: Tensor | None = None
        if settings.compile:
            for module in method.modules():
                if isinstance(module, Encoder):
                    module.compile()

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * self.loader.steps_per_epoch

    @property
    def epoch(self) -> float:
        """How many epochs are done, with a fraction."""
        return self.step / self.loader.steps_per_epoch

    def steps(self, stop: int | None = None) -> Generator[Step, None, None]:
        """Train from ``self.step`` to ``stop`` (default: the end), giving every step in order once it has been read.

        Control comes back for some steps at a time if the trainer is ``late``; the state is that of the last of them,
        the one whose number is ``self.step``. Raises NonFinite on every rank at the ``max_skipped``-th step in a row
        that could not be taken; no step after it is.
        """
        self._begin()
        stop, every = stop or self.total_steps, self.method.mine_every
        while self.step < stop:
            if every and self.step % every == 0:
                self._look()
            yield from self._stretch(min(stop, self.step - self.step % every + every) if every else stop)

    def _look(self) -> None:
        """The method looks at its images."""
        assert self.mine is not None, "a method that mines is trained by a session"
        watch.beat(self.step, "mine")
        self.mine()

    def _stretch(self, stop: int) -> Generator[Step, None, None]:
        """Steps whose images are known at the first of them."""
        with closing(self.loader.stream(self.step, stop)) as stream:
            for _, batches, waited in stream:
                watch.beat(self.step, "forward")
                lr = set_lr(self.optimizer, self.lr_scale * self.schedule(self.epoch))
                row, logs = self._optimize(batches)
                self.step += 1
                features, self._features = self._features, None
                self._pending.append(Pending(self.step, lr, logs, waited, row, features))
                if self._reads(stop):
                    yield from self._read(batches)
                watch.beat(self.step, "data")

    def _begin(self) -> None:
        self.method.train()
        self._kept = Kept(self.method, all_but_tables=self.late)
        self._pending = []
        self._in_a_row = torch.full((), float(self.skipped), device=self.device)

    def _reads(self, stop: int) -> bool:
        """At fixed steps, so that a run stops at the same one however it got there."""
        marks = self.read_every, LOOK, self.loader.steps_per_epoch
        return not self.late or self.hurry or self.step == stop or any(self.step % every == 0 for every in marks)

    def _read(self, batches: Sequence[Batch]) -> Iterator[Step]:
        """The steps since the last reading. ``batches`` are those of the newest."""
        pending, self._pending = self._pending, []
        rows = read([step.row for step in pending])                             # here the host waits for the device
        failed = next((i for i, row in enumerate(rows) if row.in_a_row >= self.settings.max_skipped), len(rows))
        self.step = pending[0].number - 1 + failed
        for step, row in zip(pending[:failed], rows[:failed], strict=True):
            self.skipped = int(row.in_a_row)
            yield Step(step.number, step.lr, step.logs, step.waited, bool(row.skip), row.loss, row.gradient_norm,
                       step.features)
        if failed < len(rows):
            self.skipped = int(rows[failed].in_a_row)
            raise self._non_finite(batches if failed == len(rows) - 1 else self._batches_of(self.step))

    def _batches_of(self, step: int) -> list[Batch]:
        with closing(self.loader.stream(step, step + 1)) as stream:
            return next(stream)[1]

    def _optimize(self, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """One step, and its row; where the trainer is not late, on the host."""
        self._kept.keep()
        outputs = self._backward_all(batches)
        row = self._judge(outputs)
        if self.late:
            skip = row[-1]
            step_unless(self.optimizer, skip)
            with guard.skipping(skip):
                self._follow(batches, outputs)
            self._kept.restore_if(skip)
        elif (row := row.cpu())[-1]:
            self._kept.restore()
        else:
            self.optimizer.step()
            self._follow(batches, outputs)
        self.optimizer.zero_grad(set_to_none=True)
        return row, _mean_logs(outputs)

    def _follow(self, batches: Sequence[Batch], outputs: Sequence[Output]) -> None:
        average_running_statistics(self.method)
        self.method.after_step(batches, outputs, (self.step + 1) / self.total_steps)

    def _backward_all(self, batches: Sequence[Batch]) -> list[Output]:
        look = self.step == 0 or (self.step + 1) % LOOK == 0
        hook = self.method.encoder.head.register_forward_hook(self._keep_features) if look else None
        outputs = [self._backward(batch, last=batch is batches[-1], share=1 / len(batches)) for batch in batches]
        if hook:
            hook.remove()
        return outputs

    def _keep_features(self, head: nn.Module, images: Any, features_BC: Tensor) -> None:
        self._features = features_BC.detach()

    def _backward(self, batch: Batch, last: bool, share: float) -> Output:
        with self._synchronise(last):
            with torch.autocast(self.device.type, DTYPES[self.settings.precision],
                                enabled=self.settings.precision != "float32"):
                output = self.parallel(batch)
            watch.beat(self.step, "backward")
            self.scaler.scale(output.loss * share).backward()
        return Output(output.loss.detach(), output.logs, output.carry)

    def _synchronise(self, last: bool) -> AbstractContextManager:
        """Gradients meet over ranks in the last micro-batch only."""
        if isinstance(self.parallel, DistributedDataParallel) and not last:
            return self.parallel.no_sync()
        return nullcontext()

    def _judge(self, outputs: Sequence[Output]) -> Tensor:
        """The step's ``Row``, the same on every rank; leaves its gradients unscaled and clipped."""
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.method.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self.settings.clip, norm)
        numbers = _numbers(outputs, norm)
        if self.scaler.is_enabled():
            self._update_scale()
        return torch.cat([numbers, self._count_skipped(numbers[0] > 0, numbers[1] > 0)])

    def _update_scale(self) -> None:
        """But not once steps are skipped because too many were: the last of those is looked into at its own scale."""
        over = self._in_a_row >= self.settings.max_skipped
        state = [x for x in (self.scaler._scale, self.scaler._growth_tracker) if x is not None]
        before = [x.clone() for x in state]
        self.scaler.update()
        for now, kept in zip(state, before, strict=True):
            now.copy_(torch.where(over, kept, now))

    def _count_skipped(self, bad_forward: Tensor, bad_gradient: Tensor) -> Tensor:
        """Steps skipped in a row, and whether this one is: it is if not finite, and if enough were before it.

        A step that fp16's scaler gives up while it looks for its scale, from 1 up, is no failure.
        """
        before, bad = self._in_a_row.clone(), bad_forward | bad_gradient
        counts = bad_forward | ~self._scaler_searches()
        over = before >= self.settings.max_skipped
        self._in_a_row.copy_(torch.where(over, before, torch.where(bad, before + counts, 0)))
        return torch.stack([self._in_a_row, (bad | over).float()])

    def _scaler_searches(self) -> Tensor:
        scale = self.scaler._get_scale_async() if self.scaler.is_enabled() else None
        return torch.zeros_like(self._in_a_row, dtype=torch.bool) if scale is None else scale >= 1

    def _non_finite(self, batches: Sequence[Batch]) -> NonFinite:
        """What to raise: the passes of this step, which changed nothing, once more, to see where it begins."""
        found = distributed.gather_objects(self._search(batches))
        self._kept.restore()
        self.optimizer.zero_grad(set_to_none=True)
        return NonFinite(self.step + 1, self.skipped, self.rollbacks, first_of(found), self.loader.images.path)

    def _search(self, batches: Sequence[Batch]) -> Finding:
        search = Search(self.method)
        with torch.compiler.set_stance("force_eager"):
            for batch in batches:
                with search.watching(batch):
                    search.see(self._backward(batch, last=False, share=1 / len(batches)))
        return search.finding()

    def state(self) -> dict:
        """Everything that the next step depends on, but for the random generators and what (seed, step) determine."""
        return {"step": self.step, "skipped": self.skipped, "lr_scale": self.lr_scale, "rollbacks": self.rollbacks,
                "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict) -> None:
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.lr_scale, self.rollbacks = state.get("lr_scale", 1.0), state.get("rollbacks", 0)    # new with rollbacks


def _numbers(outputs: Sequence[Output], norm: Tensor) -> Tensor:
    """[4] on the device: on how many ranks forward and gradient are not finite; loss and gradient norm, means over
    ranks. One sum over ranks."""
    loss_A = torch.stack([output.loss for output in outputs])                   # A micro-batches
    forward = [loss_A, *(value for output in outputs for value in output.carry.values() if value.is_floating_point())]
    forward_finite = torch.stack([value.isfinite().all() for value in forward]).all()
    means = torch.stack([loss_A.mean(), norm]).float() / distributed.world()
    sums = torch.cat([torch.stack([~forward_finite, ~norm.isfinite()]).float(), means])
    if distributed.world() > 1:
        dist.all_reduce(sums)
    return sums


def read(rows: Sequence[Tensor]) -> list[Row]:
    """To the host, all at once."""
    return [Row(*row) for row in torch.stack(list(rows)).tolist()]


def _mean_logs(outputs: Sequence[Output]) -> dict[str, Tensor]:
    return {name: torch.stack([output.logs[name] for output in outputs]).mean() for name in outputs[0].logs}

"""The loop: forward, backward, optimizer step, after_step, for any method, on any number of processes.

It knows the seam ``Method`` and nothing of what is trained; what happens between steps (records, evaluation, saving)
is the business of whoever iterates over ``Trainer.steps``.
"""

import inspect
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import distributed, watch
from common.batchnorm import Statistics, average_running_statistics
from common.data.loader import Loader
from common.diagnosis import Finding, NonFinite, Search, first_of
from common.encoder import Encoder
from common.method import Batch, Method, Output
from common.optim import set_lr
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


class Numbers(NamedTuple):
    """What the host knows of a step before it is taken; the same on every rank."""

    loss: float
    gradient_norm: float
    forward_finite: bool            # the loss, and all that ``after_step`` would take in
    gradient_finite: bool

    @property
    def finite(self) -> bool:
        return self.forward_finite and self.gradient_finite


class Trainer:
    """Trains ``method`` in place. ``step`` is how many optimizer steps are done; set by ``load_state``.

    ``lr_scale`` is a factor on every learning rate, lowered by whoever takes the training back to an earlier state;
    ``rollbacks`` counts how often that was.
    """

    def __init__(self, method: Method, loader: Loader, optimizer: torch.optim.Optimizer, schedule: Schedule,
                 settings: TrainSettings, device: torch.device):
        self.method, self.loader, self.optimizer, self.schedule = method, loader, optimizer, schedule
        self.settings, self.device = settings, device
        self.parallel: nn.Module = method
        if distributed.world() > 1:
            self.parallel = DistributedDataParallel(method, **_KEEP_BUFFERS)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._statistics = Statistics(method)
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
        """Train from ``self.step`` to ``stop`` (default: the end), giving control back after every step.

        Raises NonFinite on every rank at the ``max_skipped``-th step in a row that could not be taken.
        """
        self.method.train()
        with closing(self.loader.stream(self.step, stop or self.total_steps)) as stream:
            for _, batches, waited in stream:
                watch.beat(self.step, "forward")
                lr = set_lr(self.optimizer, self.lr_scale * self.schedule(self.epoch))
                numbers, logs = self._optimize(batches)
                if self.skipped >= self.settings.max_skipped:
                    raise self._non_finite(batches)
                self.step += 1
                features, self._features = self._features, None
                yield Step(self.step, lr, logs, waited, not numbers.finite, numbers.loss, numbers.gradient_norm,
                            features)
                watch.beat(self.step, "data")

    def _optimize(self, batches: Sequence[Batch]) -> tuple[Numbers, dict[str, Tensor]]:
        self._statistics.keep()
        outputs = self._backward_all(batches)
        numbers = self._update(outputs)
        if numbers.finite:
            average_running_statistics(self.method)
            self.method.after_step(batches, outputs, (self.step + 1) / self.total_steps)
        else:
            self._statistics.restore()
        self.optimizer.zero_grad(set_to_none=True)
        return numbers, _mean_logs(outputs)

    def _backward_all(self, batches: Sequence[Batch]) -> list[Output]:
        look = self.step == 0 or (self.step + 1) % LOOK == 0
        hook = self.method.encoder.register_forward_hook(self._keep_features) if look else None
        outputs = [self._backward(batch, last=batch is batches[-1], share=1 / len(batches)) for batch in batches]
        if hook:
            hook.remove()
        return outputs

    def _keep_features(self, encoder: nn.Module, images: Any, features_BC: Tensor) -> None:
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

    def _update(self, outputs: Sequence[Output]) -> Numbers:
        """Step the optimizer if all is finite on every rank."""
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.method.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        numbers = _numbers(outputs, norm)
        if numbers.finite:
            if self.settings.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(trained, self.settings.clip, norm)
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self._count_skipped(numbers)
        return numbers

    def _count_skipped(self, numbers: Numbers) -> None:
        """A step that fp16's scaler gives up while it looks for its scale, from 1 up, is no failure."""
        if numbers.finite:
            self.skipped = 0                            # without asking the scaler: it would wait for the device
            return
        of_scaler = numbers.forward_finite and self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        self.skipped += not of_scaler

    def _non_finite(self, batches: Sequence[Batch]) -> NonFinite:
        """What to raise: the passes of this step, which changed nothing, once more, to see where it begins."""
        found = distributed.gather_objects(self._search(batches))
        self._statistics.restore()
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


def _numbers(outputs: Sequence[Output], norm: Tensor) -> Numbers:
    """Loss, gradient norm, and whether all is finite on every rank: one sum over ranks.

    Here, and only here in a step, the host waits for the device.
    """
    loss_A = torch.stack([output.loss for output in outputs])                   # A micro-batches
    forward = [loss_A, *(value for output in outputs for value in output.carry.values() if value.is_floating_point())]
    forward_finite = torch.stack([value.isfinite().all() for value in forward]).all()
    sums = torch.stack([x.float() for x in (~forward_finite, ~norm.isfinite(), loss_A.mean(), norm)])
    if distributed.world() > 1:
        dist.all_reduce(sums)
    bad_forward, bad_gradient, loss, total = sums.tolist()
    return Numbers(loss / distributed.world(), total / distributed.world(), not bad_forward, not bad_gradient)


def _mean_logs(outputs: Sequence[Output]) -> dict[str, Tensor]:
    return {name: torch.stack([output.logs[name] for output in outputs]).mean() for name in outputs[0].logs}

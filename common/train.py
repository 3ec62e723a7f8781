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
from common.encoder import Encoder
from common.method import Batch, Method, Output
from common.optim import set_lr
from common.schedule import Schedule
from common.settings import TrainSettings

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
    skipped: bool                   # the loss or the gradient was not finite: nothing was updated


class Trainer:
    """Trains ``method`` in place. ``step`` is how many optimizer steps are done; set by ``load_state``."""

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
        """Train from ``self.step`` to ``stop`` (default: the end), giving control back after every step."""
        self.method.train()
        with closing(self.loader.stream(self.step, stop or self.total_steps)) as stream:
            for _, batches, waited in stream:
                watch.beat(self.step, "forward")
                lr = set_lr(self.optimizer, self.schedule(self.epoch))
                logs, skipped = self._optimize(batches)
                self.step += 1
                yield Step(self.step, lr, logs, waited, skipped)
                watch.beat(self.step, "data")

    def _optimize(self, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], bool]:
        self._statistics.keep()
        outputs = [self._backward(batch, last=batch is batches[-1], share=1 / len(batches)) for batch in batches]
        skipped = not self._update(outputs)
        if skipped:
            self._statistics.restore()
        else:
            average_running_statistics(self.method)
            self.method.after_step(batches, outputs, (self.step + 1) / self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        return _mean_logs(outputs), skipped

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

    def _update(self, outputs: Sequence[Output]) -> bool:
        """Step the optimizer if loss and gradient are finite on every rank; say whether it did."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        loss_finite, gradient_finite = _finite(torch.stack([output.loss for output in outputs]), norm)
        finite = loss_finite and gradient_finite
        if finite:
            if self.settings.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    [p for p in self.method.parameters() if p.grad is not None], self.settings.clip, norm)
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self._count_skipped(finite, loss_finite)
        return finite

    def _count_skipped(self, finite: bool, loss_finite: bool) -> None:
        """A step that fp16's scaler gives up while it looks for its scale, from 1 up, is no failure."""
        of_scaler = not finite and loss_finite and self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        self.skipped = 0 if finite else self.skipped + (not of_scaler)
        if self.skipped >= self.settings.max_skipped:
            raise FloatingPointError(
                f"step {self.step + 1}: the loss or the gradient was not finite for {self.skipped} steps in a row; "
                "none was taken. The last checkpoint is good. Try a lower optimizer.base_lr, train.clip, or float32.")

    def state(self) -> dict:
        """Everything that the next step depends on, but for the random generators and what (seed, step) determine."""
        return {"step": self.step, "skipped": self.skipped, "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict) -> None:
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped = state["step"], state["skipped"]


def _finite(*values: Tensor) -> list[bool]:
    """Whether each is finite on every rank. Here, and only here in a step, the host waits for the device."""
    finite = torch.stack([value.isfinite().all() for value in values]).float()
    if distributed.world() > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return [bool(flag) for flag in finite.tolist()]


def _mean_logs(outputs: Sequence[Output]) -> dict[str, Tensor]:
    return {name: torch.stack([output.logs[name] for output in outputs]).mean() for name in outputs[0].logs}

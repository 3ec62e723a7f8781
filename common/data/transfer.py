"""From the memory that workers write to, to the device.

On a GPU a copy is only asked for, and done while the host goes on. That takes memory that stays where it is
(page-locked), and that nobody writes to before the copy is done.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import Tensor

from common.data.augment import to_device

Answer = TypeVar("Answer")


def on_device(answers: Iterable[tuple[Answer, Tensor]], device: torch.device,
              waited: Callable[[float], None] = lambda seconds: None) -> Generator[tuple[Answer, Tensor], None, None]:
    """The tensors of ``answers`` on ``device``, which is the CPU or a CUDA device.

    A tensor of ``answers`` may be written to as soon as the next is asked for, so that waits for the copy. What was
    queued before the copy is waited for, too, but not what came after: a step that has been queued since goes on.
    ``waited`` is told for how many seconds that was: the time of the device, not of who makes the answers.
    """
    for answer, memory in answers:
        copy = to_device(memory, device)
        if device.type != "cuda":
            yield answer, copy
            continue
        copied = torch.cuda.Event(blocking=True)
        copied.record(torch.cuda.current_stream(device))
        yield answer, copy
        began = time.perf_counter()
        copied.synchronize()
        waited(time.perf_counter() - began)


@contextmanager
def page_locked(memory: Tensor) -> Iterator[None]:
    """Meanwhile a GPU reads ``memory`` itself, and ``to_device`` copies it nowhere else first.

    Where the driver does not allow that, it costs that copy, and nothing else changes.
    """
    cudart = torch.cuda.cudart()
    locked = int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0
    if not locked:
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")       # takes the error, which the next kernel would report as its own
    try:
        yield
    finally:
        if locked:
            torch.cuda.synchronize()
            cudart.cudaHostUnregister(memory.data_ptr())

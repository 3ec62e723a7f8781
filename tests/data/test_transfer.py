import pytest
import torch

from common.data.transfer import on_device, page_locked
from common.data.worker import shared

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def counted(memory, count=5):
    """Answers that all come in the same memory, each overwritten when the next is asked for."""
    for i in range(count):
        memory.fill_(i)
        yield i, memory


def test_on_a_cpu_nothing_is_copied():
    memory = shared(2, 3)
    answers = on_device(counted(memory), torch.device("cpu"))
    found = [(i, x.data_ptr() == memory.data_ptr(), x.tolist()) for i, x in answers]
    assert found == [(i, True, [[i] * 3] * 2) for i in range(5)]


@needs_gpu
@pytest.mark.parametrize("locked", [False, True])
def test_memory_is_not_written_to_before_the_gpu_has_read_it(locked):
    memory = shared(64, 2**20)
    copies = []

    def run():
        for _, copy in on_device(counted(memory), torch.device("cuda")):
            copies.append(copy)
            torch.cuda._sleep(100_000_000)              # the next copy waits behind this

    if locked:
        with page_locked(memory):
            run()
    else:
        run()
    assert [copy.unique().tolist() for copy in copies] == [[i] for i in range(5)]


@needs_gpu
def test_memory_is_page_locked_for_as_long_as_it_is_asked_for():
    memory = shared(2**20)
    with page_locked(memory):
        assert memory[5:].is_pinned()
        with page_locked(memory):                       # refused by the driver: nothing is lost
            assert torch.ones(3, device="cuda").sum() == 3
        assert memory.is_pinned()
    assert not memory.is_pinned()

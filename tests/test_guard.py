"""What happens on the device alone: steps that the host reads late, and those that are left out without it."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common.train
from common import guard
from common.dictionary import Bank, Queue
from common.encoder import Encoder, ema_, frozen_copy
from common.guard import Kept, skipping, write_rows_
from common.method import Batch
from common.optim import adamw, sgd, step_unless
from common.session import Session
from common.settings import TrainSettings
from common.train import LOOK, Row, Trainer
from common.tree import digest
from instdisc import InstDisc
from moco import MoCo
from tests.test_train import IMAGES, encoder, moco, spoiled, trainer

YES, NO = torch.ones(()), torch.zeros(())
META = torch.device("meta")


def instdisc(**settings):
    return InstDisc(encoder(), Bank(IMAGES, 8, negatives=6), temperature=0.2, **settings)


def shuffled():
    return moco(key_bn="shuffle")


def running_keys():
    """Whose key encoder's statistics are moved after the step."""
    return moco(key_bn="eval")


def often_spoiled():
    """In the first step, which is the one that makes the optimizer's memory, and in the last."""
    return spoiled("loss and gradient", 1, 2, 5, 9, 15)


def held(run):
    return digest([run.method.state_dict(), run.optimizer.state_dict()["state"], run.step, run.skipped,
                   run.scaler.state_dict()])


def told(steps):
    """Everything that a step says, to the last bit."""
    return [(step.number, step.lr, step.skipped, step.loss.hex(), step.gradient_norm.hex(), digest(step.logs),
             None if step.features is None else digest(step.features)) for step in steps]


def both(make, stop=None, optimizer=None, **settings):
    """The same run, read at each step and late."""
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        run = trainer(make(), **settings)
        if optimizer:
            run.optimizer = optimizer(run.method, 8, lr=1e-3)
        run.late = late
        found.append((told(run.steps(stop)), held(run)))
    return found


@pytest.mark.parametrize("make, settings", [
    (shuffled, {}), (running_keys, {"clip": 0.1}), (instdisc, {}), (often_spoiled, {}),
    (lambda: spoiled("gradient", 3, 4), {"accumulate": 2}), (often_spoiled, {"precision": "fp16"}),
    (often_spoiled, {"optimizer": adamw})])
def test_steps_that_are_read_late_are_those_that_are_read_at_once(make, settings):
    """Bit for bit: losses, skipped steps, weights, optimizer, queue or bank, statistics. Across two epochs' ends."""
    at_once, late = both(make, stop=None if "optimizer" not in settings else 12, **settings)
    assert late == at_once and len(late[0]) >= 6


def test_the_host_reads_at_fixed_steps():
    """Steps come in one go when they have been read; the state is that of the last of them."""
    run = trainer(moco(), epochs=6)
    run.late, run.read_every = True, 4                              # 5 steps an epoch
    seen = [(step.number, run.step) for step in run.steps(23)]
    marks = [4, 5, 8, 10, 12, 15, 16, 20, 23]                       # LOOK is 20
    assert seen == [(step, next(mark for mark in marks if mark >= step)) for step in range(1, 24)]
    run.hurry = True
    assert [(step.number, run.step) for step in run.steps(26)] == [(24, 24), (25, 25), (26, 26)]


def test_slow_steps_are_read_one_by_one_so_that_a_stop_is_heard(monkeypatch):
    """0.6 s a step, then 0.05 s."""
    session = Session.__new__(Session)
    session.trainer, session._last = SimpleNamespace(step=10), (0.0, 0)
    monkeypatch.setattr("time.monotonic", lambda: 6.0)
    assert session._slow()
    session.trainer.step = 30
    monkeypatch.setattr("time.monotonic", lambda: 7.0)
    assert not session._slow()


@pytest.mark.parametrize("at", [(2, 4, 5, 6), (3, 4, 5)])           # inside of what is read at once, and at its end
@pytest.mark.parametrize("precision", ["float32", "fp16"])           # with a scale, which moves at each step
def test_too_many_skipped_in_a_row_stop_at_the_same_step_and_state(at, precision):
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        run = trainer(spoiled("loss", *at, *range(100, 999)), max_skipped=3, epochs=9, precision=precision)
        run.late, run.method.at, seen = late, set(at), []
        with pytest.raises(FloatingPointError, match=f"step {at[-1]}: .* not finite for 3 steps in a row") as stop:
            seen.extend(told(run.steps()))
        found.append((held(run), stop.value.step, stop.value.skipped))
    assert found[0] == found[1] and run.step == at[-1] - 1


def test_a_step_that_is_left_out_changes_no_moving_average_and_no_row():
    fast = encoder()
    slow = frozen_copy(fast)
    with torch.no_grad():
        for weight in fast.parameters():
            weight.add_(torch.randn_like(weight))
    plain, kept = frozen_copy(slow), digest(slow.state_dict())
    queue, bank = Queue(6, 8), Bank(6, 8)
    before, key_BC, index_B = digest([queue.keys, queue.image, bank.v]), torch.randn(3, 8), torch.arange(3)
    with skipping(YES):
        ema_(slow, fast, 0.99)
        queue.update(key_BC * math.nan, index_B), bank.update(key_BC * math.nan, index_B)
    assert digest(slow.state_dict()) == kept and digest([queue.keys, queue.image, bank.v]) == before
    with skipping(NO):
        ema_(slow, fast, 0.99)
    ema_(plain, fast, 0.99)
    assert digest(slow.state_dict()) == digest(plain.state_dict()) != kept
    assert guard.skip() is None


def test_rows_are_written_where_nothing_is_left_out():
    table = torch.zeros(4, 2)
    with skipping(NO):
        write_rows_(table, torch.tensor([2, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert table.tolist() == [[3, 4], [0, 0], [1, 2], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_what_is_kept_comes_back_to_the_last_bit_also_from_nan(dtype):
    module = torch.nn.Module()
    values = torch.tensor([0.0, -1.5, 3e4, math.inf if dtype.is_floating_point else 7.0, 1e-30])
    for name, value in {"many": values, "one": values[2]}.items():
        module.register_buffer(name, value.to(dtype).clone())
    module.same, module.child = module.many, torch.nn.BatchNorm1d(2)
    module.child.register_buffer("same", module.many)               # under two names
    before, kept = digest(module.state_dict()), Kept(module, all_but_tables=True)
    for skip in (YES, NO):
        kept.keep()
        module.many.copy_(torch.tensor([math.nan, 1.0, -math.inf, 0.0, 2.0]) if dtype.is_floating_point else values + 5)
        module.one.zero_()
        changed = digest(module.state_dict())
        kept.restore_if(skip)
        assert digest(module.state_dict()) == (before if skip else changed) and before != changed


def test_momentum_begins_at_zero_where_the_first_step_is_left_out():
    """torch gives the optimizer empty memory in its first step, and then fills it or not."""
    weights = []
    for first in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = sgd(layer, 8, lr=0.1)
        for skip in [YES] * first + [NO, NO]:
            layer.weight.grad, layer.bias.grad = torch.ones(2, 3) * (math.nan if skip else 0.5), torch.ones(2)
            step_unless(optimizer, skip)
        weights.append(digest([layer.state_dict(), optimizer.state_dict()["state"]]))
    assert weights[0] == weights[1]


class Waits(TorchDispatchMode):
    """Operations for which the host of a GPU waits: numbers asked for, sizes that depend on values, copies either way.

    On torch's meta device, whose tensors hold no values, so that nothing can be asked unseen. What is asked for is made
    up here.
    """

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = operation.overloadpacket.__name__, kwargs or {}
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"):
            self.met.append(name)
            return 1 if name in ("_local_scalar_dense", "equal") else torch.zeros(1, 1, dtype=torch.long, device=META)
        if name == "_to_copy" and kwargs.get("device", args[0].device) != args[0].device:
            self.met.append(f"to {kwargs['device']}")
            return torch.zeros_like(args[0], device=kwargs["device"])
        if name == "copy_" and args[0].device != args[1].device:
            self.met.append(f"into {args[0].device}")
            return args[0]
        return None if name == "_fused_sgd_" else operation(*args, **kwargs)       # in place, and not known there


class Feed:
    """A loader whose batches are on the device; its own work is not the step's."""

    steps_per_epoch = 10**6

    def __init__(self, device):
        self.device = device

    def stream(self, start, stop):
        index_B = torch.arange(16, device=self.device)
        for step in range(start, stop):
            view_BcHW = torch.randn(16, 3, 8, 8, device=self.device)
            yield step, [Batch([view_BcHW, view_BcHW.flip(3)], index_B, index_B)], 0.0


def on_gpu(name):
    trunk = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
                                torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network = Encoder(trunk, torch.nn.Linear(16, 8))
    if name == "instdisc":
        return InstDisc(network, Bank(40, 8, negatives=6), temperature=0.2)
    if name == "instdisc full softmax":
        return InstDisc(network, Bank(40, 8), temperature=0.2, loss="full_softmax")
    return MoCo(network, Queue(24, 8, mask_own=True), key_bn="shuffle", bn_groups=2, symmetric="sum")


def waits(name, monkeypatch, steps, planted=None):
    """What the host waits for in so many steps, and how many of them it reads at a time."""
    readings = []

    def read(rows):
        readings.append(len(rows))
        return [Row(0.0, 0.0, 1.0, 1.0, 0.0, 0.0)] * len(rows)

    monkeypatch.setattr(common.train, "read", read)
    monkeypatch.setattr(torch, "autocast", lambda *of, **settings: nullcontext())       # has no word for this device
    with META:
        method = on_gpu(name)
        if planted:
            method.register_forward_hook(planted)
        optimizer = torch.optim.SGD(method.encoder.parameters(), lr=0.1, momentum=0.9, fused=True)
        optimizer._need_device_dtype_check_for_fused = False        # it would refuse this device
        run = Trainer(method, Feed(META), optimizer, lambda epoch: 1.0,
                      TrainSettings(epochs=1, batch_size=16, clip=1.0), META, read_every=3)
        run.late = True
        with Waits() as met:
            assert len(list(run.steps(steps))) == steps
    return met.met, readings


@pytest.mark.parametrize("name", ["moco", "instdisc", "instdisc full softmax"])
def test_a_step_on_a_gpu_waits_for_nothing_and_reading_many_is_one_wait(name, monkeypatch):
    assert waits(name, monkeypatch, 6) == ([], [3, 3])


@pytest.mark.parametrize("planted, seen", [
    (lambda loss: loss.item(), "_local_scalar_dense"), (lambda loss: float(loss), "_local_scalar_dense"),
    (lambda loss: (loss > 0).any() and None, "_local_scalar_dense"), (lambda loss: loss.cpu(), "to cpu"),
    (lambda loss: torch.zeros(3, device="cpu").to(META), "to meta"), (lambda loss: loss.view(1).nonzero(), "nonzero"),
    (lambda loss: torch.zeros(3, device="cpu").copy_(loss), "into cpu")])
def test_a_planted_wait_is_seen(planted, seen, monkeypatch):
    def hook(method, inputs, output):
        planted(output.loss.detach())

    assert waits("instdisc full softmax", monkeypatch, 1, hook)[0] == [seen]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, on which torch itself refuses to wait")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_step_on_a_real_gpu_waits_for_nothing(precision, monkeypatch):
    device, method = torch.device("cuda"), on_gpu("moco").to("cuda", memory_format=torch.channels_last)
    run = Trainer(method, Feed(device), sgd(method, 16, lr=0.1), lambda epoch: 1.0,
                  TrainSettings(epochs=1, batch_size=16, clip=1.0, precision=precision), device)
    taken = run._optimize

    def watched(batches):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return taken(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert run.late and len(list(run.steps(LOOK))) == LOOK          # warm: kernels chosen, memory taken
    monkeypatch.setattr(run, "_optimize", watched)
    assert all(math.isfinite(step.loss) for step in run.steps(2 * LOOK))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to record a graph on")
@pytest.mark.parametrize("name", ["moco", "instdisc"])
def test_a_step_can_be_recorded_as_a_cuda_graph(name):
    """All of a step, with what is left out: replayed, it gives the losses and the state of steps done one by one."""
    view_BcHW, index_B = torch.randn(16, 3, 8, 8, device="cuda"), torch.arange(16, device="cuda")
    batch = Batch([view_BcHW, view_BcHW.flip(3)], index_B, index_B)
    found = []
    for recorded in (False, True):
        torch.manual_seed(0)
        method = on_gpu(name).cuda()
        run = Trainer(method, Feed(torch.device("cuda")), sgd(method, 16, lr=0.1), lambda epoch: 1.0,
                      TrainSettings(epochs=1, batch_size=16), torch.device("cuda"))
        run._begin()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                run._optimize([batch])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if recorded:
            with torch.cuda.graph(graph):
                row, _ = run._optimize([batch])
        losses = []
        for _ in range(5):
            if recorded:
                graph.replay()
            else:
                row, _ = run._optimize([batch])
            losses.append(row[2].item())
        found.append((torch.tensor(losses), method.state_dict()))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)

"""What every method promises to the trainer, the checkpoint and the export; a new method joins the list below."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import instdisc.method
import moco.end_to_end
import moco.method
from common import guard
from common.dictionary import Bank, InBatch, Queue
from common.guard import Kept
from common.method import Batch
from tests import metric_cases

N, C, A = 24, 5, 4                            # images, feature dimension, micro-batches of a step


def moco_with(dictionary, **settings):
    def make(encoder):
        shuffle = {"key_bn": "shuffle", "bn_groups": 2} if len(encoder.backbone) == 5 else {"key_bn": "none"}
        return moco.method.MoCo(encoder, dictionary(), **{"momentum": 0.9, "temperature": 0.2, **shuffle, **settings})
    return make


def instdisc_with(negatives, **settings):
    return lambda encoder: instdisc.method.InstDisc(encoder, Bank(N, C, negatives), temperature=0.2, **settings)


METHODS = {
    "moco queue": moco_with(lambda: Queue(20, C)),
    "moco queue smaller than a batch": moco_with(lambda: Queue(6, C)),
    "moco queue, own image masked": moco_with(lambda: Queue(20, C, mask_own=True)),
    "moco queue, symmetric": moco_with(lambda: Queue(20, C), symmetric="mean"),
    "moco bank": moco_with(lambda: Bank(N, C)),
    "moco bank, sampled": moco_with(lambda: Bank(N, C, negatives=6)),
    "moco in batch": moco_with(InBatch),
    "end to end": lambda encoder: moco.end_to_end.EndToEnd(encoder, temperature=0.2),
    "instdisc nce": instdisc_with(6),
    "instdisc nce, first batch": instdisc_with(6, z="first_batch"),
    "instdisc nce, fixed, proximal": instdisc_with(6, z="fixed", proximal=1.0),
    "instdisc sampled softmax": instdisc_with(6, loss="sampled_softmax"),
    "instdisc full softmax": instdisc_with(None, loss="full_softmax"),
    **metric_cases.CASES,
}
IN_BATCH = ("moco in batch", "end to end", *metric_cases.CASES)      # compared within the micro-batch

IDLE = ("head.bias",)                         # distances of features that are not scaled do not depend on it


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


@pytest.fixture
def make(name, small_encoder):
    return lambda batchnorm=True: METHODS[name](small_encoder(batchnorm, C)).double()


def optimizer_of(method):
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.2, momentum=0.9)


def step(method, optimizer, batches):
    """One optimizer step over micro-batches, in the order that the trainer promises; their mean loss."""
    optimizer.zero_grad()
    outputs = [method(batch) for batch in batches]
    loss = sum(output.loss for output in outputs) / len(outputs)
    loss.backward()
    optimizer.step()
    method.after_step(batches, outputs, 0.5)
    return loss.detach()


def state(method, batchnorm_statistics=True):
    return {key: x.clone() for key, x in method.state_dict().items()
            if batchnorm_statistics or not key.endswith(("running_mean", "running_var", "num_batches_tracked"))}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key].nan_to_num(), expected[key].nan_to_num())] == []


def test_every_method_is_in_the_list(small_encoder):
    assert {type(make(small_encoder(dim=C))) for make in METHODS.values()} == metric_cases.defined()


def test_the_loss_is_a_finite_scalar_whose_gradient_reaches_the_encoder(make, batches):
    method = make()
    output = method(batches(1)[0])
    output.loss.backward()
    assert output.loss.shape == () and torch.isfinite(output.loss)
    for parameter_name, parameter in method.encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all() and \
            (parameter.grad.abs().max() > 0 or parameter_name in IDLE), parameter_name
    trained = {id(p) for p in method.parameters() if p.requires_grad}
    assert {id(p) for p in method.encoder.parameters()} <= trained
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_what_is_told_of_a_loss_at_chance_names_settings_that_the_method_has(make):
    method = make()
    assert ("method.temperature" in method.at_chance.text) <= hasattr(method, "temperature")


def test_logs_and_carry_are_detached(make, batches):
    method = make()
    output = method(batches(1)[0])
    assert {"loss", "top1", *method.legend} <= output.logs.keys()
    assert all(x.shape == () and not x.requires_grad for x in output.logs.values())
    assert all(len(x) == 8 and not x.requires_grad for x in output.carry.values())


def test_forward_may_be_called_twice(make, batches):
    method, batch = make(), batches(1)[0]
    before, rng = state(method, batchnorm_statistics=False), torch.get_rng_state()
    first, second = method(batch), method(batch)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(x, second.carry[key]) for key, x in first.carry.items())
    assert_equal(state(method, batchnorm_statistics=False), before)
    assert torch.equal(torch.get_rng_state(), rng)


def test_two_forwards_may_wait_for_one_backward(make, batches):
    """As with accumulated gradients: nothing that the first needs is overwritten by the second."""
    method = make(batchnorm=False)
    one, two = batches(2)
    parameters = list(method.encoder.parameters())
    apart = [torch.autograd.grad(method(batch).loss, parameters) for batch in (one, two)]
    together = torch.autograd.grad(method(one).loss + method(two).loss, parameters)
    torch.testing.assert_close(together, tuple(a + b for a, b in zip(*apart, strict=True)))


def test_backward_changes_no_state(make, batches):
    """What is to be remembered of a batch is remembered in after_step, with or without a backward pass."""
    method = make()
    loss = method(batches(1)[0]).loss
    before = state(method)
    loss.backward()
    assert_equal(state(method), before)


class Questions(TorchDispatchMode):
    """The operations whose answer the host of a GPU has to wait for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.asked.append(operation)
        return operation(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_no_number(make, batches):
    method, batch = make(), batches(1)[0]
    with Questions() as questions:
        output = method(batch)
        output.loss.backward()
        method.after_step([batch], [output], 0.5)
    assert questions.asked == []


def test_after_step_touches_nothing_that_has_a_gradient(make, batches):
    method, batch = make(), batches(1)[0]
    output = method(batch)
    output.loss.backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in method.encoder.parameters()]
    method.after_step([batch], [output], 0.5)
    assert all(torch.equal(p, w) and torch.equal(p.grad, g)
               for p, (w, g) in zip(method.encoder.parameters(), before, strict=True))
    assert all(x.grad_fn is None for x in method.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("skipped", [True, False])
def test_what_follows_a_step_that_the_device_leaves_out_changes_nothing(make, batches, skipped):
    """And is the same as ever after one that it takes. The method need not know: see common.guard."""
    method, batch = make(), batches(1)[0]
    plain, skip = copy.deepcopy(method), torch.tensor(float(skipped))
    for tried in (method, plain):
        with torch.no_grad():
            for parameter in tried.encoder.parameters():
                parameter.mul_(1.01)
    output, before, kept = method(batch), state(method), Kept(method, all_but_tables=True)
    kept.keep()
    with guard.skipping(skip):
        method.after_step([batch], [output], 0.5)
    kept.restore_if(skip)
    plain.after_step([batch], [plain(batch)], 0.5)
    assert_equal(state(method), before if skipped else state(plain))


def test_a_saved_run_goes_on_bit_for_bit(make, batches):
    method = make()
    optimizer, feed = optimizer_of(method), batches(8)
    for batch in feed[:4]:
        step(method, optimizer, [batch])
    file = io.BytesIO()
    torch.save({"method": method.state_dict(), "optimizer": optimizer.state_dict()}, file)
    straight = [step(method, optimizer, [batch]) for batch in feed[4:]]

    torch.manual_seed(99)                     # other weights, another queue, another bank: all must come from the file
    resumed = make()
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(saved["method"])
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    assert torch.equal(torch.stack([step(resumed, optimizer, [batch]) for batch in feed[4:]]), torch.stack(straight))
    assert_equal(state(resumed), state(method))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in IN_BATCH], indirect=True)
def test_accumulated_gradients_are_one_step(make, batches, name):
    """A micro-batches: one EMA, one average of Z, and all keys taken in, as from one batch of their size."""
    method = make(batchnorm=False)
    if hasattr(method, "log_z"):
        method.log_z.fill_(4.0)               # the very first estimate is each micro-batch's own
    whole = copy.deepcopy(method)
    (batch,) = batches(1)
    parts = [Batch([view[i:i + 8 // A] for view in batch.views], batch.index[i:i + 8 // A], batch.label[i:i + 8 // A])
             for i in range(0, 8, 8 // A)]
    losses = step(method, optimizer_of(method), parts), step(whole, optimizer_of(whole), [batch])
    torch.testing.assert_close(*losses)
    found, expected = state(method), state(whole)
    if name == "moco queue, symmetric":       # both views of a micro-batch are enqueued together: another order
        for entries in (found, expected):
            entries["dictionary.keys"] = entries["dictionary.keys"].sort(dim=0).values
            entries["dictionary.image"] = entries["dictionary.image"].sort().values
    for key in found.keys() - {"dictionary.step"}:                    # the bank counts updates
        torch.testing.assert_close(found[key], expected[key], msg=lambda text, key=key: f"{key}: {text}")

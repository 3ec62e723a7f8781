"""The loop: what one optimizer step does and does not do, whatever the method."""

import copy
import math

import pytest
import torch

from common.backbones import encoder as build_encoder
from common.data import arrays
from common.data.loader import Loader
from common.data.recipes import moco_cifar10
from common.dictionary import Bank, Queue
from common.encoder import ema_
from common.method import Output
from common.optim import sgd
from common.schedule import cosine
from common.settings import TrainSettings
from common.train import Trainer
from common.tree import digest
from instdisc import InstDisc
from moco import MoCo

CPU = torch.device("cpu")
IMAGES = 40


def encoder():
    return build_encoder("w4s1", dim=8, image_size=8)


def moco(**settings):
    settings = {"momentum": 0.9, "key_bn": "split", "bn_groups": 2, "temperature": 0.2} | settings
    return MoCo(encoder(), Queue(24, 8), **settings)


def trainer(method, schedule=lambda epoch: 1.0, lr=0.05, **settings):
    settings = TrainSettings(**{"epochs": 3, "batch_size": 8, "workers": 0} | settings)
    pixels = torch.randint(0, 256, (IMAGES, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    loader = Loader(arrays(pixels).train, moco_cifar10(8), batch_size=settings.batch_size, seed=0,
                    accumulate=settings.accumulate)
    return Trainer(method, loader, sgd(method, settings.batch_size, lr=lr), schedule, settings, CPU)


class Spoiled(MoCo):
    """``at`` names the steps (from 1) whose loss, or whose gradient alone, is made what no number is."""

    def __init__(self, *arguments, what, at, **settings):
        super().__init__(*arguments, **settings)
        self.what, self.at, self.calls = what, at, 0

    def forward(self, batch):
        self.calls += 1
        loss, logs, carry = super().forward(batch)
        weight = next(self.encoder.parameters())
        spoil = {"loss and gradient": loss * math.nan, "loss": math.inf, "gradient": (weight * 0).sum().sqrt()}
        return Output(loss + spoil[self.what] if self.calls in self.at else loss, logs, carry)


def spoiled(what, *at):
    return Spoiled(encoder(), Queue(24, 8), momentum=0.9, key_bn="split", bn_groups=2, what=what, at=at)


@pytest.mark.parametrize("what", ["loss and gradient", "loss", "gradient"])
def test_a_step_that_is_not_finite_updates_nothing_and_the_next_goes_on(what):
    run = trainer(spoiled(what, 3))
    steps = run.steps()
    next(steps), next(steps)
    before = digest([run.method.state_dict(), run.optimizer.state_dict()])
    step = next(steps)
    assert step.skipped and step.number == 3
    assert digest([run.method.state_dict(), run.optimizer.state_dict()]) == before      # statistics and queue included
    step = next(steps)
    assert not step.skipped and step.number == 4 and run.skipped == 0
    assert digest([run.method.state_dict(), run.optimizer.state_dict()]) != before


def test_too_many_such_steps_in_a_row_end_the_training():
    run = trainer(spoiled("loss", 2, 4, 5, 6), max_skipped=3)
    with pytest.raises(FloatingPointError, match="step 6: .* not finite for 3 steps in a row; none was taken"):
        list(run.steps())
    assert run.step == 5


def test_fp16_trains_and_a_gradient_that_no_scale_makes_finite_ends_it():
    """The scale falls from 2^16 to 1 in 16 steps; those after them count."""
    losses = [step.logs["loss"] for step in trainer(moco(), precision="fp16").steps(4)]
    assert torch.stack(losses).isfinite().all()
    run = trainer(spoiled("gradient", *range(100)), precision="fp16", epochs=9, max_skipped=3)
    with pytest.raises(FloatingPointError, match="step 19: .* not finite for 3 steps in a row"):
        list(run.steps())


def test_the_scale_of_fp16_goes_on_where_it_was():
    run = trainer(spoiled("gradient", 1, 2), precision="fp16")
    list(run.steps(3))
    resumed = trainer(moco(), precision="fp16")
    resumed.load_state(run.state())
    assert resumed.scaler.get_scale() == run.scaler.get_scale() == 2**14
    assert resumed.scaler.state_dict() == run.scaler.state_dict()


def test_a_training_that_goes_on_ends_where_it_would_have_ended():
    run = trainer(moco())
    list(run.steps(7))
    resumed = trainer(moco())
    resumed.load_state(run.state())
    assert [step.number for step in resumed.steps()] == list(range(8, 16))


def test_accumulation_moves_the_keys_once_and_enqueues_in_order():
    """Against the same step by hand: gradients of four micro-batches, one update, one EMA, four enqueues."""
    run = trainer(moco(), accumulate=4, batch_size=16)
    method = copy.deepcopy(run.method).train()
    optimizer = sgd(method, 16, lr=0.05)
    _, batches, _ = next(run.loader.stream(0, 1))
    outputs = [method(batch) for batch in batches]
    (sum(output.loss for output in outputs) / 4).backward()
    optimizer.step()
    ema_(method.key_encoder, method.encoder, 0.9)

    step = next(run.steps())
    for mine, its in zip(method.key_encoder.parameters(), run.method.key_encoder.parameters(), strict=True):
        torch.testing.assert_close(mine, its)
    assert run.method.dictionary.image[:16].tolist() == torch.cat([batch.index for batch in batches]).tolist()
    torch.testing.assert_close(run.method.dictionary.keys[:16], torch.cat([output.carry["keys"] for output in outputs]))
    assert int(run.method.dictionary.filled) == 16 and int(run.method.step) == 1
    torch.testing.assert_close(step.logs["loss"], sum(output.loss for output in outputs).detach() / 4)


def test_without_batchnorm_accumulation_is_the_whole_batch():
    """The gradient of the mean is the mean of the gradients, once no batch statistics join the images."""
    weights = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        method = InstDisc(encoder(), Bank(IMAGES, 8), temperature=0.2, loss="full_softmax").eval()
        method.train = lambda mode=True: None                               # BatchNorm goes by its running statistics
        run = trainer(method, accumulate=accumulate, batch_size=16)
        for _ in run.steps(3):
            pass
        weights.append(torch.cat([parameter.flatten() for parameter in method.parameters()]).detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_clip_limits_the_norm_of_the_step(clip):
    run = trainer(moco(), clip=clip, lr=1.0)
    before = torch.nn.utils.parameters_to_vector(run.method.encoder.parameters()).detach()
    next(run.steps())
    moved = float((torch.nn.utils.parameters_to_vector(run.method.encoder.parameters()) - before).detach().norm())
    assert moved == pytest.approx(0.01, rel=1e-3) if clip else moved > 0.1


def test_bf16_trunk_gives_float32_features_and_loss():
    run = trainer(moco(), precision="bf16")
    seen = []
    run.method.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run.method.encoder.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    steps = list(run.steps(2))
    assert set(seen[::2]) == {torch.bfloat16} and set(seen[1::2]) == {torch.float32}
    assert all(step.logs["loss"].dtype == torch.float32 and step.logs["loss"].isfinite() for step in steps)
    assert run.method.dictionary.keys.dtype == torch.float32 and not steps[-1].skipped


def test_learning_rate_follows_the_schedule_step_by_step():
    schedule = cosine(3, warmup=1)
    found = [step.lr for step in trainer(moco(), schedule=schedule, lr=0.08).steps()]
    per_epoch = IMAGES // 8
    assert found == pytest.approx([0.08 * schedule(step / per_epoch) for step in range(3 * per_epoch)])
    assert found[0] == 0 and max(found) == found[per_epoch] == 0.08


@pytest.mark.parametrize("mistake, said", [
    ({"epochs": 0}, "epochs: 0 is less than 1"),
    ({"workers": -1}, "workers: -1 is negative"),
    ({"max_unreadable": 1.5}, "max_unreadable: 1.5 is no share"),
    ({"clip": 0.0}, "clip: 0.0 is not positive"),
])
def test_settings_that_mean_nothing_are_refused(mistake, said):
    with pytest.raises(ValueError, match=said):
        TrainSettings(**{"epochs": 1, "batch_size": 8} | mistake)

import pytest
import torch
from torch import nn

from common.optim import adamw, effective_lr, lars, parameter_groups, set_lr, sgd


def toy():
    """A filter, a matrix, a norm, and a frozen copy of something."""
    method = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 4))
    method[4].requires_grad_(False)
    return method.double()


def gradients(method, step):
    draw = torch.Generator().manual_seed(step)
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)


def test_base_lr_is_the_rate_for_256_images():
    assert effective_lr(None, 0.03, 256) == 0.03
    assert effective_lr(None, 0.03, 1024) == pytest.approx(0.12)
    assert effective_lr(0.015, None, 1024) == 0.015
    assert sgd(toy(), 512, base_lr=0.03).param_groups[0]["lr"] == pytest.approx(0.06)


@pytest.mark.parametrize("rates", [{}, {"lr": 0.1, "base_lr": 0.1}, {"lr": -0.1}])
@pytest.mark.parametrize("make", [sgd, adamw, lars])
def test_one_of_the_two_rates_has_to_be_given(make, rates):
    with pytest.raises(ValueError, match="lr"):
        make(toy(), 256, **rates)


def test_decay_is_on_all_trained_parameters_or_on_matrices_and_filters():
    method = toy()
    (everything,) = parameter_groups(method, 1e-4, decay_all=True)
    assert len(everything["params"]) == 6 and everything["weight_decay"] == 1e-4
    decayed, plain = parameter_groups(method, 1e-4, decay_all=False)
    assert [x.ndim for x in decayed["params"]] == [3, 2] and decayed["weight_decay"] == 1e-4
    assert [x.ndim for x in plain["params"]] == [1, 1, 1, 1] and plain["weight_decay"] == 0


@pytest.mark.parametrize("decay_all", [True, False])
def test_sgd_is_the_formula(decay_all):
    """v <- mu v + (g + beta w), w <- w - lr v, as in the authors' code."""
    method = toy()
    weights = [p.detach().clone() for p in method.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    optimizer = sgd(method, 512, base_lr=0.05, momentum=0.9, weight_decay=0.01, decay_all=decay_all)
    for step in range(5):
        gradients(method, step)
        for w, v, p in zip(weights, velocity, method.parameters(), strict=True):
            if p.requires_grad:
                v.mul_(0.9).add_(p.grad + (0.01 if decay_all or p.ndim > 1 else 0.0) * w)
                w.sub_(0.1 * v)
        optimizer.step()
    torch.testing.assert_close(list(method.parameters()), weights)


def test_adamw_is_torchs_with_the_same_settings():
    ours, theirs = toy(), toy()
    theirs.load_state_dict(ours.state_dict())
    optimizer = adamw(ours, 256, lr=0.01, betas=(0.8, 0.9), weight_decay=0.2)
    reference = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.01, betas=(0.8, 0.9),
                                  weight_decay=0.2, foreach=False)
    for step in range(5):
        gradients(ours, step), gradients(theirs, step)
        optimizer.step(), reference.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_lars_is_algorithm_1_of_you_et_al(weight_decay):
    """lambda = eta |w| / (|g| + beta |w|), v <- mu v + lr lambda (g + beta w), w <- w - v; plain SGD on one axis."""
    method, eta, lr, mu = toy(), 0.02, 0.3, 0.9
    weights = [p.detach().clone() for p in method.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    optimizer = lars(method, 256, lr=lr, momentum=mu, weight_decay=weight_decay, trust_coefficient=eta)
    for step in range(5):
        gradients(method, step)
        for w, v, p in zip(weights, velocity, method.parameters(), strict=True):
            if not p.requires_grad:
                continue
            local, beta = 1.0, 0.0
            if p.ndim > 1:
                beta = weight_decay
                local = eta * w.norm() / (p.grad.norm() + beta * w.norm())
            v.mul_(mu).add_(lr * local * (p.grad + beta * w))
            w.sub_(v)
        optimizer.step()
    torch.testing.assert_close(list(method.parameters()), weights, rtol=1e-7, atol=1e-9)      # timm's |g| has 1e-8 more


@pytest.mark.parametrize("make", [sgd, adamw, lars])
def test_the_schedule_scales_every_group_from_the_rate_it_was_built_with(make):
    optimizer = make(toy(), 256, lr=0.4)
    assert set_lr(optimizer, 0.5) == pytest.approx(0.2) and set_lr(optimizer, 0.1) == pytest.approx(0.04)
    resumed = make(toy(), 256, lr=0.4)
    resumed.load_state_dict(optimizer.state_dict())
    assert set_lr(resumed, 1.0) == pytest.approx(0.4)
    assert all(group["lr"] == pytest.approx(0.4) for group in resumed.param_groups)

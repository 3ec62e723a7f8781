"""Optimizers, with the learning rate written per 256 images and the effective one kept in sight.

``base_lr`` is the rate for a batch of 256 (Goyal et al. 2017): the effective rate is ``base_lr * batch_size / 256``.
``lr`` is the effective rate itself. A config gives one of the two.
"""

import math

import torch
from torch import Tensor, nn


def effective_lr(lr: float | None, base_lr: float | None, batch_size: int) -> float:
    """The rate for ``batch_size`` images. Raises ValueError unless one of the two is given, not negative and finite."""
    check_rate(lr, base_lr)
    rate = lr if base_lr is None else base_lr * batch_size / 256
    assert rate is not None
    return rate


def check_rate(lr: float | None, base_lr: float | None) -> None:
    if (lr is None) == (base_lr is None):
        raise ValueError("lr, base_lr: give one of the two: lr is the rate itself, base_lr the rate per 256 images.")
    key, rate = ("base_lr", base_lr) if lr is None else ("lr", lr)
    if rate is not None and not 0 <= rate < math.inf:
        raise ValueError(f"{key}: {rate} is {'negative' if rate < 0 else 'no rate'}. Give 0 or more.")


def _check_decay(weight_decay: float, momentum: float = 0.0) -> None:
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay: {weight_decay} given. Give 0 or more, such as 1e-4.")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: {momentum} lies outside [0, 1). The papers' is 0.9.")


def sgd(method: nn.Module, batch_size: int, lr: float | None = None, base_lr: float | None = None,
        momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False,
        decay_all: bool = True) -> torch.optim.Optimizer:
    """SGD; weight decay on all parameters as in MoCo's code, or (``decay_all: false``) on matrices and filters only."""
    check_rate(lr, base_lr)
    _check_decay(weight_decay, momentum)
    if nesterov and momentum == 0:
        raise ValueError("nesterov: it needs a momentum above 0.")
    return torch.optim.SGD(parameter_groups(method, weight_decay, decay_all), fused=_can_fuse(method),
                           lr=effective_lr(lr, base_lr, batch_size), momentum=momentum, nesterov=nesterov)


def adamw(method: nn.Module, batch_size: int, lr: float | None = None, base_lr: float | None = None,
          betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.1,
          decay_all: bool = True) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019)."""
    check_rate(lr, base_lr)
    _check_decay(weight_decay)
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: {list(betas)} given. Each lies in [0, 1); AdamW's are [0.9, 0.999].")
    return torch.optim.AdamW(parameter_groups(method, weight_decay, decay_all), fused=_can_fuse(method),
                             lr=effective_lr(lr, base_lr, batch_size), betas=betas)


def lars(method: nn.Module, batch_size: int, lr: float | None = None, base_lr: float | None = None,
         momentum: float = 0.9, weight_decay: float = 1e-6, trust_coefficient: float = 0.001) -> torch.optim.Optimizer:
    """LARS (You et al. 2017, Algorithm 1), timm's; biases and norms get neither decay nor adaptation, as in MoCo v3.

    The rate stands outside the momentum, as in torch's SGD and MoCo v3; the paper's is inside. The two differ only
    while the rate changes.
    """
    check_rate(lr, base_lr)
    _check_decay(weight_decay, momentum)
    from timm.optim import Lars

    adapted, plain = parameter_groups(method, weight_decay, decay_all=False)
    adapted["always_adapt"] = True                       # timm adapts nothing that has no decay
    return Lars([adapted, plain], momentum=momentum, lr=effective_lr(lr, base_lr, batch_size),
                trust_coeff=trust_coefficient)


def parameter_groups(method: nn.Module, weight_decay: float, decay_all: bool) -> list[dict]:
    """The trained parameters; those of one axis (biases, norms) apart and without decay unless ``decay_all``."""
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    if decay_all:
        return [{"params": trained, "weight_decay": weight_decay}]
    return [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's rate from the one it was built with; the first group's rate is returned."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return optimizer.param_groups[0]["lr"]


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the device can leave out a step by itself: torch's fused optimizers can, as GradScaler asks them to."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """``optimizer.step()`` of one that ``can_skip``, but nothing where ``skip`` (float32, 0-d, on the device) is 1."""
    _start_momentum(optimizer)
    optimizer.found_inf, optimizer.grad_scale = skip, None          # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale               # type: ignore[attr-defined]


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """From zero, which is the first gradient after the first step: torch's is empty memory if that one is left out."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _can_fuse(method: nn.Module) -> bool:
    return next(method.parameters()).device.type in ("cpu", "cuda")

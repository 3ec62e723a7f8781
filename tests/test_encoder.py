"""The momentum copy of an encoder."""

import torch

from common.backbones import encoder
from common.encoder import ema_, frozen_copy


def test_the_momentum_update_is_equation_2_and_leaves_every_weight_in_its_place():
    """No new memory each step, and whatever holds on to the weights (a compiled encoder) goes on seeing them."""
    fast = encoder("w4s1", dim=8, image_size=8)
    slow = frozen_copy(fast)
    places = [weight.data_ptr() for weight in slow.parameters()]
    expected = [weight.clone() for weight in slow.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for weight in fast.parameters():
                weight.add_(torch.randn_like(weight))
        expected = [0.9 * old + 0.1 * new.detach() for old, new in zip(expected, fast.parameters(), strict=True)]
        ema_(slow, fast, 0.9)
    torch.testing.assert_close(list(slow.parameters()), [weight.requires_grad_(False) for weight in expected])
    assert [weight.data_ptr() for weight in slow.parameters()] == places

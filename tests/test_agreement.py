"""The hash by which ranks compare what they hold, against a loop; and what is said when they differ."""

import pytest
import torch

from common import agreement
from common.agreement import Drifted, check_state, hash64
from common.config import ConfigError

GOLDEN = -7046029254386353131


def by_hand(values: list[int], chunk: int) -> int:
    total = 0
    for i, value in enumerate(values):
        number, place = divmod(i, chunk)
        total += value * (place * GOLDEN << 1 | 1) * (2 * number + 1)
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
def test_the_hash_is_the_sum_of_a_loop(count, monkeypatch):
    monkeypatch.setattr(agreement, "_CHUNK", 8)
    values = torch.randint(-2**62, 2**62, (count,))
    assert hash64(values).item() == by_hand(values.tolist(), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_any_element_that_changes_changes_the_hash(dtype, monkeypatch):
    monkeypatch.setattr(agreement, "_CHUNK", 8)
    tensor = torch.randn(3, 7).to(dtype)
    before = hash64(tensor).item()
    for i in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1).view(torch.uint8)[i * tensor.element_size()] ^= 1       # its lowest bit
        assert hash64(other).item() != before


def test_the_place_counts_and_the_layout_in_memory_does_not():
    image = torch.randn(2, 3, 4, 5)
    assert hash64(image.to(memory_format=torch.channels_last)) == hash64(image)
    assert hash64(image.flip(0)) != hash64(image) and hash64(image.flip(3)) != hash64(image)
    assert hash64(torch.tensor(-0.0)) != hash64(torch.tensor(0.0))


def on(monkeypatch, *ranks):
    """As if ``ranks`` other ranks had given these."""
    monkeypatch.setattr(agreement.distributed, "gather_objects", lambda mine: [mine, *ranks])


def hashes(*tensors):
    return [hash64(tensor).item() for tensor in tensors]


@pytest.mark.parametrize("others, said", [("bg", "queue: not the same on rank 2 as on the other 2"),
                                          ("bb", "queue: not the same on rank 0 as on the other 2"),
                                          ("b", "queue: not the same on ranks 0, 1, "),
                                          ("bc", "queue: not the same on ranks 0, 1, 2, ")])
def test_what_differs_is_named_and_who_is_in_the_minority(others, said, monkeypatch):
    weight, good, bad = torch.ones(3), torch.zeros(4), torch.ones(4)
    queues = {"g": good, "b": bad, "c": bad + 1}
    seen = [hashes(weight, queues[letter]) for letter in ("gb" if others == "bg" else others)]
    on(monkeypatch, *seen)
    with pytest.raises(Drifted, match=f"step 1,000: {said}"):
        check_state(1000, {"method": {"weight": weight, "queue": good}, "optimizer": {}})


def test_equal_ranks_pass(monkeypatch):
    weight, momentum = torch.ones(3), torch.zeros(4)
    on(monkeypatch, hashes(weight, momentum))
    check_state(1, {"method": {"weight": weight}, "optimizer": {0: {"momentum_buffer": momentum, "none": None}}})


@pytest.mark.parametrize("theirs, said", [
    (("c", "other", 41), r"data: rank 1 sees other .* than rank 0 \(41 against 40\)"),
    (("other", "d", 40), "config: rank 1 was started with other settings"),
])
def test_other_data_or_settings_on_one_rank_are_refused(theirs, said, monkeypatch):
    on(monkeypatch, theirs)
    with pytest.raises(ConfigError, match=said):
        agreement.check_start("c", "d", 40)

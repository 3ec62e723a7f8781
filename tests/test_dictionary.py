import collections

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common import losses
from common.dictionary import Bank, InBatch, Queue
from common.losses import info_nce

T = 0.1


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def oldest_first(queue):
    return torch.roll(queue.keys, -queue.head.item(), 0), torch.roll(queue.image, -queue.head.item(), 0)


@pytest.mark.parametrize("batch", [1, 3, 5, 12, 30])                    # one, dividing, not dividing, all, more
def test_queue_holds_the_most_recent_keys(batch):
    queue = Queue(12, 4)
    keys, images = (collections.deque(x.clone(), maxlen=12) for x in (queue.keys, queue.image))
    for step in range(9):
        k, index = unit(batch, 4), torch.arange(batch) + 100 * step
        queue.update(k, index)
        keys.extend(k), images.extend(index)
        found_keys, found_images = oldest_first(queue)
        assert torch.equal(found_keys, torch.stack(list(keys)))
        assert torch.equal(found_images, torch.stack(list(images)))
        assert queue.filled == min(12, batch * (step + 1)) and queue.logs()["queue"] == queue.filled / 12


def test_rows_have_unit_length_from_the_start():
    queue, bank = Queue(7, 4), Bank(9, 4)
    for _ in range(5):
        for rows in (queue.keys, bank.v):
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
        queue.update(unit(5, 4), torch.arange(5))
        bank.update(unit(5, 4), torch.randperm(9)[:5])


@pytest.mark.parametrize("dictionary", [InBatch(), Queue(50, 64), Bank(60, 64), Bank(60, 64, negatives=30)], ids=repr)
def test_comparison_is_that_of_a_loop_over_the_candidates(dictionary, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 20)
    q, k, index = unit(6, 64), unit(6, 64), torch.randperm(60)[:6]
    found = dictionary.compare(q, k, index, T)
    for b in range(6):
        if isinstance(dictionary, InBatch):
            positive, negatives = k[b], [k[j] for j in range(6) if j != b]
        elif isinstance(dictionary, Queue):
            positive, negatives = k[b], list(dictionary.keys)
        elif dictionary.negatives is None:
            positive, negatives = dictionary.v[index[b]], [v for i, v in enumerate(dictionary.v) if i != index[b]]
        else:
            positive, negatives = dictionary.v[index[b]], drawn_rows(dictionary, index[b])
        sims = torch.stack([q[b] @ key for key in (positive, *negatives)])
        torch.testing.assert_close(found.pos_B[b], sims[0])
        torch.testing.assert_close(found.log_sum_B[b], (sims / T).exp().sum().log())
        torch.testing.assert_close(found.hardest_B[b], sims[1:].max())
    if dictionary.candidates() is not None:
        assert dictionary.candidates() == len(sims)


def drawn_rows(bank, image):
    """The rows that a bank draws for one image, found out one coordinate at a time by unit queries."""
    width = bank.v.shape[1]
    noise = bank.compare(torch.eye(width), torch.eye(width), image.repeat(width), T).noise_BM
    return list(noise.T)


def test_logs_say_how_similar_and_how_often_first():
    queue = Queue(4, 2)
    queue.keys.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
    q = torch.tensor([[1.0, 0], [0.6, 0.8]])
    positive, negative, top1 = queue.compare(q, torch.tensor([[1.0, 0], [0, 1]]), torch.arange(2), T).logs().values()
    assert positive.item() == pytest.approx(0.9) and negative.item() == pytest.approx(0, abs=1e-6)
    assert top1 == 0                                                     # a draw with a negative is no first place
    queue.keys.copy_(torch.tensor([[0.0, -1]] * 4))
    assert queue.compare(q, q, torch.arange(2), T).logs()["top1"] == 1


def test_perfect_features_give_a_loss_near_zero():
    """No query's own key is among its negatives, whatever the dictionary (a floor of ln 2 otherwise)."""
    perfect, index = torch.eye(40), torch.arange(40)
    queue = Queue(32, 40)
    queue.update(perfect[:32], index[:32])
    bank = Bank(40, 40)
    bank.fill(perfect)
    for dictionary, rows in [(InBatch(), slice(0, 8)), (queue, slice(32, 40)), (bank, slice(0, 8))]:
        found = dictionary.compare(perfect[rows], perfect[rows], index[rows], 0.07)
        assert info_nce(found.pos_B, found.log_sum_B, 0.07) < 1e-3


@pytest.mark.parametrize("chunk", [15, 10_000])                         # 3 keys at a time, all
def test_mask_own_leaves_the_querys_own_image_out(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    queue, masked = Queue(10, 8), Queue(10, 8, mask_own=True)
    index = torch.arange(5)
    keys, images = unit(10, 8), torch.tensor([7, 0, 8, 1, 0, 9, 6, 2, 7, 8])
    queue.update(keys, images), masked.update(keys, images)
    q, k = unit(5, 8), unit(5, 8)
    assert not torch.allclose(queue.compare(q, k, index, T).log_sum_B[:2], masked.compare(q, k, index, T).log_sum_B[:2])
    for b in range(5):
        others = keys[images != index[b]]
        sims = torch.cat([k[b:b + 1], others]) @ q[b]
        torch.testing.assert_close(masked.compare(q, k, index, T).log_sum_B[b], (sims / T).logsumexp(dim=0))


def test_a_queue_of_nothing_but_the_own_image_still_has_a_gradient():
    queue, q = Queue(3, 4, mask_own=True), unit(2, 4).requires_grad_()
    queue.update(unit(3, 4), torch.tensor([5, 5, 5]))
    found = queue.compare(q, unit(2, 4), torch.tensor([5, 6]), T)
    info_nce(found.pos_B, found.log_sum_B, T).backward()
    assert torch.isfinite(q.grad).all() and q.grad[0].abs().max() < 1e-6 < q.grad[1].abs().max()


@pytest.mark.parametrize("make", [lambda: Queue(20, 8), lambda: Bank(30, 8), lambda: Bank(30, 8, negatives=6),
                                  lambda: Bank(30, 8, negatives=6, shared=True), InBatch])
def test_two_comparisons_may_wait_for_one_backward_pass(make):
    dictionary, q, index = make(), unit(4, 8).requires_grad_(), torch.arange(4)
    k = unit(2, 4, 8)

    def loss(i):
        found = dictionary.compare(q, k[i], index, T)
        return info_nce(found.pos_B, found.log_sum_B, T)

    apart = sum(torch.autograd.grad(loss(i), q)[0] for i in range(2))
    torch.testing.assert_close(torch.autograd.grad(loss(0) + loss(1), q)[0], apart)


@pytest.mark.parametrize("make", [lambda: Queue(20, 8), lambda: Bank(30, 8)])
def test_a_comparison_may_wait_for_its_backward_pass_while_entries_change(make):
    dictionary, q, index = make(), unit(4, 8).requires_grad_(), torch.arange(4)
    k = unit(4, 8)
    (expected,) = torch.autograd.grad(dictionary.compare(q, k, index, T).log_sum_B.sum(), q)
    waiting = dictionary.compare(q, k, index, T).log_sum_B.sum()
    dictionary.update(k, index)
    torch.testing.assert_close(torch.autograd.grad(waiting, q)[0], expected)


def test_comparison_changes_no_state_and_draws_nothing_from_torch():
    for dictionary in (Queue(20, 8), Bank(30, 8), Bank(30, 8, negatives=6)):
        before = {name: x.clone() for name, x in dictionary.state_dict().items()}
        rng = torch.get_rng_state()
        dictionary.compare(unit(4, 8), unit(4, 8), torch.arange(4), T)
        torch.set_rng_state(rng)
        first = dictionary.compare(unit(4, 8), unit(4, 8), torch.arange(4), T)
        torch.set_rng_state(rng)
        again = dictionary.compare(unit(4, 8), unit(4, 8), torch.arange(4), T)
        assert all(torch.equal(x, before[name]) for name, x in dictionary.state_dict().items())
        assert all(x is y or torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_comparison_is_in_float32_under_autocast():
    q, k, index = unit(4, 64), unit(4, 64), torch.arange(4)
    for dictionary in (Queue(200, 64), Bank(200, 64), Bank(200, 64, negatives=60, shared=True), InBatch()):
        exact = dictionary.compare(q, k, index, 0.07).log_sum_B
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = dictionary.compare(q, k, index, 0.07).log_sum_B
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact)


def test_bank_moves_each_row_towards_its_key_and_the_last_of_two_counts():
    bank = Bank(6, 4, momentum=0.3)
    rows, k, index = bank.v.clone(), unit(5, 4), torch.tensor([2, 0, 2, 5, 2])
    bank.update(k, index)
    for image, key in dict(zip(index.tolist(), k, strict=True)).items():      # of equal keys a dict keeps the last
        rows[image] = F.normalize(0.3 * rows[image] + 0.7 * key, dim=0)
    torch.testing.assert_close(bank.v, rows)


class LastRowFirst(TorchDispatchMode):
    """A device that writes the rows of an assignment in the opposite order; of two to one place the first stays."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.index_put_.default:
            x, (index,), values, *rest = args
            args = x, [index.flip(0)], values.flip(0), *rest
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [lambda: Bank(6, 4), lambda: Queue(3, 4), lambda: Queue(12, 4)])
def test_what_is_kept_does_not_depend_on_the_order_in_which_a_device_writes(make):
    here, there = make(), make()
    there.load_state_dict(here.state_dict())
    for k, index in zip(unit(4, 5, 4), torch.randint(3, (4, 5)), strict=True):          # images stand there twice
        here.update(k, index)
        with LastRowFirst():
            there.update(k, index)
    assert all(torch.equal(x, here.state_dict()[name]) for name, x in there.state_dict().items())


def test_the_banks_draws_are_a_function_of_seed_step_and_image():
    def noise(bank, images):
        return bank.compare(q.expand(len(images), 8), q.expand(len(images), 8), torch.tensor(images), T).noise_BM

    bank, q = Bank(50, 8, negatives=20), unit(1, 8)
    together = noise(bank, [3, 1, 4])
    assert torch.equal(together[[2, 0]], noise(bank, [4, 3]))
    assert not torch.equal(together[0], together[1])
    other = Bank(50, 8, negatives=20, seed=1)
    other.v.copy_(bank.v)
    assert not torch.equal(noise(other, [3, 1, 4]), together)
    bank.step.add_(1)
    assert not torch.equal(noise(bank, [3, 1, 4]), together)
    bank.step.sub_(1)
    assert torch.equal(noise(bank, [3, 1, 4]), together)


def test_shared_draws_are_the_same_for_all_queries_of_a_step():
    bank = Bank(50, 8, negatives=20, shared=True)
    noise = bank.compare(unit(1, 8).expand(3, 8), unit(3, 8), torch.tensor([3, 1, 4]), T).noise_BM
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[0], noise[2])


def test_the_bank_draws_from_all_its_rows_evenly():
    bank = Bank(5, 5, negatives=20_000)
    bank.fill(torch.eye(5))
    noise = bank.compare(torch.eye(5), torch.eye(5), torch.full((5,), 2), T).noise_BM    # row j of queries counts row j
    torch.testing.assert_close(noise.mean(dim=1), torch.full((5,), 0.2), atol=0.015, rtol=0)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Queue(0, 4), "size: 0"), (lambda: Bank(9, 4, negatives=0), "negatives: 0"),
    (lambda: Bank(9, 4, momentum=1.0), "momentum: 1.0"), (lambda: Queue(20, 4, num_samples=20), "mask_own: true")])
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_queue_long_for_its_images_is_warned_of_unless_masked():
    with pytest.warns(UserWarning, match="mask_own"):
        Queue(10, 4, num_samples=20)
    Queue(30, 4, mask_own=True, num_samples=20)

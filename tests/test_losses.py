import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import losses
from common.losses import gathered_similarity, info_nce, log_sum_exp, nce


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def with_grad(loss, x):
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


@pytest.mark.parametrize("chunk", [1, 20, 25, 10_000])                  # one column at a time, 4, 5 and a short one
@pytest.mark.parametrize("temperature", [0.07, 0.002])                  # exp(1 / 0.002) overflows a double
def test_chunked_log_sum_exp_is_the_dense_one(chunk, temperature, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    q, keys, weight = unit(3, 5).requires_grad_(), unit(17, 5), torch.randn(3, dtype=torch.float64)
    found, hardest, mean = log_sum_exp(q, keys, temperature)
    dense = (q @ keys.T / temperature).logsumexp(dim=1)
    torch.testing.assert_close(with_grad((found * weight).sum(), q), with_grad((dense * weight).sum(), q))
    torch.testing.assert_close((hardest, mean), ((q @ keys.T).amax(dim=1).detach(), (q @ keys.T).mean().detach()))
    assert not hardest.requires_grad and not mean.requires_grad


@pytest.mark.parametrize("size", [1, 4, 5, 6, 9, 10, 11])               # chunks are of 5 candidates
@pytest.mark.parametrize("temperature", [0.025, 0.07, 0.2, 1.0])
@pytest.mark.parametrize("hide_one", [False, True])
def test_in_float32_it_is_the_dense_form_in_double_precision(size, temperature, hide_one, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 5 * 64)
    q, keys = unit(8, 64).float().requires_grad_(), unit(size, 64).float()
    keys[0] = q.detach()[0]                                             # the largest logit that there can be, 1 / T
    own = torch.arange(8) % size

    def hide(cos, first):
        return cos.masked_fill_(torch.arange(first, first + cos.shape[1]) == own[:, None], -math.inf)

    found, *_ = log_sum_exp(q, keys, temperature, hide if hide_one else None)
    exact = q.detach().double().requires_grad_()
    logits = (exact @ keys.double().T) / temperature
    if hide_one:
        logits = logits.masked_fill(F.one_hot(own, size).bool(), -math.inf)
    some = logits.detach().isfinite().any(dim=1)                        # a query whose only candidate is hidden
    assert found[~some].tolist() == [-math.inf] * int((~some).sum())
    if some.any():
        (loss, grad), (loss_64, grad_64) = with_grad(found[some].mean(), q), with_grad(
            logits[some].logsumexp(dim=1).mean(), exact)
        torch.testing.assert_close(loss.double(), loss_64, rtol=1e-6, atol=1e-6)
        assert (grad - grad_64).norm() < 3e-6 * grad_64.norm()          # a logit of 40 is rounded by up to 2e-6


@pytest.mark.parametrize("length", [1e-4, 30.0, 1e4])                   # 1e4: logits of up to a thousand million
def test_log_sum_exp_takes_vectors_of_any_length(length, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 20)
    q, keys = (length * unit(3, 5)).requires_grad_(), length * unit(17, 5)
    found, hardest, _ = log_sum_exp(q, keys, 0.1)
    dense = (q @ keys.T / 0.1).logsumexp(dim=1)
    torch.testing.assert_close(with_grad(found.sum(), q), with_grad(dense.sum(), q))
    torch.testing.assert_close(hardest, (q @ keys.T).amax(dim=1).detach())


@pytest.mark.parametrize("chunk", [1, 20, 10_000])
def test_hidden_candidates_do_not_count(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    q, keys = unit(3, 5).requires_grad_(), unit(17, 5)
    hidden = torch.rand(3, 17) < 0.5
    hidden[0, :6] = True                                                # the first chunks of this query hold nothing

    def hide(cos, first):
        return cos.masked_fill(hidden[:, first:first + cos.shape[1]], -math.inf)

    found, hardest, mean = log_sum_exp(q, keys, 0.1, hide)
    sim = (q @ keys.T).masked_fill(hidden, -math.inf)
    torch.testing.assert_close(with_grad(found.sum(), q), with_grad((sim / 0.1).logsumexp(dim=1).sum(), q))
    torch.testing.assert_close(hardest, sim.amax(dim=1).detach())
    torch.testing.assert_close(mean, (q @ keys.T).mean().detach())


@pytest.mark.parametrize("hidden", [0, 12])                             # none, or all that the first chunks hold
def test_candidates_all_far_away_count_like_others(hidden, monkeypatch):
    """Their exponentials, e^-1000 and less, are nothing beside 1; the log of their sum is a number."""
    monkeypatch.setattr(losses, "CHUNK", 20)
    keys = F.normalize(1 + 0.1 * torch.randn(17, 5), dim=1)
    q = -keys[:3].clone().requires_grad_()

    def hide(cosines, first):
        return cosines.masked_fill(torch.arange(first, first + cosines.shape[1]) < hidden, -math.inf)

    found = log_sum_exp(q, keys, 0.001, hide)[0]
    dense = (q.double() @ keys[hidden:].T.double() / 0.001).logsumexp(dim=1)
    assert dense.max() < -500
    torch.testing.assert_close(with_grad(found.sum(), q), with_grad(dense.float().sum(), q), rtol=1e-4, atol=1e-3)


def test_a_query_without_any_candidate_has_an_empty_sum_and_no_gradient():
    q = unit(2, 5).requires_grad_()
    found, *_ = log_sum_exp(q, unit(4, 5), 0.1, lambda x, first: torch.full_like(x, -math.inf))
    assert found.tolist() == [-math.inf] * 2
    loss, grad = with_grad(torch.logaddexp(q[:, 0], found).sum(), q)
    torch.testing.assert_close(loss, q.detach()[:, 0].sum())
    torch.testing.assert_close(grad, torch.tensor([[1.0, 0, 0, 0, 0]] * 2, dtype=torch.float64))


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 6)
    q, keys, rows = unit(3, 4).requires_grad_(), unit(9, 4), torch.randint(9, (3, 5))
    assert torch.autograd.gradcheck(lambda q: log_sum_exp(q, keys, 0.3)[0], q)
    assert torch.autograd.gradcheck(lambda q: gathered_similarity(q, keys, rows), q)
    assert torch.autograd.gradcheck(lambda q: nce(q[:, 0], q @ keys.T, 0.3, 40, torch.tensor(3.0)), q)


@pytest.mark.parametrize("chunk", [1, 45, 10_000])                      # one query at a time, two, all
def test_gathered_similarity_is_that_of_the_rows_one_by_one(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    q, bank, rows, weight = unit(3, 4).requires_grad_(), unit(9, 4), torch.randint(9, (3, 5)), torch.randn(3, 5)
    found = gathered_similarity(q, bank, rows)
    loop = torch.stack([torch.stack([q[b] @ bank[row] for row in rows[b]]) for b in range(3)])
    torch.testing.assert_close(found, loop)
    torch.testing.assert_close(with_grad((found * weight).sum(), q), with_grad((loop * weight).sum(), q))


@pytest.mark.parametrize("chunk", [1, 10_000])
def test_nce_over_gathered_rows_is_nce_over_copies_of_them(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    q, bank, rows, log_z = unit(6, 4).requires_grad_(), unit(9, 4), torch.randint(9, (6, 7)), torch.tensor(2.0)
    found = nce(q[:, 0], gathered_similarity(q, bank, rows), 0.07, 9, log_z)
    dense = nce(q[:, 0], (q[:, None] * bank[rows]).sum(dim=2), 0.07, 9, log_z)
    torch.testing.assert_close(with_grad(found, q), with_grad(dense, q))


class Largest(TorchDispatchMode):
    """The numbers in the largest piece of memory that an operator takes; ``total``, in all of them."""

    largest = total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                size = x.untyped_storage().nbytes() // x.element_size()
                self.largest, self.total = max(self.largest, size), self.total + size
        return result


def test_the_softmax_takes_one_chunk_whatever_the_number_of_candidates(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 1024)
    q, keys = unit(16, 8).requires_grad_(), unit(6400, 8)
    with Largest() as took:
        log_sum_exp(q, keys, 0.1)[0].sum().backward()
    assert took.largest == 1024 and took.total < 16 * 6400 / 4          # the dense form: 16 x 6400, several times


def test_nce_copies_the_rows_of_one_query_at_a_time(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 1)
    q, bank, rows = unit(16, 32).requires_grad_(), unit(50, 32), torch.randint(50, (16, 40))
    with Largest() as took:
        gathered_similarity(q, bank, rows).sum().backward()
    assert took.largest == 40 * 32 and took.total < 16 * 40 * 32 / 4    # copies of all rows: 16 x 40 x 32


def test_the_sums_never_wait_for_a_device():
    """On a device without values, whose ``item()`` raises: the host knows nothing but sizes, as in a CUDA graph."""
    with FakeTensorMode():
        q, keys = torch.randn(8, 16, device="cuda", requires_grad=True), torch.randn(3_000_000, 16, device="cuda")
        log_sum, *_ = log_sum_exp(q, keys, 0.1)
        sims = gathered_similarity(q, keys, torch.zeros(8, 50, dtype=torch.long, device="cuda"))
        for found in (log_sum, sims):
            grad, *_ = found.grad_fn.apply(torch.ones_like(found), *[None] * (found is log_sum))
            assert grad.shape == q.shape and grad.device.type == "cuda"


def test_info_nce_is_equation_1_of_moco_and_cross_entropy():
    pos, neg = torch.rand(6, dtype=torch.float64), torch.rand(6, 9, dtype=torch.float64)
    log_sum = (torch.cat([pos[:, None], neg], dim=1) / 0.2).logsumexp(dim=1)
    written = sum(-math.log(math.exp(p / 0.2) / sum(math.exp(s / 0.2) for s in (p, *row)))
                  for p, row in zip(pos.tolist(), neg.tolist(), strict=True)) / 6
    assert info_nce(pos, log_sum, 0.2).item() == pytest.approx(written, abs=1e-12)
    logits = torch.cat([pos[:, None], neg], dim=1) / 0.2
    assert written == pytest.approx(F.cross_entropy(logits, torch.zeros(6, dtype=torch.long)).item(), abs=1e-12)


@pytest.mark.parametrize("n", [40, 1_281_167])
def test_nce_is_the_equations_as_written(n):
    """Wu et al. 2018: P = exp(s/T) / Z, h = P / (P + m P_n), J = -log h(i, v) - sum_j log(1 - h(i, v_j))."""
    T, Z, m = 0.07, 2.2 * n, 7
    pos, noise = torch.rand(6, dtype=torch.float64), torch.rand(6, m, dtype=torch.float64) - 0.5

    def h(s):
        p = math.exp(s / T) / Z
        return p / (p + m / n)

    written = sum(-math.log(h(p)) - sum(math.log(1 - h(s)) for s in row)
                  for p, row in zip(pos.tolist(), noise.tolist(), strict=True)) / 6
    assert nce(pos, noise, T, n, torch.tensor(Z, dtype=torch.float64).log()).item() == pytest.approx(written, rel=1e-12)


def test_nce_stays_finite_where_the_equations_overflow():
    pos, noise = torch.tensor([1.0, -1.0], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss = nce(pos, noise, 0.002, 10, torch.tensor(0.0))
    assert torch.isfinite(loss) and torch.isfinite(with_grad(loss, pos)[1]).all()


def test_a_later_change_of_the_keys_leaves_the_gradient_alone():
    """The queue takes new keys in place; two losses may wait for their backward pass until then."""
    q, keys = unit(3, 4).requires_grad_(), unit(9, 4)
    expected = with_grad(log_sum_exp(q, keys, 0.3)[0].sum(), q)
    found = log_sum_exp(q, keys, 0.3)[0].sum()
    keys.zero_()
    torch.testing.assert_close(with_grad(found, q), expected)

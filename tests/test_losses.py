import math

import pytest
import torch
import torch.nn.functional as F

from common import losses
from common.losses import gathered_similarity, info_nce, log_sum_exp, nce


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def with_grad(loss, x):
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


@pytest.mark.parametrize("chunk", [1, 12, 15, 10_000])                  # one column at a time, 4, 5 and a short one
@pytest.mark.parametrize("temperature", [0.07, 0.002])                  # exp(1 / 0.002) overflows a double
def test_chunked_log_sum_exp_is_the_dense_one(chunk, temperature, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    q, keys, weight = unit(3, 5).requires_grad_(), unit(17, 5), torch.randn(3, dtype=torch.float64)
    found, hardest = log_sum_exp(q, keys, temperature)
    dense = (q @ keys.T / temperature).logsumexp(dim=1)
    torch.testing.assert_close(with_grad((found * weight).sum(), q), with_grad((dense * weight).sum(), q))
    torch.testing.assert_close(hardest, (q @ keys.T).amax(dim=1).detach())
    assert not hardest.requires_grad


@pytest.mark.parametrize("chunk", [1, 12, 10_000])
def test_hidden_candidates_do_not_count(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    q, keys = unit(3, 5).requires_grad_(), unit(17, 5)
    hidden = torch.rand(3, 17) < 0.5
    hidden[0, :6] = True                                                # the first chunks of this query hold nothing

    def hide(logits, first):
        return logits.masked_fill(hidden[:, first:first + logits.shape[1]], -math.inf)

    found, hardest = log_sum_exp(q, keys, 0.1, hide)
    sim = (q @ keys.T).masked_fill(hidden, -math.inf)
    torch.testing.assert_close(with_grad(found.sum(), q), with_grad((sim / 0.1).logsumexp(dim=1).sum(), q))
    torch.testing.assert_close(hardest, sim.amax(dim=1).detach())


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
    found, _ = log_sum_exp(q, unit(4, 5), 0.1, lambda x, first: torch.full_like(x, -math.inf))
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

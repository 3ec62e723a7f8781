"""The cross-batch memory: beside a plain list, beside that of pytorch-metric-learning, and what it is to a batch."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F

from metric_learning import Contrastive, Memory, SupCon, losses
from metric_learning.memory import candidates
from tests.metric_learning import loops

D = 5
SIZES = [3, 6, 1, 8, 2, 20, 7, 7, 4]            # of batches: less than the memory, as much, more


def features(count):
    return torch.randn(count, D, dtype=torch.float64)


def entries(memory):
    """(feature, image, label) of each entry, the oldest first."""
    order = (torch.arange(len(memory.keys)) + memory.head) % len(memory.keys)
    return list(zip(*(table[order].tolist() for table in (memory.keys, memory.image, memory.label)), strict=True))


def given(sizes=SIZES):
    """A batch of each size: features, which images, their labels."""
    return [(features(size), torch.randint(50, (size,)), torch.randint(-1, 4, (size,)) * 7) for size in sizes]


@pytest.mark.parametrize("size", [1, 6, 7, 100])
def test_it_holds_the_last_features_with_their_images_and_labels(size):
    memory, held = Memory(size, D).double(), []
    for batch in given():
        memory.remember(*batch)
        held = [*held, *zip(*(x.tolist() for x in batch), strict=True)][-size:]
        assert entries(memory)[-len(held):] == held and memory.filled == len(held)
        assert all(image == label == -1 for _, image, label in entries(memory)[:-len(held)])


def test_saved_and_restored_in_the_middle_it_goes_on_as_the_same():
    memory, batches = Memory(7, D).double(), given()
    for batch in batches[:5]:
        memory.remember(*batch)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    restored = Memory(7, D).double()
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert entries(restored) == entries(memory)
    for batch in batches[5:]:
        for each in (memory, restored):
            each.remember(*batch)
        assert entries(restored) == entries(memory)


def test_an_empty_memory_counts_for_nothing():
    x, index, label = features(8), torch.arange(8), torch.tensor([0, 0, 14, 14, 7, -1, 0, 7])
    found = candidates(x, index, label, Memory(6, D).double())
    assert found.batch == 8 and not any(mask_BM[:, 8:].any() for mask_BM in found.related)
    alone = candidates(x, index, label)
    for with_it, without in zip(found.related, alone.related, strict=True):
        assert torch.equal(with_it[:, :8], without)


def test_the_loss_of_a_method_is_the_same_with_an_empty_memory(small_encoder):
    batch, encoder = loops.batch([0, 1, 5, 20, 21, 2]), small_encoder(False)
    with_it, without = (SupCon(copy.deepcopy(encoder), dictionary=memory) for memory in (Memory(9, D).double(), None))
    torch.testing.assert_close(loops.gradient(with_it, batch), loops.gradient(without, batch))


def test_what_it_holds_of_an_image_is_neither_positive_nor_negative_of_that():
    memory = Memory(6, D).double()
    memory.remember(features(5), torch.tensor([3, 4, 8, 3, 9]), torch.tensor([0, 0, 7, 0, -1]))
    found = candidates(features(2), torch.tensor([3, 9]), torch.tensor([0, -1]), memory)
    positive_BM, negative_BM = (mask_BM[:, 2:].tolist() for mask_BM in found.related)
    assert positive_BM == [[False, True, False, False, False, False], [False] * 6]
    assert negative_BM == [[False, False, True, False, False, False], [False] * 6]


def test_gradient_goes_to_the_batch_alone():
    memory, x = Memory(6, D).double(), features(4).requires_grad_()
    memory.remember(features(6), torch.arange(6), torch.zeros(6, dtype=torch.int64))
    found = candidates(x, torch.arange(10, 14), torch.zeros(4, dtype=torch.int64), memory)
    found.x_MD.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and not memory.keys.requires_grad


def test_what_was_seen_later_is_compared_with_what_was_seen_before(small_encoder):
    """It is the features of earlier steps that are kept, as the encoder made them then."""
    method = Contrastive(small_encoder(False), pairs="all", dictionary=Memory(8, D).double())
    batch = loops.batch([0, 1, 4, 5])
    before = method.encoder(batch.views[0]).detach()
    loops.remember(method, [[0, 1, 4, 5]])                              # and the encoder moves on
    assert torch.equal(method.dictionary.keys[:4], before)
    assert not torch.allclose(method.encoder(batch.views[0]), before)


@pytest.fixture(params=["contrastive", "supervised contrastive"])
def pair(request):
    """A loss of ours of candidates, and the peer's with the memory that has room for the batch, too."""
    peer = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory, SupConLoss

    plain = peer.distances.LpDistance(normalize_embeddings=False)
    apart = ContrastiveLoss(0, 1.5, reducer=peer.reducers.DoNothingReducer(), distance=plain)
    theirs = {"contrastive": apart, "supervised contrastive": SupConLoss(0.1, reducer=peer.reducers.MeanReducer())}
    return request.param, CrossBatchMemory(theirs[request.param], D, memory_size=6 + 12)


def ours(name, x, found):
    if name == "supervised contrastive":
        return losses.supervised_contrastive(losses.products(x, found.x_MD), *found.related, 0.1)
    positive_BM, negative_BM = found.related
    loss_BM = losses.pair_losses(losses.distances(x, found.x_MD), positive_BM, 1.5)
    return losses.mean(loss_BM, positive_BM | negative_BM)


def test_it_is_the_peers(pair):
    name, theirs = pair
    memory = Memory(12, D).double()
    for step in range(5):                                               # empty, half full, full, and round
        x, label = F.normalize(features(6), dim=1), torch.tensor([0, 0, 3, 3, 9, 9])[torch.randperm(6)]
        index = torch.arange(6 * step, 6 * step + 6)                    # theirs does not know which image it is
        value = theirs(x, label)
        if name == "contrastive":
            value = torch.cat([part["losses"] for part in value.values()]).square().mean() / 2
        torch.testing.assert_close(ours(name, x, candidates(x, index, label, memory)), value)
        memory.remember(x, index, label)

"""What tests share: a small encoder, two views of some images that never change, and the long form of fault tests."""

import pytest
import torch
from torch import nn

from common.encoder import Encoder
from common.method import Batch
from tests.metric_cases import LABELS
from tests.soak import Soak

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="fault tests with the counts of docs/reliability.md")


@pytest.fixture
def soak(request):
    """``soak.count(3, 50)`` is 3, or 50 under --soak; ``soak.report("R1", kills=50)`` writes the figure down."""
    return Soak(request.config.getoption("soak"), request.node.nodeid)


@pytest.fixture(autouse=True)
def _seeded():
    """Weights, queues and banks start from torch's generator; a test does not depend on those that ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def small_encoder():
    """``small_encoder(batchnorm=True)``: one convolution and a linear head to ``dim`` features, in float64."""
    def build(batchnorm: bool = True, dim: int = 5) -> Encoder:
        norm = [nn.BatchNorm2d(6)] if batchnorm else []
        trunk = nn.Sequential(nn.Conv2d(2, 6, 3), *norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Encoder(trunk, nn.Linear(6, dim)).double()
    return build


@pytest.fixture
def batches():
    """``batches(steps, size)``: batches of ``size`` of 24 images; a batch holds an image once where it can."""
    def make(steps: int, size: int = 8, num_samples: int = 24) -> list[Batch]:
        draw = torch.Generator().manual_seed(1)
        image_n = torch.randn(num_samples, 2, 5, 5, generator=draw, dtype=torch.float64)
        order = torch.cat([torch.randperm(num_samples, generator=draw) for _ in range(steps * size // num_samples + 1)])
        made = []
        for index_B in order[:steps * size].split(size):
            views = [image_n[index_B] + 0.5 * torch.randn(size, 2, 5, 5, generator=draw, dtype=torch.float64)
                     for _ in range(2)]
            label_B = torch.tensor(LABELS * (size // len(LABELS) + 1))[:size]
            made.append(Batch(views, index_B, label_B))
        return made
    return make

import copy

import pytest
import timm
import torch
from torch import nn

from common.backbones import backbone
from common.batchnorm import GroupBatchNorm, average_running_statistics, group_batchnorm, has_batchnorm

BOUNDS = {(12, 1): [12], (12, 4): [3, 3, 3, 3], (11, 4): [2, 3, 3, 3], (9, 4): [2, 2, 2, 3]}


def moved(norm):
    """A BatchNorm that is not at its start: weights, bias and running statistics all differ from 0 and 1."""
    for x in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(x)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm.double()


@pytest.mark.parametrize(("size", "groups"), BOUNDS)
@pytest.mark.parametrize("shape", [(), (3, 2)], ids=["features", "images"])
def test_each_group_is_normalised_as_by_a_plain_batchnorm(size, groups, shape):
    plain = moved(nn.BatchNorm2d(5, momentum=0.3) if shape else nn.BatchNorm1d(5, momentum=0.3))
    grouped = GroupBatchNorm(copy.deepcopy(plain), groups)
    x = torch.randn(size, 5, *shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(size, 5, *shape, dtype=torch.float64)
    parts = [copy.deepcopy(plain) for _ in range(groups)]
    loop = torch.cat([part(x_b) for part, x_b in zip(parts, x.split(BOUNDS[size, groups]), strict=True)])
    found = grouped(x)
    torch.testing.assert_close(found, loop)
    (expected,) = torch.autograd.grad((loop * weight).sum(), x)
    (found * weight).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(grouped.bias.grad, weight.sum(dim=(0, *range(2, weight.dim()))))
    for name in ("running_mean", "running_var"):                    # the mean over the groups, as over so many GPUs
        mean = torch.stack([getattr(part, name) for part in parts]).mean(dim=0)
        torch.testing.assert_close(getattr(grouped, name), mean)
    assert grouped.num_batches_tracked == 1


def test_evaluation_is_by_running_statistics_whatever_the_groups():
    plain = moved(nn.BatchNorm2d(5)).eval()
    x = torch.randn(1, 5, 3, 3, dtype=torch.float64)
    assert torch.equal(GroupBatchNorm(copy.deepcopy(plain), 4)(x), plain(x))


def test_memory_format_is_kept():
    x = torch.randn(8, 5, 4, 4).contiguous(memory_format=torch.channels_last)
    y = GroupBatchNorm(nn.BatchNorm2d(5), 4)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, GroupBatchNorm(nn.BatchNorm2d(5), 4)(x.contiguous()))


@pytest.mark.parametrize("arch, size", [("torchvision/resnet18", 48), ("resnet26", 48), ("w16s1", 16)])
def test_a_whole_network_stays_channels_last_forward_and_back(arch, size):
    """In groups too: one layer that changed the layout would have every one after it copy its input.

    But for the gradient that the last pooling gives, which is one number for each channel.
    """
    network = group_batchnorm(backbone(arch, image_size=224), 2).to(memory_format=torch.channels_last)
    seen = []

    def look(name):
        def forward(module, inputs, output):
            if output.dim() == 4 and min(output.shape[1:]) > 1:
                layouts = [output.is_contiguous(memory_format=torch.channels_last)]
                output.register_hook(lambda grad: layouts.append(grad.is_contiguous(memory_format=torch.channels_last)))
                seen.append((name, layouts))
        return forward

    for name, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(look(name))
    network(torch.randn(4, 3, size, size)).square().sum().backward()
    assert len(seen) > 5 and [(name, layouts) for name, layouts in seen[:-1] if layouts != [True, True]] == []


def test_a_fused_activation_and_every_name_survive():
    """timm's BatchNormAct2d is a BatchNorm with an activation in it (EfficientNet, also MobileNet, RegNet, ...)."""
    plain = timm.create_model("efficientnet_b0", num_classes=0, pretrained=False)
    grouped = group_batchnorm(copy.deepcopy(plain), 2)
    assert not any(type(child).__name__.startswith("BatchNorm") for child in grouped.modules())
    assert list(grouped.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(group_batchnorm(copy.deepcopy(plain), 1).train()(x), copy.deepcopy(plain).train()(x))
    plain.load_state_dict(grouped.state_dict())
    with torch.no_grad():
        assert torch.equal(grouped.eval()(x), plain.eval()(x))
        assert torch.equal(group_batchnorm(grouped, 1)(x), plain(x))                # grouped once more


def test_parameters_are_the_same_ones():
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    parameters = list(plain.parameters())
    grouped = group_batchnorm(plain, 2)
    assert all(x is y for x, y in zip(grouped.parameters(), parameters, strict=True))
    assert has_batchnorm(grouped) and not has_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))


def test_one_process_averages_nothing():
    grouped = group_batchnorm(nn.Sequential(nn.BatchNorm1d(4)), 2)
    grouped(torch.randn(6, 4))
    before = copy.deepcopy(grouped.state_dict())
    average_running_statistics(grouped)
    assert all(torch.equal(x, before[name]) for name, x in grouped.state_dict().items())


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(ValueError, match="bn_groups: 0"):
        group_batchnorm(nn.BatchNorm1d(4), 0)
    with pytest.raises(ValueError, match="bn_groups: 7 images .* 4 groups"):
        group_batchnorm(nn.BatchNorm1d(4), 4)(torch.randn(7, 4))

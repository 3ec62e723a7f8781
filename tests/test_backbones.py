import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import list_models

from common.architectures import check_arch
from common.backbones import backbone, encoder, feature_width, projection, trainable_parameters


def features(arch, image_size, channels=3, **settings):
    """Shape of the features and the width that the backbone names, on the meta device, where nothing is computed."""
    with torch.device("meta"):
        trunk = backbone(arch, image_size=image_size, channels=channels, **settings)
        return tuple(trunk(torch.empty(2, channels, image_size, image_size)).shape), feature_width(trunk)


@pytest.mark.parametrize(("arch", "image_size", "channels", "width"), [
    ("torchvision/resnet50", 224, 3, 2048), ("torchvision/resnet18", 32, 13, 512), ("torchvision/vit_b_16", 32, 3, 768),
    ("torchvision/convnext_tiny", 64, 3, 768), ("torchvision/mobilenet_v3_small", 64, 3, 576),
    ("torchvision/efficientnet_b0", 96, 3, 1280), ("torchvision/maxvit_t", 224, 3, 512),
    ("torchvision/vgg11", 64, 3, 25088), ("resnet18", 8, 1, 512), ("timm/resnet50", 224, 1, 2048),
    ("resnet50d", 32, 3, 2048), ("resnext50_32x4d", 64, 13, 2048),
    ("vit_tiny_patch16_224", 224, 3, 192), ("vit_tiny_patch16_224", 64, 1, 192), ("vit_base_patch16_384", 224, 3, 768),
    ("deit_tiny_patch16_224", 96, 13, 192), ("swin_tiny_patch4_window7_224", 64, 3, 768),
    ("mobilenetv3_small_100", 32, 1, 1024), ("efficientnet_b0", 224, 13, 1280), ("convnext_atto", 64, 1, 320),
    ("regnetx_002", 28, 1, 368), ("w16s1", 8, 1, 64), ("w48p4", 32, 3, 192), ("w16s2", 28, 13, 64)])
def test_a_backbone_gives_features_of_the_width_it_names(arch, image_size, channels, width):
    assert features(arch, image_size, channels) == ((2, width), width)


@pytest.mark.parametrize("arch", ["torchvision/resnet18", "resnet18"])
@pytest.mark.parametrize(("image_size", "stem", "side"), [
    (32, "auto", 32), (64, "auto", 64), (65, "auto", 17), (224, "auto", 56), (32, "imagenet", 8), (224, "small", 224),
    (32, "small_padded", 34)])
def test_small_images_get_a_stem_that_keeps_their_size(arch, image_size, stem, side):
    with torch.device("meta"):
        trunk = backbone(arch, image_size=image_size, stem=stem, channels=1)
        seen = []
        trunk.layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
        trunk(torch.empty(2, 1, image_size, image_size))
    assert seen == [side]


@pytest.mark.parametrize(("arch", "count"), [("resnet18", 11.18e6), ("torchvision/resnet50", 23.51e6)])
def test_resnets_have_the_known_number_of_parameters(arch, count):
    with torch.device("meta"):
        assert trainable_parameters(backbone(arch)) == pytest.approx(count, rel=1e-3)


@pytest.mark.parametrize(("arch", "millions"), [("w48p4", 0.72), ("w16s1", 0.09)])
def test_small_encoders_are_as_small_as_they_say(arch, millions):
    with torch.device("meta"):
        count = trainable_parameters(encoder(arch, head="mlp", hidden=128, dim=64))
    assert count / 1e6 == pytest.approx(millions, abs=0.006)


def test_other_sizes_of_a_vit_are_timms_own():
    sizes = {"num_heads": 12, "depth": 2, "patch_size": 8, "embed_dim": 96}
    ours = backbone("vit_small_patch16_224", image_size=32, arch_args=sizes)
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32, **sizes)
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours.eval()(image), theirs.eval()(image)) and ours.blocks[0].attn.num_heads == 12


def test_timms_resnet_is_torchvisions():
    """Same architecture and the same first values: MoCo's code does not zero the last BatchNorm of a block."""
    ours, theirs = backbone("resnet18"), backbone("torchvision/resnet18")
    assert [tuple(x.shape) for x in ours.parameters()] == [tuple(x.shape) for x in theirs.parameters()]
    assert all((block.bn2.weight == 1).all() for trunk in (ours, theirs) for block in trunk.layer1)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_heads_are_those_of_moco_v1_and_v2():
    linear, mlp = projection("linear", 16, 8), projection("mlp", 16, 8)
    assert isinstance(linear, nn.Linear) and (linear.in_features, linear.out_features) == (16, 8)
    first, relu, last = mlp
    assert isinstance(relu, nn.ReLU)
    assert [(x.in_features, x.out_features) for x in (first, last)] == [(16, 16), (16, 8)]
    assert projection("mlp", 16, 8, hidden=32)[0].out_features == 32
    for layer in (linear, first, last):                              # torch's own: U(-1, 1) / sqrt(fan in), bias too
        assert layer.weight.abs().max() <= 0.25 and layer.weight.std().item() == pytest.approx(0.144, rel=0.15)
        assert layer.bias.abs().max() <= 0.25


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_an_encoder_ends_in_unit_vectors_of_the_given_dimension(head):
    made = encoder("w8p2", head=head, dim=7, channels=1, image_size=8)
    z = made(torch.randn(4, 1, 8, 8))
    assert z.shape == (4, 7) and z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(torch.randn(4, 1, 8, 8)).dtype == torch.float32
    assert made.double()(torch.randn(4, 1, 8, 8, dtype=torch.float64)).dtype == torch.float64
    plain = encoder("w8p2", head=head, dim=7, channels=1, image_size=8, unit=False)
    image_BcHW = torch.randn(4, 1, 8, 8)
    assert torch.equal(plain(image_BcHW), plain.project(image_BcHW)) and "unit=False" in repr(plain)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: backbone("resnet5O"), "no model 'resnet5O'.*resnet50"),
    (lambda: backbone("torchvision/resnet19"), "torchvision/resnet18"),
    (lambda: backbone("w16x1"), "wWsS such as w16s1"),
    (lambda: backbone("torchvision/squeezenet1_0"), "no classifier"),
    (lambda: backbone("torchvision/googlenet"), "no classifier"),
    (lambda: backbone("torchvision/mobilenet_v2", channels=1), "takes 3 channels and the images have 1"),
    (lambda: backbone("torchvision/shufflenet_v2_x0_5", channels=1), "takes 3 channels and the images have 1"),
    (lambda: backbone("vit_tiny_patch16_224", stem="small"), "stem: 'small'"),
    (lambda: backbone("resnet50d", stem="small"), "stem: 'small'"),
    (lambda: backbone("vit_tiny_patch16_224", arch_args={"num_heads": 5}), "arch_args.*num_heads.*divi"),
    (lambda: encoder("resnet18", arch_args={"num_heads": 5}), "for timm's ViTs alone"),
    (lambda: encoder("vit_tiny_patch16_224", arch_args={"checkpoint_path": 5}), "'checkpoint_path' is not known"),
    (lambda: encoder("vit_tiny_patch16_224", arch_args={"depth": 10**6}), "depth 1000000 given.*1 to 256")])
@pytest.mark.filterwarnings("ignore:The default weight initialization")             # torchvision's, of googlenet
def test_what_cannot_be_built_is_refused_with_the_way_out(make, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        make()


def test_every_model_of_the_libraries_is_known_before_they_are_imported():
    for name in (*timm.list_models(), *(f"torchvision/{name}" for name in list_models(module=torchvision.models))):
        check_arch(name)
    for name in ("w0s1", "w4s0", "w4", "resnet5", "torchvision/resnet5", "torchvision/", "", "x/resnet"):
        with pytest.raises(ValueError, match="^arch: .* has no model"):
            check_arch(name)

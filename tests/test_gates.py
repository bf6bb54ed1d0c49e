"""Gates: what blocks in a network multiply its feature maps with, against hooks on the blocks themselves."""

import pytest
import timm
import torch
from torch import nn

from vision_attn.attribution import explain
from vision_attn.errors import AttentionNotFoundError, UsageError


def small(name="resnet18", block=None, **options):
    torch.manual_seed(0)
    options |= {"block_args": {"attn_layer": block}} if block else {}
    if "resnet" in name:
        options |= {"channels": (16, 16, 24, 32), "stem_width": 8}
    return timm.create_model(name, num_classes=5, **options).eval()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def through(model, name, images):
    """What goes into and out of a module; copies, as the model works in place."""
    seen = []
    block = model.get_submodule(name)
    handle = block.register_forward_hook(lambda module, args, output: seen.extend((args[0].clone(), output.clone())))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("make", "first", "last"),
    [
        (lambda: small("seresnet18"), "layer1.0.se", "layer4.1.se"),
        (lambda: small(block="eca"), "layer1.0.se", "layer4.1.se"),
        (lambda: small("mobilenetv3_small_050"), "blocks.0.0.se", "blocks.4.2.se"),
        (lambda: small("efficientnet_b0"), "blocks.0.0.se", "blocks.6.0.se"),
    ],
    ids=["squeeze-and-excitation", "ECA", "MobileNet", "EfficientNet"],
)
def test_a_channel_gate_is_shown_by_the_map_that_it_weights(make, first, last):
    model, images = make(), noise(2, 3, 64, 96)
    for layer, name in ((-1, last), (0, first), (first, first)):
        result = explain(model, images, method="gates", layer=layer)
        _, gated = through(model, name, images)
        assert result.options == {"layer": name}
        torch.testing.assert_close(result.maps, gated.mean(1))


@pytest.mark.parametrize(("name", "block"), [("skresnet18", "layer4.1.conv1"), ("resnest14d", "layer4.0.conv2")])
def test_a_gate_among_paths_is_shown_by_their_sum(name, block):
    model, images = small(name), noise(2, 3, 64, 96)
    result = explain(model, images, method="gates")
    assert result.options == {"layer": block}
    torch.testing.assert_close(result.maps, through(model, block, images)[1].mean(1))


def test_a_spatial_gate_is_shown_as_it_is():
    model, images = small(block="cbam"), noise(2, 3, 64, 96)
    result = explain(model, images, method="gates")
    features, gated = through(model, "layer4.1.se.spatial", images)
    assert result.options == {"layer": "layer4.1.se.spatial"}
    assert result.maps.shape == (2, 2, 3)
    torch.testing.assert_close(result.maps[:, None] * features, gated)
    assert result.maps.min() > 0 and result.maps.max() < 1
    channel = explain(model, images, method="gates", layer="layer4.1.se.channel")
    torch.testing.assert_close(channel.maps, features.mean(1))  # what the channel gate let through
    assert torch.equal(explain(model, images, method="gates", layer="layer4").maps, result.maps)


class Gate(nn.Module):
    """Lets through what is bright: by place, or by place and colour."""

    def __init__(self, full):
        super().__init__()
        self.full = full

    def forward(self, images):
        features = images + 1
        gate = torch.sigmoid(4 * (images if self.full else images.mean(1, keepdim=True)) - 2)
        return gate * features


class Gated(nn.Module):
    def __init__(self, full=False):
        super().__init__()
        self.gate = Gate(full)

    def forward(self, images):
        return self.gate(images).mean((2, 3))


@pytest.mark.parametrize("size", [(24, 64), (64, 24), (40, 40)])
@pytest.mark.parametrize("full", [False, True])
def test_planted_square_opens_the_gate(size, full):
    images = torch.zeros(2, 3, *size)
    images[1, :, 8:16, 16:24] = 1.0
    maps = explain(Gated(full), images, method="gates").maps
    expected = torch.sigmoid(4 * images - 2).mean(1)
    torch.testing.assert_close(maps, expected)
    assert (maps[1] > 0.8).nonzero().aminmax(dim=0).min.tolist() == [8, 16]
    assert (maps[1] > 0.8).sum() == 64


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (small, 64, "expected blocks that gate a feature map in ResNet, got none: use grad_cam or integrated"),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1), num_heads=(1, 1)),
            224,
            "expected blocks that gate a feature map in SwinTransformer, got none: use grad_cam",
        ),
        (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), Gate(True), nn.Flatten()), 8, "of more than one place in Sequ"),
    ],
)
def test_networks_without_gates_are_told_what_works(make, size, message):
    with pytest.raises(AttentionNotFoundError, match=message):
        explain(make(), noise(1, 3, size, size), method="gates")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (8, r"expected a layer from 0 to 7 \(or -1 for the last\), got 8"),
        ("layer4.1.sse", "expected a known gate, got 'layer4.1.sse': did you mean 'layer4.1.se'"),
    ],
)
def test_gates_that_are_not_there_are_refused(layer, message):
    with pytest.raises(UsageError, match=message):
        explain(small("seresnet18"), noise(1, 3, 64, 64), method="gates", layer=layer)


def test_logits_are_those_of_the_model_and_the_batch_that_of_its_images():
    model, images = small("seresnet18"), noise(3, 3, 64, 64)
    result = explain(model, images, method="gates")
    with torch.no_grad():
        torch.testing.assert_close(result.probabilities, model(images).softmax(-1).amax(-1))
    for index, image in enumerate(images):
        torch.testing.assert_close(explain(model, image[None], method="gates").maps[0], result.maps[index])

"""Integrated gradients and occlusion: the sums that they must give, loops by hand, and what stands for no image."""

import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vision_attn.attribution import explain
from vision_attn.errors import UsageError


def tiny_cnn():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5, channels=(8, 8, 12, 16), stem_width=8).eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
    return model


def tiny_vit():
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**options).eval().double()


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def logits(model, images, target):
    with torch.no_grad():
        return model(images)[:, target]


@pytest.mark.parametrize("make", [tiny_cnn, tiny_vit])
@pytest.mark.parametrize("baseline", ["mean", "black"])
def test_integrated_gradients_sum_to_the_difference_of_the_logits(make, baseline):
    model, images = make(), noise(2, 3, 32, 32)
    model.preprocessing = SimpleNamespace(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    start = torch.tensor({"mean": [0.0, 0.0, 0.0], "black": [-2.5, -1.6, -0.6]}[baseline], dtype=torch.float64)
    start = start[None, :, None, None].expand_as(images)
    maps = explain(model, images, method="integrated_gradients", target=1, steps=100, baseline=baseline).maps
    assert maps.shape == (2, 32, 32)
    difference = logits(model, images, 1) - logits(model, start, 1)
    torch.testing.assert_close(maps.sum((1, 2)), difference, rtol=0.01, atol=0.01 * difference.abs().max().item())


def test_integrated_gradients_of_a_linear_network_are_its_weights_times_the_pixels():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 8, 4)).double()
    images = noise(3, 3, 6, 8)
    maps = explain(model, images, method="integrated_gradients", target=[0, 3, 1], steps=2).maps
    weights = model[1].weight[[0, 3, 1]].detach().view(3, 3, 6, 8)
    torch.testing.assert_close(maps, (weights * images).sum(1))


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_maps_do_not_depend_on_the_size_of_a_pass_which_is_never_larger(method):
    model, images = tiny_vit(), noise(5, 3, 32, 32)
    options = {"steps": 7} if method == "integrated_gradients" else {"window": 12, "stride": 10}
    expected = explain(model, images, method=method, **options).maps
    sizes = []
    model.blocks.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for batch_size in (1, 3, 64):
        maps = explain(model, images, method=method, batch_size=batch_size, **options).maps
        assert sizes.pop(0) == 5  # the prediction, of the images as they were given
        assert max(sizes) <= batch_size
        sizes.clear()
        torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize(("window", "stride"), [(8, None), (12, 5), (10, 10)])
@pytest.mark.parametrize("baseline", ["mean", "blur"])
def test_occlusion_equals_a_loop_by_hand(window, stride, baseline):
    model, images = tiny_cnn(), noise(2, 3, 32, 40)
    step = window // 2 if stride is None else stride
    start = torch.zeros_like(images) if baseline == "mean" else blurred(images)
    whole = logits(model, images, 2)
    falls, counts = torch.zeros(2, 32, 40, dtype=torch.float64), torch.zeros(32, 40, dtype=torch.float64)
    for top in positions(32, window, step):
        for left in positions(40, window, step):
            rows, columns = slice(top, top + window), slice(left, left + window)
            hidden = images.clone()
            hidden[:, :, rows, columns] = start[:, :, rows, columns]
            falls[:, rows, columns] += (whole - logits(model, hidden, 2))[:, None, None]
            counts[rows, columns] += 1
    options = {"window": window, "stride": stride, "baseline": baseline}
    maps = explain(model, images, method="occlusion", target=2, **options).maps
    torch.testing.assert_close(maps, falls / counts)
    assert maps.std() > 0


def positions(length, window, stride):
    """Where windows start: at every stride, until one reaches the end, which the last may go beyond."""
    starts = [0]
    while starts[-1] + window < length:
        starts.append(starts[-1] + stride)
    return starts


def blurred(images):
    """A Gaussian of a tenth of the longer side, as full matrices over reflected pixels."""
    for axis in (-2, -1):
        length = images.shape[axis]
        sigma = 4.0
        radius = min(12, length - 1)
        matrix = torch.zeros(length, length, dtype=images.dtype)
        for row in range(length):
            for shift in range(-radius, radius + 1):
                place = abs(row + shift)
                place = place if place < length else 2 * (length - 1) - place
                matrix[row, place] += torch.exp(torch.tensor(-(shift**2) / (2 * sigma**2), dtype=images.dtype))
        matrix /= matrix.sum(-1, keepdim=True)
        images = matrix @ images if axis == -2 else images @ matrix.T
    return images


def test_black_is_what_the_model_says_of_its_pixels():
    model, images = tiny_cnn(), noise(1, 3, 32, 32)
    # timm's models say it in their configuration.
    mean, std = (torch.tensor(model.pretrained_cfg[name], dtype=torch.float64) for name in ("mean", "std"))
    black = (-mean / std)[None, :, None, None].expand_as(images).clone()
    for method, options in (("integrated_gradients", {"steps": 3}), ("occlusion", {"window": 16})):
        assert explain(model, black, method=method, baseline="black", **options).maps.abs().max() < 1e-12
        assert explain(model, images, method=method, baseline="black", **options).maps.abs().max() > 1e-6
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).double()
    with pytest.raises(UsageError, match="for baseline 'black', got Sequential: use 'mean' or 'blur'"):
        explain(plain, images, method="occlusion", baseline="black")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("integrated_gradients", {"steps": 0}, "expected steps as a whole number above 0, got 0"),
        ("integrated_gradients", {"batch_size": 1.5}, "expected batch_size as a whole number above 0, got 1.5"),
        ("integrated_gradients", {"baseline": "blak"}, "expected a known baseline, got 'blak': did you mean 'black'"),
        ("occlusion", {"window": 33}, "up to the image's shorter side 32 .* got window 33 and stride 16"),
        ("occlusion", {"window": 4, "stride": 5}, "got window 4 and stride 5: pixels in between would not be hidden"),
        ("occlusion", {"stride": 0}, "expected stride as a whole number above 0, got 0"),
        ("occlusion", {"window": True}, "expected window as a whole number above 0, got True"),
    ],
)
def test_options_out_of_range_are_refused(method, options, message):
    with pytest.raises(UsageError, match=message):
        explain(tiny_vit(), noise(1, 3, 32, 32), method=method, **options)


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_missing_captum_names_its_command(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UsageError, match=r"got no such package: pip install vision-attn\[explain\]"):
        explain(tiny_vit(), noise(1, 3, 32, 32), method=method)

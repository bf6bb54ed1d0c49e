"""Blocks that weigh channels, against timm and torchvision with the same weights, or their equations in NumPy."""

import math

import numpy as np
import pytest
import timm.layers
import torch
import torchvision
from torch import nn

from vision_attn.errors import UsageError
from vision_attn.layers.factory import create_layer

SIZES = [(1, 1), (5, 3), (8, 9)]


def noise(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def randomized(module):
    """The module in evaluation mode with all its numbers drawn anew."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(generator=generator)
                part.running_var.uniform_(0.5, 2, generator=generator)
    return module.eval()


def with_weights_of(block, reference):
    """The block with the reference's parameters, in their order."""
    ours, theirs = list(block.parameters()), list(reference.parameters())
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        own.data.copy_(other.data.view_as(own))
    return block.eval()


def same(block, reference, channels, tolerance=1e-6):
    for size in SIZES:
        x = noise(2, channels, *size)
        torch.testing.assert_close(block(x), reference(x), atol=tolerance, rtol=tolerance)


def parameters(name, channels, **options):
    return sum(parameter.numel() for parameter in create_layer(name, channels, **options).parameters())


def numbers(module):
    """Parameters and buffers as NumPy arrays."""
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.detach().double().numpy() for name, tensor in state.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def equals(block, x, expected, tolerance=1e-5):
    torch.testing.assert_close(block(x).detach().double(), torch.from_numpy(expected), atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize(("channels", "reduction"), [(64, 16), (24, 4), (8, 16)])
def test_se_equals_timms_and_torchvisions_with_the_same_weights(channels, reduction):
    hidden = max(channels // reduction, 1)
    for reference in (
        timm.layers.SEModule(channels, rd_channels=hidden),
        torchvision.ops.SqueezeExcitation(channels, hidden),
    ):
        reference = randomized(reference)
        same(with_weights_of(create_layer("se", channels, reduction=reduction), reference), reference, channels)


def test_se_has_the_papers_parameters():
    for channels, reduction in ((256, 16), (64, 4), (8, 16)):
        m = max(channels // reduction, 1)
        assert parameters("se", channels, reduction=reduction) == 2 * channels * m + channels + m
    with pytest.raises(UsageError, match="expected reduction as a whole number of at least 1, got 0"):
        create_layer("se", 64, reduction=0)


def test_ese_equals_timms_with_the_same_weights():
    reference = randomized(timm.layers.EffectiveSEModule(24))
    same(with_weights_of(create_layer("ese", 24), reference), reference, 24)
    assert parameters("ese", 24) == 24**2 + 24


def test_the_gate_of_ese_is_a_straight_line_that_is_cut():
    block = create_layer("ese", 3)
    nn.init.zeros_(block.fc.weight)
    block.fc.bias.data = torch.tensor([-4.0, 1.5, 9.0])
    x = torch.ones(1, 3, 2, 2)
    assert block(x).mean((2, 3)).tolist() == [[0.0, 0.75, 1.0]]


@pytest.mark.parametrize("channels", [8, 64, 256])
def test_eca_equals_timms_with_the_same_weights(channels):
    reference = randomized(timm.layers.EcaModule(channels))
    same(with_weights_of(create_layer("eca", channels), reference), reference, channels)


def test_the_width_of_eca_follows_the_channels():
    widths = {4: 1, 6: 1, 8: 3, 64: 3, 128: 5, 256: 5, 1024: 5, 2048: 7}
    assert {channels: parameters("eca", channels) for channels in widths} == widths
    assert create_layer("eca", 256, gamma=1, b=0).conv.kernel_size == (9,)
    assert create_layer("eca", 256, k_size=3).conv.kernel_size == (3,)
    with pytest.raises(UsageError, match="expected k_size as an odd number, got 4: use 3 or 5"):
        create_layer("eca", 256, k_size=4)
    with pytest.raises(UsageError, match="expected gamma other than 0, got 0"):
        create_layer("eca", 256, gamma=0)


@pytest.mark.parametrize("extent", [0, 2, 4, 8])
def test_gather_excite_without_parameters_equals_timms(extent):
    reference = timm.layers.GatherExcite(6, extent=extent, use_mlp=False)
    same(create_layer("ge", 6, extent=extent), reference, 6)
    assert parameters("ge", 6, extent=extent) == 0


def convolved(x, weight, stride, padding):
    """A depthwise convolution, (C, H, W) with (C, 1, h, w)."""
    height, width = weight.shape[2:]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    rows, columns = (x.shape[1] - height) // stride + 1, (x.shape[2] - width) // stride + 1
    out = np.empty((len(x), rows, columns))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + height, j * stride : j * stride + width]
            out[:, i, j] = (window * weight[:, 0]).sum((1, 2))
    return out


def normalised(x, state, name):
    """Batch normalisation in evaluation, (C, H, W)."""
    part = {key: state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")}
    return (x - part["running_mean"]) / np.sqrt(part["running_var"] + 1e-5) * part["weight"] + part["bias"]


@pytest.mark.parametrize("use_mlp", [False, True])
@pytest.mark.parametrize("extent", [0, 2, 4])
def test_gather_excite_with_parameters_equals_its_equation(extent, use_mlp):
    size = (5, 7)
    options = {"feature_size": size} if extent == 0 else {}
    block = randomized(create_layer("ge", 6, extent=extent, extra_params=True, use_mlp=use_mlp, reduction=3, **options))
    x, state, expected = noise(2, 6, *size), numbers(block), []
    for image in x.double().numpy():
        gathered = image
        steps = [0] if extent == 0 else range(0, 3 * int(math.log2(extent)), 3)
        for step in steps:
            stride, padding = (1, 0) if extent == 0 else (2, 1)
            gathered = convolved(gathered, state[f"gather.{step}.weight"], stride, padding)
            gathered = normalised(gathered, state, f"gather.{step + 1}")
            if step != steps[-1]:
                gathered = np.maximum(gathered, 0)
        if use_mlp:
            w1, w2 = (state[f"mlp.{layer}.weight"][:, :, 0, 0] for layer in (0, 2))
            b1, b2 = (state[f"mlp.{layer}.bias"][:, None, None] for layer in (0, 2))
            hidden = np.maximum(np.einsum("mc,chw->mhw", w1, gathered) + b1, 0)
            gathered = np.einsum("cm,mhw->chw", w2, hidden) + b2
        rows = np.arange(size[0]) * gathered.shape[1] // size[0]
        columns = np.arange(size[1]) * gathered.shape[2] // size[1]
        expected.append(image * sigmoid(gathered[:, rows][:, :, columns]))
    equals(block, x, np.stack(expected))


def test_gather_excite_has_the_papers_parameters():
    for extent in (2, 4, 8):
        assert parameters("ge", 32, extent=extent, extra_params=True) == 11 * 32 * math.log2(extent)
    assert parameters("ge", 32, extra_params=True, feature_size=(7, 9)) == 32 * 7 * 9 + 2 * 32
    assert parameters("ge", 32, use_mlp=True) == 2 * 32 * 2 + 32 + 2  # squeeze-and-excitation
    learned = parameters("ge", 32, extent=2, extra_params=True, use_mlp=True, reduction=64)
    assert learned == 11 * 32 + 2 * 32 + 32 + 1


def test_gather_excite_names_what_does_not_fit():
    for extent in (-2, 1, 3, 6, 2.0):
        with pytest.raises(UsageError, match=r"expected extent as a power of two, got .*: use 2, 4, 8, or 0"):
            create_layer("ge", 32, extent=extent)
    with pytest.raises(UsageError, match=r"feature_size=None: give the maps' size or an extent"):
        create_layer("ge", 32, extra_params=True)
    with pytest.raises(UsageError, match=r"feature_size=\(7, 9\): leave it out"):
        create_layer("ge", 32, extent=2, extra_params=True, feature_size=(7, 9))
    block = create_layer("ge", 32, extra_params=True, feature_size=(7, 9))
    with pytest.raises(UsageError, match=r"expected maps of \(7, 9\), got \(9, 7\): make the block with this size"):
        block(torch.zeros(1, 32, 9, 7))
    block(torch.zeros(1, 32, 7, 9))  # one image in training


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1, 1e-3])
def test_gct_equals_its_equation(size, scale):
    # Where a map is near zero, the small number in each of the two roots counts.
    block, x = randomized(create_layer("gct", 6)), scale * noise(2, 6, *size)
    alpha, gamma, beta = (numbers(block)[name].ravel() for name in ("alpha", "gamma", "beta"))
    maps = x.double().numpy()
    expected = np.empty_like(maps)
    for b, image in enumerate(maps):
        s = np.array([alpha[c] * math.sqrt((image[c] ** 2).sum() + 1e-5) for c in range(6)])
        norm = math.sqrt((s**2).sum() / 6 + 1e-5)
        for c in range(6):
            expected[b, c] = image[c] * (1 + math.tanh(gamma[c] * s[c] / norm + beta[c]))
    equals(block, x, expected, 1e-5 * scale)
    assert parameters("gct", 6) == 3 * 6


def test_gct_does_not_overflow_in_half_precision():
    block = create_layer("gct", 4).half()
    nn.init.ones_(block.gamma)
    x = torch.full((1, 4, 16, 16), 200.0, dtype=torch.float16)  # the squares of a map sum up to 10 million
    torch.testing.assert_close(block(x), x * (1 + math.tanh(1)), atol=0.5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_srm_equals_its_equation(size):
    block, x = randomized(create_layer("srm", 6)), noise(2, 6, *size)
    state, maps = numbers(block), x.double().numpy()
    mean = maps.mean((2, 3))
    std = np.sqrt(((maps - mean[:, :, None, None]) ** 2).mean((2, 3)))
    style = state["cfc"][:, 0] * mean + state["cfc"][:, 1] * std
    gate = np.stack([sigmoid(normalised(image[:, None, None], state, "bn")) for image in style])
    equals(block, x, maps * gate)
    assert parameters("srm", 6) == 4 * 6


def test_srm_trains_on_one_image_and_on_flat_maps():
    block = create_layer("srm", 6).train()
    nn.init.ones_(block.cfc)
    x = torch.ones(1, 6, 3, 3, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.isfinite().all() and block.cfc.grad.isfinite().all()
    assert block.bn.num_batches_tracked == 0  # one value a channel has no variance
    block(noise(2, 6, 3, 3))
    assert block.bn.num_batches_tracked == 1


def frequencies(x, pairs):
    """The cosine transform of (B, C, 7, 7) maps at one frequency (u, v) for each group of channels."""
    out = np.zeros(x.shape[:2])
    for c in range(x.shape[1]):
        u, v = pairs[c * len(pairs) // x.shape[1]]
        scale = (1 if u == 0 else 2) ** 0.5 * (1 if v == 0 else 2) ** 0.5 / 7
        for h in range(7):
            for w in range(7):
                wave = math.cos(math.pi * u * (h + 0.5) / 7) * math.cos(math.pi * v * (w + 0.5) / 7)
                out[:, c] += scale * wave * x[:, c, h, w]
    return out


FIRST_SIXTEEN = [(0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0)]
FIRST_SIXTEEN += [(5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2)]


@pytest.mark.parametrize(("channels", "groups"), [(32, 16), (24, 12), (5, 5)])
def test_fca_equals_its_equation(channels, groups):
    block, x = randomized(create_layer("fca", channels)), noise(2, channels, 7, 7)
    w1, w2 = (numbers(block)[f"mlp.{layer}.weight"][:, :, 0, 0] for layer in (0, 2))
    squeezed = frequencies(x.double().numpy(), FIRST_SIXTEEN[:groups])
    gate = sigmoid(np.maximum(squeezed @ w1.T, 0) @ w2.T)
    equals(block, x, x.double().numpy() * gate[:, :, None, None])


def test_fca_sees_larger_maps_by_the_means_of_their_squares():
    block, x = randomized(create_layer("fca", 32)), noise(2, 32, 14, 21)
    small = x.unflatten(3, (7, 3)).unflatten(2, (7, 2)).mean((3, 5))
    torch.testing.assert_close(block(x) / x, block(small)[:, :, :1, :1].div(small[:, :, :1, :1]).expand_as(x))


def test_the_frequencies_of_fca_are_told_apart_on_small_maps():
    block, x = create_layer("fca", 32), noise(1, 1, 3, 4).expand(1, 32, 3, 4)
    seen = []
    block.mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].flatten()))
    block(x)
    # Half of the frequencies repeat what others see, as 3 x 4 places have no more than 12.
    assert len(set(seen[0].mul(1e4).round().tolist())) > 8


def test_the_lowest_frequency_of_fca_is_the_mean_that_se_takes():
    fca, se, x = (
        create_layer("fca", 16, num_freqs=1, reduction=4),
        create_layer("se", 16, reduction=4),
        noise(2, 16, 7, 7),
    )
    nn.init.zeros_(se.mlp[0].bias), nn.init.zeros_(se.mlp[2].bias)
    fca.mlp[0].weight.data, fca.mlp[2].weight.data = se.mlp[0].weight.data / 7, se.mlp[2].weight.data
    torch.testing.assert_close(fca(x), se(x))


def test_fca_has_the_papers_parameters_and_no_other_state():
    assert parameters("fca", 256) == 2 * 256 * 16
    assert set(create_layer("fca", 256).state_dict()) == {"mlp.0.weight", "mlp.2.weight"}
    with pytest.raises(UsageError, match="expected num_freqs to divide 40 channels, got 16: use one of"):
        create_layer("fca", 40, num_freqs=16)
    with pytest.raises(UsageError, match="expected num_freqs up to 32, got 64: use fewer"):
        create_layer("fca", 64, num_freqs=64)

"""Blocks that weigh places, against their equations in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from vision_attn.errors import UsageError
from vision_attn.layers.factory import create_layer

SIZES = [(1, 1), (4, 3), (5, 8)]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def parameters(name, channels, **options):
    return sum(parameter.numel() for parameter in create_layer(name, channels, **options).parameters())


def numbers(module):
    """Parameters and buffers as NumPy arrays."""
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.detach().double().numpy() for name, tensor in state.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def equals(block, x, expected, *others):
    actual = block(x, *others).detach().double()
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


def convolved(x, weight, bias=0.0, dilation=1):
    """A convolution of (C, H, W) with (D, C or 1, k, m) that keeps the size; depthwise where the second is 1."""
    depth, per, k, m = weight.shape
    _, height, width = x.shape
    tall, wide = dilation * (k // 2), dilation * (m // 2)
    x = np.pad(x, ((0, 0), (tall, tall), (wide, wide)))
    out = np.zeros((depth, height, width))
    for i in range(k):
        for j in range(m):
            shifted = x[:, i * dilation : i * dilation + height, j * dilation : j * dilation + width]
            if per == 1 and depth == len(x):
                out += weight[:, 0, i, j, None, None] * shifted
            else:
                out += np.einsum("dc,chw->dhw", weight[:, :, i, j], shifted)
    return out + np.reshape(bias, (-1, 1, 1))


def normalised(x, state, name):
    """Batch normalisation in evaluation, (C, H, W)."""
    part = {key: state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")}
    return (x - part["running_mean"]) / np.sqrt(part["running_var"] + 1e-5) * part["weight"] + part["bias"]


@pytest.mark.parametrize("size", SIZES)
def test_sse_equals_its_equation(size):
    block, x = randomized(create_layer("sse", 6)), noise(2, 6, *size)
    weight, bias, maps = block.conv.weight.detach().numpy().ravel(), block.conv.bias.item(), x.double().numpy()
    expected = np.empty_like(maps)
    for b, h, w in np.ndindex(2, *size):
        expected[b, :, h, w] = maps[b, :, h, w] * sigmoid(maps[b, :, h, w] @ weight + bias)
    equals(block, x, expected)
    assert parameters("sse", 6) == 6 + 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_sge_equals_its_equation(groups, size):
    block, x = randomized(create_layer("sge", 12, groups=groups)), noise(2, 12, *size)
    state, maps, width = numbers(block), x.double().numpy(), 12 // groups
    expected = np.empty_like(maps)
    for b in range(2):
        for g in range(groups):
            part = maps[b, g * width : (g + 1) * width]
            likeness = np.einsum("chw,c->hw", part, part.mean((1, 2)))
            centred = likeness - likeness.mean()
            score = centred / (np.sqrt((centred**2).mean()) + 1e-5)
            gate = sigmoid(state["weight"][0, g, 0, 0] * score + state["bias"][0, g, 0, 0])
            expected[b, g * width : (g + 1) * width] = part * gate
    equals(block, x, expected)


def test_sge_starts_with_the_same_gate_everywhere():
    block, x = create_layer("sge", 256), noise(1, 256, 3, 4)
    torch.testing.assert_close(block(x), x * torch.sigmoid(torch.tensor(1.0)))
    assert parameters("sge", 256) == 2 * 64
    assert [create_layer("sge", channels).groups for channels in (128, 96, 40, 6)] == [64, 48, 40, 6]
    with pytest.raises(UsageError, match="expected groups to divide 40 channels, got 64: use one of"):
        create_layer("sge", 40, groups=64)


def resampled(x, size):
    """Bilinear interpolation of (C, H, W), pixel centres at halves, the border repeated."""
    for axis, length in ((1, size[0]), (2, size[1])):
        old = x.shape[axis]
        at = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high, part = np.minimum(low + 1, old - 1), at - low
        part = part[:, None] if axis == 1 else part
        x = (1 - part) * np.take(x, low, axis) + part * np.take(x, high, axis)
    return x


def gated(image, g, state, stride=1):
    """The equation of the attention gate, without batch normalisation."""
    weight = state["theta.0.weight"]
    channels, height, width = image.shape
    padded = np.pad(image, ((0, 0), (0, -height % stride), (0, -width % stride)))
    patches = padded.reshape(channels, padded.shape[1] // stride, stride, padded.shape[2] // stride, stride)
    theta = np.einsum("fcij,chiwj->fhw", weight, patches)
    phi = convolved(g, state["phi.0.weight"], state["phi.0.bias"])
    hidden = np.maximum(theta + resampled(phi, theta.shape[1:]), 0)
    alpha = sigmoid(np.einsum("f,fhw->hw", state["psi.0.weight"].ravel(), hidden) + state["psi.0.bias"])
    return image * resampled(alpha[None], padded.shape[1:])[:, :height, :width]


@pytest.mark.parametrize(
    ("stride", "size", "other"), [(1, (4, 6), (4, 6)), (1, (5, 8), (3, 2)), (2, (4, 6), (2, 3)), (2, (5, 7), (3, 3))]
)
def test_the_attention_gate_equals_its_equation(stride, size, other):
    block = randomized(create_layer("attention_gate", 6, gating_channels=4, sub_sample_factor=stride))
    x, g = noise(2, 6, *size), noise(2, 4, *other, seed=3)
    state = numbers(block)
    expected = [gated(*pair, state, stride) for pair in zip(x.double().numpy(), g.double().numpy(), strict=True)]
    equals(block, x, np.stack(expected), g)


def test_the_attention_gate_gates_a_map_by_itself():
    block, x = randomized(create_layer("attention_gate", 6)), noise(2, 6, 4, 5)
    equals(block, x, np.stack([gated(image, image, numbers(block)) for image in x.double().numpy()]))
    assert torch.equal(block(x), block(x, x))


def test_the_attention_gate_normalises_where_it_is_asked_to():
    block, x, g = (
        create_layer("attention_gate", 6, gating_channels=4, batch_norm=True),
        noise(1, 6, 3, 4),
        noise(1, 4, 3, 4),
    )
    state, image = numbers(randomized(block)), x[0].double().numpy()
    parts = {}
    for name, source in (("theta", image), ("phi", g[0].double().numpy())):
        part = convolved(source, state[f"{name}.0.weight"], state[f"{name}.0.bias"])
        parts[name] = normalised(part, state, f"{name}.1")
    hidden = np.maximum(parts["theta"] + parts["phi"], 0)
    alpha = normalised(convolved(hidden, state["psi.0.weight"], state["psi.0.bias"]), state, "psi.1")
    equals(block, x, (image * sigmoid(alpha))[None], g)


def test_the_attention_gate_has_the_papers_parameters():
    assert parameters("attention_gate", 64) == 32 * (64 + 64 + 2) + 1
    assert parameters("attention_gate", 64, gating_channels=128, sub_sample_factor=2) == 32 * (64 * 4 + 128 + 2) + 1
    with_norm = parameters("attention_gate", 64, gating_channels=128, inter_channels=24, batch_norm=True)
    assert with_norm == 24 * (64 + 128 + 7) + 3
    assert parameters("attention_gate", 1) == 1 + 1 + 2 + 1


def test_the_attention_gate_names_the_gating_map_that_it_needs():
    block, x = create_layer("attention_gate", 6, gating_channels=4), noise(2, 6, 4, 5)
    for g in (None, noise(2, 6, 4, 5), noise(1, 4, 4, 5), noise(2, 4, 5)):
        with pytest.raises(
            UsageError, match=r"expected a gating map \(2, 4, H, W\), got \(.*\): pass it as the second"
        ):
            block(x, g)
    with pytest.raises(UsageError, match="expected sub_sample_factor as a whole number of at least 1, got 0"):
        create_layer("attention_gate", 6, sub_sample_factor=0)


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "size"), [(21, 3, (4, 3)), (21, 3, (13, 22)), (9, 2, (5, 8)), (3, 1, (1, 1))]
)
def test_lka_equals_its_equation(kernel_size, dilation, size):
    block = randomized(create_layer("lka", 4, kernel_size=kernel_size, dilation=dilation))
    x, state, expected = noise(2, 4, *size), numbers(block), []
    for image in x.double().numpy():
        part = convolved(image, state["conv0.weight"], state["conv0.bias"])
        part = convolved(part, state["conv_spatial.weight"], state["conv_spatial.bias"], dilation)
        gate = np.einsum("dc,chw->dhw", state["conv1.weight"][:, :, 0, 0], part) + state["conv1.bias"][:, None, None]
        expected.append(image * gate)
    equals(block, x, np.stack(expected))


def test_lka_sees_23_places_in_a_row():
    # The dilated kernel sees 6 * 3 + 1 and the local one adds 5 - 1; the kernel that they stand for has 21.
    block, x = create_layer("lka", 1), torch.zeros(1, 1, 41, 41, requires_grad=True)
    for conv in (block.conv0, block.conv_spatial, block.conv1):
        nn.init.ones_(conv.weight)
    gates = []
    block.report.register_forward_hook(lambda module, args, output: gates.append(output))
    block(x)
    (grad,) = torch.autograd.grad(gates[0][0, 0, 20, 20], x)
    rows, columns = (grad[0, 0].sum(axis) > 0 for axis in (0, 1))
    assert rows.sum() == columns.sum() == 23


def test_lka_has_the_papers_parameters():
    assert parameters("lka", 64) == 64**2 + 77 * 64
    assert parameters("lka", 64, kernel_size=9, dilation=2) == 64**2 + 64 * (9 + 25 + 3)
    with pytest.raises(UsageError, match=r"expected kernel_size / dilation, .* got 20 / 2 = 10: use kernel_size=22"):
        create_layer("lka", 64, kernel_size=20, dilation=2)


@pytest.mark.parametrize("size", SIZES)
def test_strip_pooling_equals_its_equation(size):
    block, x = randomized(create_layer("strip_pooling", 4)), noise(2, 4, *size)
    state, expected = numbers(block), []
    for image in x.double().numpy():
        rows = normalised(convolved(image.mean(2, keepdims=True), state["conv1.weight"]), state, "bn1")
        columns = normalised(convolved(image.mean(1, keepdims=True), state["conv2.weight"]), state, "bn2")
        hidden = np.maximum(rows + columns, 0)
        expected.append(image * sigmoid(convolved(hidden, state["conv3.weight"], state["conv3.bias"])))
    equals(block, x, np.stack(expected))
    assert parameters("strip_pooling", 64) == 7 * 64**2 + 5 * 64

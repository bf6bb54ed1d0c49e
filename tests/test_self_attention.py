"""Self-attention on maps: each block equals timm's or torchvision's, or its paper's equation written in NumPy."""

import numpy as np
import pytest
import torch
from timm.layers import GlobalContext, NonLocalAttn
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from timm.models.xcit import XCA as TimmXCA
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.swin_transformer import ShiftedWindowAttention

from vision_attn.capture import AttentionCapture
from vision_attn.errors import UsageError
from vision_attn.layers.factory import create_layer
from vision_attn.layers.self_attention.axes import AxisAttention
from vision_attn.layers.self_attention.context import Gather
from vision_attn.layers.self_attention.dense import ChannelAttention, PositionAttention


def noise(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(module):
    """A module in evaluation mode whose numbers are all moved, so that nothing is hidden behind a zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
            if name.endswith("running_var"):
                buffer *= 0.5 + torch.rand(buffer.shape, generator=generator)
    return module.eval()


def make(name, channels, **options):
    torch.manual_seed(0)
    return moved(create_layer(name, channels, **options))


def close(actual, expected, tolerance=2e-5):
    actual, expected = (torch.as_tensor(part).detach().double() for part in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def numpy(tensor):
    return tensor.detach().double().numpy()


def conv(layer, x):
    """A 1x1 convolution of a map (C, H, W)."""
    weight = numpy(layer.weight).reshape(len(layer.weight), -1)
    out = np.einsum("oc,chw->ohw", weight, x)
    return out if layer.bias is None else out + numpy(layer.bias)[:, None, None]


def batch_norm(layer, x):
    scale = numpy(layer.weight) / np.sqrt(numpy(layer.running_var) + layer.eps)
    return (x - numpy(layer.running_mean)[:, None, None]) * scale[:, None, None] + numpy(layer.bias)[:, None, None]


def softmax(scores, axis=-1):
    powers = np.exp(scores - scores.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


# Equality with independent implementations.


def test_non_local_equals_timms_with_the_same_weights():
    block = make("non_local", 64, reduction=8, scale=64**-0.5)
    theirs = NonLocalAttn(64).eval()
    names = {"theta": "t", "phi": "p", "g": "g", "expand": "z", "norm": "norm"}
    theirs.load_state_dict(
        {f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in block.state_dict().items()}
    )
    x = noise(2, 64, 5, 7)
    close(block(x), theirs(x))


def test_non_local_is_the_papers_equation_without_scale():
    block, x = make("non_local", 6), noise(1, 6, 3, 4)
    image = numpy(x[0])
    theta, phi, g = (conv(layer, image).reshape(3, -1) for layer in (block.theta, block.phi, block.g))
    y = np.stack([sum(weight * g[:, j] for j, weight in enumerate(softmax(theta[:, i] @ phi))) for i in range(12)], 1)
    close(block(x)[0], image + batch_norm(block.norm, conv(block.expand, y.reshape(3, 3, 4))))


@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
def test_gc_equals_timms_gca_with_the_same_weights(size):
    block = make("gc", 64)
    theirs = GlobalContext(64, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16).eval()
    for own, their in (
        (block.score, theirs.conv_attn),
        (block.reduce, theirs.mlp_add.fc1),
        (block.norm, theirs.mlp_add.norm),
        (block.expand, theirs.mlp_add.fc2),
    ):
        their.load_state_dict({key: value.view_as(getattr(their, key)) for key, value in own.state_dict().items()})
    theirs.mlp_add.norm.eps = block.norm.eps  # theirs is 1e-6, the paper's code has torch's 1e-5
    x = noise(2, 64, *size)
    close(block(x), theirs(x))


@pytest.mark.parametrize("scale_pos_embed", [True, False])
def test_bot_equals_timms_with_the_same_weights(scale_pos_embed):
    block = make("bot", 32, feature_size=(5, 7), scale_pos_embed=scale_pos_embed)
    theirs = BottleneckAttn(32, feat_size=(5, 7), scale_pos_embed=scale_pos_embed)
    theirs.load_state_dict(
        {
            "qkv.weight": block.qkv.weight,
            "pos_embed.height_rel": block.positions.rows,
            "pos_embed.width_rel": block.positions.columns,
        }
    )
    x = noise(2, 32, 5, 7)
    close(block(x), theirs(x))


def timm_halo(block, **options):
    """timm's block with the same weights; its tables have 2 halo entries in front that no offset reaches."""
    theirs = HaloAttn(block.channels, block_size=block.block_size, halo_size=block.halo_size, **options)
    theirs.load_state_dict({"q.weight": block.q.weight, "kv.weight": block.kv.weight}, strict=False)
    with torch.no_grad():
        for their, own in (
            (theirs.pos_embed.height_rel, block.positions.rows),
            (theirs.pos_embed.width_rel, block.positions.columns),
        ):
            their.fill_(100.0)[2 * block.halo_size :] = own
    return theirs


@pytest.mark.parametrize("scale_pos_embed", [True, False])
def test_halo_equals_timms_where_padding_is_not_hidden(scale_pos_embed):
    block = make("halo", 32, block_size=4, halo_size=1, mask_padding=False, scale_pos_embed=scale_pos_embed)
    x = noise(2, 32, 8, 12)
    close(block(x), timm_halo(block, scale_pos_embed=scale_pos_embed)(x))


def test_halo_equals_timms_in_blocks_away_from_the_border():
    block = make("halo", 32, block_size=3, halo_size=2)
    x = noise(1, 32, 9, 12)
    ours, theirs = block(x), timm_halo(block, scale_pos_embed=True)(x)
    close(ours[..., 3:6, 3:9], theirs[..., 3:6, 3:9])
    assert not torch.allclose(ours[..., :3, :], theirs[..., :3, :], atol=1e-2)


@pytest.mark.parametrize("size", [(8, 12), (4, 8), (4, 4)])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_window_equals_torchvisions_with_the_same_weights(size, shift):
    block = make("window", 32, window_size=4, num_heads=2, shift=shift)
    theirs = ShiftedWindowAttention(32, [4, 4], [shift, shift], 2).eval()
    theirs.load_state_dict(block.state_dict(), strict=False)
    x = noise(2, 32, *size)
    close(block(x), theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_window_equals_timms_with_the_same_weights():
    block, theirs = make("window", 64), WindowAttention(64, 2, window_size=7).eval()
    theirs.load_state_dict(block.state_dict())
    x = noise(2, 64, 7, 14)
    windows = theirs(window_partition(x.permute(0, 2, 3, 1), (7, 7)).view(-1, 49, 64))
    close(block(x), window_reverse(windows.view(-1, 7, 7, 64), (7, 7), 7, 14).permute(0, 3, 1, 2))


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_xca_equals_timms_with_the_same_weights(qkv_bias):
    block = make("xca", 32, qkv_bias=qkv_bias)
    theirs = TimmXCA(32, qkv_bias=qkv_bias).eval()
    state = block.state_dict()
    theirs.load_state_dict({key: value.view_as(theirs.state_dict()[key]) for key, value in state.items()})
    x = noise(2, 32, 5, 7)
    close(block(x), theirs(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape))


def torch_attention(axis):
    """torch's multi-head attention with the weights of one axis."""
    channels = axis.proj.out_channels
    theirs = nn.MultiheadAttention(channels, axis.num_heads, batch_first=True).eval()
    state = {
        "in_proj_weight": axis.qkv.weight.flatten(1),
        "in_proj_bias": torch.zeros(3 * channels),
        "out_proj.weight": axis.proj.weight.flatten(1),
        "out_proj.bias": axis.proj.bias,
    }
    theirs.load_state_dict(state)
    return lambda lines: theirs(lines, lines, lines, need_weights=False)[0]


def axial_reference(block, x):
    height, width = torch_attention(block.height), torch_attention(block.width)

    def down(x):
        return torch.stack([height(x[..., column].transpose(1, 2)).transpose(1, 2) for column in range(x.shape[3])], 3)

    def along(x):
        return torch.stack([width(x[..., row, :].transpose(1, 2)).transpose(1, 2) for row in range(x.shape[2])], 2)

    return along(down(x)) if block.combine == "serial" else down(x) + along(x)


@torch.no_grad()
@pytest.mark.parametrize("combine", ["serial", "sum"])
def test_axial_is_torchs_attention_of_each_column_and_row(combine):
    block, x = make("axial", 16, num_heads=4, combine=combine), noise(2, 16, 3, 5)
    close(block(x), axial_reference(block, x))


# The papers' equations.


@pytest.mark.parametrize("max_minus_energy", [False, True])
def test_danet_is_the_papers_equations(max_minus_energy):
    block, x = make("danet", 8, reduction=2, max_minus_energy=max_minus_energy), noise(1, 8, 3, 4)
    image = numpy(x[0])
    q, k, v = (
        conv(part, image).reshape(-1, 12) for part in (block.position.query, block.position.key, block.position.value)
    )
    between_places = np.stack([v @ softmax(q[:, i] @ k) for i in range(12)], 1).reshape(8, 3, 4)
    rows = image.reshape(8, 12)
    energy = rows @ rows.T
    if max_minus_energy:
        energy = energy.max(-1, keepdims=True) - energy
    between_channels = (softmax(energy) @ rows).reshape(8, 3, 4)
    gammas = block.position.gamma.item(), block.channel.gamma.item()
    close(block(x)[0], image + gammas[0] * between_places + gammas[1] * between_channels)


def criss_cross_pass(block, image):
    """One pass, place by place: its row and its column, itself once."""
    q, k, v = (conv(part, image) for part in (block.query, block.key, block.value))
    out = np.empty_like(image)
    _, height, width = image.shape
    for i, j in np.ndindex(height, width):
        cross = [(i, x) for x in range(width)] + [(y, j) for y in range(height) if y != i]
        weights = softmax(np.array([q[:, i, j] @ k[:, y, x] for y, x in cross]))
        out[:, i, j] = sum(weight * v[:, y, x] for weight, (y, x) in zip(weights, cross, strict=True))
    return image + block.gamma.item() * out


@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_criss_cross_is_the_papers_equation_pass_by_pass(recurrence):
    block, x = make("criss_cross", 8, reduction=2, recurrence=recurrence), noise(1, 8, 3, 4)
    image = numpy(x[0])
    for _ in range(recurrence):
        image = criss_cross_pass(block, image)
    close(block(x)[0], image)


def test_a2_is_the_papers_equation():
    block, x = make("a2", 8, c_m=3, c_n=5), noise(1, 8, 3, 4)
    image = numpy(x[0])
    a, b, v = (conv(part, image).reshape(-1, 12) for part in (block.features, block.gathering, block.distributing))
    descriptors = a @ softmax(b, 1).T
    close(block(x)[0], conv(block.expand, (descriptors @ softmax(v, 0)).reshape(3, 3, 4)))


def test_external_is_the_papers_equation():
    block, x = make("external", 8, slots=5), noise(1, 8, 3, 4)
    image = numpy(x[0])
    weights = softmax(numpy(block.keys.weight)[..., 0] @ conv(block.reduce, image).reshape(8, 12), 1)
    weights = weights / weights.sum(0)
    y = (numpy(block.values.weight)[..., 0] @ weights).reshape(8, 3, 4)
    close(block(x)[0], image + batch_norm(block.norm, conv(block.expand, y)))


@pytest.mark.parametrize("num_heads", [1, 2])
def test_efficient_is_the_papers_equation_head_by_head(num_heads):
    block = make("efficient", 8, key_channels=6, value_channels=4, num_heads=num_heads)
    x = noise(1, 8, 3, 4)
    image = numpy(x[0])
    q, k, v = (conv(part, image).reshape(-1, 12) for part in (block.queries, block.keys, block.values))
    heads = []
    for own_q, own_k, own_v in zip(*(np.split(part, num_heads) for part in (q, k, v)), strict=True):
        context = softmax(own_k, 1) @ own_v.T
        heads.append(context.T @ softmax(own_q, 0))
    close(block(x)[0], image + conv(block.expand, np.concatenate(heads).reshape(4, 3, 4)))


def window_reference(block, image):
    """Place by place: what lies in the same window of the shifted grid, and on the image."""
    channels, height, width = image.shape
    size, heads = block.window_size, block.num_heads
    tokens = np.einsum("oc,chw->hwo", numpy(block.qkv.weight), image) + numpy(block.qkv.bias)
    q, k, v = np.split(tokens.reshape(height, width, 3 * heads, -1), 3, 2)
    table = numpy(block.relative_position_bias_table).reshape(2 * size - 1, 2 * size - 1, heads)
    down, right = (block.shift if side > size else 0 for side in (height, width))
    out = np.empty((height, width, heads, channels // heads))
    for i, j, head in np.ndindex(height, width, heads):
        near = [
            (y, x)
            for y, x in np.ndindex(height, width)
            if (y - down) // size == (i - down) // size and (x - right) // size == (j - right) // size
        ]
        scores = [
            q[i, j, head] @ k[y, x, head] / np.sqrt(channels // heads) + table[i - y + size - 1, j - x + size - 1, head]
            for y, x in near
        ]
        weights = softmax(np.array(scores))
        out[i, j, head] = sum(weight * v[y, x, head] for weight, (y, x) in zip(weights, near, strict=True))
    merged = out.reshape(height, width, channels) @ numpy(block.proj.weight).T + numpy(block.proj.bias)
    return merged.transpose(2, 0, 1)


@pytest.mark.parametrize(("size", "shift"), [((5, 7), 0), ((5, 7), 1), ((2, 4), 2), ((7, 2), 2), ((6, 4), 1)])
def test_window_of_any_map_is_the_papers_equation_on_what_lies_on_it(size, shift):
    block, x = make("window", 4, window_size=3, num_heads=2, shift=shift), noise(1, 4, *size)
    close(block(x)[0], window_reference(block, numpy(x[0])))


def halo_reference(block, image):
    """Place by place: what lies in its block or at most a halo away from that, and on the image."""
    channels, height, width = image.shape
    size, halo, heads = block.block_size, block.halo_size, block.num_heads
    dim = channels // heads
    q = conv(block.q, image).reshape(heads, dim, height, width) / np.sqrt(dim)
    k, v = np.split(conv(block.kv, image).reshape(heads, 2 * dim, height, width), 2, 1)
    rows, columns = numpy(block.positions.rows), numpy(block.positions.columns)
    out = np.empty((heads, dim, height, width))
    for head, i, j in np.ndindex(heads, height, width):
        top, left = i // size * size, j // size * size
        near = [
            (y, x)
            for y, x in np.ndindex(height, width)
            if top - halo <= y < top + size + halo and left - halo <= x < left + size + halo
        ]
        middle = size + halo - 1  # the entry of offset 0
        scores = [
            q[head, :, i, j] @ (k[head, :, y, x] + rows[y - i + middle] + columns[x - j + middle]) for y, x in near
        ]
        weights = softmax(np.array(scores))
        out[head, :, i, j] = sum(weight * v[head, :, y, x] for weight, (y, x) in zip(weights, near, strict=True))
    return out.reshape(channels, height, width)


@pytest.mark.parametrize("size", [(4, 6), (5, 4), (1, 3)])
def test_halo_of_any_map_is_the_papers_equation_on_what_lies_on_it(size):
    block, x = make("halo", 4, block_size=2, halo_size=1, num_heads=2), noise(1, 4, *size)
    close(block(x)[0], halo_reference(block, numpy(x[0])))


# Sizes and costs.


def count(name, channels, **options):
    return sum(parameter.numel() for parameter in create_layer(name, channels, **options).parameters())


@pytest.mark.parametrize("c", [64, 24])
def test_parameters_are_as_many_as_the_formulas_say(c):
    m = c // 2
    assert count("non_local", c) == 4 * c * m + 3 * m + 3 * c
    m = max(c // 16, 1)
    assert count("gc", c) == 2 * c * m + 2 * c + 3 * m + 1
    assert count("danet", c) == 5 * c * c // 4 + 5 * c // 4 + 2
    assert count("criss_cross", c) == count("criss_cross", c, recurrence=3) == 5 * c * c // 4 + 5 * c // 4 + 1
    assert count("a2", c) == c * c + 7 * c // 4
    assert count("external", c, slots=16) == 2 * c * 16 + 2 * c * c + 3 * c
    k, v = c // 2, c // 4
    assert count("efficient", c, value_channels=v) == 2 * (c * k + k) + c * v + v + v * c + c
    assert count("bot", c, feature_size=(5, 7)) == 3 * c * c + 2 * (5 + 7 - 1) * c // 4
    assert count("halo", c) == 3 * c * c + 2 * (2 * 8 + 2 * 3 - 1) * c // 8
    assert count("window", c, num_heads=4) == 4 * c * c + 4 * c + 13**2 * 4
    assert count("axial", c) == 2 * (4 * c * c + c)
    assert count("xca", c) == 4 * c * c + c + 8


class LargestTensor(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)), 0)
        return out


def largest(name, side, **options):
    if name == "bot":
        options["feature_size"] = (side, side)
    block = create_layer(name, 8, **options)
    with LargestTensor() as made:
        block(noise(1, 8, side, side).requires_grad_()).sum().backward()
    return made.numel


@pytest.mark.parametrize(
    ("name", "options", "growth"),
    [
        *((name, {}, 4) for name in ("gc", "a2", "external", "efficient", "xca", "non_local")),
        ("window", {"window_size": 4, "shift": 2}, 4),
        ("halo", {"block_size": 4, "halo_size": 1}, 4),
        ("criss_cross", {}, 8),
        ("axial", {}, 8),
        ("bot", {}, 8),
    ],
)
def test_memory_grows_with_the_places_and_not_with_their_square(name, options, growth):
    # Twice the side: 4 times the places, 16 times the pairs.
    assert largest(name, 32, **options) <= 1.01 * growth * largest(name, 16, **options)


# Where attention lies.

OPTIONS = {
    "windows": ("window", {"window_size": 3, "num_heads": 2}),
    "shifted": ("window", {"window_size": 3, "num_heads": 2, "shift": 1}),
    "halo": ("halo", {"block_size": 3, "halo_size": 1, "num_heads": 2}),
    "halo with padding": ("halo", {"block_size": 3, "halo_size": 1, "num_heads": 2, "mask_padding": False}),
    "cross": ("criss_cross", {"recurrence": 1}),
    "non_local": ("non_local", {"reduction": 1}),
}


def placed_block(name, size):
    torch.manual_seed(0)
    if name == "bot":
        return make("bot", 4, feature_size=size)
    if name in ("height", "width"):
        return moved(AxisAttention(4, name, num_heads=2))
    if name == "position":
        return moved(PositionAttention(4, 2))
    layer, options = OPTIONS[name]
    return make(layer, 4, **options)


placed = pytest.mark.parametrize("name", [*OPTIONS, "bot", "height", "width", "position"])
sizes = pytest.mark.parametrize("size", [(5, 4), (3, 7), (1, 1)])


@placed
@sizes
def test_a_place_depends_on_the_places_that_key_positions_lists_and_no_others(name, size):
    block = placed_block(name, size).double()
    x = noise(1, 4, *size).double().requires_grad_()
    out = block(x).flatten(2)
    positions = block.key_positions(*size)
    assert positions.grid == size and positions.query_grid in (None, size)
    asked = positions.queries.flatten()
    assert sorted(asked[asked >= 0].tolist()) == list(range(size[0] * size[1]))
    for window, queries in enumerate(positions.queries.tolist()):
        for number, place in enumerate(queries):
            if place >= 0:
                keys = positions.keys[window] if positions.keys.dim() == 2 else positions.keys[window, number]
                keys = keys[keys >= 0].tolist()
                assert len(set(keys)) == len(keys)
                (gradient,) = torch.autograd.grad(out[..., place].square().sum(), x, retain_graph=True)
                assert gradient.abs().sum((0, 1)).flatten().nonzero().flatten().tolist() == sorted(keys)


@placed
def test_weights_put_where_key_positions_says_give_what_the_block_computes(name):
    size, images = (5, 4), 2
    block = placed_block(name, size)
    for part in ("proj", "expand", "norm"):
        if hasattr(block, part):  # what comes after attention: taken away
            setattr(block, part, nn.Identity())
    x = noise(images, 4, *size)
    with torch.no_grad(), AttentionCapture(block) as capture:
        out = block(x)
    (record,), positions = capture.records, block.key_positions(*size)
    weights, values = (part.unflatten(0, (images, -1)) for part in (record.weights, record.values))
    expected = torch.zeros(images, record.num_heads, 4 // record.num_heads, size[0] * size[1])
    for window, queries in enumerate(positions.queries.tolist()):
        for number, place in enumerate(queries):
            if place >= 0:
                keys = positions.keys[window] if positions.keys.dim() == 2 else positions.keys[window, number]
                own = weights[:, window, :, number]
                assert name == "halo with padding" or not own[..., keys < 0].any()
                held = values[:, window, :, :, : expected.shape[2]]
                held = held[:, :, keys.clamp(min=0)] if name == "cross" else held  # there all places have values
                expected[..., place] = torch.einsum("bhk,bhkd->bhd", own * (keys >= 0), held)
    expected = expected.flatten(1, 2).unflatten(2, size)
    expected = expected * getattr(block, "gamma", 1.0)
    close(out - x if name in ("cross", "non_local") else out, expected)


@pytest.mark.parametrize("size", [(5, 4), (1, 1)])
def test_descriptors_see_every_place_and_lie_nowhere(size):
    gather, (scores, values) = Gather(num_heads=2), noise(2, 1, 4, *size).requires_grad_()
    for module in (gather, make("external", 4)):
        positions = module.key_positions(*size)
        assert positions.grid == size and positions.queries is None
        assert positions.keys.tolist() == [list(range(size[0] * size[1]))]
    (gradient,) = torch.autograd.grad(gather(scores, values).sum(), values)
    assert (gradient != 0).all()


def test_attention_between_channels_has_no_places():
    for module in (ChannelAttention(), make("xca", 4)):
        positions = module.key_positions(5, 4)
        assert positions.grid == (5, 4) and positions.keys is None and positions.queries is None


def test_each_pass_of_criss_cross_is_reported():
    block, x = make("criss_cross", 8, recurrence=3), noise(2, 8, 3, 4)
    with torch.no_grad(), AttentionCapture(block) as capture:
        block(x)
    assert [record.weights.shape for record in capture.records] == [(2, 1, 12, 7)] * 3
    assert not torch.equal(capture.records[0].weights, capture.records[1].weights)


def test_two_passes_of_criss_cross_reach_every_place_and_one_does_not():
    x = noise(1, 4, 3, 4).requires_grad_()
    for recurrence, reached in ((1, 3 + 4 - 1), (2, 12)):
        out = make("criss_cross", 4, recurrence=recurrence)(x)
        (gradient,) = torch.autograd.grad(out[..., 1, 2].square().sum(), x)
        assert gradient.abs().sum((0, 1)).count_nonzero() == reached


def test_external_reports_the_softmax_over_places():
    block, x = make("external", 8, slots=5), noise(2, 8, 3, 4)
    with torch.no_grad(), AttentionCapture(block) as capture:
        block(x)
    (record,) = capture.records
    features = block.reduce(x).flatten(2)
    close(record.weights[:, 0], block.keys(features).softmax(-1))
    close(record.values[:, 0], features.transpose(1, 2))


# Options.


def test_default_heads_are_the_papers_or_fit_the_channels():
    for name, options, heads in (
        ("bot", {"feature_size": (2, 2)}, {64: 4, 6: 3, 5: 1}),
        ("halo", {}, {64: 8, 6: 6, 20: 5}),
        ("axial", {}, {64: 8, 6: 6, 20: 5}),
        ("xca", {}, {64: 8, 6: 6, 20: 5}),
        ("window", {}, {96: 3, 64: 2, 8: 1}),
    ):
        for channels, expected in heads.items():
            block = create_layer(name, channels, **options)
            assert getattr(block, "height", block).num_heads == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bot", {}, r"expected feature_size=\(H, W\), got None: give the size of the maps"),
        ("bot", {"feature_size": 7}, r"expected feature_size=\(H, W\), got 7: "),
        ("bot", {"feature_size": (7, 0)}, "expected each side of feature_size as a whole number of at least 1, got 0"),
        (
            "bot",
            {"feature_size": (7, 7), "num_heads": 3},
            "expected num_heads to divide 16 channels, got 3: use one of",
        ),
        ("halo", {"num_heads": 3}, "expected num_heads to divide 16 channels, got 3: use one of"),
        ("halo", {"halo_size": -1}, "expected halo_size as a whole number of at least 0, got -1: "),
        ("halo", {"block_size": 0}, "expected block_size as a whole number of at least 1, got 0: "),
        ("window", {"shift": 7}, "expected a shift from 0 to 6, got 7: use 3"),
        ("window", {"num_heads": 3}, "expected num_heads to divide 16 channels, got 3: use one of"),
        ("axial", {"num_heads": 3}, "expected num_heads to divide 16 channels, got 3: use one of"),
        ("axial", {"combine": "serail"}, "expected a known way to combine axes, got 'serail': did you mean 'serial'"),
        ("xca", {"num_heads": 3}, "expected num_heads to divide 16 channels, got 3: use one of"),
        ("efficient", {"num_heads": 3}, "expected num_heads to divide 8 channels, got 3: use one of"),
        ("efficient", {"key_channels": 0}, "expected key_channels as a whole number of at least 1, got 0: "),
        ("a2", {"c_n": 0}, "expected c_n as a whole number of at least 1, got 0: "),
        ("external", {"slots": 0}, "expected slots as a whole number of at least 1, got 0: "),
        ("criss_cross", {"recurrence": 0}, "expected recurrence as a whole number of at least 1, got 0: "),
        ("non_local", {"reduction": 0}, "expected reduction as a whole number of at least 1, got 0: "),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(name, options, message):
    with pytest.raises(UsageError, match=message) as error:
        create_layer(name, 16, **options)
    assert "\n" not in str(error.value)


def test_windows_and_halos_see_maps_of_several_sizes_with_one_set_of_weights():
    for name, options in (("window", {"window_size": 3, "shift": 1}), ("halo", {"block_size": 3})):
        block = make(name, 8, **options)
        for size in ((3, 3), (5, 8), (1, 2)):
            assert block(noise(1, 8, *size)).shape == (1, 8, *size)

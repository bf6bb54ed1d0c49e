"""Attention on tokens: equal to timm's, to torch's and to the papers' equations, whatever the grid and the prefix."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from timm.layers import AttentionPoolLatent
from timm.layers.attention import Attention as TimmAttention
from timm.layers.attention import AttentionRope
from timm.layers.diff_attention import DiffAttention
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models.cait import ClassAttn
from timm.models.eva import EvaAttention
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.xcit import XCA
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vision_attn.attribution.positions import find_positions
from vision_attn.capture import AttentionCapture
from vision_attn.errors import UsageError
from vision_attn.layers.rotary import AxialRotary, MixedRotary
from vision_attn.layers.tokens import (
    TOKEN_LAYERS,
    AgentAttention,
    Attention,
    ClassAttention,
    CrossCovarianceAttention,
    LatentAttention,
    LinearAttention,
    MapPooling,
    RelativeBias,
    SpatialReductionAttention,
    WindowAttention,
    create_token_layer,
    list_token_layers,
)

NAMES = list_token_layers()
SMALL = {"window": {"window_size": 3, "shift": 1}, "agent": {"num_agents": 4}, "latent": {"num_latents": 5}}
GRID = (5, 7)
C, K = 24, 3
norm = partial(nn.LayerNorm, eps=1e-6)


def filled(module, seed=0):
    """Every parameter non-trivial, so that nothing can be equal by being zero or one."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def layer_of(name, dim=C, heads=K):
    return filled(create_token_layer(name, dim, num_heads=heads, **SMALL.get(name, {})))


def tokens(num_prefix=0, *, batch=2, dim=C, grid=GRID, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, num_prefix + grid[0] * grid[1], dim, generator=generator, dtype=dtype)


def numpy_of(module):
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def softmax(scores, axis=-1):
    weights = np.exp(scores - scores.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def heads_of(x, heads):
    """(N, K D) as (K, N, D)."""
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


# --- self- and cross-attention ---


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"qkv_bias": True}),
        ({"qkv_bias": False, "proj_bias": False}, {"proj_bias": False}),
        ({"head_dim": 10}, {"qkv_bias": True, "attn_head_dim": 10}),
        (
            {"qk_norm": True, "scale_norm": True, "gated": "elementwise"},
            {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "gated": True, "norm_layer": norm},
        ),
    ],
    ids=["plain", "no biases", "head width", "norms and gate"],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_equals_timms_with_the_same_weights(ours, theirs, is_causal):
    reference = filled(TimmAttention(C, num_heads=K, **theirs))
    layer = Attention(C, num_heads=K, **ours).eval()
    layer.load_state_dict(reference.state_dict())
    torch.testing.assert_close(layer(tokens(), is_causal=is_causal), reference(tokens(), is_causal=is_causal))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_timms_with_the_same_weights(kv_heads):
    reference = filled(AttentionRope(C, num_heads=4, num_kv_heads=kv_heads, qkv_fused=False))
    weights = reference.state_dict()
    for kind in ("weight", "bias"):
        weights[f"qkv.{kind}"] = torch.cat([weights.pop(f"{part}_proj.{kind}") for part in "qkv"])
    layer = Attention(C, num_heads=4, num_kv_heads=kv_heads).eval()
    layer.load_state_dict(weights)
    torch.testing.assert_close(layer(tokens()), reference(tokens()))


@pytest.mark.parametrize("depth", [0, 5])
def test_differential_attention_equals_timms_with_the_same_weights(depth):
    reference = filled(DiffAttention(C, num_heads=K, qkv_bias=True, depth=depth))
    layer = Attention(C, num_heads=K, differential=True, depth=depth).eval()
    layer.load_state_dict(reference.state_dict())
    torch.testing.assert_close(layer(tokens()), reference(tokens()))


@pytest.mark.parametrize("kind", ["eva02", "dinov3"])
def test_attention_with_rotary_positions_equals_timms(kind):
    half = kind == "dinov3"
    reference = filled(EvaAttention(C, num_heads=K, qkv_bias=False, rotate_half=half, scale_norm=False))
    layer = Attention(C, num_heads=K, qkv_bias=False).eval()
    layer.load_state_dict(reference.state_dict())
    if half:
        table = RotaryEmbeddingDinoV3(C // K).get_embed(GRID)
        rope = AxialRotary(C // K, coordinates="centered", order="yx", rotate_half=True)(GRID, num_prefix=1)
    else:
        table = RotaryEmbeddingCat(C // K, in_pixels=False, ref_feat_shape=[4, 4]).get_embed(GRID)
        rope = AxialRotary(C // K, temperature=10_000, order="yx", reference_grid=(4, 4))(GRID, num_prefix=1)
    torch.testing.assert_close(layer(tokens(1), rope=rope), reference(tokens(1), rope=table))


def test_cross_attention_equals_torchs_with_the_same_weights():
    reference = filled(nn.MultiheadAttention(C, K, kdim=10, vdim=10, batch_first=True))
    layer = Attention(C, num_heads=K, kv_dim=10).eval()
    q, k, v = reference.in_proj_bias.split(C)
    weights = {
        "q.weight": reference.q_proj_weight,
        "q.bias": q,
        "kv.weight": torch.cat((reference.k_proj_weight, reference.v_proj_weight)),
        "kv.bias": torch.cat((k, v)),
        "proj.weight": reference.out_proj.weight,
        "proj.bias": reference.out_proj.bias,
    }
    layer.load_state_dict(weights)
    context = tokens(dim=10, grid=(2, 4))
    torch.testing.assert_close(layer(tokens(), context), reference(tokens(), context, context)[0])
    # Of torch's mask True is what is left out.
    mask = torch.rand(35, 8) > 0.4
    mask[:, 0] = True
    wanted = reference(tokens(), context, context, attn_mask=~mask)[0]
    torch.testing.assert_close(layer(tokens(), context, mask=mask), wanted)


@pytest.mark.parametrize("gated", ["elementwise", "headwise"])
def test_a_gate_multiplies_what_the_heads_give(gated):
    layer = filled(Attention(C, num_heads=K, gated=gated))
    plain = Attention(C, num_heads=K).eval()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "gate" not in name})
    plain.proj = nn.Identity()
    x = tokens()
    weights = numpy_of(layer)
    gate = 1 / (1 + np.exp(-(x.double().numpy() @ weights["gate.weight"].T + weights["gate.bias"])))
    mixed = plain(x).detach().double().numpy().reshape(2, 35, K, C // K)
    mixed = mixed * gate.reshape(2, 35, K, -1)
    wanted = mixed.reshape(2, 35, C) @ weights["proj.weight"].T + weights["proj.bias"]
    np.testing.assert_allclose(layer(x).detach().numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("table", [(5, 7), (6, 9)])
def test_a_relative_bias_is_that_of_the_way_between_two_patches(num_prefix, table):
    layer = filled(Attention(C, num_heads=K, relative_bias=table))
    plain = Attention(C, num_heads=K).eval()
    weights = layer.state_dict()
    entries = weights.pop("relative_bias.table").view(2 * table[0] - 1, 2 * table[1] - 1, K)
    plain.load_state_dict(weights)
    bias = torch.zeros(K, num_prefix + 35, num_prefix + 35)
    for query in range(35):
        for key in range(35):
            (i, j), (m, n) = divmod(query, 7), divmod(key, 7)
            bias[:, num_prefix + query, num_prefix + key] = entries[i - m + table[0] - 1, j - n + table[1] - 1]
    x = tokens(num_prefix)
    torch.testing.assert_close(layer(x, grid=GRID, num_prefix=num_prefix), plain(x, mask=bias))


def test_a_query_without_keys_gets_zeros_and_no_gradient_is_lost():
    layer = Attention(C, num_heads=K).eval()
    mask = torch.ones(2, 1, 35, 35, dtype=torch.bool)
    mask[0, :, 3] = False
    x = tokens().requires_grad_()
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        output = layer(x, mask=given)
        torch.testing.assert_close(output[0, 3], layer.proj.bias)
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        assert gradient.isfinite().all()
        assert (output[1, 3] - layer.proj.bias).abs().min() > 0


@pytest.mark.parametrize("relative_bias", [None, GRID])
def test_what_is_masked_has_no_influence_and_masks_join(relative_bias):
    layer = filled(Attention(C, num_heads=K, relative_bias=relative_bias))
    x, other = tokens(), tokens(seed=2)
    keys = torch.arange(35) < 20
    changed = torch.where(keys[:, None], x, other)
    run = partial(layer, grid=GRID)
    torch.testing.assert_close(run(x, mask=keys)[:, :20], run(changed, mask=keys)[:, :20])
    # Causal and masked: token i sees the kept tokens up to i.
    both = torch.zeros(35, 35).masked_fill(~(keys & torch.ones(35, 35, dtype=torch.bool).tril()), -torch.inf)
    torch.testing.assert_close(run(x, mask=keys, is_causal=True), run(x, mask=both))
    additive = torch.zeros(35).masked_fill(~keys, -torch.inf)
    torch.testing.assert_close(run(x, mask=additive, is_causal=True), run(x, mask=both))


def test_an_added_mask_joins_a_relative_bias():
    layer = filled(Attention(C, num_heads=K, relative_bias=GRID))
    plain = Attention(C, num_heads=K).eval()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "bias.table" not in name})
    mask = torch.randn(2, 1, 1, 35)
    wanted = plain(tokens(), mask=layer.relative_bias(GRID) + mask)
    torch.testing.assert_close(layer(tokens(), grid=GRID, mask=mask), wanted)


# --- pooling ---


def test_class_attention_equals_timms_with_the_same_weights():
    reference = filled(ClassAttn(C, num_heads=K, qkv_bias=True))
    layer = ClassAttention(C, num_heads=K).eval()
    layer.load_state_dict(reference.state_dict())
    torch.testing.assert_close(layer(tokens(1)), reference(tokens(1)))


def test_map_pooling_equals_timms_with_the_same_weights():
    reference = filled(AttentionPoolLatent(C, num_heads=K, norm_layer=norm))
    layer = MapPooling(C, num_heads=K).eval()
    layer.load_state_dict(reference.state_dict())
    torch.testing.assert_close(layer(tokens()), reference(tokens()))
    mask = torch.arange(35) < 20
    torch.testing.assert_close(layer(tokens(), mask=mask), reference(tokens()[:, :20]))


def test_several_latents_pool_as_timms():
    reference = filled(AttentionPoolLatent(C, num_heads=K, latent_len=3, norm_layer=norm, pool_type="avg"))
    layer = MapPooling(C, num_heads=K, num_latents=3).eval()
    layer.load_state_dict(reference.state_dict())
    torch.testing.assert_close(layer(tokens()).mean(1), reference(tokens()))


# --- what is not quadratic ---


@pytest.mark.parametrize("options", [{"sr_ratio": 1}, {"sr_ratio": 2}, {"sr_ratio": 3}, {"pool_size": 7}])
def test_spatial_reduction_equals_timms_with_the_same_weights(options):
    theirs = {"linear_attn": True} if "pool_size" in options else options
    reference = filled(PvtAttention(C, num_heads=K, **theirs))
    layer = SpatialReductionAttention(C, num_heads=K, **options).eval()
    layer.load_state_dict(reference.state_dict())
    torch.testing.assert_close(layer(tokens(), grid=GRID), reference(tokens(), GRID))


def test_a_prefix_is_a_key_beside_the_reduced_patches():
    layer = filled(SpatialReductionAttention(C, num_heads=K, sr_ratio=2))
    cross = Attention(C, num_heads=K, kv_dim=C).eval()
    cross.load_state_dict(
        {name: value for name, value in layer.state_dict().items() if name.split(".")[0] in "q kv proj"}
    )
    x = tokens(2)
    patches = x[:, 2:].transpose(1, 2).reshape(2, C, *GRID)
    keys = layer.norm(torch.cat((x[:, :2], layer.sr(patches).flatten(2).transpose(1, 2)), dim=1))
    torch.testing.assert_close(layer(x, grid=GRID, num_prefix=2), cross(x, keys))


def test_cross_covariance_equals_timms_with_the_same_weights():
    reference = filled(XCA(C, num_heads=K, qkv_bias=True))
    layer = CrossCovarianceAttention(C, num_heads=K).eval()
    layer.load_state_dict(reference.state_dict())
    torch.testing.assert_close(layer(tokens()), reference(tokens()))


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_windows_equal_timms_with_the_same_weights(shift):
    grid = (8, 12)
    reference = filled(SwinTransformerBlock(C, grid, num_heads=K, window_size=4, shift_size=shift))
    weights = reference.attn.state_dict()
    weights["relative_bias.table"] = weights.pop("relative_position_bias_table")
    layer = WindowAttention(C, num_heads=K, window_size=4, shift=shift).eval()
    layer.load_state_dict(weights)
    x = tokens(grid=grid)
    wanted = reference._attn(x.view(2, *grid, C)).reshape(2, -1, C)
    torch.testing.assert_close(layer(x, grid=grid), wanted, atol=1e-5, rtol=1e-5)


def windows_written_out(grid, size, shift, num_prefix):
    """Which token sees which, (N, N): a patch those of its window, the prefix all, and all the prefix."""
    shifts = [shift if side > size else 0 for side in grid]
    number = {
        place: [(index - moved) // size for index, moved in zip(place, shifts, strict=True)]
        for place in np.ndindex(*grid)
    }
    sees = np.ones((num_prefix + len(number),) * 2, dtype=bool)
    for query, its in enumerate(number.values()):
        for key, other in enumerate(number.values()):
            sees[num_prefix + query, num_prefix + key] = its == other
    return torch.from_numpy(sees)


@pytest.mark.parametrize("rotary", [None, "axial", "mixed"])
@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize(
    ("grid", "shift"), [((6, 9), 0), ((6, 9), 2), ((5, 7), 0), ((5, 7), 1), ((2, 7), 1), ((2, 3), 1)]
)
def test_windows_are_full_attention_with_all_else_masked(grid, shift, num_prefix, rotary):
    layer = filled(WindowAttention(C, num_heads=K, window_size=3, shift=shift, qk_norm=True, gated="headwise")).double()
    full = Attention(C, num_heads=K, relative_bias=grid, qk_norm=True, gated="headwise").eval().double()
    weights = layer.state_dict()
    near = weights["relative_bias.table"].view(5, 5, K)
    far = torch.zeros(2 * grid[0] - 1, 2 * grid[1] - 1, K, dtype=torch.float64)
    for down in range(max(-2, 1 - grid[0]), min(3, grid[0])):
        for right in range(max(-2, 1 - grid[1]), min(3, grid[1])):
            far[down + grid[0] - 1, right + grid[1] - 1] = near[down + 2, right + 2]
    full.load_state_dict(weights | {"relative_bias.table": far.flatten(0, 1)})
    rope = None
    if rotary == "axial":
        rope = AxialRotary(C // K)(grid, num_prefix=num_prefix, dtype=torch.float64)
    elif rotary == "mixed":
        rope = MixedRotary(C, K, 1)(grid, num_prefix=num_prefix, dtype=torch.float64)[0]
    given = {"grid": grid, "num_prefix": num_prefix, "rope": rope}
    x = tokens(num_prefix, grid=grid, dtype=torch.float64)
    wanted = full(x, mask=windows_written_out(grid, 3, shift, num_prefix), **given)
    torch.testing.assert_close(layer(x, **given), wanted, atol=1e-10, rtol=0)


def test_linear_attention_is_the_papers_equation():
    layer = filled(LinearAttention(C, num_heads=K))
    weights = numpy_of(layer)
    for image, output in zip(tokens(2).double().numpy(), layer(tokens(2)), strict=True):
        q, k, v = (heads_of(part, K) for part in np.split(image @ weights["qkv.weight"].T + weights["qkv.bias"], 3, 1))
        mixed = [softmax(q[i], 1) @ (softmax(k[i], 0).T @ v[i]) for i in range(K)]
        wanted = np.concatenate(mixed, 1) @ weights["proj.weight"].T + weights["proj.bias"]
        np.testing.assert_allclose(output.detach().numpy(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_agent_attention_is_the_papers_equation(num_prefix):
    grid = (4, 6)
    layer = filled(AgentAttention(C, num_heads=K, num_agents=4, grid_size=grid))
    weights = numpy_of(layer)
    x = tokens(num_prefix, grid=grid)

    def bias(name):
        """B for each head, agent and token."""
        part = {key: weights[f"{name}.{key}"] for key in ("map", "rows", "columns", "prefix")}
        values = np.empty((K, 4, num_prefix + 24))
        values[:, :, :num_prefix] = part["prefix"]
        for token in range(24):
            row, column = divmod(token, 6)
            # Bilinear, pixel centres aligned, from 7 x 7.
            ys, xs = ((row + 0.5) * 7 / 4 - 0.5, (column + 0.5) * 7 / 6 - 0.5)
            y, x = int(ys), int(xs)
            corners = part["map"][:, :, [y, y, y + 1, y + 1], [x, x + 1, x, x + 1]]
            shares = np.outer([y + 1 - ys, ys - y], [x + 1 - xs, xs - x]).ravel()
            values[:, :, num_prefix + token] = corners @ shares
            values[:, :, num_prefix + token] += part["rows"][:, :, row, 0] + part["columns"][:, :, 0, column]
        return values

    for image, output in zip(x.double().numpy(), layer(x, grid=grid, num_prefix=num_prefix), strict=True):
        q, k, v = np.split(image @ weights["qkv.weight"].T + weights["qkv.bias"], 3, 1)
        parts = q[num_prefix:].reshape(2, 2, 2, 3, C)  # two rows of two agents, each the mean of 2 x 3 places
        agents = heads_of(parts.mean((1, 3)).reshape(4, C), K)
        places = np.pad(v[num_prefix:].reshape(4, 6, C), ((1, 1), (1, 1), (0, 0)))
        local = np.zeros((4, 6, C)) + weights["dwc.bias"]
        for i, j in np.ndindex(3, 3):
            local += places[i : i + 4, j : j + 6] * weights["dwc.weight"][:, 0, i, j]
        scale = (C // K) ** -0.5
        gathered = softmax(scale * agents @ heads_of(k, K).transpose(0, 2, 1) + bias("gather_bias")) @ heads_of(v, K)
        scores = scale * heads_of(q, K) @ agents.transpose(0, 2, 1) + bias("return_bias").transpose(0, 2, 1)
        mixed = (softmax(scores) @ gathered).transpose(1, 0, 2).reshape(-1, C)
        mixed[num_prefix:] += local.reshape(-1, C)
        wanted = mixed @ weights["proj.weight"].T + weights["proj.bias"]
        np.testing.assert_allclose(output.detach().numpy(), wanted, atol=1e-4, rtol=1e-4)


def test_latents_gather_and_are_read():
    layer = filled(LatentAttention(C, num_heads=K, num_latents=5))
    references = []
    for part in (layer.gather, layer.read):
        reference = nn.MultiheadAttention(C, K, batch_first=True).eval()
        reference.in_proj_weight.data = torch.cat((part.q.weight, part.kv.weight))
        reference.in_proj_bias.data = torch.cat((part.q.bias, part.kv.bias))
        reference.out_proj = part.proj
        references.append(reference)
    x = tokens(1)
    latents = layer.latents.expand(2, -1, -1)
    held = layer.norm(latents + references[0](latents, x, x)[0])
    torch.testing.assert_close(layer(x), references[1](x, held, held)[0])


# --- all of them ---


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_as_many_as_the_docstring_says(name):
    linears, bias = 4 * C**2, 4 * C
    wanted = {
        "self": linears + bias,
        "window": linears + bias + 5**2 * K,
        "spatial_reduction": linears + bias + 4 * C**2 + 3 * C,
        "linear": linears + bias,
        "cross_covariance": linears + bias + K,
        "agent": linears + 14 * C + 2 * K * 4 * (14 + 14 + 50),
        "latent": 2 * linears + 10 * C + 5 * C,
    }
    assert sum(parameter.numel() for parameter in layer_of(name).parameters()) == wanted[name]


def test_pooling_has_as_many_parameters_as_the_docstring_says():
    count = [sum(part.numel() for part in layer.parameters()) for layer in (ClassAttention(C), MapPooling(C))]
    assert count == [4 * C**2 + 4 * C, 12 * C**2 + 12 * C]


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_in_tokens_is_that_which_is_said(name):
    """The products beside the projections, at 4 times as many tokens."""
    costs = []
    for side in (12, 24):
        layer = create_token_layer(name, 16, num_heads=2, **{**SMALL, "window": {"window_size": 6}}.get(name, {}))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer(torch.zeros(1, side**2, 16), grid=(side, side))
        costs.append(sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "addmm" not in str(op)))
    growth = math.log(costs[1] / costs[0], 4)
    assert growth == pytest.approx(2 if "N²" in TOKEN_LAYERS.info(name)["cost"] else 1, abs=0.15)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("grid", "num_prefix"), [((5, 7), 1), ((1, 1), 0), ((1, 1), 2), ((3, 1), 0)])
def test_any_grid_gives_finite_tokens_and_batch_1_trains(name, grid, num_prefix):
    layer = layer_of(name).train()
    x = tokens(num_prefix, batch=1, grid=grid).requires_grad_()
    held = x.detach().clone()
    output = layer(x, grid=grid, num_prefix=num_prefix)
    assert output.shape == x.shape
    assert output.isfinite().all()
    output.sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(x, held)
    assert layer(torch.zeros_like(x), grid=grid, num_prefix=num_prefix).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    layer = layer_of(name)
    layer(tokens(1), grid=GRID, num_prefix=1).square().sum().backward()
    # What is added to all keys of a query alike falls out of its softmax: there the gradient is rounding.
    still = [key for key, parameter in layer.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not still


@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_batch_are_independent_and_a_copy_is_equal(name):
    layer = layer_of(name)
    x = tokens(1, batch=3)
    together = layer(x, grid=GRID, num_prefix=1)
    alone = torch.cat([layer(image[None], grid=GRID, num_prefix=1) for image in x])
    torch.testing.assert_close(together, alone)
    other = create_token_layer(name, C, num_heads=K, **SMALL.get(name, {})).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, grid=GRID, num_prefix=1), together)
    assert torch.equal(copy.deepcopy(layer)(x, grid=GRID, num_prefix=1), together)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right_in_float64(name):
    layer = layer_of(name, dim=8, heads=2).double()
    x = tokens(1, batch=1, dim=8, grid=(2, 4), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(partial(layer, grid=(2, 4), num_prefix=1), (x,), fast_mode=True)


@pytest.mark.parametrize(
    "options", [{"differential": True}, {"num_kv_heads": 1}, {"gated": "headwise", "qk_norm": True}]
)
def test_gradients_of_the_options_are_right_in_float64(options):
    layer = filled(Attention(8, num_heads=2, **options)).double()
    x = tokens(1, batch=1, dim=8, grid=(2, 4), dtype=torch.float64).requires_grad_()
    rope = AxialRotary(layer.head_dim if layer.head_dim % 4 == 0 else 4)((2, 4), num_prefix=1, dtype=torch.float64)
    run = partial(layer, rope=rope if layer.head_dim % 4 == 0 else None)
    assert torch.autograd.gradcheck(run, (x,), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_to_bfloat16_is_close(name):
    layer = layer_of(name)
    nn.init.normal_(next(p for n, p in layer.named_parameters() if n.endswith("proj.weight")), std=0.1)
    x = tokens(1)
    plain = layer(x, grid=GRID, num_prefix=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(x, grid=GRID, num_prefix=1)
    assert (rounded.float() - plain).norm() < 0.03 * plain.norm()


def test_autocast_takes_rotary_positions_norms_and_masks():
    layer = filled(Attention(C, num_heads=K, qk_norm=True, relative_bias=GRID, differential=False))
    rope = AxialRotary(C // K)(GRID, num_prefix=1)
    given = {"grid": GRID, "num_prefix": 1, "rope": rope, "mask": torch.randn(2, 1, 1, 36)}
    plain = layer(tokens(1), **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(tokens(1), **given)
    assert (rounded.float() - plain).norm() < 0.05 * plain.norm()


SLOW = [name if name == "self" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", SLOW)
def test_each_compiles_into_one_graph(name):
    layer = layer_of(name)
    rope = AxialRotary(C // K)(GRID, num_prefix=1) if TOKEN_LAYERS.info(name).get("rope") else None
    given = {"grid": GRID, "num_prefix": 1, "rope": rope}
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens(1), **given), layer(tokens(1), **given))


KINDS = {
    "self": [("self", 36, 36)],
    "window": [("cross", 1, 36), ("window", 9, 10)],
    "spatial_reduction": [("cross", 36, 1 + 2 * 3)],
    "linear": [("cross", 8, 36), ("cross", 36, 8)],
    "cross_covariance": [("channel", 8, 8)],
    "agent": [("cross", 4, 36), ("cross", 36, 4)],
    "latent": [("cross", 5, 36), ("cross", 36, 5)],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_attention_of_each_is_seen(name, batch):
    layer = layer_of(name)
    x = tokens(1, batch=batch)
    with AttentionCapture(layer) as capture:
        seen = layer(x, grid=GRID, num_prefix=1)
    assert [(record.kind, record.query_length, record.key_length) for record in capture.records] == KINDS[name]
    assert all(record.num_heads == K for record in capture.records)
    for record in capture.records:
        torch.testing.assert_close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]))
    torch.testing.assert_close(seen, layer(x, grid=GRID, num_prefix=1))


@pytest.mark.parametrize(
    ("layer", "kind", "heads"),
    [
        (Attention(C, num_heads=4, differential=True), "self", 8),
        (Attention(C, num_heads=1, differential=True), "self", 2),
        (Attention(C, num_heads=4, num_kv_heads=2), "self", 4),
        (ClassAttention(C), "cross", 8),
        (MapPooling(C), "cross", 8),
    ],
)
def test_the_attention_of_options_and_pooling_is_seen(layer, kind, heads):
    with AttentionCapture(layer) as capture:
        layer(tokens(1))
    assert [(record.kind, record.num_heads) for record in capture.records] == [(kind, heads)]


class _Net(nn.Module):
    """A patch embedding and one layer of windows."""

    def __init__(self, num_prefix):
        super().__init__()
        self.embed = nn.Conv2d(3, C, 4, stride=4)
        self.prefix = nn.Parameter(torch.randn(1, num_prefix, C))
        self.layer = WindowAttention(C, num_heads=K, window_size=3, shift=1)

    def forward(self, images):
        maps = self.embed(images)
        grid = (maps.shape[2], maps.shape[3])
        x = torch.cat((self.prefix.expand(len(images), -1, -1), maps.flatten(2).transpose(1, 2)), dim=1)
        return self.layer(x, grid=grid, num_prefix=self.prefix.shape[1]).mean(1)


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_where_the_keys_of_windows_lie_is_found(num_prefix):
    net, images = _Net(num_prefix).eval(), torch.rand(2, 3, 20, 28)
    with AttentionCapture(net, kinds=["window"]) as capture:
        net(images)
    positions = find_positions(net, images, capture.records[0])
    assert positions.grid == GRID
    assert (positions.keys[:, :num_prefix] == -1).all()
    keys = positions.keys[:, num_prefix:]
    sees = windows_written_out(GRID, 3, 1, 0)
    # Together, the windows hold each patch once, and who shares a window and is not masked is who sees whom.
    assert sorted(keys[keys >= 0].tolist()) == list(range(35))
    weights = capture.records[0].weights[: len(keys), 0]
    for window, places in enumerate(keys):
        for query, place in enumerate(positions.queries[window]):
            if place >= 0:
                seen = places[(weights[window, query, num_prefix:] > 0)]
                assert set(seen.tolist()) <= set(sees[place].nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_token_layer("windows", C), "did you mean 'window'"),
        (lambda: create_token_layer("window", C, windowsize=3), "did you mean 'window_size'"),
        (lambda: create_token_layer("self", 0), "dim as a whole number"),
        (lambda: create_token_layer("linear", 20, num_heads=3), "num_heads to divide 20 channels"),
        (lambda: Attention(C, num_heads=K, num_kv_heads=2), "num_kv_heads to divide 3 heads"),
        (lambda: Attention(C, num_heads=8, differential=True), "an even width"),
        (lambda: Attention(C, gated="head"), "'headwise'"),
        (lambda: WindowAttention(C, window_size=4, shift=4), "a shift of 0 to 3"),
        (lambda: AgentAttention(C, num_agents=10), "use 9 or 16"),
        (lambda: Attention(C)(tokens()[0]), "tokens \\(B, N, 24\\), got \\(35, 24\\)"),
        (lambda: Attention(C)(tokens(), tokens()), "kv_dim="),
        (lambda: Attention(C, kv_dim=8)(tokens()), "a context \\(B, keys, 8\\), got none"),
        (lambda: Attention(C, kv_dim=8)(tokens(), tokens()), "got \\(2, 35, 24\\)"),
        (lambda: Attention(C, num_heads=K, kv_dim=C)(tokens(), tokens(), rope=AxialRotary(8)(GRID)), "no rope"),
        (lambda: Attention(C, num_heads=K)(tokens(1), rope=AxialRotary(8)(GRID)), "36 tokens"),
        (
            lambda: WindowAttention(C, num_heads=K, window_size=3)(
                tokens(1), grid=GRID, num_prefix=1, rope=AxialRotary(8)(GRID)
            ),
            "36 tokens",
        ),
        (lambda: WindowAttention(C)(tokens()), "grid for window attention, got none"),
        (lambda: WindowAttention(C)(tokens(1), grid=GRID), "0 prefix tokens and 5 x 7 patches, got 36"),
        (lambda: Attention(C, relative_bias=GRID)(tokens()), "grid for a relative position bias"),
        (lambda: RelativeBias((4, 7), 2)(GRID), "at most 4 x 7 patches, got 5 x 7"),
        (lambda: Attention(C, relative_bias=7), r"relative_bias as \(rows, columns\) of patches, got 7"),
        (lambda: Attention(C, relative_bias=(0, 7)), "relative_bias as"),
        (lambda: Attention(C, relative_bias=GRID, kv_dim=8), "no relative_bias for cross-attention"),
        (lambda: Attention(C, kv_dim=0), "kv_dim as a whole number"),
        (lambda: Attention(C, differential=True, num_heads=K, depth=-1), "depth as the number of layers"),
        (lambda: AgentAttention(C, grid_size=14), "grid_size as"),
        (lambda: Attention(C, kv_dim=8)(tokens(), torch.zeros(5, 8)), r"a context \(B, keys, 8\), got \(5, 8\)"),
        (lambda: WindowAttention(C)(tokens(), grid=35), "grid for window attention, got 35"),
        (
            lambda: Attention(C)(tokens(), mask=torch.ones(35, 35).long()),
            r"booleans .* torch.int64: pass mask",
        ),
        (lambda: Attention(C)(tokens(), mask=torch.ones(2, 35).bool()), r"\(2, 8, 35, 35\) .* got \(2, 35\): one of"),
        (lambda: ClassAttention(C)(tokens(), mask=torch.ones(35, 35).bool()), r"\(2, 8, 1, 35\) .* got \(35, 35\)"),
        (lambda: MapPooling(C)(tokens(), mask=torch.ones(34).bool()), r"got \(34,\)"),
        (lambda: Attention(C, num_heads=K)(tokens(), rope=MixedRotary(C, K, 3)(GRID)), "of one layer .* got tuple"),
        (lambda: AxialRotary(8, temperature=0), "temperature as a number above 0"),
        (lambda: AxialRotary(8, jitter=0.0), "jitter as a number above 0"),
        (lambda: MixedRotary(C, K, 2, temperature=-1), "temperature as a number above 0"),
    ],
)
def test_bad_input_is_one_line(make, message):
    with pytest.raises(UsageError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_or_rope_that_a_layer_has_no_use_for_is_refused(name):
    layer, info = layer_of(name), TOKEN_LAYERS.info(name)
    given = {"mask": torch.ones(36, 36, dtype=torch.bool), "rope": AxialRotary(C // K)(GRID, num_prefix=1)}
    for part, value in given.items():
        run = partial(layer, tokens(1), grid=GRID, num_prefix=1, **{part: value})
        if info.get(part):
            assert run().shape == (2, 36, C)
        else:
            with pytest.raises(UsageError, match=f"expected no {part} for"):
                run()
    if info.get("grid"):
        with pytest.raises(UsageError, match="expected the patches' grid"):
            layer(tokens())
    else:
        assert layer(tokens()).shape == (2, 35, C)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_onnx_gives_the_same(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = layer_of(name)
    rope = AxialRotary(C // K)(GRID, num_prefix=1) if TOKEN_LAYERS.info(name).get("rope") else None

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, grid=GRID, num_prefix=1, rope=rope)

    program = torch.onnx.export(Fixed().eval(), (tokens(1),), dynamo=True, verbose=False)
    program.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: tokens(1).numpy()})
    np.testing.assert_allclose(output, layer(tokens(1), grid=GRID, num_prefix=1, rope=rope).detach().numpy(), atol=1e-4)

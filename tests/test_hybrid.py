"""The hybrid blocks: each against an independent implementation, or its paper's equation written in NumPy."""

from functools import partial

import numpy as np
import pytest
import torch
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn, EfficientLocalAttn
from torch import nn

from vision_attn.errors import UsageError
from vision_attn.layers.factory import create_layer
from vision_attn.reporting import ReportGate


def moved(block):
    """The block in evaluation mode with other numbers than those it starts with."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in block.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise.abs() if name.endswith("running_var") else 0.5 * noise)
    return block.eval()


def maps(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def copy_in_order(block, other):
    """Gives `block` the numbers of `other`, whose tensors are the same in the same order."""
    values = list(other.state_dict().values())
    names = list(block.state_dict())
    assert len(names) == len(values)
    shapes = [tensor.shape for tensor in block.state_dict().values()]
    block.load_state_dict(
        {name: value.reshape(shape) for name, value, shape in zip(names, values, shapes, strict=True)}
    )
    return block


def outputs_and_gradients(block, x):
    leaf = x.clone().requires_grad_()
    out = block(leaf)
    (gradient,) = torch.autograd.grad((out * maps(*out.shape)).sum(), leaf)
    return out, gradient


def assert_equal(block, other, x):
    """The same values and gradients in evaluation and in training."""
    for training in (False, True):
        results = outputs_and_gradients(block.train(training), x), outputs_and_gradients(other.train(training), x)
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def assert_matches(block, expected, x, **tolerances):
    with torch.no_grad():
        out = block(x)
    tolerances = {"atol": 1e-5, "rtol": 1e-5} | tolerances
    torch.testing.assert_close(out, torch.as_tensor(expected).to(out.dtype), **tolerances)


def numbers(block):
    """The block's state in NumPy, in double precision."""
    return {name: tensor.double().numpy() for name, tensor in block.state_dict().items()}


def reported(block, x):
    """What each ReportGate of a block was given: name -> (gate, features)."""
    seen = {}
    for name, module in block.named_modules():
        if isinstance(module, ReportGate):
            module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: args}))
    with torch.no_grad():
        block(x)
    return seen


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def relu(z):
    return np.maximum(z, 0)


def softmax(z):
    powers = np.exp(z - z.max())
    return powers / powers.sum()


def batch_norm(z, state, name):
    """Normalises the first axis of one image's map with running statistics."""
    mean, variance, weight, bias = (
        state[f"{name}.{part}"].reshape(-1, *[1] * (z.ndim - 1))
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (z - mean) / np.sqrt(variance + 1e-5) * weight + bias


def normalize(z, groups, weight, bias):
    """Normalises groups of the first axis of one image's map with their own mean and variance."""
    parts = z.reshape(groups, -1)
    parts = (parts - parts.mean(1, keepdims=True)) / np.sqrt(parts.var(1, keepdims=True) + 1e-5)
    shape = (-1, *[1] * (z.ndim - 1))
    return parts.reshape(z.shape) * weight.reshape(shape) + bias.reshape(shape)


def convolve(z, weight, bias=None, dilation=1):
    """A convolution with zeros around one image's map, place by place."""
    out_channels, _, height, width = weight.shape
    down, right = dilation * (height // 2), dilation * (width // 2)
    padded = np.pad(z, ((0, 0), (down, down), (right, right)))
    result = np.zeros((out_channels, *z.shape[1:]))
    for i in range(height):
        for j in range(width):
            top, left = i * dilation, j * dilation
            shifted = padded[:, top : top + z.shape[1], left : left + z.shape[2]]
            result += np.einsum("oc,chw->ohw", weight[:, :, i, j], shifted)
    return result if bias is None else result + bias[:, None, None]


@pytest.mark.parametrize(
    ("name", "channels", "options", "expected"),
    [
        ("cbam", 64, {}, 2 * 64 * 4 + 64 + 4 + 100),
        ("cbam", 6, {"kernel_size": 3}, 2 * 6 + 6 + 1 + 20),
        ("bam", 64, {}, 3 * 64 * 4 + 18 * 16 + 13 * 4 + 3 * 64 + 3),
        ("bam", 6, {}, 3 * 6 + 18 + 13 + 3 * 6 + 3),
        ("scse", 64, {}, 2 * 64 * 32 + 2 * 64 + 32 + 1),
        ("coord", 512, {}, 3 * 512 * 16 + 3 * 16 + 2 * 512),
        ("coord", 64, {}, 3 * 64 * 8 + 3 * 8 + 2 * 64),
        ("triplet", 64, {}, 300),
        ("triplet", 64, {"kernel_size": 3}, 60),
        ("simam", 64, {}, 0),
        ("shuffle", 512, {}, 3 * 512 // 64),
        ("shuffle", 24, {}, 3 * 24 // 12),
        ("polarized", 64, {}, 2 * 64**2 + 3 * 64),
        ("polarized", 7, {}, 4 * 7 * 3 + 3 * 7),
        ("ema", 64, {}, 10 * 2**2 + 4 * 2),
        ("ema", 48, {"groups": 6}, 10 * 8**2 + 4 * 8),
        ("ela", 64, {}, 2 * (7 + 2) * 64),
        ("ela", 64, {"kernel_size": 5, "groups": 8}, 2 * (5 * 64 * 8 + 2 * 64)),
    ],
)
def test_the_number_of_parameters_is_what_the_docstring_says(name, channels, options, expected):
    assert sum(parameter.numel() for parameter in create_layer(name, channels, **options).parameters()) == expected


@pytest.mark.parametrize(("channels", "kernel"), [(32, 7), (6, 3)])
def test_cbam_equals_timms_with_the_same_weights(channels, kernel):
    block = create_layer("cbam", channels, kernel_size=kernel)
    theirs = CbamModule(channels, mlp_bias=True, rd_channels=max(channels // 16, 1), spatial_kernel_size=kernel)
    theirs.spatial.conv.bn.momentum = 0.01
    copy_in_order(block, moved(theirs))
    assert_equal(block, theirs, maps(2, channels, 5, 6))
    torch.testing.assert_close(block.norm.running_var, theirs.spatial.conv.bn.running_var)


def test_bam_adds_its_two_parts_as_in_the_paper():
    block, x = moved(create_layer("bam", 8, reduction=2, dilation=3)), maps(2, 8, 5, 6)
    state, expected = numbers(block), []
    for z in x.double().numpy():
        hidden = state["channel.0.weight"][..., 0, 0] @ z.mean((1, 2)) + state["channel.0.bias"]
        hidden = relu(batch_norm(hidden, state, "channel.1"))
        logits = state["channel.3.weight"][..., 0, 0] @ hidden + state["channel.3.bias"]
        channel = batch_norm(logits, state, "channel.4")
        spatial = z
        for place, dilation in ((0, 1), (3, 3), (6, 3)):
            weight, bias = state[f"spatial.{place}.weight"], state[f"spatial.{place}.bias"]
            spatial = relu(batch_norm(convolve(spatial, weight, bias, dilation), state, f"spatial.{place + 1}"))
        spatial = convolve(spatial, state["spatial.9.weight"], state["spatial.9.bias"])
        spatial = batch_norm(spatial, state, "spatial.10")
        expected.append(z * (1 + sigmoid(channel[:, None, None] + spatial)))
    assert_matches(block, np.stack(expected), x)


def test_bams_options_are_used():
    block = create_layer("bam", 32, reduction=4, dilation=2)
    assert block.spatial[3].dilation == (2, 2) and block.spatial[3].in_channels == block.channel[0].out_channels == 8
    assert create_layer("bam", 32).spatial[6].dilation == (4, 4)


@pytest.mark.parametrize("fusion", ["add", "max"])
def test_scse_is_the_papers_equation(fusion):
    block, x = moved(create_layer("scse", 6, fusion=fusion)), maps(2, 6, 4, 5)
    state, expected = numbers(block), []
    for z in x.double().numpy():
        hidden = relu(state["reduce.weight"][..., 0, 0] @ z.mean((1, 2)) + state["reduce.bias"])
        channel = sigmoid(state["expand.weight"][..., 0, 0] @ hidden + state["expand.bias"])
        spatial = sigmoid(np.einsum("c,chw->hw", state["squeeze.weight"][0, :, 0, 0], z) + state["squeeze.bias"])
        parts = channel[:, None, None] * z, spatial * z
        expected.append(parts[0] + parts[1] if fusion == "add" else np.maximum(*parts))
    assert_matches(block, np.stack(expected), x)


def test_coordinate_attention_equals_timms_with_the_same_weights():
    block = create_layer("coord", 32)
    theirs = CoordAttn(32, rd_channels=8, bias=True)
    copy_in_order(block, moved(theirs))
    assert_equal(block, theirs, maps(2, 32, 5, 6))


def test_triplet_attention_is_the_papers_equation():
    block, x = moved(create_layer("triplet", 6, kernel_size=3)), maps(2, 6, 4, 5)
    state, expected = numbers(block), []

    def gate(pooled, name):
        logits = batch_norm(convolve(pooled, state[f"{name}.0.weight"]), state, f"{name}.1")
        return sigmoid(logits[0])

    for z in x.double().numpy():
        spatial = gate(np.stack([z.max(0), z.mean(0)]), "spatial")
        columns = gate(np.stack([z.max(1), z.mean(1)]), "columns")
        # The authors turn the map so that W is in front: what is convolved is rows by channels.
        rows = gate(np.stack([z.max(2).T, z.mean(2).T]), "rows").T
        expected.append((z * spatial + z * columns[:, None, :] + z * rows[:, :, None]) / 3)
    assert_matches(block, np.stack(expected), x)


@pytest.mark.parametrize("e_lambda", [1e-4, 1.0])
def test_simam_is_the_energy_of_its_paper(e_lambda):
    block, x = create_layer("simam", 4, e_lambda=e_lambda), maps(2, 4, 5, 6)
    z = x.double().numpy()
    expected = np.empty_like(z)
    for place in np.ndindex(z.shape):
        channel = z[place[:2]]
        t, mean, variance = z[place], channel.mean(), channel.var(ddof=1)
        energy = 4 * (variance + e_lambda) / ((t - mean) ** 2 + 2 * variance + 2 * e_lambda)
        expected[place] = t * sigmoid(1 / energy)
    assert_matches(block, expected, x)


def test_simam_squares_large_half_precision_values_without_overflow():
    x = 1000 * maps(1, 4, 5, 6)
    torch.testing.assert_close(
        create_layer("simam", 4)(x.half()).float(), create_layer("simam", 4)(x), rtol=2e-3, atol=0
    )


def test_simam_of_one_place_is_the_gate_of_the_mean():
    x = maps(2, 4, 1, 1)
    torch.testing.assert_close(create_layer("simam", 4)(x), x * torch.sigmoid(torch.tensor(0.5)))


def test_shuffle_attention_is_the_papers_equation():
    block, x = moved(create_layer("shuffle", 12, groups=2)), maps(2, 12, 4, 5)
    state, expected = numbers(block), []
    for z in x.double().numpy():
        halves = []
        for group in z.reshape(2, 6, 4, 5):
            first, second = group[:3], group[3:]
            logits = state["channel_weight"] * first.mean((1, 2))[:, None, None] + state["channel_bias"]
            halves.append(first * sigmoid(logits))
            normalized = normalize(second, 3, state["norm.weight"], state["norm.bias"])
            halves.append(second * sigmoid(state["spatial_weight"] * normalized + state["spatial_bias"]))
        weighed = np.concatenate(halves)
        expected.append([weighed[half * 6 + place] for place in range(6) for half in (0, 1)])
    assert_matches(block, np.array(expected), x)


def test_shuffle_attention_starts_with_the_papers_numbers():
    block, x = create_layer("shuffle", 4, groups=1), maps(1, 4, 3, 3)
    shuffled = x[:, [0, 2, 1, 3]]
    torch.testing.assert_close(block(x), shuffled * torch.sigmoid(torch.tensor(1.0)))


@pytest.mark.parametrize(("channels", "groups"), [(512, 64), (24, 12), (40, 20), (2, 1), (384, 64)])
def test_shuffle_attention_takes_as_many_groups_as_fit(channels, groups):
    assert create_layer("shuffle", channels).groups == groups


@pytest.mark.parametrize("arrangement", ["parallel", "sequential"])
def test_polarized_self_attention_is_the_papers_equation(arrangement):
    block, x = moved(create_layer("polarized", 6, arrangement=arrangement)), maps(2, 6, 4, 5)
    state, expected = numbers(block), []

    def channel_gate(z):
        places = z.reshape(6, -1)
        attention = softmax(state["channel.query.weight"][0, :, 0, 0] @ places)
        raised = state["channel.expand.weight"] @ ((state["channel.value.weight"] @ places) @ attention)
        return sigmoid(normalize(raised, 1, state["channel.norm.weight"], state["channel.norm.bias"]))[:, None, None]

    def spatial_gate(z):
        places = z.reshape(6, -1)
        queries = (state["spatial.query.weight"][..., 0, 0] @ places).mean(1)
        return sigmoid(softmax(queries) @ (state["spatial.value.weight"][..., 0, 0] @ places)).reshape(4, 5)

    for z in x.double().numpy():
        if arrangement == "parallel":
            expected.append(z * channel_gate(z) + z * spatial_gate(z))
        else:
            weighed = z * channel_gate(z)
            expected.append(weighed * spatial_gate(weighed))
    assert_matches(block, np.stack(expected), x)


def test_polarized_attention_says_what_its_keys_are():
    block = create_layer("polarized", 6)
    assert block.channel.key_positions(2, 3).keys.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert block.channel.key_positions(2, 3).queries is None
    assert block.spatial.key_positions(2, 3).keys is None
    assert create_layer("ema", 6).key_positions(2, 3).keys is None


def test_ema_is_the_papers_equation():
    block, x = moved(create_layer("ema", 12, groups=3)), maps(2, 12, 4, 5)
    state, expected = numbers(block), []
    weight, bias = state["conv1.weight"][..., 0, 0], state["conv1.bias"]
    for image in x.double().numpy():
        for z in image.reshape(3, 4, 4, 5):
            rows = sigmoid(weight @ z.mean(2) + bias[:, None])
            columns = sigmoid(weight @ z.mean(1) + bias[:, None])
            gated = z * rows[:, :, None] * columns[:, None, :]
            first = normalize(gated, 4, state["norm.weight"], state["norm.bias"])
            second = convolve(z, state["conv3.weight"], state["conv3.bias"])
            logits = np.einsum("c,chw->hw", softmax(first.mean((1, 2))), second)
            logits += np.einsum("c,chw->hw", softmax(second.mean((1, 2))), first)
            expected.append(z * sigmoid(logits))
    assert_matches(block, np.stack(expected).reshape(x.shape), x)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (40, 20), (7, 7), (37, 1)])
def test_ema_takes_as_many_groups_as_fit(channels, groups):
    assert create_layer("ema", channels).groups == groups


def test_ela_equals_timms_without_its_activation_and_with_the_papers_groups():
    block = create_layer("ela", 32)
    theirs = EfficientLocalAttn(32, act_layer=nn.Identity, norm_layer=partial(nn.GroupNorm, 16))
    moved(theirs)
    for ours, convolution, norm in (
        (block.rows, theirs.conv_h, theirs.norm_h),
        (block.columns, theirs.conv_w, theirs.norm_w),
    ):
        ours[0].load_state_dict({"weight": convolution.weight.detach().view(32, 1, 7)})
        ours[1].load_state_dict(norm.state_dict())
    assert_equal(block, theirs, maps(2, 32, 5, 6))


def test_elas_larger_variant_convolves_channels_together():
    block, x = moved(create_layer("ela", 8, kernel_size=3, groups=2, num_groups=4)), maps(1, 8, 4, 5)
    state, z = numbers(block), x[0].double().numpy()

    def gate(strips, name):
        weight, halves = state[f"{name}.0.weight"][:, :, None], np.split(strips[:, None], 2)
        convolved = np.concatenate([convolve(halves[0], weight[:4]), convolve(halves[1], weight[4:])])[:, 0]
        return sigmoid(normalize(convolved, 4, state[f"{name}.1.weight"], state[f"{name}.1.bias"]))

    expected = z * gate(z.mean(2), "rows")[:, :, None] * gate(z.mean(1), "columns")[:, None]
    assert_matches(block, expected[None], x)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("cbam", {"report_channel": (2, 8, 1, 1), "report_spatial": (2, 1, 4, 5)}),
        ("bam", {"report": (2, 8, 4, 5)}),
        ("scse", {"report_channel": (2, 8, 1, 1), "report_spatial": (2, 1, 4, 5)}),
        ("coord", {"report_rows": (2, 8, 4, 1), "report_columns": (2, 8, 1, 5)}),
        (
            "triplet",
            {"report_columns": (2, 8, 1, 5), "report_rows": (2, 8, 4, 1), "report_spatial": (2, 1, 4, 5)},
        ),
        ("simam", {"report": (2, 8, 4, 5)}),
        ("shuffle", {"report_channel": (2, 4, 1, 1, 1), "report_spatial": (2, 4, 1, 4, 5)}),
        ("polarized", {"report_channel": (2, 8, 1, 1), "report_spatial": (2, 1, 4, 5)}),
        ("ema", {"report": (2, 8, 1, 4, 5)}),
        ("ela", {"report_rows": (2, 8, 4, 1), "report_columns": (2, 8, 1, 5)}),
    ],
)
def test_gates_are_reported_at_their_own_size(name, shapes):
    seen = reported(moved(create_layer(name, 8)), maps(2, 8, 4, 5))
    assert {label: tuple(gate.shape) for label, (gate, _) in seen.items()} == shapes


@pytest.mark.parametrize("name", ["cbam", "bam", "coord", "simam", "polarized", "ema", "ela"])
def test_the_last_reported_gate_makes_the_output(name):
    options = {"arrangement": "sequential"} if name == "polarized" else {}
    block, x = moved(create_layer(name, 8, **options)), maps(2, 8, 4, 5)
    gate, features = list(reported(block, x).values())[-1]
    assert_matches(block, (gate * features).reshape(x.shape), x)


@pytest.mark.parametrize(
    ("name", "channels", "options", "message"),
    [
        ("cbam", 8, {"reduction": 0}, "expected reduction as a whole number of at least 1, got 0"),
        ("cbam", 8, {"kernel_size": 6}, "expected kernel_size as an odd number, got 6: use 5 or 7"),
        ("bam", 8, {"dilation": 0}, "expected dilation as a whole number of at least 1, got 0"),
        ("scse", 8, {"fusion": "sum"}, "expected a known fusion, got 'sum': choose one of add, max"),
        ("coord", 8, {"reduction": -1}, "expected reduction as a whole number of at least 1, got -1"),
        ("triplet", 8, {"kernel_size": 4}, "expected kernel_size as an odd number, got 4: use 3 or 5"),
        ("simam", 8, {"e_lambda": 0}, "expected e_lambda above 0, got 0: constant maps would divide by it"),
        ("shuffle", 7, {}, "expected an even number of channels, got 7: shuffle attention halves them"),
        ("shuffle", 24, {"groups": 8}, "expected groups, on half of the channels, to divide 12 channels, got 8"),
        (
            "polarized",
            8,
            {"arrangement": "serial"},
            "expected a known arrangement, got 'serial': did you mean 'sequential'",
        ),
        ("ema", 24, {"groups": 5}, "expected groups to divide 24 channels, got 5: use one of"),
        ("ela", 24, {"groups": 5}, "expected groups to divide 24 channels, got 5: use one of"),
        ("ela", 24, {"num_groups": 16}, "expected num_groups to divide 24 channels, got 16: use one of"),
        ("ela", 24, {"kernel_size": 2}, "expected kernel_size as an odd number, got 2: use 1 or 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, channels, options, message):
    with pytest.raises(UsageError, match=message):
        create_layer(name, channels, **options)

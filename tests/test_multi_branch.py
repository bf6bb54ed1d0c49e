"""The multi-branch blocks: each against an independent implementation, or its paper's equation written in NumPy."""

import numpy as np
import pytest
import torch
from timm.layers import SelectiveKernel, SplitAttn
from torch import nn

from vision_attn.errors import UsageError
from vision_attn.layers.factory import create_layer


def moved(block):
    """The block in evaluation mode with other numbers than those it starts with."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in block.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise.abs() if name.endswith("running_var") else 0.3 * noise)
    return block.eval()


def maps(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def assert_equal_with_the_same_weights(block, theirs, x):
    """The same values and gradients in evaluation and in training, given tensors in the same order."""
    block.double().load_state_dict(
        dict(zip(block.state_dict(), moved(theirs).double().state_dict().values(), strict=True))
    )
    for training in (False, True):
        results = []
        for module in (block.train(training), theirs.train(training)):
            leaf = x.double().requires_grad_()
            out = module(leaf)
            (gradient,) = torch.autograd.grad((out * maps(*out.shape)).sum(), leaf)
            results.append((out, gradient))
        torch.testing.assert_close(*results)


def gate_of(block, x):
    """The gate and the maps that it was reported with."""
    seen = []
    block.report.register_forward_hook(lambda module, args, output: seen.extend(args))
    with torch.no_grad():
        block(x)
    return seen


@pytest.mark.parametrize(
    ("name", "channels", "options", "expected"),
    [
        ("sk", 64, {}, 2 * 9 * 64**2 // 32 + 2 * 2 * 64 + 3 * 64 * 32 + 2 * 32),
        ("sk", 1024, {}, 2 * 9 * 1024**2 // 32 + 2 * 2 * 1024 + 3 * 1024 * 64 + 2 * 64),
        ("sk", 6, {"paths": ((3, 1), (5, 1), (3, 3))}, (9 + 25 + 9) * 6 + 2 * 3 * 6 + 4 * 6 * 32 + 2 * 32),
        ("split_attn", 64, {}, 9 * 64**2 + 4 * 64 + 3 * 64 * 32 + 2 * 64 + 3 * 32),
        (
            "split_attn",
            96,
            {"radix": 3, "cardinality": 2, "kernel_size": 1},
            96**2 // 2 + 6 * 96 + 4 * 96 * 72 // 2 + 3 * 96 + 3 * 72,
        ),
        ("msca", 64, {}, 64**2 + 111 * 64),
        ("msca", 6, {"kernel_size": 3, "strips": (5,)}, 6**2 + 6 * (9 + 2 + 2 * 6)),
    ],
)
def test_the_number_of_parameters_is_what_the_docstring_says(name, channels, options, expected):
    assert sum(parameter.numel() for parameter in create_layer(name, channels, **options).parameters()) == expected


@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (24, 4)])
def test_selective_kernels_equal_timms_with_the_same_weights(channels, groups):
    block = create_layer("sk", channels, groups=groups, min_width=8)
    theirs = SelectiveKernel(channels, split_input=False, groups=groups, rd_channels=8)
    assert_equal_with_the_same_weights(block, theirs, maps(2, channels, 5, 6))


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (40, 20), (6, 6), (37, 1)])
def test_selective_kernels_take_as_many_groups_as_fit(channels, groups):
    assert create_layer("sk", channels).paths[1][0].groups == groups


def test_selective_kernels_have_the_papers_paths():
    first, second = (path[0] for path in create_layer("sk", 32).paths)
    assert (first.kernel_size, first.dilation, second.kernel_size, second.dilation) == ((3, 3), (1, 1), (3, 3), (2, 2))


@pytest.mark.parametrize(("radix", "cardinality"), [(2, 1), (2, 2), (3, 2), (1, 1), (1, 2)])
def test_split_attention_equals_timms_with_the_same_weights(radix, cardinality):
    block = create_layer("split_attn", 24, radix=radix, cardinality=cardinality)
    hidden = max(24 * radix // 4, 32)
    theirs = SplitAttn(24, groups=cardinality, radix=radix, rd_channels=cardinality, norm_layer=nn.BatchNorm2d)
    theirs.fc1 = nn.Conv2d(24, hidden, 1, groups=cardinality)
    theirs.bn1 = nn.BatchNorm2d(hidden)
    theirs.fc2 = nn.Conv2d(hidden, 24 * radix, 1, groups=cardinality)
    assert_equal_with_the_same_weights(block, theirs, maps(2, 24, 5, 6))


@pytest.mark.parametrize(("name", "options"), [("sk", {}), ("split_attn", {}), ("split_attn", {"cardinality": 2})])
def test_a_gate_chooses_among_paths(name, options):
    block, x = moved(create_layer(name, 8, **options)), maps(2, 8, 4, 5)
    gate, paths = gate_of(block, x)
    assert gate.shape == (2, 2, 8, 1, 1) and paths.shape == (2, 2, 8, 4, 5)
    torch.testing.assert_close(gate.sum(1), torch.ones(2, 8, 1, 1))
    torch.testing.assert_close((gate * paths).sum(1), block(x))


def depthwise(z, weight, bias):
    """A depthwise convolution with zeros around one image's map, place by place."""
    _, _, height, width = weight.shape
    padded = np.pad(z, ((0, 0), (height // 2, height // 2), (width // 2, width // 2)))
    result = np.zeros_like(z) + bias[:, None, None]
    for i in range(height):
        for j in range(width):
            result += weight[:, 0, i, j, None, None] * padded[:, i : i + z.shape[1], j : j + z.shape[2]]
    return result


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3, "strips": (5, 9)}])
def test_msca_is_the_papers_equation(options):
    block, x = moved(create_layer("msca", 6, **options)), maps(2, 6, 4, 5)
    state = {name: tensor.double().numpy() for name, tensor in block.state_dict().items()}
    expected = []
    for z in x.double().numpy():
        local = depthwise(z, state["local.weight"], state["local.bias"])
        total = local.copy()
        for place, length in enumerate(options.get("strips", (7, 11, 21))):
            row, column = (state[f"strips.{place}.{part}.weight"] for part in (0, 1))
            assert row.shape[2:] == (1, length) and column.shape[2:] == (length, 1)
            strip = depthwise(local, row, state[f"strips.{place}.0.bias"])
            total += depthwise(strip, column, state[f"strips.{place}.1.bias"])
        gate = np.einsum("oc,chw->ohw", state["mix.weight"][..., 0, 0], total) + state["mix.bias"][:, None, None]
        expected.append(z * gate)
    with torch.no_grad():
        torch.testing.assert_close(block(x), torch.tensor(np.stack(expected)).float(), atol=1e-5, rtol=1e-5)
    gate, features = gate_of(block, x)
    assert features is x and gate.shape == x.shape


@pytest.mark.parametrize(
    ("name", "channels", "options", "message"),
    [
        ("sk", 8, {"paths": ()}, r"expected paths as \(kernel, dilation\) pairs, got \(\): give one pair or more"),
        ("sk", 8, {"paths": (3, 5)}, r"expected paths as \(kernel, dilation\) pairs, got \(3, 5\): give"),
        ("sk", 8, {"paths": ((4, 1),)}, "expected a path's kernel as an odd number, got 4: use 3 or 5"),
        ("sk", 8, {"paths": ((3, 0),)}, "expected a path's dilation as a whole number of at least 1, got 0"),
        ("sk", 8, {"groups": 3}, "expected groups to divide 8 channels, got 3: use one of"),
        ("sk", 8, {"min_width": 0}, "expected min_width as a whole number of at least 1, got 0"),
        ("split_attn", 7, {}, "expected cardinality times radix to divide 7 channels, got 2: use one of"),
        ("split_attn", 8, {"radix": 0}, "expected radix as a whole number of at least 1, got 0"),
        ("split_attn", 8, {"cardinality": 3}, "expected cardinality times radix to divide 8 channels, got 6"),
        ("split_attn", 8, {"kernel_size": 2}, "expected kernel_size as an odd number, got 2: use 1 or 3"),
        ("msca", 8, {"kernel_size": 4}, "expected kernel_size as an odd number, got 4: use 3 or 5"),
        ("msca", 8, {"strips": (7, 10)}, "expected a strip's length as an odd number, got 10: use 9 or 11"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, channels, options, message):
    with pytest.raises(UsageError, match=message):
        create_layer(name, channels, **options)

"""Gates: what blocks in a network multiply its feature maps with, against hooks on the blocks themselves."""

import pytest
import timm
import torch
from torch import nn

from vision_attn.attribution import explain
from vision_attn.attribution.gates import see_gates
from vision_attn.capture import AttentionCapture
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.layers.attach import attach_attention
from vision_attn.layers.base import LAYERS
from vision_attn.layers.factory import create_layer, list_layers
from vision_attn.layout import KeyPositions
from vision_attn.look.sheets import layer_maps
from vision_attn.reporting import ReportAttention, ReportGate


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
        assert result.options["layer"] == name
        torch.testing.assert_close(result.maps, gated.mean(1))


@pytest.mark.parametrize(("name", "block"), [("skresnet18", "layer4.1.conv1"), ("resnest14d", "layer4.0.conv2")])
def test_a_gate_among_paths_is_shown_by_their_sum(name, block):
    model, images = small(name), noise(2, 3, 64, 96)
    result = explain(model, images, method="gates")
    assert result.options["layer"] == block
    torch.testing.assert_close(result.maps, through(model, block, images)[1].mean(1))


def test_a_spatial_gate_is_shown_as_it_is():
    model, images = small(block="cbam"), noise(2, 3, 64, 96)
    result = explain(model, images, method="gates")
    features, gated = through(model, "layer4.1.se.spatial", images)
    assert result.options["layer"] == "layer4.1.se.spatial"
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


# ------------------------------------------------------------------------------------------------ blocks that report


class Net(nn.Module):
    """One block between a convolution and a linear head."""

    def __init__(self, block, channels=16):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=4, padding=1)
        self.block, self.head = block, nn.Linear(channels, 3)

    def forward(self, images):
        return self.head(self.block(self.stem(images)).mean((2, 3)))


def net(name, **options):
    torch.manual_seed(0)
    if LAYERS.info(name).get("sizes") == "fixed":
        options["feature_size"] = (5, 7)
    return Net(create_layer(name, 16, **options)).eval()


@pytest.mark.parametrize("name", list_layers())
def test_every_block_is_drawn(name):
    model, images = net(name), noise(2, 3, 20, 28)
    result = explain(model, images, method="gates")
    assert result.maps.shape == (2, 5, 7)
    assert result.maps.isfinite().all()
    assert result.options["layer"].startswith("block")
    alone = explain(model, images[1:], method="gates").maps[0]
    torch.testing.assert_close(result.maps[1], alone, atol=1e-6, rtol=1e-4)
    assert torch.equal(explain(model, images, method="gates", layer=result.options["layer"]).maps, result.maps)
    # Attention to places gives away all that it has, but for what goes to padding; gates are no shares.
    for view in see_gates(model, images, patch=lambda _: None):
        if view.what in ("attention", "context maps"):
            assert (view.maps.sum((1, 2)) < 1 + 1e-4).all() and (view.maps.sum((1, 2)) > 0.2).all()


class Told(nn.Module):
    """Reports whatever gate it is given, and multiplies it."""

    def __init__(self, gate, groups=1):
        super().__init__()
        self.gate, self.groups, self.report = gate, groups, ReportGate()

    def forward(self, x):
        features = x.unflatten(1, (self.groups, -1)) if self.groups > 1 else x
        gated = features * self.report(self.gate.expand(len(x), *self.gate.shape[1:]), features)
        return gated.flatten(1, 2) if self.groups > 1 else gated


def seen(gate, groups=1, **options):
    torch.manual_seed(0)
    model = Net(Told(gate, groups)).eval()
    (view,) = see_gates(model, images := noise(2, 3, 20, 28), patch=lambda _: None, **options)
    torch.testing.assert_close(explain(model, images, method="gates").maps, view.maps)
    return view, model.stem(images).detach()


def test_gates_of_every_shape_are_shown_as_what_they_are():
    torch.manual_seed(1)
    spatial = torch.randn(1, 1, 5, 7)
    view, _ = seen(spatial)
    assert (view.what, view.channels) == ("spatial gate", None)
    torch.testing.assert_close(view.maps, spatial[:, 0].expand(2, -1, -1))  # with its sign
    full = torch.randn(1, 16, 5, 7)
    view, _ = seen(full)
    assert view.what == "gate of channels and places"
    torch.testing.assert_close(view.maps, full.mean(1).expand(2, -1, -1))
    rows, columns = torch.randn(1, 16, 5, 1), torch.randn(1, 16, 1, 7)
    for gate, what in ((rows, "rows"), (columns, "columns")):
        view, _ = seen(gate)
        assert view.what == f"gate of channels and {what}"
        torch.testing.assert_close(view.maps, gate.mean(1).expand(2, 5, 7))
    view, _ = seen(torch.stack([spatial, 3 * spatial], 1), groups=2)
    assert view.what == "spatial gate of each group"
    torch.testing.assert_close(view.maps, 2 * spatial[:, 0].expand(2, -1, -1))


def test_channel_gates_have_their_values_and_strongest_channels_beside():
    torch.manual_seed(1)
    gate = torch.randn(1, 16, 1, 1)
    view, features = seen(gate, strongest=2)
    assert view.what == "channel gate"
    torch.testing.assert_close(view.maps, (gate * features).mean(1))
    assert torch.equal(view.channels, gate.flatten(1).expand(2, -1))
    numbers, maps = view.strongest
    assert numbers[0].tolist() == gate.flatten().abs().argsort(descending=True)[:2].tolist()
    torch.testing.assert_close(maps[1, 0], (gate * features)[1, numbers[1, 0]])
    # In groups they are channels still; only what sums to 1 chooses among paths.
    grouped, _ = seen(gate.unflatten(1, (2, 8)), groups=2)
    assert grouped.what == "channel gate"
    torch.testing.assert_close(grouped.maps, view.maps)
    assert torch.equal(grouped.channels, view.channels)
    paths = gate.unflatten(1, (2, 8)).softmax(1)
    view, features = seen(paths, groups=2)
    assert view.what == "gate among paths"
    assert view.channels.shape == (2, 2, 8)
    torch.testing.assert_close(view.maps, (paths * features.unflatten(1, (2, 8))).sum(1).mean(1))


def test_both_gates_of_cbam_have_names_and_the_same_block_for_both():
    model, images = net("cbam"), noise(2, 3, 20, 28)
    spatial = explain(model, images, method="gates", layer="block.report_spatial").maps
    channel = explain(model, images, method="gates", layer="block.report_channel").maps
    assert torch.equal(explain(model, images, method="gates", layer="block").maps, spatial)
    with torch.no_grad(), AttentionCapture(model, kinds=("gate",)) as capture:
        model(images)
    first, second = capture.records
    torch.testing.assert_close(channel, (first.weights * first.values).mean(1))
    torch.testing.assert_close(spatial, second.weights[:, 0])
    assert second.weights.shape == (2, 1, 5, 7)


def test_a_criss_cross_query_shows_a_cross():
    model, images = net("criss_cross"), noise(2, 3, 20, 28)
    maps = explain(model, images, method="gates", query_patch=(2, 4)).maps
    cross = torch.zeros(5, 7, dtype=torch.bool)
    cross[2], cross[:, 4] = True, True
    assert (maps[:, cross] > 0).all() and (maps[:, ~cross] == 0).all()
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2))
    torch.testing.assert_close(maps, explain(model, images, method="raw", query_patch=(2, 4)).maps)
    # All places together: each its own cross.
    each = [explain(model, images, method="gates", query_patch=(i, j)).maps for i in range(5) for j in range(7)]
    torch.testing.assert_close(explain(model, images, method="gates").maps, torch.stack(each).mean(0))


def test_axial_queries_show_a_column_and_a_row():
    model, images = net("axial"), noise(2, 3, 20, 28)
    column = explain(model, images, method="gates", layer="block.height", query_patch=(2, 4)).maps
    row = explain(model, images, method="gates", layer="block.width", query_patch=(2, 4)).maps
    assert (column[:, :, 4] > 0).all() and (column[:, :, torch.arange(7) != 4] == 0).all()
    assert (row[:, 2] > 0).all() and (row[:, torch.arange(5) != 2] == 0).all()


@pytest.mark.parametrize(
    ("name", "options", "rows", "columns"),
    [
        ("window", {"window_size": 4}, slice(0, 4), slice(4, 7)),
        ("halo", {"block_size": 2, "halo_size": 1}, slice(1, 5), slice(3, 7)),
    ],
)
def test_a_query_in_a_window_shows_its_window_and_in_a_halo_its_neighbourhood(name, options, rows, columns):
    model, images = net(name, **options), noise(2, 3, 20, 28)
    maps = explain(model, images, method="gates", query_patch=(2, 4)).maps
    window = torch.zeros(5, 7, dtype=torch.bool)
    window[rows, columns] = True
    assert (maps[:, window] > 0).all() and (maps[:, ~window] == 0).all()


class Descriptors(nn.Module):
    """Two heads of three descriptors, and channels that attend to each other: planted."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.report = weights, ReportAttention("cross")

    def forward(self, x):
        values = x.flatten(2).unflatten(1, (2, -1)).transpose(2, 3)
        self.report(self.weights.expand(len(x), -1, -1, -1), values)
        return x

    def key_positions(self, height, width):
        return KeyPositions((height, width), keys=torch.arange(height * width)[None])


def test_descriptors_and_heads_are_fused_or_chosen():
    weights = noise(1, 2, 3, 35).softmax(-1)
    model, images = Net(Descriptors(weights)), noise(2, 3, 20, 28)

    def maps(**options):
        return explain(model, images, method="gates", **options).maps[0].flatten()

    torch.testing.assert_close(maps(), weights.mean((1, 2))[0])
    torch.testing.assert_close(maps(descriptor=2), weights[0, :, 2].mean(0))
    torch.testing.assert_close(maps(descriptor=2, head=1), weights[0, 1, 2])
    for options, message in (
        ({"head": 2}, "expected a head from 0 to 1 in 'block', got 2"),
        ({"descriptor": 3}, "expected a descriptor from 0 to 2 in 'block', got 3"),
        ({"query_patch": (0, 0)}, "known where queries lie for query_patch"),
    ):
        with pytest.raises(UsageError, match=message):
            maps(**options)


class Channels(nn.Module):
    """Channels attend to each other in two heads."""

    def forward(self, x):
        values = x.flatten(2).unflatten(1, (2, -1))
        weights = (values @ values.transpose(2, 3)).softmax(-1)
        return (weights @ values).flatten(1, 2).unflatten(2, x.shape[2:])

    def key_positions(self, height, width):
        return KeyPositions((height, width), keys=None)


def test_attention_between_channels_is_the_gate_that_each_channel_receives():
    torch.manual_seed(0)
    model, images = Net(Channels()), noise(2, 3, 20, 28)
    values = model.stem(images).detach().flatten(2).unflatten(1, (2, -1))
    weights = torch.einsum("bhqn,bhkn->bhqk", values, values).softmax(-1)
    gate = weights.mean(2)
    expected = torch.einsum("bhk,bhkn->bhn", gate, values) / 8
    (view,) = see_gates(model, images, patch=lambda _: None)
    assert view.what == "channel attention"
    torch.testing.assert_close(view.channels, gate.flatten(1))
    torch.testing.assert_close(view.maps, expected.mean(1).unflatten(1, (5, 7)))
    second = explain(model, images, method="gates", head=1).maps
    torch.testing.assert_close(second, expected[:, 1].unflatten(1, (5, 7)))
    with pytest.raises(UsageError, match="attends to places for query_patch, got attention between channels in 'bl"):
        explain(model, images, method="gates", query_patch=(0, 0))


def test_channels_are_told_from_places_by_what_the_block_states_where_there_are_as_many():
    model, images = net("danet"), noise(2, 3, 16, 16)
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    assert [(record.kind, record.key_length) for record in capture.records] == [("self", 16), ("channel", 16)]
    assert [view.what for view in see_gates(model, images, patch=lambda _: None)] == ["attention", "channel attention"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("se", {"query_patch": (1, 1)}, "a block with attention for query_patch, got a gate in 'block': leave query_p"),
        ("non_local", {"query_patch": (5, 0)}, r"query_patch as \(row, column\) on the 5 x 7 grid, got \(5, 0\)"),
        ("non_local", {"descriptor": 0}, "whose queries are no places for descriptor, got places in 'block'"),
        ("se", {"head": 0}, "a block with attention for head, got a gate in 'block'"),
    ],
)
def test_options_that_do_not_fit_the_block_are_told(name, options, message):
    with pytest.raises(UsageError, match=message):
        explain(net(name), noise(1, 3, 20, 28), method="gates", **options)


def test_options_need_fit_the_chosen_block_alone():
    torch.manual_seed(0)
    model = Net(nn.Sequential(create_layer("non_local", 16), nn.MaxPool2d(2), create_layer("non_local", 16)))
    images = noise(1, 3, 20, 28)
    assert explain(model, images, method="gates", layer="block.0", query_patch=(4, 6)).maps.shape == (1, 5, 7)
    with pytest.raises(UsageError, match="on the 2 x 3 grid"):
        explain(model, images, method="gates", query_patch=(4, 6))


def test_an_attached_block_tells_how_much_of_it_is_let_in():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    images = noise(1, 3, 64, 64)
    attach_attention(model, "sse", where="stages", image_size=64)
    result = explain(model, images, method="gates")
    assert result.options["gain"] == 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    gained = explain(model, images, method="gates")
    assert 0.4 < gained.options["gain"] < 0.6
    assert gained.options["turned"] == 0.5
    assert "gain" not in explain(net("sse"), noise(1, 3, 20, 28), method="gates").options


@pytest.mark.parametrize("name", ["sse", "sge", "simam", "se"])
def test_an_attached_gate_is_shown_as_what_the_networks_map_is_multiplied_with(name):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    attach_attention(model, name, where="layer2", image_size=64)
    attached = next(module for module in model.modules() if hasattr(module, "gain"))
    attached.gain.data.uniform_(-2, 0)  # the block works the other way round
    attached.register_forward_pre_hook(lambda _, args: (args[0] + 1,))  # no zeros to divide by
    seen = []
    attached.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    result = explain(model, noise(2, 3, 64, 96), method="gates")
    before, after = seen[0]
    shown = after.mean(1) if name == "se" else (after / before).mean(1)
    torch.testing.assert_close(result.maps, shown, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ blocks in an encoder


def encoder(block, **options):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(48, 64), embed_dim=16, depth=2, num_heads=2, num_classes=3, **options
    ).eval()
    return attach_attention(model, block, where="blocks.1", image_size=(48, 64)) if block else model


METHODS = ("rollout", "generic", "grad_rollout", "legrad")


@pytest.mark.parametrize("block", ["se", "cbam", "polarized", "xca", "ema"])
def test_blocks_that_gate_an_encoder_leave_its_attention_as_it_is(block):
    # Nothing is let in yet, so that the answer is that of the encoder alone.
    plain, model, images = encoder(None), encoder(block), noise(1, 3, 48, 64)
    for method in METHODS:
        expected = explain(plain, images, method=method).maps
        torch.testing.assert_close(explain(model, images, method=method).maps, expected)
    assert explain(model, images, method="gates").maps.shape == (1, 3, 4)


@pytest.mark.parametrize("block", ["non_local", "criss_cross", "axial", "gc"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_blocks_that_mix_places_are_refused_by_products_of_token_attention(block, pool):
    model = encoder(block, global_pool=pool, class_token=pool == "token")
    images = noise(1, 3, 48, 64)
    for method in METHODS:
        with pytest.raises(
            UsageError, match=f"for {method}, got a block that attends on a feature map in 'blocks.1.att"
        ):
            explain(model, images, method=method)
    assert explain(model, images, method="gates").maps.shape == (1, 3, 4)
    # raw shows each layer by itself: the block's own attention on its map, the encoder's on the patches.
    for layer in (0, -1):
        maps = explain(model, images, method="raw", layer=layer).maps
        assert maps.shape == (1, 3, 4) and maps.sum() > 0.5


@pytest.mark.parametrize(
    ("name", "shown", "other", "what"),
    [
        ("a2", "block.gather", "block.distribute", "to descriptors"),
        ("efficient", "block.gather", "block.distribute", "to descriptors"),
        ("danet", "block.position", "block.channel", "between channels"),
    ],
)
def test_raw_and_the_sheet_of_heads_show_the_attention_of_a_block_that_has_places(name, shown, other, what):
    model, images = net(name), noise(2, 3, 20, 28)
    maps = explain(model, images, method="raw").maps
    assert torch.equal(maps, explain(model, images, method="raw", layer=shown).maps)
    ((layer, heads),) = layer_maps(model, images[:1])
    assert layer == shown
    torch.testing.assert_close(heads.mean(0), maps[0])
    with pytest.raises(UsageError, match=f"got attention {what} in '{other}': choose {shown}, or use gates or"):
        explain(model, images, method="raw", layer=other)


def test_raw_names_gates_where_a_block_attends_between_channels_alone():
    with pytest.raises(UsageError, match="got attention between channels in 'block': use gates or"):
        explain(net("xca"), noise(1, 3, 20, 28), method="raw")

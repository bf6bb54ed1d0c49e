"""What holds of every block, whoever wrote it; the equation of each is tested with its group."""

import copy
import inspect
import io
import pickle
from typing import get_args

import pytest
import torch
from torch import nn

from vision_attn.capture import AttentionCapture
from vision_attn.capture.records import Kind
from vision_attn.errors import UsageError
from vision_attn.layers.base import LAYERS, Group, SafeBatchNorm2d, SafeGroupNorm, check_odd, fitting_groups
from vision_attn.layers.factory import create_layer, list_layers
from vision_attn.reporting import HasKeyPositions, ReportAttention, ReportGate

SIZE = (5, 6)
SIZES = [(1, 1), (1, 7), (6, 1), (3, 5), (7, 9), (8, 8)]
REQUIRED = {
    "channel": "eca ese fca gct ge se srm",
    "spatial": "attention_gate lka sge sse strip_pooling",
    "hybrid": "bam cbam coord ela ema polarized scse shuffle simam triplet",
    "self_attention": "a2 axial bot criss_cross danet efficient external gc halo non_local window xca",
    "multi_branch": "msca sk split_attn",
}
# So that a group has several channels, also where there are only 16.
OPTIONS = {"sge": {"groups": 4}, "shuffle": {"groups": 2}, "ema": {"groups": 4}}
# Gates that are not in (0, 1), and why.
RANGES = {
    "gct": (0, 2),  # 1 + tanh
    "bam": (1, 2),  # 1 + sigmoid
    "lka": (-torch.inf, torch.inf),  # a convolution
    "msca": (-torch.inf, torch.inf),  # a convolution
    "ese": (0, 1 + 1e-6),  # the hard sigmoid reaches 1
}
# What does something of its own on a map of one place, in the exported graph too.
SMALL = ("ela", "simam", "srm", "halo")
every_block = pytest.mark.parametrize("name", list_layers())


def make(name, channels=16, size=SIZE, *, seed=0, **options):
    """A new block; one for a fixed size is made for `size`."""
    if LAYERS.info(name).get("sizes") == "fixed":
        options["feature_size"] = size
    if channels == 16:
        options = OPTIONS.get(name, {}) | options
    torch.manual_seed(seed)
    return create_layer(name, channels, **options)


def trained(name, channels=16, size=SIZE):
    """A block in evaluation mode whose numbers are all moved, so that nothing is hidden behind a zero."""
    block = make(name, channels, size).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for label, buffer in block.named_buffers():
            if label.endswith("running_mean"):
                buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
            if label.endswith("running_var"):
                buffer *= 0.5 + torch.rand(buffer.shape, generator=generator)
    return block


def noise(*shape, seed=2, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**options)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("group", REQUIRED)
def test_all_blocks_are_there(group):
    assert set(REQUIRED[group].split()) <= set(list_layers(group))
    assert set(list_layers(group)) <= set(list_layers())


@every_block
def test_a_block_says_what_it_is(name):
    info, block = LAYERS.info(name), LAYERS.get(name)
    assert info["group"] in get_args(Group)
    assert info["gate"] and info["paper"] and info["url"].startswith("https://")
    for word in ("Source:", "Parameters:", "Args:", "channels:", "Example:", info["url"]):
        assert word in block.__doc__


@every_block
def test_any_map_comes_back_at_its_size_with_finite_values(name):
    for size in SIZES:
        block = trained(name, size=size)
        out = block(noise(2, 16, *size))
        assert out.shape == (2, 16, *size) and out.dtype == torch.float32
        assert out.isfinite().all()


@every_block
def test_the_defaults_work_with_any_number_of_channels(name):
    for channels in (6, 8, 24, 40):
        out = trained(name, channels)(noise(2, channels, *SIZE))
        assert out.shape == (2, channels, *SIZE) and out.isfinite().all()


@every_block
def test_very_few_channels_work_or_are_refused(name):
    for channels in (1, 2, 3):
        try:
            block = make(name, channels)
        except UsageError as error:
            assert "expected" in str(error) and ": " in str(error)
        else:
            assert block(noise(2, channels, *SIZE)).isfinite().all()


@every_block
def test_flat_and_large_maps_give_finite_values_and_gradients(name):
    for size in ((1, 1), SIZE):
        for x in (torch.zeros(2, 16, *size), torch.ones(2, 16, *size), 1e3 * noise(2, 16, *size)):
            for training in (False, True):
                block = trained(name, size=size).train(training)
                leaf = x.clone().requires_grad_()
                block(leaf).sum().backward()
                assert leaf.grad.isfinite().all()
                assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


@every_block
def test_one_image_can_be_trained_on(name):
    for size in ((1, 1), (1, 4), SIZE):
        block = trained(name, size=size).train()
        out = block(noise(1, 16, *size).requires_grad_())
        out.square().sum().backward()
        assert out.isfinite().all()
        assert all(parameter.grad is not None for parameter in block.parameters())


@every_block
def test_images_of_a_batch_do_not_know_each_other(name):
    block, x = trained(name), noise(3, 16, *SIZE)
    close(torch.cat([block(image[None]) for image in x]), block(x))


@every_block
@pytest.mark.parametrize("training", [False, True])
def test_the_input_is_left_as_it_was(name, training):
    block, x = trained(name).train(training), noise(2, 16, *SIZE)
    before = x.clone()
    with torch.no_grad():
        block(x)
    assert torch.equal(x, before)
    # A network's map is no leaf: autograd would not notice a change in place.
    leaf = x.clone().requires_grad_()
    inner = leaf * 1
    block(inner).sum().backward()
    assert torch.equal(inner, before)


@every_block
def test_a_new_block_hands_its_input_on_exactly_if_it_says_so(name):
    x = noise(2, 16, *SIZE)
    same = torch.allclose(make(name).eval()(x), x, atol=1e-6, rtol=0)
    assert same == bool(LAYERS.info(name).get("identity"))


@every_block
def test_gates_fit_their_features_and_lie_in_their_range(name):
    block, seen = trained(name), []
    for module in block.modules():
        if isinstance(module, ReportGate):
            module.register_forward_hook(lambda module, args, output: seen.append(args))
    block(noise(2, 16, *SIZE))
    low, high = RANGES.get(name, (0, 1))
    for gate, features in seen:
        assert torch.broadcast_shapes(gate.shape, features.shape) == features.shape
        assert gate.dim() == features.dim() and gate.dtype == features.dtype
        # On the map, or on the map turned by 90 degrees: what else would be drawn?
        assert features.dim() in (4, 5) and sorted(features.shape[-2:]) == sorted(SIZE)
        assert gate.isfinite().all() and gate.min() >= low and gate.max() <= high
        assert gate.numel() == gate.shape[0] or gate.std() > 0


@every_block
def test_a_block_is_seen_by_capture(name):
    block, x = trained(name), noise(2, 16, *SIZE)
    with torch.no_grad():
        expected = block(x)
        with AttentionCapture(block, kinds=get_args(Kind)) as capture:
            out = block(x)
    assert torch.equal(out, expected)
    records = capture.records
    gates = [record for record in records if record.kind == "gate"]
    assert len(gates) == sum(isinstance(module, ReportGate) for module in block.modules())
    attention = [record for record in records if record.kind != "gate"]
    for record in attention:
        assert record.weights.min() >= 0 and record.weights.isfinite().all()
        close(record.weights.sum(-1), torch.ones_like(record.weights[..., 0]))
    placed = [module for module in block.modules() if isinstance(module, HasKeyPositions)]
    assert bool(attention) == bool(placed)
    assert len({record.name for record in gates}) == len(gates)


@every_block
def test_capturing_with_gradients_leaves_the_outputs(name):
    block, x = trained(name), noise(2, 16, *SIZE).requires_grad_()
    expected = block(x)
    with AttentionCapture(block, kinds=get_args(Kind), detach=False) as capture:
        out = block(x)
    close(out, expected)
    for record in capture.records:
        assert torch.autograd.grad(out.sum(), record.weights, retain_graph=True)[0].isfinite().all()


@every_block
def test_places_of_keys_fit_the_attention(name):
    block, x = trained(name), noise(2, 16, *SIZE)
    with torch.no_grad(), AttentionCapture(block, kinds=get_args(Kind)) as capture:
        block(x)
    records = [record for record in capture.records if record.kind != "gate"]
    placed = [record for record in records if record.positions is not None]
    assert bool(placed) == bool(records)
    for record in placed:
        places = record.positions
        for indices, grid, length in (
            (places.keys, places.grid, record.key_length),
            (places.queries, places.query_grid or places.grid, record.query_length),
        ):
            if indices is not None:
                assert indices.shape[-1] == length
                assert indices.min() >= -1 and indices.max() < grid[0] * grid[1]
                assert len(record.values) == 2 * len(indices)  # windows of one image lie together


@every_block
def test_gradients_are_those_of_finite_differences(name):
    size = (3, 4)
    block = trained(name, 8, size).double()
    x = noise(1, 8, *size, dtype=torch.float64).requires_grad_()
    parameters = tuple(block.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *parameters), fast_mode=True)


@every_block
def test_double_precision_stays(name):
    block, x = trained(name), noise(2, 16, *SIZE)
    out = copy.deepcopy(block).double()(x.double())
    assert out.dtype == torch.float64
    close(out.float(), block(x), 1e-4)


@every_block
def test_bfloat16_autocast_comes_near_single_precision(name):
    block, x = make(name).eval(), noise(2, 16, *SIZE)
    expected = block(x)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = block(given)
        assert out.isfinite().all()
        close(out.float(), expected, 0.05)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block.train()(leaf).float().sum().backward()
    assert leaf.grad.isfinite().all()


@every_block
def test_channels_last_gives_the_same(name):
    block, x = trained(name), noise(2, 16, *SIZE)
    expected = block(x)
    close(block(x.to(memory_format=torch.channels_last)), expected)
    close(block.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), expected)
    close(block(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)


class Beside(nn.ModuleDict):
    """Blocks that all see the same map: compiled together they take half the time."""

    def forward(self, x):
        return {name: block(x) for name, block in self.items()}


@pytest.mark.parametrize("group", REQUIRED)
def test_the_whole_block_is_one_graph(group):
    blocks, x = Beside({name: trained(name) for name in list_layers(group)}), noise(2, 16, *SIZE)
    torch._dynamo.reset()
    outs = torch.compile(blocks, backend="eager", fullgraph=True)(x)
    for name, block in blocks.items():
        close(outs[name], block(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["se", "cbam", "criss_cross", "window", "sk", "gc"])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_code_gives_the_same(name, training):
    block, x = trained(name).train(training), noise(2, 16, *SIZE)
    twin = copy.deepcopy(block)
    torch._dynamo.reset()
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, out = block(leaves[0]), torch.compile(twin, fullgraph=True)(leaves[1])
    close(out, expected, 1e-4)
    expected.square().sum().backward()
    out.square().sum().backward()
    close(leaves[1].grad, leaves[0].grad, 1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@every_block
def test_the_onnx_graph_gives_the_same(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for size in ((5, 9), (1, 1)) if name in SMALL else ((5, 9),):
        block, x, file = trained(name, size=size), noise(2, 16, *size), io.BytesIO()
        torch.onnx.export(block, (x,), dynamo=True, verbose=False).save(file)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        close(torch.from_numpy(out), block(x).detach(), 1e-4)


@every_block
def test_state_dicts_copies_and_pickles_give_the_same(name):
    block, x = trained(name), noise(2, 16, *SIZE)
    expected = block(x)
    loaded = make(name, seed=5).eval()
    loaded.load_state_dict(block.state_dict())
    for twin in (loaded, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), expected)
    assert not any(
        module._parameters for module in block.modules() if isinstance(module, (ReportGate, ReportAttention))
    )


@every_block
def test_what_is_no_map_of_its_channels_is_refused(name):
    block = make(name)
    for shape in ((2, 8, *SIZE), (16, *SIZE), (2, *SIZE, 16), (2, 30, 16)):
        with pytest.raises(UsageError, match=r"expected .*\(B, 16, H, W\), got .*: "):
            block(torch.zeros(shape))


@every_block
def test_a_block_for_one_size_refuses_another(name):
    if LAYERS.info(name).get("sizes") == "fixed":
        with pytest.raises(UsageError, match=r"expected .*5, 6.*, got .*4, 4.*: "):
            make(name)(torch.zeros(2, 16, 4, 4))


@every_block
def test_unknown_options_and_channels_that_are_none_are_refused(name):
    with pytest.raises(UsageError, match=f"(option of {name}|no options for {name})"):
        make(name, reductoin=4)
    for channels in (0, -8, 2.5, "64", True):
        with pytest.raises(UsageError, match="expected channels as a whole number of at least 1, got"):
            make(name, channels)


@every_block
def test_options_of_the_wrong_type_are_refused_in_one_line(name):
    fixed = {"feature_size": SIZE} if LAYERS.info(name).get("sizes") == "fixed" else {}
    for option in list(inspect.signature(LAYERS.get(name)).parameters.values())[1:]:
        wrong = ["a", [-1], {}]
        if option.annotation is not bool:
            wrong += [float("nan")]
        if option.annotation in (int, int | None):
            wrong += [2.5, True, -1]
        for value in wrong:
            with pytest.raises(UsageError, match=r"^expected .+, got .+: .+") as error:
                create_layer(name, 16, **fixed | {option.name: value})
            assert "\n" not in str(error.value)


def test_a_size_for_the_learned_gather_of_ge_is_checked():
    for size in (7, "ab", (0, 3), (5,), (5, 6.0)):
        with pytest.raises(UsageError, match=r"^expected .*feature_size.*, got"):
            create_layer("ge", 16, extra_params=True, feature_size=size)


def test_close_names_are_offered():
    with pytest.raises(UsageError, match=r"expected a known layer, got 'cbma': did you mean 'cbam'"):
        create_layer("cbma", 16)
    with pytest.raises(UsageError, match=r"expected a known option of se, got 'reducton': did you mean 'reduction'"):
        create_layer("se", 16, reducton=4)
    with pytest.raises(UsageError, match="expected no options for ese, got reduction: leave it out"):
        create_layer("ese", 16, reduction=4)
    with pytest.raises(UsageError, match="expected a known group of layers, got 'chanel': did you mean 'channel'"):
        list_layers("chanel")
    with pytest.raises(UsageError, match="expected a known layer, got 'CBAM': did you mean 'cbam'"):
        create_layer("CBAM", 16)
    for name in (3, None, ["se"]):
        with pytest.raises(UsageError, match="expected a known layer, got "):
            create_layer(name, 16)


def test_a_block_of_ones_own_takes_three_lines(monkeypatch):
    monkeypatch.setattr(LAYERS, "_things", dict(LAYERS._things))
    monkeypatch.setattr(LAYERS, "_info", dict(LAYERS._info))

    @LAYERS.register("brightness", group="spatial", gate="spatial")
    class Brightness(nn.Module):
        def __init__(self, channels: int, *, gain: float = 1.0) -> None:
            super().__init__()
            self.gain = gain

        def forward(self, x):
            return x * torch.sigmoid(self.gain * x.mean(1, keepdim=True))

    block, x = create_layer("brightness", 16, gain=2.0), noise(1, 16, *SIZE)
    close(block(x), x * torch.sigmoid(2 * x.mean(1, keepdim=True)))
    assert "brightness" in list_layers("spatial")
    with AttentionCapture(block, kinds=("gate",)) as capture:
        block(x)
    assert capture.records[0].weights.shape == (1, 1, *SIZE)
    with pytest.raises(UsageError, match="expected a new name for a layer, got 'brightness'"):
        LAYERS.register("brightness")(Brightness)


def test_groups_fit_the_channels():
    assert [fitting_groups("groups", None, channels, 64) for channels in (256, 96, 40, 6, 67, 1)] == [
        64,
        48,
        40,
        6,
        1,
        1,
    ]
    assert fitting_groups("groups", 8, 64, 32) == 8
    with pytest.raises(UsageError, match=r"expected groups to divide 6 channels, got 4: use one of \[1, 2, 3, 6\]"):
        fitting_groups("groups", 4, 6, 64)
    with pytest.raises(UsageError, match="expected k as an odd number, got 4: use 3 or 5"):
        check_odd("k", 4)


def test_group_normalisation_takes_one_value_and_is_torchs_otherwise():
    ours, theirs, x = SafeGroupNorm(2, 4), nn.GroupNorm(2, 4), noise(3, 4, 2, 3)
    assert torch.equal(ours(x), theirs(x))
    nn.init.constant_(ours.bias, 0.5)
    close(SafeGroupNorm(4, 4)(noise(1, 4, 1, 1)), torch.zeros(1, 4, 1, 1), 1e-4)
    close(ours(torch.ones(1, 4, 1, 1)), torch.full((1, 4, 1, 1), 0.5), 1e-4)


def test_batch_normalisation_trains_on_one_value_and_is_torchs_otherwise():
    ours, theirs = SafeBatchNorm2d(4), nn.BatchNorm2d(4)
    for x in (noise(3, 4, 1, 1), noise(1, 4, 2, 3)):
        assert torch.equal(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())
    before, x = {key: value.clone() for key, value in ours.state_dict().items()}, noise(1, 4, 1, 1)
    assert torch.equal(ours(x), theirs.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())

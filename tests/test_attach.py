"""Blocks in networks that exist: where they go, that nothing changes until they learn, and that they come out again."""

import copy
import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import save_file
from timm.utils.model import reparameterize_model
from torch import nn

import vision_attn as va
from vision_attn.cli import main
from vision_attn.errors import CheckpointMismatchError, UsageError
from vision_attn.export import save_model
from vision_attn.layers.attach import Attached, attach_all, attach_attention, attached_blocks, attachments
from vision_attn.layers.attach import detach_attention as detach
from vision_attn.layers.base import LAYERS
from vision_attn.layers.places import image_shape
from vision_attn.models.factory import create_model, load_checkpoint, timm_preprocessing
from vision_attn.training.module import Classifier

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Case:
    """A network, and what its stages and blocks are, read off its source by hand."""

    name: str
    stages: list  # the modules whose output is the end of a stage
    blocks: int
    size: int | None = 64
    options: dict = field(default_factory=dict)

    def __str__(self):
        return self.name

    def build(self):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.name.startswith("torchvision/"):
                model = getattr(torchvision.models, self.name.partition("/")[2])(weights=None, **self.options)
            else:
                model = timm.create_model(self.name, **self.options)
        for module in model.modules():
            # What begins as zero, or divides by a variance that no photo has seen, hides what is wrong.
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)
        images = torch.randn(2, *image_shape(model, self.size))
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None
            with torch.no_grad():
                model.train()(images)
        return model.eval(), images


def layers(*depths, prefix="layer"):
    return [f"{prefix}{stage}.{depth - 1}" for stage, depth in enumerate(depths, 1)]


def stages(*depths, prefix="stages", inner=""):
    return [f"{prefix}.{stage}.{inner}{depth - 1}" for stage, depth in enumerate(depths)]


# Where the class token answers, nothing reads the patches after the last block.
_COLUMN = [f"blocks.{index}" for index in range(11)]
_FEW = [
    Case("resnet10t", layers(1, 1, 1, 1), 4),
    Case("regnety_002", ["s1.b1", "s2.b1", "s3.b4", "s4.b7"], 13),
    Case("tf_efficientnet_lite0", ["blocks.0.0", "blocks.1.1", "blocks.2.1", "blocks.4.2", "blocks.6.0"], 16),
    Case("convnext_atto", stages(2, 2, 6, 2, inner="blocks."), 12),
    Case("deit_tiny_patch16_224", _COLUMN[:2], 2, None, {"depth": 3}),
    Case("va_vit_micro_stem8_64", _COLUMN[:1], 1),
]
_MANY = [
    Case("torchvision/densenet121", [f"features.denseblock{i}" for i in (1, 2, 3, 4)], 4),
    Case("resnet18", layers(2, 2, 2, 2), 8),
    Case("resnet50", layers(3, 4, 6, 3), 16),
    Case("resnext50_32x4d", layers(3, 4, 6, 3), 16),
    Case("mobilenetv2_100", ["blocks.0.0", "blocks.1.1", "blocks.2.2", "blocks.4.2", "blocks.6.0"], 17),
    Case("mobilenetv3_small_100", ["blocks.0.0", "blocks.1.1", "blocks.3.1", "blocks.5.0"], 12),
    Case("efficientnet_b0", ["blocks.0.0", "blocks.1.1", "blocks.2.1", "blocks.4.2", "blocks.6.0"], 16),
    Case("densenet121", [f"features.denseblock{i}" for i in (1, 2, 3, 4)], 4, 96),
    Case("vgg11_bn", ["features.2", "features.6", "features.13", "features.20", "features.27"], 0),
    Case("repvgg_a0", stages(2, 4, 14, 1), 21),
    Case("cspresnet50", ["stages.0", "stages.1", "stages.2", "stages.3"], 13, 96),
    Case("cspdarknet53", [f"stages.{i}" for i in range(5)], 23),
    Case("dm_nfnet_f0", stages(1, 2, 6, 3), 12),
    Case("nf_resnet26", stages(2, 2, 2, 2), 8),
    Case("eca_nfnet_l0", stages(1, 2, 6, 3), 12),
    Case("resnest14d", layers(1, 1, 1, 1), 4),
    Case("hrnet_w18_small", [f"incre_modules.{i}.0" for i in range(4)], 23),
    Case("mobileone_s0", stages(4, 16, 20, 2), 42),
    Case("torchvision/resnet18", layers(2, 2, 2, 2), 8),
    Case("torchvision/mobilenet_v2", [f"features.{i}" for i in (1, 3, 6, 13, 17)], 17),
    Case("torchvision/mobilenet_v3_small", [f"features.{i}" for i in (1, 3, 8, 11)], 11),
    Case("torchvision/efficientnet_b0", [f"features.{i}" for i in ("1.0", "2.1", "3.1", "5.2", "7.0")], 16),
    Case("torchvision/convnext_tiny", [f"features.{i}" for i in ("1.2", "3.2", "5.8", "7.2")], 18),
    Case("torchvision/vgg11_bn", ["features.2", "features.6", "features.13", "features.20", "features.27"], 0),
    Case("torchvision/regnet_y_400mf",
         [f"trunk_output.block{i}.block{i}-{j}" for i, j in ((1, 0), (2, 2), (3, 5), (4, 5))], 16),
    Case("torchvision/vit_b_16", [f"encoder.layers.encoder_layer_{i}" for i in range(11)], 11, None),
    Case("torchvision/swin_t", [f"features.{i}" for i in ("1.1", "3.1", "5.5", "7.1")], 12),
    Case("torchvision/googlenet", ["inception3b", "inception4e", "inception5b"], 9, 96,
         {"aux_logits": False, "init_weights": True}),
    Case("deit_tiny_distilled_patch16_224", _COLUMN, 11, None),
    Case("vit_small_patch14_reg4_dinov2", _COLUMN, 11, None, {"img_size": (70, 98)}),
    Case("eva02_tiny_patch14_224", [*_COLUMN, "blocks.11"], 12, None),
    Case("va_vit_tiny_patch16_224", _COLUMN, 11, None),
    Case("swin_tiny_patch4_window7_224", stages(2, 2, 6, 2, prefix="layers", inner="blocks."), 12, None),
]  # fmt: skip
CASES = [*_FEW, *(pytest.param(case, marks=pytest.mark.slow) for case in _MANY)]


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@torch.no_grad()
def logits(model, images):
    return model(images)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_block_changes_nothing_until_it_has_learned_and_comes_out_again(case):
    model, images = case.build()
    before, old = logits(model, images), copy.deepcopy(model.state_dict())
    assert (before[0] - before[1]).abs().max() > 1e-4  # two images, two answers
    for where, name in (("stages", "cbam"), ("blocks", "eca")):
        if where == "blocks" and not case.blocks:
            with pytest.raises(UsageError, match="expected blocks that add or join maps, got none"):
                attach_attention(model, name, where=where, image_size=case.size)
            continue
        assert attach_attention(model, name, where=where, image_size=case.size) is model
        places = [place for place, _, _ in attached_blocks(model)]
        assert sorted(places) == sorted(case.stages) if where == "stages" else len(places) == case.blocks
        assert torch.equal(logits(model, images), before)
        # The old weights load, and the new keys lie below their places.
        model.load_state_dict(old)
        new = set(model.state_dict()) - set(old)
        assert set(old) < set(model.state_dict())
        assert all(any(key.startswith(f"{place}.") for place in places) for key in new)
        # They are in the way of the logits: a gain that is not zero changes them.
        for _, _, block in attached_blocks(model):
            nn.init.constant_(block.gain, 0.5)
        assert not torch.equal(logits(model, images), before)
        detach(model)
        assert torch.equal(logits(model, images), before)
        assert list(model.state_dict()) == list(old)
        assert not hooks(model)
        assert not hasattr(model, "attached_attention")
        assert not any(isinstance(module, Attached) for module in model.modules())


_TIMMS = ["regnety_002", "convnext_atto"]
_TIMMS += [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "tf_efficientnet_lite0", "nf_resnet26")]


@pytest.mark.parametrize("name", _TIMMS)
def test_stages_are_where_timm_takes_its_features(name):
    model = timm.create_model(name)
    theirs = [info["module"] for info in model.feature_info]
    attach_attention(model, "se", image_size=64)
    ours = [place for place, _, _ in attached_blocks(model)]
    for place in ours:
        assert any(f"{place}.".startswith(f"{module}.") for module in theirs)
    # All but the stem.
    assert len(ours) in (len(theirs), len(theirs) - 1)


def small(**options):
    """A residual network of four stages, 16 to 64 channels wide."""
    torch.manual_seed(0)
    options = {"num_classes": 3, "channels": (16, 32, 48, 64), "stem_width": 8, **options}
    return timm.create_model("resnet10t", **options).eval()


def chain(*, head=()):
    """Two convolutions 48 channels wide, and a classifier."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 48, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), *head, nn.Flatten(), nn.Linear(48, 3)).eval()


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_every_block_learns_from_the_start(name):
    model = chain()
    images, labels = torch.randn(2, 3, 12, 16), torch.tensor([0, 2])
    before = logits(model, images)
    attach_attention(model, name, where="2", image_size=(12, 16))
    assert torch.equal(logits(model, images), before)
    ((_, _, block),) = attached_blocks(model)
    assert block.does_nothing()
    assert (block.gain is None) == bool(LAYERS.info(name).get("identity"))
    wanting = {key for key, _ in block.named_parameters()}
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    # The gain, then what starts at zero in the block itself, then what is behind that.
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        wanting -= {key for key, parameter in block.named_parameters() if parameter.grad.any()}
        optimizer.step()
    assert not wanting
    assert not block.does_nothing()


def woken(model):
    """A model whose attached blocks do something."""
    for _, _, block in attached_blocks(model):
        if block.gain is not None:
            nn.init.constant_(block.gain, 0.5)
    return model


def test_the_sum_is_the_input_and_a_share_of_what_the_block_changes():
    torch.manual_seed(0)
    model = woken(attach_attention(small(), "se", where="layer1"))
    attached = model.layer1[0].attached_se
    attached.gain.data = torch.linspace(-1, 2, 16)
    x = torch.randn(2, 16, 5, 7)
    expected = x + attached.gain[:, None, None] * (attached.block(x) - x)
    torch.testing.assert_close(attached(x), expected)


def test_looking_for_places_leaves_no_trace():
    model = small().train()
    model.layer1.eval()
    images = torch.randn(2, 3, 64, 64)
    model(images).sum().backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with pytest.raises(UsageError, match="which gives \\(B, 64\\)"):
        attach_attention(model, "se", where=["layer1", "global_pool"])
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert model.layer2.training
    assert not model.layer1.training
    assert not model.layer1[0].conv1.training
    assert not hooks(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key])
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[key])
    attach_attention(model, "cbam", where=["layer1", "layer2"])
    assert not model.layer1[0].attached_cbam.block.training
    assert model.layer2[0].attached_cbam.block.training


def test_a_chains_pooled_end_is_no_stage():
    model = attach_attention(chain(head=(nn.Conv2d(48, 48, 1), nn.ReLU())), "se", image_size=16)
    assert [place for place, _, _ in attached_blocks(model)] == ["3"]


def test_after_the_last_block_a_class_token_answers_alone():
    for pool, expected in (("token", ["blocks.0"]), ("avg", ["blocks.0", "blocks.1"])):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, global_pool=pool)
        for where in ("stages", "blocks"):
            attach_attention(model, "eca", where=where)
            assert [place for place, _, _ in attached_blocks(model)] == expected
            detach(model)
    with pytest.raises(UsageError, match=r"whose class token answers after blocks\.0"):
        attach_attention(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1), "eca")
    # Who names the place wants it.
    attach_attention(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1), "eca", where="blocks.*")


def test_a_block_follows_its_place_in_dtype():
    model = attach_attention(small().to(torch.bfloat16), "cbam")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert woken(model)(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_under_autocast_the_place_keeps_its_dtype():
    model = woken(attach_attention(small(), "cbam"))
    seen = []
    model.layer2[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    images = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model, images)
    torch.testing.assert_close(mixed.float(), logits(model, images), atol=0.05, rtol=0.05)
    without = detach(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits(without, images)
    assert seen[0] == seen[2]


def test_copies_and_pickles_are_whole_and_can_be_taken_apart():
    for model in (small(), create_model("va_vit_micro_stem8_64", num_classes=3).eval()):
        images = torch.randn(2, 3, 64, 64)
        before = logits(model, images)
        woken(attach_attention(model, "eca"))
        changed = logits(model, images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other, images), changed)
            # Of the copy's own: another size there leaves the original alone.
            logits(other, torch.randn(1, 3, 64, 96))
            assert torch.equal(logits(model, images), changed)
            assert torch.equal(logits(detach(other), images), before)
            assert not hooks(other)
        assert torch.equal(logits(model, images), changed)


def test_a_chain_compiles_whole():
    model = woken(attach_attention(chain(), "se", where="2", image_size=16))
    images = torch.randn(2, 3, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, images), logits(model, images))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "va_vit_micro_stem8_64"])
def test_it_compiles_whole_and_exports(name):
    model = woken(create_model(name, num_classes=3, attention={"name": "eca"}).eval())
    images = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, images), logits(model, images))
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(logits(exported, images), logits(model, images))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "va_vit_micro_stem8_64"])
def test_onnx_gives_the_same_logits(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = woken(create_model(name, num_classes=3, attention={"name": "cbam"}).eval())
    images = torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits(model, images), atol=1e-5, rtol=1e-5)


def test_in_a_vit_the_prefix_passes_by_and_the_patches_lie_as_in_the_image():
    @LAYERS.register("columns", group="spatial", gate="spatial", replace=True)
    class Columns(nn.Module):
        """Adds the number of its column to each place."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.seen: list[tuple[int, ...]] = []

        def forward(self, x):
            self.seen.append(tuple(x.shape[2:]))
            return x + torch.arange(x.shape[3]).to(x)

    try:
        model = timm.create_model(
            "vit_tiny_patch16_224", depth=1, reg_tokens=2, dynamic_img_size=True, num_classes=3
        ).eval()
        attach_attention(model, "columns", where="blocks.0")
        attached = model.blocks[0].attached_columns
        nn.init.ones_(attached.gain)
        before, after = [], []
        attached.register_forward_pre_hook(lambda module, args: before.append(args[0]))
        attached.register_forward_hook(lambda module, args, output: after.append(output))
        for height, width in ((64, 96), (48, 32)):
            logits(model, torch.randn(2, 3, height, width))
            assert attached.block.seen[-1] == (height // 16, width // 16)
            added = after[-1] - before[-1]
            assert not added[:, :3].any()
            expected = torch.arange(width // 16).repeat(height // 16)[None, :, None].expand_as(added[:, 3:])
            torch.testing.assert_close(added[:, 3:], expected.to(added), atol=1e-4, rtol=0)
    finally:
        del LAYERS._things["columns"], LAYERS._info["columns"]


def test_left_out_patches_are_refused_with_the_numbers():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.5)
    attach_attention(model, "eca", where="blocks.0")
    with pytest.raises(UsageError, match="expected 1 prefix tokens and 14 x 14 patches, got 99 tokens"):
        model.train()(torch.zeros(1, 3, 224, 224))


def test_several_blocks_share_a_place_in_order_and_come_out_one_by_one():
    model, images = small(), torch.randn(1, 3, 64, 64)
    before = logits(model, images)
    attach_attention(model, "eca")
    attach_attention(model, "eca", attached_as="second", where="layer?")
    attach_attention(model, "gc", where="layer1.0")
    assert [name for _, name, _ in attached_blocks(model)][:3] == ["attached_eca", "second", "attached_gc"]
    assert len(attached_blocks(model)) == 9
    assert model.attached_attention[0]["where"] == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    rebuilt = attach_all(small(), model.attached_attention)
    assert list(rebuilt.state_dict()) == list(model.state_dict())
    detach(model, "second")
    assert {name for _, name, _ in attached_blocks(model)} == {"attached_eca", "attached_gc"}
    assert [spec["attached_as"] for spec in model.attached_attention] == ["attached_eca", "attached_gc"]
    with pytest.raises(UsageError, match="did you mean 'attached_eca'"):
        detach(model, "attached_ecb")
    assert torch.equal(logits(detach(model), images), before)
    attach_attention(model, "eca")
    assert len(attached_blocks(model)) == 4


def test_blocks_that_are_there_are_not_taken_for_the_networks_own():
    convolutions = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for c in (3, 8)]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    attach_attention(model, "danet", image_size=16)
    attach_attention(model, "eca", image_size=16)
    places = [place for place, _, _ in attached_blocks(model)]
    assert places == ["0.1", "0.1", "1.1", "1.1"]
    with pytest.raises(UsageError, match="expected blocks that add or join maps, got none"):
        attach_attention(model, "se", where="blocks", image_size=16)
    with pytest.raises(UsageError, match=r"matches none"):
        attach_attention(model, "se", where="**.attached_eca.*", image_size=16)


def test_patterns_stop_at_dots_and_two_stars_do_not():
    model = small()
    found = {}
    for where in ("layer1", "layer?", "layer[12].*", "**.conv2", ["layer1", "layer1.0", "conv1"], ["stages"]):
        attach_attention(model, "eca", where=where)
        found[str(where)] = [place for place, _, _ in attached_blocks(model)]
        detach(model)
    assert found["layer1"] == ["layer1.0"]
    assert found["layer?"] == found["['stages']"] == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert found["layer[12].*"] == ["layer1.0", "layer2.0"]
    assert found["**.conv2"] == [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]
    assert len(found["['layer1', 'layer1.0', 'conv1']"]) == 2


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)
        self.idle = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.convolution(self.convolution(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (small, {"name": "cbm"}, "expected a known layer, got 'cbm': did you mean 'cbam'"),
        (small, {"name": "cbam", "wher": "stages"}, "option of cbam, got 'wher': did you mean 'where'"),
        (small, {"name": "se", "where": "stage"}, "got 'stage': did you mean 'stages'"),
        (small, {"name": "se", "where": "layer7.*"}, "which matches none .* there are layer"),
        (small, {"name": "se", "where": "global_pool"}, r"got global_pool, which gives \(B, 64\)"),
        (small, {"name": "se", "where": []}, "expected where as"),
        (small, {"name": "se", "where": 3}, "expected where as"),
        (small, {"name": "se", "attached_as": "a.b"}, "expected attached_as as a name without dots"),
        (small, {"name": "se", "attached_as": "se"}, "layer1.0, got 'se', which it has for something of its own"),
        (small, {"name": "sge", "groups": 7}, r"the map \(16, 44, 44\) of layer1.0, got an error: .* divide 16 chan"),
        (small, {"name": "se", "image_size": 0}, "expected image_size as"),
        (small, {"name": "se", "image_size": "a"}, "expected image_size as"),
        (small, {"name": "se", "image_size": 64.0}, "expected image_size as"),
        (small, {"name": "se", "image_size": True}, "expected image_size as"),
        (small, {"name": "se", "image_size": (64, 64.0)}, "expected image_size as"),
        (small, {"name": 3}, "expected a known layer, got 3"),
        (small, {"name": "se", "where": ["stages", "conv1"]}, "expected 'stages' alone"),
        (Twice, {"name": "se", "where": "convolution"}, "convolution, which runs 2 times"),
        (Twice, {"name": "se", "where": "idle"}, "idle, which does not run"),
        (Twice, {"name": "se"}, "expected stages .* got none in Twice: name modules"),
        (nn.Identity, {"name": "se"}, "a network with parameters, got Identity"),
        (lambda: None, {"name": "se"}, "a network .* got NoneType"),
        (lambda: nn.DataParallel(small()), {"name": "se"}, "got DataParallel: attach first"),
        (lambda: torch.compile(chain(), backend="eager"), {"name": "se"}, "got a compiled one: attach first"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {"name": "se"}, r"takes images \(2, 3, 224, 224\), got an error"),
        (lambda: attach_attention(small(), "se"), {"name": "se"}, "got layer1.0, which has that: detach it"),
        (
            lambda: timm.create_model("densenet121"),
            {"name": "se", "where": ["features.denseblock1", "features.denseblock1.denselayer6"], "image_size": 32},
            "denselayer6, which has that",
        ),
    ],
)
def test_what_cannot_be_attached_is_told_and_leaves_the_network_alone(model, arguments, message):
    model = model()
    names = None if model is None else [name for name, _ in model.named_modules()]
    with pytest.raises(UsageError, match=message) as error:
        attach_attention(model, **arguments)
    assert "\n" not in str(error.value)
    assert names is None or [name for name, _ in model.named_modules()] == names


@pytest.mark.slow
def test_a_list_of_maps_is_refused_with_their_shapes():
    with pytest.raises(UsageError, match=r"gives a list of \(B, 16, 56, 56\), \(B, 32, 28, 28\)"):
        attach_attention(timm.create_model("hrnet_w18_small"), "se", where="stage2.0")


def test_without_blocks_there_is_nothing_to_take_out_nor_to_tell():
    for function in (detach, attachments):
        with pytest.raises(UsageError, match="expected a network with attached blocks, got ResNet without"):
            function(small())


def test_a_block_for_one_size_takes_it_from_the_network():
    model = attach_attention(small(), "bot", where="layer4", image_size=(64, 96))
    assert logits(model, torch.zeros(1, 3, 64, 96)).shape == (1, 3)
    with pytest.raises(UsageError, match=r"\(2, 3\)"):
        model(torch.zeros(1, 3, 96, 96))


def test_the_report_counts_what_a_hand_counts():
    model = attach_attention(small(), "se", image_size=64, reduction=16)
    report = attachments(model)
    widths = (16, 32, 48, 64)
    assert [place.shape for place in report.places] == [(c, s, s) for c, s in zip(widths, (16, 8, 4, 2), strict=True)]
    # 2 C m + C + m, and a gain a channel; both 1 x 1 convolutions see one place.
    assert [place.parameters for place in report.places] == [2 * c * (c // 16) + c + c // 16 + c for c in widths]
    assert [place.multiply_adds for place in report.places] == [2 * c * (c // 16) for c in widths]
    assert report.network_parameters == sum(parameter.numel() for parameter in small().parameters())
    assert report.parameters == sum(p.numel() for p in model.parameters()) - report.network_parameters
    lines = str(report).splitlines()
    assert len(lines) == 6
    assert "layer1.0  se     attached_se  16 x 16 x 16" in lines[1]
    assert lines[-1].startswith("4 blocks (se) attached: 1,290 parameters (+1 %)")


def test_a_report_leaves_the_model_alone():
    model = attach_attention(small().train(), "cbam", image_size=64)
    state = copy.deepcopy(model.state_dict())
    attachments(model)
    assert model.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_state_dict_with_some_of_a_block_is_refused():
    model = attach_attention(small(), "cbam")
    state = model.state_dict()
    del state["layer1.0.attached_cbam.gain"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layer1\.0\.attached_cbam\.gain"):
        model.load_state_dict(state)
    assert set(small().state_dict()).isdisjoint(key for key in model.state_dict() if "attached" in key)


def test_a_checkpoint_loads_with_the_blocks_weights_and_without():
    plain, model = small(), woken(attach_attention(small(), "cbam"))
    mine = {"name": "cbam", "where": "stages"}
    thin = {"num_classes": 3, "channels": (16, 32, 48, 64), "stem_width": 8, "attention": mine}
    fresh = create_model("resnet10t", checkpoint=plain.state_dict(), **thin).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(logits(fresh, images), logits(plain, images))
    trained = create_model("resnet10t", checkpoint=model.state_dict(), **thin).eval()
    assert torch.equal(logits(trained, images), logits(model, images))
    state = model.state_dict()
    del state["layer1.0.attached_cbam.gain"]
    with pytest.raises(CheckpointMismatchError, match=r"layer1\.0\.attached_cbam\.gain: missing"):
        load_checkpoint(trained, state)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("cbam", "expected attention as keys and values"),
        ([{"name": "cbam"}, 3], "expected attention as keys and values"),
        ({"nme": "cbam"}, "expected the name of a block in attention"),
        ({"name": "cbam", "wher": "stages"}, "did you mean 'where'"),
        ({"name": "cbam", "model": 1}, "expected a known option of cbam, got 'model'"),
    ],
)
def test_a_config_that_cannot_be_read_is_told(attention, message):
    with pytest.raises(UsageError, match=message):
        create_model("resnet10t", attention=attention)


def test_a_networks_list_runs_a_block_once_and_checkpointing_runs_it_too():
    # RegNet's stages and DenseNet's dense blocks run all that is in them.
    model = timm.create_model("regnety_002", num_classes=3)
    attach_attention(model, "eca", where="s3", image_size=64)
    assert [key for key in model.state_dict() if key.endswith("gain")] == ["s3.b4.attached_eca.gain"]
    model.train().set_grad_checkpointing()
    woken(model)(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.s3.b4.attached_eca.block.conv.weight.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_a_network_that_is_made_smaller_for_inference_keeps_its_blocks(name):
    model, images = Case(name, [], 0).build()
    woken(attach_attention(model, "eca", image_size=64))
    smaller = reparameterize_model(model)
    torch.testing.assert_close(logits(smaller, images), logits(model, images), rtol=1e-3, atol=1e-3)
    assert len(attached_blocks(smaller)) == 4


def test_an_artefact_has_its_blocks_and_is_explained(tmp_path):
    model = timm.create_model("resnet10t", num_classes=2, channels=(8, 8, 16, 16), stem_width=8).eval()
    woken(attach_attention(model, "cbam", image_size=64))
    attach_attention(model, "gc", where="layer4", image_size=64)
    folder = save_model(
        tmp_path / "a",
        model,
        architecture="resnet10t",
        model_args={"channels": [8, 8, 16, 16], "stem_width": 8},
        classes=("a", "b"),
        preprocessing=timm_preprocessing(model, 64),
    )
    again, images = va.load_model(folder), torch.randn(2, 3, 64, 64)
    assert torch.equal(logits(again, images), logits(model, images))
    assert [name for _, name, _ in attached_blocks(again)] == ["attached_cbam"] * 4 + ["attached_gc"]
    # Of the network's own modules, blocks or not.
    assert va.explain(again, images, method="grad_cam").options["layer"] == "layer4"
    assert va.explain(again, images, method="gates").options["layer"].startswith("layer4.0.attached_")


@pytest.mark.slow
def test_a_run_with_blocks_leaves_an_artefact_and_checkpoints_with_them(tmp_path):
    thin = {"channels": [8, 8, 16, 16], "stem_width": 8}
    theirs = timm.create_model("resnet10t", num_classes=5, **thin)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    config = yaml.safe_load((CONFIGS / "shapes_resnet_cbam.yaml").read_text())
    config["model"] |= {"checkpoint": str(tmp_path / "w.safetensors"), "options": thin, "freeze": ["conv1", "bn1"]}
    config["model"]["attention"] = [config["model"]["attention"], {"name": "bot", "where": "layer4", "num_heads": 2}]
    config["model"]["optim"] |= {"layer_decay": 0.8, "warmup_epochs": 0}
    config["data"] |= {"options": {"size": 32, "train": 16, "validation": 8, "test": 8}, "image_size": 32}
    config["data"] |= {"batch_size": 8}
    config |= {"trainer": {"max_epochs": 1, "accelerator": "cpu"}, "ema": 0.5, "run_dir": str(tmp_path / "run")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "c.yaml")]) == 0
    model = va.load_model(tmp_path / "run" / "export")
    assert [name for _, name, _ in attached_blocks(model)] == ["attached_cbam"] * 4 + ["attached_bot"]
    assert all(block.gain is None or block.gain.any() for _, _, block in attached_blocks(model))
    assert torch.equal(model.conv1[0].weight, theirs.conv1[0].weight)
    images = torch.randn(2, 3, 32, 32)
    again = va.open_model(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert torch.equal(logits(again, images), logits(model, images))
    assert va.explain(model, images, method="gates").maps.shape[0] == 2
    assert main(["test", "--config", str(tmp_path / "run" / "config.yaml")]) == 0


def test_a_new_block_in_a_frozen_layer_is_refused_and_one_that_learned_is_not(tmp_path):
    thin = {"channels": [8, 8, 16, 16], "stem_width": 8}
    attention = {"name": "cbam", "where": "layer1"}
    arguments = {"num_classes": 3, "options": thin, "attention": attention, "freeze": ["layer1"]}
    save_file(create_model("resnet10t", num_classes=3, **thin).state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(UsageError, match=r"which covers the new one at layer1\.0\.attached_cbam"):
        Classifier("resnet10t", checkpoint=str(tmp_path / "plain.safetensors"), **arguments)
    learned = woken(create_model("resnet10t", num_classes=3, attention=attention, **thin))
    save_file(learned.state_dict(), tmp_path / "w.safetensors")
    classifier = Classifier("resnet10t", checkpoint=str(tmp_path / "w.safetensors"), **arguments)
    assert not classifier.train().network.layer1[0].attached_cbam.training


@pytest.mark.slow
def test_the_example_config_builds_its_network():
    config = yaml.safe_load((CONFIGS / "shapes_resnet_cbam.yaml").read_text())["model"]
    model = create_model(
        config["name"], num_classes=8, image_size=64, attention=config["attention"], **config["options"]
    )
    assert len(attached_blocks(model)) == 4


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "weights", "size"),
    [
        ("tf_efficientnet_lite0", "tf_efficientnet_lite0", None),
        ("vit_small_patch14_dinov2", "vits14_saliency_fp16", 224),
    ],
)
def test_real_weights_answer_as_before(name, weights, size, real_dir):
    path = real_dir / "weights" / f"{weights}.safetensors"
    model = create_model(name, checkpoint=path, image_size=size, position_interpolation="hf").eval()
    images = torch.randn(2, 3, 224, 224)
    before, old = logits(model, images), model.state_dict()
    for where, block in (("stages", "cbam"), ("blocks", "gc"), ("stages", "coord")):
        attach_attention(model, block, where=where)
        torch.testing.assert_close(logits(model, images), before, rtol=0, atol=1e-6)
        detach(model)
        assert torch.equal(logits(model, images), before)
        assert list(model.state_dict()) == list(old)


def test_the_public_doors_are_these():
    assert va.attach_attention is attach_attention
    assert va.detach_attention is detach
    assert va.attachments is attachments

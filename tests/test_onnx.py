"""A network as one file: onnxruntime and torch.export give PyTorch's logits, and the map of the rollout."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from vision_attn.attribution.base import explain
from vision_attn.attribution.rollout import logits_and_rollout
from vision_attn.attribution.tokens import find_layout
from vision_attn.capture import AttentionCapture
from vision_attn.data.reading import read_image
from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.export import export_graph, graph, graph_path, onnx
from vision_attn.layers.attach import attach_attention
from vision_attn.layout import TokenLayout
from vision_attn.models.factory import create_model

SMALL = {"img_size": [32, 24], "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def deployable(model, size=(32, 24), classes=("cat", "dog", "Übel|<b>")):
    model.preprocessing = Preprocessing(size, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    model.classes, model.layout, model.temperature, model.multi_label = classes, None, 1.5, False
    return model.eval()


def small_vit(**options):
    torch.manual_seed(0)
    return deployable(create_model("vit_tiny_patch16_224", num_classes=3, **{**SMALL, **options}))


class Conv(nn.Module):
    """A network without attention."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(4, 3)

    def forward(self, images):
        return self.head(self.features(images).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def conv():
    torch.manual_seed(0)
    return deployable(Conv())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    model = small_vit()
    return model, export_graph(model, path, opset=18)


def photos(count, size=(32, 24)):
    return np.random.default_rng(1).integers(0, 256, (count, 3, *size), dtype=np.uint8)


def rollout_by_hand(model, images):
    """The class token's row of the product of (mean of heads + I) / 2, in NumPy, without what is tested here."""
    with AttentionCapture(model) as capture, torch.no_grad():
        model(images)
    whole = np.eye(capture.records[0].key_length)[None]
    for record in capture.records:
        whole = (record.weights.double().numpy().mean(1) + np.eye(whole.shape[-1])) / 2 @ whole
    return whole[:, 0, 1:].reshape(len(images), 4, 3)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnxruntime_gives_the_logits_and_the_rollout_of_raw_photos_in_batches_of_any_size(exported, count):
    import onnxruntime

    model, written = exported
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits", "rollout"]
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 24]
    assert session.get_inputs()[0].type == "tensor(uint8)"
    pixels = photos(count)
    logits, maps = session.run(None, {"images": pixels})
    mean, std = (np.array(part).reshape(1, 3, 1, 1) for part in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    images = torch.tensor((pixels / 255 - mean) / std, dtype=torch.float32)
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(images), atol=1e-5)
    np.testing.assert_allclose(maps, rollout_by_hand(model, images), rtol=1e-4)


def test_the_file_says_all_that_a_deployer_needs(exported):
    import onnxruntime

    _, written = exported
    facts = onnxruntime.InferenceSession(written.path).get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["cat", "dog", "Übel|<b>"]
    assert json.loads(facts["mean"]) == [0.5, 0.4, 0.3] and json.loads(facts["std"]) == [0.2, 0.25, 0.3]
    assert json.loads(facts["image_size"]) == [32, 24]
    assert json.loads(facts["temperature"]) == 1.5 and json.loads(facts["multi_label"]) is False
    assert json.loads(facts["layout"]) == {"prefix": ["class"], "grid": [4, 3], "query": "class"}
    assert facts["architecture"] == "vit_tiny_patch16_224" and "uint8" in facts["input"]
    assert json.loads(facts["versions"])["torch"] == torch.__version__
    assert written.opset == 18 and written.size == written.path.stat().st_size
    assert 0 < written.deviation["rollout"] < 1e-4 and "logits and rollout, opset 18" in written.line


def test_exporting_leaves_the_network_as_it_was(exported):
    model, _ = exported
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_a_program_of_torch_takes_normalised_floats_and_holds_its_facts(tmp_path):
    model = small_vit()
    written = export_graph(model, tmp_path / "m.pt2", format="torch", inputs="float", head_fusion="max")
    extra = {"facts.json": ""}
    run = torch.export.load(written.path, extra_files=extra).module()
    images = torch.randn(3, 3, 32, 24)
    found = run(images)
    assert json.loads(extra["facts.json"])["head_fusion"] == "max"
    result = explain(model, images, method="rollout", head_fusion="max")
    torch.testing.assert_close(found["rollout"], result.maps, rtol=1e-4, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(images))


def test_without_attention_there_are_logits_and_a_reason(tmp_path, conv):
    written = export_graph(conv, tmp_path / "m.pt2", format="torch")
    assert written.outputs == ("logits",)
    assert "not all tokens attend to each other in Conv" in written.note
    images = torch.from_numpy(photos(4))
    with torch.no_grad():
        wanted = conv(conv.preprocessing.normalize(images))
    torch.testing.assert_close(torch.export.load(written.path).module()(images)["logits"], wanted)
    with pytest.raises(AttentionNotFoundError, match="grad_cam"):
        export_graph(conv, tmp_path / "n.pt2", format="torch", method="rollout")
    assert graph._layout(conv, images[:1], "none") == (None, "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "tflite"}, "known format, got 'tflite': choose one of onnx, torch"),
        ({"method": "raw"}, "known method of a graph, got 'raw'"),
        ({"inputs": "int8"}, "known input, got 'int8'"),
        ({"dtype": "float64"}, "known dtype"),
        ({"head_fusion": "sum"}, "known head_fusion"),
        ({"opset": 9}, "expected an opset from 18 to"),
        ({"opset": 999}, "expected an opset from 18 to"),
        ({"opset": 18, "format": "torch"}, "leave it out"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, conv, options, words):
    with pytest.raises(UsageError, match=words):
        export_graph(conv, tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(tmp_path, conv):
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(UsageError, match="which exists"):
        export_graph(conv, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "mine"
    with pytest.raises(UsageError, match="which exists"):
        export_graph(conv, tmp_path)


def test_a_graph_has_a_place_of_its_own_in_the_artefact_beside_the_checkpoint_or_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.ckpt").touch()
    (tmp_path / "model.onnx").touch()
    assert graph_path(tmp_path) == tmp_path / "model-2.onnx"
    assert graph_path(tmp_path, "torch") == tmp_path / "model.pt2"
    assert graph_path(tmp_path / "best.ckpt") == tmp_path / "best.onnx"
    assert str(graph_path("hf-hub:timm/vit_tiny.in1k")) == "timm_vit_tiny.in1k.onnx"


def test_a_missing_library_is_named_with_its_extra(tmp_path, conv, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(UsageError, match=r"expected onnxruntime for ONNX.*vision-attn\[onnx\]"):
        export_graph(conv, tmp_path / "m.onnx")


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_graph_that_gives_other_numbers_is_not_written(tmp_path, conv, monkeypatch, wrong):
    right = graph.program.runner

    def off(content):
        run = right(content)
        return lambda images: {name: part * wrong for name, part in run(images).items()}

    monkeypatch.setattr(graph.program, "runner", off)
    with pytest.raises(UsageError, match=r"logits of the torch graph within 1e-04 of PyTorch's, got .*not|nothing"):
        export_graph(conv, tmp_path / "m.pt2", format="torch")
    assert not list(tmp_path.iterdir())


def test_deviation_of_a_map_is_measured_against_its_highest_value():
    wanted = {"rollout": torch.full((3, 1, 2), 0.01)}
    found = graph._deviation(
        lambda images: {"rollout": wanted["rollout"][: len(images)] + 1e-5}, torch.zeros(3), wanted
    )
    assert found["rollout"] == pytest.approx(1e-3, rel=1e-3)


def test_networks_that_look_at_their_numbers_are_refused_in_a_line(tmp_path):
    class Looks(Conv):
        def forward(self, images):
            return super().forward(images if images.sum() > 0 else -images)

    with pytest.raises(UsageError, match=r"expected a network that torch\.export can trace, got Looks: ") as told:
        export_graph(deployable(Looks()), tmp_path / "m.pt2", format="torch")
    assert "\n" not in str(told.value)


def test_weights_of_more_than_two_gigabytes_do_not_go_into_one_file_of_onnx():
    class Large:
        state_dict = {"weight": torch.empty(2**29, device="meta")}

    with pytest.raises(UsageError, match=r"at most 2 GB .* got 2.1 GB: use float16, or the format torch"):
        onnx.to_bytes(Large(), ["logits"], {}, None)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("kind", ["class", "mean", "map", "distilled", "merged", "float64"])
def test_the_traceable_rollout_is_the_rollout(kind, fusion):
    torch.manual_seed(0)
    options = {**SMALL, "img_size": 32}
    if kind == "mean":
        model = create_model("vit_tiny_patch16_224", global_pool="avg", **options)
    elif kind == "map":
        model = create_model("vit_tiny_patch16_224", global_pool="map", class_token=False, **options)
    elif kind == "distilled":
        model = create_model("deit_tiny_distilled_patch16_224", **options)
    elif kind == "merged":
        model = create_model("va_vit_micro_stem8_64", depth=3).eval().merge_tokens(5)
    else:
        model = create_model("vit_tiny_patch16_224", **options)
    images = torch.randn(2, 3, *((64, 64) if kind == "merged" else (32, 32)))
    model, images = (model.double(), images.double()) if kind == "float64" else (model, images)
    model.eval()
    logits, maps = logits_and_rollout(model, images, find_layout(model, images), head_fusion=fusion)
    wanted = explain(model, images, method="rollout", head_fusion=fusion)
    torch.testing.assert_close(maps, wanted.maps, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)


def test_the_traceable_rollout_refuses_what_the_rollout_refuses():
    model = small_vit()
    images = torch.zeros(1, 3, 32, 24)
    with pytest.raises(UsageError, match="pass the layout of this model"):
        logits_and_rollout(model, images, TokenLayout(prefix=(), grid=(4, 3), query="mean"))
    swin = create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)).eval()
    with pytest.raises(UsageError, match="got windows of 49 tokens"):
        logits_and_rollout(swin, torch.zeros(1, 3, 224, 224), find_layout(model, images))


# ------------------------------------------------------------------------------------------------ one by one

FAMILIES = {
    "registers": ("vit_small_patch14_reg4_dinov2", {"depth": 2, "embed_dim": 96, "num_heads": 3}, 56),
    "mean of patches": ("vit_base_patch16_siglip_gap_224", {"depth": 2, "embed_dim": 96, "num_heads": 3}, 64),
    "map head": ("vit_base_patch16_siglip_224", {"depth": 2, "embed_dim": 96, "num_heads": 3}, 64),
    "distilled, with blocks": ("deit_tiny_distilled_patch16_224", {"depth": 2}, 64),
    "merged tokens": ("va_vit_micro_stem8_64", {"depth": 2}, 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_vits_give_the_same_map_in_onnxruntime(tmp_path, family):
    name, options, size = FAMILIES[family]
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, image_size=size, **options).eval()
    if family.endswith("blocks"):
        attach_attention(model, "cbam", where="blocks")
    if family == "merged tokens":
        model.merge_tokens(6)
    written = export_graph(deployable(model, (size, size)), tmp_path / "m.onnx", method="rollout")
    # What was written is compared once more here, on other photos than those that it was tried on.
    run = onnx.runner(written.path.read_bytes())
    images = torch.from_numpy(photos(4, (size, size)))
    result = explain(model, model.preprocessing.normalize(images), method="rollout")
    torch.testing.assert_close(run(images)["rollout"], result.maps, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_options_of_onnx_are_what_is_written(tmp_path):
    model = small_vit()
    written = export_graph(model, tmp_path / "m.onnx", dtype="float16", opset=23, inputs="float")
    run = onnx.runner(written.path.read_bytes())
    images = model.preprocessing.normalize(torch.from_numpy(photos(4)))
    torch.testing.assert_close(run(images)["rollout"], explain(model, images, method="rollout").maps, rtol=1e-2, atol=0)
    assert written.opset == 23
    assert 1e-5 < written.deviation["logits"] < 1e-2  # it is float16 that was computed in


@pytest.mark.slow
def test_a_program_runs_where_this_package_is_not(tmp_path):
    model = small_vit()
    export_graph(model, tmp_path / "m.pt2", format="torch")
    code = (
        "import sys, torch; sys.modules['vision_attn'] = None; sys.modules['timm'] = None\n"
        "found = torch.export.load('m.pt2').module()(torch.zeros(2, 3, 32, 24, dtype=torch.uint8))\n"
        "print({name: tuple(part.shape) for name, part in found.items()})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'logits': (2, 3), 'rollout': (2, 4, 3)}"


@pytest.mark.real
def test_dinov2_on_real_photos_gives_the_same_map_in_onnxruntime(tmp_path, real_dir):
    model = create_model(
        "vit_small_patch14_dinov2",
        num_classes=3,
        image_size=224,
        checkpoint=real_dir / "weights" / "vits14_saliency_fp16.safetensors",
        position_interpolation="hf",
    )
    model = deployable(model, (224, 224))
    files = sorted((real_dir / "data" / "clothing" / "test").rglob("*.jpg"))[::120]
    pixels = torch.stack([model.preprocessing(read_image(file))[0] for file in files])
    run = onnx.runner(export_graph(model, tmp_path / "m.onnx").path.read_bytes())
    images = model.preprocessing.normalize(pixels)
    found = run(pixels)
    torch.testing.assert_close(found["rollout"], explain(model, images, method="rollout").maps, rtol=1e-4, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(images), rtol=1e-4, atol=1e-4)

import io
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vision_attn.errors import CheckpointMismatchError, UsageError
from vision_attn.models.from_timm import options_of
from vision_attn.models.vit import ViT
from vision_attn.models.weights import load_into, load_state_dict_file

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}


def small_state() -> dict[str, Tensor]:
    return {"weight": torch.randn(2, 3), "bias": torch.randn(2)}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin"])
def test_a_file_gives_its_tensors_back(tmp_path: Path, name: str) -> None:
    state = small_state()
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    assert_same(load_state_dict_file(tmp_path / name), state)


@pytest.mark.parametrize(
    ("wrapper", "unwrapped"),
    [
        (lambda s: {"state_dict": s, "epoch": 3}, ("state_dict",)),
        (lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}, ("model", "module.")),
        (lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}}, None),
        (lambda s: s, ()),
    ],
)
def test_what_was_unwrapped_stands_in_the_report(tmp_path: Path, wrapper, unwrapped) -> None:  # type: ignore[no-untyped-def]
    state = small_state()
    torch.save(wrapper(state), tmp_path / "w.pth")
    model = nn.Linear(3, 2)
    report = load_into(model, tmp_path / "w.pth")
    assert_same(model.state_dict(), state)
    assert report.unwrapped == (("state_dict", "module.", "_orig_mod.") if unwrapped is None else unwrapped)
    assert report.loaded == ("weight", "bias")


def test_a_prefix_that_the_model_has_itself_is_kept() -> None:
    model = nn.ModuleDict({"model": nn.Linear(3, 2)})
    assert load_into(model, {f"model.{key}": tensor for key, tensor in small_state().items()}).unwrapped == ()


def test_several_state_dicts_in_a_file_need_a_choice(tmp_path: Path) -> None:
    first, second = small_state(), small_state()
    torch.save({"model": first, "model_ema": second}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="got model, model_ema: choose one with key='model'"):
        load_state_dict_file(tmp_path / "w.pth")
    assert_same(load_state_dict_file(tmp_path / "w.pth", key="model_ema"), second)
    with pytest.raises(UsageError, match="did you mean 'model_ema'"):
        load_state_dict_file(tmp_path / "w.pth", key="modelema")


class Bomb:
    """Unpickling it calls `Path.touch` on a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path: Path) -> None:
    torch.save({"state_dict": small_state(), "extra": Bomb(tmp_path / "ran")}, tmp_path / "w.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for name in ("w.pth", "plain.pth"):
        with pytest.raises(UsageError, match=r"needs unpickling of code \(refused.*save model.state_dict") as caught:
            load_state_dict_file(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def _truncated(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(small_state(), path)
    path.write_bytes(path.read_bytes()[:-8])
    return path


def _file(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def _saved(tmp_path: Path, content: object) -> Path:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return _file(tmp_path, "w.pt", buffer.getvalue())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t / "none.safetensors", "none.safetensors, got nothing there: check the path"),
        (lambda t: t, "got a folder"),
        (lambda t: _truncated(t, "w.safetensors"), "whole safetensors file, got .*truncated or damaged"),
        (lambda t: _file(t, "w.safetensors", b""), "whole safetensors file, got .*truncated or damaged"),
        (lambda t: _truncated(t, "w.pth"), "whole file written by torch.save, got .*damaged"),
        (lambda t: _file(t, "w.pth", b"hello, I am a text"), "whole file written by torch.save, got .*damaged"),
        (lambda t: _file(t, "w.pth", b""), "whole file written by torch.save, got .*damaged"),
        (lambda t: _file(t, "w.npz", b"PK"), r"ending in .safetensors, .pth.*got .*w.npz: convert"),
        (lambda t: _saved(t, [1, 2]), "expected a state dict in .*, got list"),
        (lambda t: _saved(t, {"epoch": 3}), r"got entries that are no tensors \(epoch\)"),
        (lambda t: _saved(t, {}), "got an empty one"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message) as caught:
        load_state_dict_file(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_differences_are_listed_and_the_model_is_left_as_it_was() -> None:
    model = ViT(**TINY)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {key: tensor + 1 for key, tensor in before.items()}
    state["head.weight"] = torch.zeros(7, 16)
    state["extra"] = state.pop("norm.bias")
    with pytest.raises(CheckpointMismatchError) as caught:
        load_into(model, state)
    assert "got 3 differences" in str(caught.value)
    for line in (
        "head.weight: expected shape (5, 16), got (7, 16)",
        "extra: not in the model",
        "norm.bias: missing in the checkpoint",
    ):
        assert line in str(caught.value)
    assert_same(model.state_dict(), before)


def test_a_head_of_other_classes_is_left_out_only_when_asked() -> None:
    state = ViT(**{**TINY, "num_classes": 9}).state_dict()
    model = ViT(**TINY)
    head = model.head.weight.clone()
    with pytest.raises(CheckpointMismatchError, match=r"head.weight: expected shape \(5, 16\), got \(9, 16\)"):
        load_into(model, state)
    report = load_into(model, state, skip=("head.",))
    assert report.skipped == report.missing == ("head.weight", "head.bias")
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.cls_token, state["cls_token"])
    assert "skipped: head.weight, head.bias" in str(report)


def test_missing_keys_are_allowed_by_name_or_all_with_strict_off() -> None:
    state = ViT(**{**TINY, "num_classes": 0}).state_dict()
    with pytest.raises(CheckpointMismatchError, match=r"head.weight: missing.*head.bias: missing"):
        load_into(ViT(**TINY), state)
    assert load_into(ViT(**TINY), state, allow_missing=("head.",)).missing == ("head.weight", "head.bias")
    report = load_into(ViT(**TINY), {**state, "extra": torch.zeros(1)}, strict=False)
    assert (report.missing, report.unexpected) == (("head.weight", "head.bias"), ("extra",))


@pytest.mark.parametrize("interpolation", ["timm", "hf"])
@pytest.mark.parametrize("build", [ViT, VisionTransformer])
def test_positions_reach_the_grid_of_the_model(build: type[nn.Module], interpolation: str) -> None:
    state = ViT(**{**TINY, "img_size": 80}).state_dict()
    model = build(**{**TINY, "img_size": (32, 48)})
    report = load_into(model, state, interpolation=interpolation)
    patches = state["pos_embed"][:, 1:].reshape(1, 10, 10, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(patches, (4, 6), mode="bicubic", antialias=interpolation == "timm").flatten(2).mT
    torch.testing.assert_close(model.pos_embed[:, 1:], expected)
    assert torch.equal(model.pos_embed[:, :1], state["pos_embed"][:, :1])
    assert report.resampled == (f"pos_embed 10 x 10 -> 4 x 6 ({interpolation})",)


def test_our_vit_resamples_as_its_config_says() -> None:
    state = ViT(**{**TINY, "img_size": 80}).state_dict()
    report = load_into(ViT(**TINY, pos_interpolation="hf"), state)
    assert report.resampled == ("pos_embed 10 x 10 -> 4 x 4 (hf)",)
    with pytest.raises(UsageError, match="did you mean 'timm'"):
        load_into(ViT(**TINY), state, interpolation="tim")


def test_a_grid_that_is_not_square_must_be_given() -> None:
    state = ViT(**{**TINY, "img_size": (48, 80)}, no_embed_class=True).state_dict()
    model = ViT(**TINY, no_embed_class=True)
    with pytest.raises(UsageError, match=r"got 60 patch positions: pass source_grid"):
        load_into(model, state)
    with pytest.raises(UsageError, match=r"source_grid of 60 patches, got \(6, 9\)"):
        load_into(model, state, source_grid=(6, 9))
    assert load_into(model, state, source_grid=(6, 10)).resampled == ("pos_embed 6 x 10 -> 4 x 4 (timm)",)


def test_tensors_take_the_dtype_of_the_model() -> None:
    state = {key: tensor.half() for key, tensor in ViT(**TINY).state_dict().items()}
    model = ViT(**TINY)
    report = load_into(model, state)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert report.cast == (f"float16 -> float32 ({len(state)} tensors)",)
    assert torch.equal(model.head.weight, state["head.weight"].float())


def tiny_eva() -> Eva:
    return Eva(**TINY, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, init_values=0.1)


def test_keys_of_timms_eva_become_those_of_our_vit_and_the_report_says_which() -> None:
    state = {key: torch.randn_like(tensor) for key, tensor in tiny_eva().state_dict().items()}
    model = ViT(**options_of(tiny_eva(), "eva"))
    report = load_into(model, state)
    assert report.missing == report.unexpected == ()
    assert set(report.renamed) == {
        "gamma_1 -> ls1.gamma (1 times)",
        "gamma_2 -> ls2.gamma (1 times)",
        "attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight -> attn.qkv.weight (1 times)",
        "attn.q_proj.bias, attn.v_proj.bias -> attn.qkv.bias (1 times)",
        "mlp.fc1_g.weight, mlp.fc1_x.weight -> mlp.fc1.weight (1 times)",
        "mlp.fc1_g.bias, mlp.fc1_x.bias -> mlp.fc1.bias (1 times)",
    }
    bias = torch.cat([state["blocks.0.attn.q_proj.bias"], torch.zeros(16), state["blocks.0.attn.v_proj.bias"]])
    assert torch.equal(model.blocks[0].attn.qkv.bias, bias)
    assert "renamed: gamma_1 -> ls1.gamma (1 times)" in str(report)


def test_keys_of_timms_eva_stay_where_the_model_has_them_or_a_part_is_missing() -> None:
    state = tiny_eva().state_dict()
    theirs = tiny_eva()
    assert load_into(theirs, state).renamed == ()
    assert_same(theirs.state_dict(), state)
    del state["blocks.0.attn.k_proj.weight"]
    message = "q_proj.weight: not in the model; .*v_proj.weight: not in the model; .*qkv.weight: missing"
    with pytest.raises(CheckpointMismatchError, match=message):
        load_into(ViT(**options_of(tiny_eva(), "eva")), state)


def test_a_network_without_positions_loads_too() -> None:
    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    report = load_into(timm.create_model("resnet10t", num_classes=3), state)
    assert (len(report.loaded), report.resampled, report.missing) == (len(state), (), ())


@pytest.mark.real
@torch.no_grad()
def test_the_real_vit_gives_one_network_in_timm_and_here(real_dir: Path) -> None:
    path = real_dir / "weights" / "vits14_saliency_fp16.safetensors"
    theirs = timm.create_model("vit_small_patch14_dinov2", img_size=224).eval()
    report = load_into(theirs, path, interpolation="hf")
    assert report.resampled == ("pos_embed 37 x 37 -> 16 x 16 (hf)",)
    assert report.missing == report.unexpected == ()
    assert report.cast == (f"float16 -> float32 ({len(report.loaded)} tensors)",)

    ours = ViT.from_timm("vit_small_patch14_dinov2", path, img_size=224, pos_interpolation="hf").eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    features = theirs(images)
    torch.testing.assert_close(ours(images), features, atol=1e-5, rtol=1e-5)
    native = ViT.from_timm("vit_small_patch14_dinov2", path, pos_interpolation="hf").eval()
    torch.testing.assert_close(native(images), features, atol=1e-5, rtol=1e-5)
    antialiased = ViT.from_timm("vit_small_patch14_dinov2", path, img_size=224).eval()
    assert (antialiased(images) - features).abs().max() > 1e-2


@pytest.mark.real
@torch.no_grad()
def test_the_real_efficientnet_loads_into_timm(real_dir: Path) -> None:
    path = real_dir / "weights" / "tf_efficientnet_lite0.safetensors"
    model = timm.create_model("tf_efficientnet_lite0").eval()
    report = load_into(model, path)
    assert report.missing == report.unexpected == report.resampled == ()
    assert_same(model.state_dict(), load_file(path))

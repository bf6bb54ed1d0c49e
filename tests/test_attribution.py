"""explain: its checks, its result, the model as it was; raw attention and the controls."""

import copy
import dataclasses
import gc
import importlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import distributed, nn
from transformers import ViTConfig, ViTForImageClassification

from vision_attn.attribution import METHODS, Explanation, explain, find_layout
from vision_attn.capture import AttentionCapture
from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.layout import TokenLayout


def tiny_vit(**options):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5} | options
    model = VisionTransformer(**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name or name == "head.weight":
                parameter.mul_(30)
    return model


def tiny_cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def small_cnn():
    """Batch norm with statistics of its own, a squeeze-and-excitation gate, and a head that tells places apart."""
    torch.manual_seed(0)
    model = timm.create_model("seresnet18", num_classes=5, channels=(8, 8, 12, 16), stem_width=8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


# Options that make a method quick on 32 pixels.
QUICK = {"occlusion": {"window": 16, "stride": 16}, "integrated_gradients": {"steps": 3}}
ON_PIXELS = ("occlusion", "integrated_gradients")
CONTROLS = ("center", "edges", "random")
METHODS_OF_VITS = [name for name in METHODS.names() if name != "gates"]
METHODS_OF_CNNS = [name for name in METHODS.names() if METHODS.info(name)["needs"] in ("nothing", "gates")]


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_result_carries_what_reproduces_it():
    model, images = tiny_vit(), noise(3, 3, 32, 32)
    geometry = Geometry.identity((32, 32))
    result = explain(model, images, method="rollout", discard_ratio=0.5, geometry=geometry)
    with torch.no_grad():
        probabilities = model(images).softmax(-1)
    assert result.method == "rollout"
    assert result.options == {"head_fusion": "mean", "discard_ratio": 0.5, "query_patch": None}
    assert torch.equal(result.targets, probabilities.argmax(-1))
    torch.testing.assert_close(result.probabilities, probabilities.amax(-1))
    assert result.layout == TokenLayout(prefix=("class",), grid=(4, 4))
    assert result.geometry == (geometry,) * 3
    assert result.versions["torch"] == torch.__version__
    assert result.versions["timm"] == timm.__version__
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.method = "raw"


@pytest.mark.parametrize("target", [2, [2, 2, 2], torch.tensor([2, 2, 2])])
def test_target_is_one_class_or_one_for_each_image(target):
    model, images = tiny_vit(), noise(3, 3, 32, 32)
    result = explain(model, images, target=target)
    with torch.no_grad():
        torch.testing.assert_close(result.probabilities, model(images).softmax(-1)[:, 2])
    assert result.targets.tolist() == [2, 2, 2]


@pytest.mark.parametrize("method", METHODS_OF_VITS)
def test_batch_equals_its_images_one_by_one(method):
    model, images, options = tiny_vit(), noise(3, 3, 32, 32), QUICK.get(method, {})
    batch = explain(model, images, method=method, **options)
    assert batch.maps.shape == ((3, 32, 32) if method in ON_PIXELS else (3, 4, 4))
    assert batch.maps.isfinite().all()
    for index, image in enumerate(images):
        single = explain(model, image[None], method=method, **options)
        torch.testing.assert_close(single.maps[0], batch.maps[index], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(single.probabilities[0], batch.probabilities[index])


@pytest.mark.parametrize("method", METHODS_OF_CNNS)
def test_batch_equals_its_images_one_by_one_also_with_batch_norm(method):
    model, images, options = small_cnn(), noise(3, 3, 64, 64), QUICK.get(method, {})
    batch = explain(model, images, method=method, **options)
    assert method in CONTROLS or batch.maps.std() > 0
    singles = torch.cat([explain(model, image[None], method=method, **options).maps for image in images])
    torch.testing.assert_close(singles, batch.maps, atol=1e-6, rtol=1e-4)


def forwards(model):
    count = []
    model.register_forward_pre_hook(lambda module, args: count.append(1))
    return count


@pytest.mark.parametrize("method", [name for name in METHODS_OF_VITS if name not in ON_PIXELS])
@pytest.mark.parametrize("target", [None, 1])
def test_model_runs_once(method, target):
    model = tiny_vit()
    count = forwards(model)
    explain(model, noise(2, 3, 32, 32), method=method, target=target)
    assert len(count) == 1


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def state(model):
    hooks = [
        len(getattr(module, kind))
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    ]
    modes = [module.training for module in model.modules()]
    gradients = [
        (parameter.requires_grad, parameter.grad is not None and parameter.grad.tolist())
        for parameter in model.parameters()
    ]
    weights = [tensor.tolist() for tensor in model.state_dict().values()]
    return hooks, modes, gradients, weights, torch.get_rng_state().tolist(), torch.is_grad_enabled()


def in_training():
    model = tiny_vit(proj_drop_rate=0.5)
    model.train()
    model.blocks[1].eval()
    next(model.parameters()).requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.blocks[0].register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize("method", METHODS_OF_VITS)
@pytest.mark.parametrize("broken", [False, True])
def test_model_is_left_as_it_was_found(method, broken):
    model = in_training()
    if broken:
        model.norm = Broken()
    before = state(model)
    if broken:
        with pytest.raises(RuntimeError, match="broken"):
            explain(model, noise(2, 3, 32, 32), method=method, **QUICK.get(method, {}))
    else:
        explain(model, noise(2, 3, 32, 32), method=method, **QUICK.get(method, {}))
    assert state(model) == before


@pytest.mark.parametrize("broken", [False, True])
def test_model_is_left_as_it_was_found_by_a_careless_callable(broken):
    def careless(model, images, target):
        torch.manual_seed(3)
        for module in model.modules():
            module.register_forward_hook(lambda module, args, output: None)
        model.norm.register_full_backward_hook(lambda module, given, gradients: None)
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_()
        model(images)[:, 0].sum().backward()
        images.mul_(0)
        if broken:
            raise RuntimeError("broken")
        return images[:, 0]

    model, images = in_training(), noise(2, 3, 32, 32)
    kept, before = images.clone(), state(model)
    if broken:
        with pytest.raises(RuntimeError, match="broken"):
            explain(model, images, method=careless)
    else:
        explain(model, images, method=careless)
    assert state(model) == before
    assert torch.equal(images, kept)


@pytest.mark.parametrize("method", METHODS_OF_VITS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_get_the_same(method, mode):
    model, options = tiny_vit(), QUICK.get(method, {})
    expected = explain(model, noise(2, 3, 32, 32), method=method, target=1, **options).maps
    with mode():
        images, target = noise(2, 3, 32, 32), torch.tensor([1, 1])
        maps = explain(model, images, method=method, target=target, **options).maps
        assert not torch.is_grad_enabled()
    assert torch.equal(maps, expected)
    assert not maps.requires_grad


def test_registered_methods_may_differentiate_whatever_the_caller_does():
    @METHODS.register("sensitivity", class_specific=True, needs="nothing")
    def sensitivity(model, images, target):
        (gradient,) = torch.autograd.grad(model(images)[:, 0].sum(), model.patch_embed.proj.weight)
        return gradient.abs().sum().expand(len(images), 1, 1)

    model = tiny_vit()
    try:
        expected = explain(model, noise(2, 3, 32, 32), method="sensitivity").maps
        with torch.inference_mode():
            assert torch.equal(explain(model, noise(2, 3, 32, 32), method="sensitivity").maps, expected)
    finally:
        METHODS._things.pop("sensitivity")
        METHODS._info.pop("sensitivity")


def test_a_model_made_under_inference_mode_has_no_gradients_and_says_so():
    with torch.inference_mode():
        model = tiny_vit()
    with pytest.raises(UsageError, match=r"one that was made under torch\.inference_mode: make it outside"):
        explain(model, noise(1, 3, 32, 32), method="generic")
    assert explain(model, noise(1, 3, 32, 32), method="rollout").maps.shape == (1, 4, 4)


@pytest.mark.parametrize("method", METHODS_OF_VITS)
def test_frozen_and_checkpointed_models_give_the_same(method):
    model, images, options = tiny_vit(), noise(2, 3, 32, 32), QUICK.get(method, {})
    expected = explain(model, images, method=method, **options).maps
    model.set_grad_checkpointing()
    maps = explain(model.requires_grad_(False), images, method=method, **options).maps
    torch.testing.assert_close(maps, expected)
    assert model.grad_checkpointing


def test_no_memory_grows_over_200_calls():
    model, images = tiny_vit(depth=1, embed_dim=6, img_size=16), noise(1, 3, 16, 16)
    cnn, photos = small_cnn(), noise(1, 3, 64, 64)

    def calls(count):
        for _ in range(count):
            for method in ("rollout", "raw", "grad_rollout", "generic", "legrad", "random"):
                explain(model, images, method=method)
        for _ in range(1 + count // 10):
            explain(cnn, photos, method="grad_cam")
            explain(cnn, photos, method="gates")
            explain(model, images, method="occlusion", window=8, stride=8)
            explain(model, images, method="integrated_gradients", steps=2)
        gc.collect()
        objects = gc.get_objects()
        return sum(issubclass(type(one), torch.Tensor) for one in objects), len(objects)

    calls(1)  # what the tests before have left goes, too, some of it only now
    tensors, objects = calls(3)
    after = calls(35)
    assert after[0] <= tensors
    assert after[1] < objects + 100  # not one for each call


def test_dropout_is_off_also_in_a_model_that_is_training():
    model, images = tiny_vit(proj_drop_rate=0.5), noise(2, 3, 32, 32)
    expected = explain(model, images)
    result = explain(model.train(), images)
    torch.testing.assert_close(result.maps, expected.maps)
    torch.testing.assert_close(result.probabilities, expected.probabilities)


class Flipped(nn.Module):
    """The mean over images and their mirror images."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return (self.model(images) + self.model(images.flip(-1))) / 2


class Ensemble(nn.Module):
    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images):
        return sum(model(images) for model in self.models)


@pytest.mark.parametrize("method", ["raw", "rollout", "generic", "legrad", "grad_cam"])
def test_a_mean_over_several_runs_is_not_explained_as_one(method):
    images, layout = noise(2, 3, 32, 32), TokenLayout(("class",), (4, 4))
    for model in (Flipped(tiny_vit()), Ensemble(tiny_vit(), tiny_vit())):
        with pytest.raises(UsageError, match=r"expected a model that runs one encoder once, .*explain the Vision"):
            explain(model, images, method=method, layout=layout)
        assert explain(model, images, method="center").maps.shape[0] == 2


def test_threads_explain_one_model_one_after_the_other():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    expected = explain(model, images, method="generic", target=1).maps
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(explain, model, images, method="generic", target=1) for _ in range(12)]
    assert all(torch.equal(job.result().maps, expected) for job in jobs)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["generic", "grad_rollout", "legrad", "integrated_gradients"])
def test_logits_without_gradients_are_refused_where_they_are_needed(method):
    model = tiny_vit()
    model.forward = torch.no_grad()(model.forward)
    with pytest.raises(UsageError, match=f"expected logits with gradients for {method}, got logits of Vision"):
        explain(model, noise(2, 3, 32, 32), method=method, target=1)


def test_a_model_with_randomness_of_its_own_leaves_the_random_state_alone():
    class Noisy(nn.Module):
        def forward(self, x):
            return (x + torch.rand_like(x)).mean((2, 3))

    before = torch.get_rng_state()
    explain(Noisy(), noise(2, 3, 8, 8), method="center")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"add a batch dimension with images\[None\]"),
        (torch.zeros(1, 32, 32, 3), r"images.permute\(0, 3, 1, 2\)"),
        (torch.zeros(1, 1, 32, 32), r"got \(1, 1, 32, 32\): give RGB images"),
        (torch.zeros(0, 3, 32, 32), r"expected \(B, 3, H, W\) images, got \(0, 3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "expected float images, normalised"),
        (np.zeros((1, 3, 32, 32)), "as a tensor, got ndarray"),
        (torch.zeros(1, 3, 30, 32), r"expected images of 32 x 32, got 30 x 32: resize them, or create"),
    ],
)
def test_images_that_cannot_be_used_are_refused(images, message):
    with pytest.raises(UsageError, match=message):
        explain(tiny_vit(), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "rolout"}, "expected a known method, got 'rolout': did you mean 'rollout'"),
        (
            {"discard_rati": 0.5},
            "expected a known option of grad_rollout, got 'discard_rati': did you mean 'discard_ratio'",
        ),
        ({"query_patch": (1, 1)}, r"option of grad_rollout \(discard_ratio\), got 'query_patch': .* raw or rollout"),
        ({"method": "edges", "seed": 1}, r"option of edges \(it has none\), got 'seed': .* takes it, random"),
        ({"method": "edges", "speed": 1}, "expected no options for edges, got 'speed'"),
        ({"target": 5}, "expected a target below 5, the number of classes, got 5"),
        ({"target": -1}, "expected a target of at least 0, got -1"),
        ({"target": [1, 2, 3]}, r"one class, 2 \(one for each image\), or several for each as \(1, T\) or \(2, T\)"),
        ({"target": [[1], [2], [3]]}, r"or several for each as \(1, T\) or \(2, T\)"),
        ({"target": [[1, 2], [3]]}, "give whole numbers"),
        ({"target": [[]]}, "give whole numbers"),
        ({"target": 1.5}, "give whole numbers"),
        ({"target": True}, "give whole numbers"),
        ({"target": {"cat"}}, "give whole numbers"),
        ({"target": [[0, 5]], "method": "generic"}, "expected a target below 5, the number of classes, got 5"),
        ({"target": 5, "method": "legrad"}, "expected a target below 5, the number of classes, got 5"),
        ({"target": 5, "method": "occlusion"}, "expected a target below 5, the number of classes, got 5"),
        ({"target": "cat"}, "got 'cat' for a model without class names: pass classes="),
        ({"target": "cta", "classes": ["cat", "dog", "a", "b", "c"]}, "got 'cta': did you mean 'cat'"),
        ({"classes": ["cat", "dog"]}, "expected 5 class names, one for each logit, got 2"),
        ({"classes": "cat"}, r"as a sequence of names, got 'cat': pass \['cat', ...\]"),
        ({"method": 3}, r"a method's name or a callable \(model, images, target\) -> maps, got int: choose one of"),
        ({"geometry": [Geometry.identity((4, 4))] * 3}, "expected 2 geometries, one for each image, got 3"),
        ({"method": "center", "sigma": 0}, "expected a sigma above 0"),
        ({"layout": (4, 4)}, r"expected a TokenLayout, got \(4, 4\): pass layout=TokenLayout"),
        ({"method": "raw", "layer": None}, r"expected a layer from 0 to 2 \(or -1 for the last\), got None"),
        ({"method": "raw", "head": 1.0}, "expected a head from 0 to 2 in 'blocks.2.attn', got 1.0"),
        ({"method": "raw", "head": True}, "expected a head from 0 to 2 in 'blocks.2.attn', got True"),
        ({"method": "rollout", "query_patch": 5}, r"expected query_patch as \(row, column\) on the 4 x 4 grid, got 5"),
        ({"method": "rollout", "query_patch": (1.5, 2)}, r"on the 4 x 4 grid, got \(1.5, 2\)"),
        ({"method": "rollout", "query_patch": (1, 2, 3)}, r"on the 4 x 4 grid, got \(1, 2, 3\)"),
        ({"method": "legrad", "last_layers": 1.0}, "expected last_layers from 1 to 3, got 1.0"),
        ({"method": "grad_cam", "layer": 1}, "expected a known layer, got '1'"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        explain(tiny_vit(), noise(2, 3, 32, 32), **arguments)


def test_numbers_of_numpy_are_options_that_a_file_can_hold(tmp_path):
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    result = explain(model, images, method="raw", layer=np.int64(1), head=np.int32(2))
    assert torch.equal(result.maps, explain(model, images, method="raw", layer=1, head=2).maps)
    assert Explanation.load(result.save(tmp_path / "raw.safetensors")).options == result.options
    assert explain(model, images, method="rollout", discard_ratio=np.float32(0.5)).options["discard_ratio"] == 0.5
    assert explain(model, images, method="rollout", query_patch=[1, 2]).options["query_patch"] == (1, 2)


def test_model_that_is_no_module_is_refused():
    with pytest.raises(UsageError, match=r"expected a model as torch.nn.Module, got function: wrap it"):
        explain(lambda images: images.mean((2, 3)), noise(2, 3, 32, 32))


def test_model_without_logits_is_refused():
    with pytest.raises(UsageError, match=r"expected a model that returns logits \(B, classes\), got \(2, 3, 8, 8\)"):
        explain(nn.Identity(), noise(2, 3, 8, 8), method="center")


def test_any_callable_can_be_a_registered_method():
    def ones(model, images, target):
        model(images)
        return torch.ones(len(images), 2, 2) * target[:, None, None]

    METHODS.register("ones", class_specific=True, needs="nothing")(ones)
    try:
        result = explain(tiny_vit(), noise(2, 3, 32, 32), method="ones")
    finally:
        METHODS._things.pop("ones")
        METHODS._info.pop("ones")
    assert torch.equal(result.maps[:, 0, 0], result.targets.float())
    assert result.layout is None


def test_a_callable_is_a_method_as_it_stands():
    seen = []

    def square(model, images, target, *, side=2, layout=None):
        seen.append((torch.is_grad_enabled(), layout.grid))
        return np.ones((len(images), 1, side, side)) * target[:, None, None, None].numpy()

    result = explain(tiny_vit(), noise(2, 3, 32, 32), method=square, target=[3, 1], side=4)
    assert (result.method, result.options) == ("square", {"side": 4})
    assert result.maps[:, 0, 0].tolist() == [3.0, 1.0]
    assert result.maps.shape == (2, 4, 4)
    assert seen == [(True, (4, 4))]
    predicted = explain(tiny_vit(), noise(2, 3, 32, 32), method=square)
    assert (
        predicted.maps[:, 0, 0].tolist()
        == predicted.targets.tolist()
        == predicted.probabilities.new_tensor(
            [int(logits.argmax()) for logits in tiny_vit()(noise(2, 3, 32, 32))]
        ).tolist()
    )


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.zeros(2, 3, 4, 4), r"expected maps \(2, h, w\) or \(2, 1, h, w\) from <lambda>, got \(2, 3, 4, 4\)"),
        (torch.zeros(4, 4), r"got \(4, 4\): return one map for each image"),
        (torch.zeros(1, 4, 4), r"got \(1, 4, 4\)"),
        ([1.0], r"expected maps \(2, h, w\) from <lambda>, got list: return a tensor or an array"),
    ],
)
def test_maps_of_a_callable_that_cannot_be_used_are_refused(maps, message):
    with pytest.raises(UsageError, match=message):
        explain(tiny_vit(), noise(2, 3, 32, 32), method=lambda model, images, target: maps)


def test_objects_of_pytorch_grad_cam_work_and_leave_nothing_behind():
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
    model, images = small_cnn(), noise(2, 3, 64, 64)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = state(model)

    def method(model, images, target):
        cam = grad_cam.GradCAM(model, [model.layer4])
        return cam(images, [targets.ClassifierOutputTarget(int(one)) for one in target])

    result = explain(model, images, method=method, target=2)
    assert state(model) == before
    with grad_cam.GradCAM(model, [model.layer4]) as cam:
        expected = cam(images, [targets.ClassifierOutputTarget(2)] * 2)
    np.testing.assert_allclose(result.maps.numpy(), expected, atol=1e-5)


# Targets.


NAMES = ("ant", "bee", "cat", "dog", "elk")


def test_targets_are_given_by_name():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    expected = explain(model, images, method="generic", target=[2, 3])
    assert expected.classes is None
    named = explain(model, images, method="generic", target=["cat", "dog"], classes=NAMES)
    assert torch.equal(named.maps, expected.maps)
    assert named.classes == NAMES
    model.classes = NAMES
    assert torch.equal(explain(model, images, method="generic", target="dog").maps[1], expected.maps[1])


def test_names_left_from_another_head_are_not_used():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    model.classes = ("cat", "dog")
    assert explain(model, images).classes is None
    with pytest.raises(UsageError, match="expected 5 class names, one for each logit, got 2"):
        explain(model, images, target="dog")


@pytest.mark.parametrize("target", [[["cat", 0, "bee"]], [[2, 0, 1], [2, 0, 1]], torch.tensor([[2, 0, 1]])])
@pytest.mark.parametrize("method", ["generic", "legrad", "grad_cam", "rollout"])
def test_several_targets_at_once_equal_one_after_the_other(method, target):
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    result = explain(model, images, method=method, target=target, classes=NAMES)
    assert result.maps.shape == (2, 3, 4, 4)
    assert result.targets.tolist() == [[2, 0, 1], [2, 0, 1]]
    for place, index in enumerate([2, 0, 1]):
        single = explain(model, images, method=method, target=index)
        torch.testing.assert_close(result.maps[:, place], single.maps)
        torch.testing.assert_close(result.probabilities[:, place], single.probabilities)


def test_several_targets_of_each_image_differ():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    result = explain(model, images, method="generic", target=[[0, 1], [2, 3]])
    single = explain(model, images, method="generic", target=[1, 3])
    torch.testing.assert_close(result.maps[:, 1], single.maps)


def test_a_method_that_asks_for_no_class_runs_once_for_several():
    model = tiny_vit()
    count = forwards(model)
    result = explain(model, noise(2, 3, 32, 32), method="rollout", target=[[0, 1, 2]])
    assert len(count) == 1
    assert torch.equal(result.maps[:, 0], result.maps[:, 2])


# Models that stand in something.


def hugging_face_vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=5,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    return ViTForImageClassification(config).eval()


@pytest.mark.parametrize("method", ["rollout", "generic", "legrad", "grad_cam", "integrated_gradients", "occlusion"])
def test_models_that_return_an_output_with_logits_are_explained(method):
    model, images = hugging_face_vit(), noise(2, 3, 32, 32)
    layout = TokenLayout(("class",), (4, 4))
    options = QUICK.get(method, {}) | ({"layout": layout} if method not in ON_PIXELS else {})
    result = explain(model, images, method=method, target="cat", **options)
    with torch.no_grad():
        torch.testing.assert_close(result.probabilities, model(images).logits.softmax(-1)[:, 2])
    assert result.classes == NAMES
    assert result.maps.std() > 0


@pytest.mark.parametrize("method", ["rollout", "generic", "legrad", "grad_cam"])
def test_compiled_models_are_explained_through_their_original(method):
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager")
    result = explain(compiled, images, method=method)
    assert torch.equal(result.maps, explain(model, images, method=method).maps)


@pytest.mark.parametrize("method", ["rollout", "generic", "grad_cam"])
def test_distributed_models_are_explained_and_train_on(method, tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, images = tiny_vit(), noise(2, 3, 32, 32)
        wrapped = nn.parallel.DistributedDataParallel(model)
        count = forwards(wrapped)
        result, expected = (explain(one, images, method=method) for one in (wrapped, model))
        assert not count  # its forward pass would wait for other processes, which explain nothing
        assert torch.equal(result.maps, expected.maps)
        assert result.options == expected.options
        wrapped(images).sum().backward()
        wrapped(images).sum().backward()
    finally:
        distributed.destroy_process_group()


def test_half_precision_models_are_explained():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    expected = explain(model, images, method="generic", target=1).maps
    half = copy.deepcopy(model).bfloat16()
    result = explain(half, images, method="generic", target=1)
    for method in ("grad_cam", "occlusion"):
        assert explain(half, images, method=method, target=1).maps.dtype == torch.float32
    assert torch.corrcoef(torch.stack([result.maps.flatten().float(), expected.flatten()]))[0, 1] > 0.95


# Files.


def same(one, other):
    assert torch.equal(one.maps, other.maps) and one.maps.dtype == other.maps.dtype
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.probabilities, other.probabilities)
    for name in ("method", "options", "layout", "geometry", "versions", "classes"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rollout", "query_patch": (1, 2), "geometry": Geometry.identity((40, 60)).resize((32, 32))},
        {"method": "generic", "target": [["cat", "dog"]], "classes": NAMES},
        {"method": "occlusion", "target": 1, "window": 8},
    ],
)
def test_saved_explanation_is_loaded_as_it_was(options, tmp_path):
    result = explain(tiny_vit(), noise(2, 3, 32, 32), **options)
    path = result.save(tmp_path / "deep" / "maps.safetensors")
    same(Explanation.load(path), result)
    assert list(path.parent.iterdir()) == [path]
    assert set(load_file(path)) == {"maps", "targets", "probabilities"}
    with pytest.raises(UsageError, match=r"maps.safetensors, which exists: choose another name"):
        result.save(path)


def test_files_that_hold_no_explanation_are_refused(tmp_path):
    path = explain(tiny_vit(), noise(2, 3, 32, 32)).save(tmp_path / "maps")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b"", b"{}" * 40, whole.replace(b"rollout", b"roll\x00ut")):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="got a file that is damaged or holds something else"):
            Explanation.load(path)
    save_file({"maps": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="damaged or holds something else"):
        Explanation.load(path)
    tensors = {name: torch.zeros(1) for name in ("maps", "targets", "probabilities")}
    save_file(tensors, path, {"vision_attn.explanation": json.dumps({"version": 2})})
    with pytest.raises(UsageError, match=r"of version 1 in .*, got version 2"):
        Explanation.load(path)
    with pytest.raises(UsageError, match=r"expected a file at .*absent"):
        Explanation.load(tmp_path / "absent")


def test_options_that_no_file_can_hold_are_refused(tmp_path):
    result = explain(tiny_vit(), noise(1, 3, 32, 32), method=lambda m, x, t, *, thing: x[:, 0], thing=object())
    with pytest.raises(UsageError, match="expected options that JSON can hold"):
        result.save(tmp_path / "maps")
    assert not list(tmp_path.iterdir())


# Layouts.


@pytest.mark.parametrize(
    ("options", "size", "layout"),
    [
        ({"reg_tokens": 3}, (32, 32), TokenLayout(("class", "register", "register", "register"), (4, 4))),
        ({"class_token": False, "reg_tokens": 1, "global_pool": "avg"}, (32, 32), TokenLayout(("register",), (4, 4))),
        ({"global_pool": "avg"}, (32, 32), TokenLayout(("class",), (4, 4), "mean")),
        ({"class_token": False, "global_pool": "map"}, (32, 32), TokenLayout((), (4, 4), "map")),
        ({"img_size": (24, 40), "patch_size": (8, 4)}, (24, 40), TokenLayout(("class",), (3, 10))),
        ({"dynamic_img_size": True}, (16, 64), TokenLayout(("class",), (2, 8))),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (17, 60), TokenLayout(("class",), (3, 8))),
    ],
)
def test_layout_of_timm_models_follows_from_the_model(options, size, layout):
    model, images = tiny_vit(**options), noise(1, 3, *size)
    assert find_layout(model, images) == layout
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    assert capture.records[0].key_length == layout.num_tokens


def test_layout_is_found_inside_a_wrapper_and_stated_by_a_model():
    images = noise(1, 3, 32, 32)
    assert find_layout(nn.Sequential(nn.Identity(), tiny_vit()), images).grid == (4, 4)

    class Ours(nn.Module):
        def token_layout(self, image_size):
            return TokenLayout(("class",), (image_size[0] // 16, image_size[1] // 4))

    assert find_layout(Ours(), images).grid == (2, 8)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_small_patch16_dinov3"])
def test_layout_of_kindred_models(name):
    model = timm.create_model(name, depth=1, embed_dim=64, num_heads=2, num_classes=2).eval()
    size = model.patch_embed.img_size
    layout = find_layout(model, torch.zeros(1, 3, *size))
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(torch.zeros(1, 3, *size))
    assert capture.records[0].key_length == layout.num_tokens == model.num_prefix_tokens + layout.num_patches


@pytest.mark.parametrize("options", [{"global_pool": "max"}, {"global_pool": "avg", "pool_include_prefix": True}])
def test_pooling_that_no_row_stands_for_is_refused(options):
    model = tiny_vit(**options)
    with pytest.raises(UsageError, match="which no one row stands for: pass layout=TokenLayout"):
        find_layout(model, noise(1, 3, 32, 32))
    result = explain(model, noise(1, 3, 32, 32), layout=TokenLayout(("class",), (4, 4), "mean"))
    assert result.maps.shape == (1, 4, 4)


def test_unknown_model_and_size_that_the_patch_does_not_divide_are_refused():
    with pytest.raises(UsageError, match=r"token layout is known, got Identity: pass layout=TokenLayout\("):
        find_layout(nn.Identity(), noise(1, 3, 32, 32))
    with pytest.raises(UsageError, match=r"patches of 8 x 8 divide, got 30 x 41: resize the images to 24 x 40"):
        find_layout(tiny_vit(dynamic_img_size=True), noise(1, 3, 30, 41))


# Raw attention.


def test_raw_is_the_class_row_of_the_chosen_layer():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    last, first = capture.records[-1].weights, capture.records[0].weights

    def check(expected, **options):
        result: Explanation = explain(model, images, method="raw", **options)
        torch.testing.assert_close(result.maps, expected[:, 1:].unflatten(-1, (4, 4)))

    check(last.mean(1)[:, 0])
    check(first.amax(1)[:, 0], layer=0, head_fusion="max")
    check(first[:, 2, 0], layer="blocks.0.attn", head=2)
    check(last.mean(1)[:, 1 + 4 + 3], query_patch=(1, 3))


def test_raw_is_not_rounded_by_autocast():
    model = tiny_vit(class_token=False, global_pool="avg")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = explain(model, noise(2, 3, 32, 32), method="raw").maps
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2))


def test_raw_of_a_map_model_is_the_heads_own_attention():
    model, images = tiny_vit(class_token=False, global_pool="map"), noise(2, 3, 32, 32)
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    head = capture.records[-1].weights[:, :, 0]
    maps = explain(model, images, method="raw").maps
    torch.testing.assert_close(maps.flatten(1), head.mean(1))
    torch.testing.assert_close(explain(model, images, method="raw", head=1).maps.flatten(1), head[:, 1])
    mean = capture.records[0].weights.mean((1, 2))
    torch.testing.assert_close(explain(model, images, method="raw", layer=0).maps.flatten(1), mean)
    with pytest.raises(UsageError, match="in which no patch asks"):
        explain(model, images, method="raw", query_patch=(0, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, r"expected a layer from 0 to 2 \(or -1 for the last\), got 3"),
        ({"layer": "blocks.1.atn"}, "did you mean 'blocks.1.attn'"),
        ({"head": 3}, "expected a head from 0 to 2 in 'blocks.2.attn', got 3"),
        ({"query_patch": (0, 4)}, "columns from 0 to 3"),
        ({"layout": TokenLayout((), (4, 4))}, r"expected rows of 16 tokens.*got 17"),
    ],
)
def test_raw_refuses_what_is_not_there(options, message):
    with pytest.raises(UsageError, match=message):
        explain(tiny_vit(), noise(1, 3, 32, 32), method="raw", **options)


# Controls.


def test_controls_stand_on_pixels_where_there_are_no_patches():
    for method in ("random", "center", "edges"):
        assert explain(tiny_cnn(), noise(2, 3, 8, 12), method=method).maps.shape == (2, 8, 12)


def test_random_depends_on_image_and_seed_alone():
    model, images = tiny_cnn(), noise(2, 3, 8, 12)
    first = explain(model, images, method="random").maps
    torch.manual_seed(7)
    assert torch.equal(explain(model, images, method="random").maps, first)
    assert not torch.equal(explain(model, images, method="random", seed=1).maps, first)
    assert not torch.equal(first[0], first[1])
    assert first.min() >= 0 and first.max() < 1 and 0.4 < first.mean() < 0.6


def test_center_is_a_gaussian_in_shares_of_the_sides():
    maps = explain(tiny_cnn(), noise(1, 3, 9, 15), method="center", sigma=0.2).maps[0]
    assert maps[4, 7] == 1.0
    assert maps[4 + 3, 7] == pytest.approx(np.exp(-((3 / 9) ** 2) / (2 * 0.2**2)), rel=1e-5)
    assert maps[4, 7 + 5] == pytest.approx(maps[4 + 3, 7].item(), rel=1e-5)
    torch.testing.assert_close(maps, maps.flip(0, 1))


def test_edges_are_the_slope_of_the_grey_image():
    images = torch.zeros(1, 3, 6, 8)
    images[0, :] = torch.arange(8.0) * 2  # a ramp: 2 a pixel
    maps = explain(tiny_cnn(), images, method="edges").maps[0]
    torch.testing.assert_close(maps[:, 1:-1], torch.full((6, 6), 2.0))
    flat = explain(tiny_cnn(), torch.ones(1, 3, 6, 8), method="edges").maps
    assert flat.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (tiny_vit, "grad_rollout"),
        (lambda: nn.Sequential(tiny_vit()), "grad_rollout"),
        (
            lambda: timm.create_model("cait_xxs24_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=5),
            "rollout",
        ),
        (tiny_cnn, "grad_cam"),
        (lambda: timm.create_model("test_resnet", num_classes=5), "grad_cam"),
        (lambda: timm.create_model("xcit_nano_12_p16_224", img_size=32, depth=2, num_classes=5), "grad_cam"),
        (
            lambda: timm.create_model(
                "swin_tiny_patch4_window7_224",
                img_size=32,
                window_size=4,
                embed_dim=12,
                depths=(1, 1),
                num_heads=(1, 2),
            ),
            "grad_cam",
        ),
    ],
)
def test_any_classifier_is_explained_without_naming_a_method(make, method):
    result = explain(make(), noise(2, 3, 32, 32))
    assert result.method == method
    assert result.maps.shape[0] == 2


class Probe(nn.Module):
    """What a linear probe is: a classifier of its own on the tokens of an encoder."""

    def __init__(self, read):
        super().__init__()
        self.encoder, self.classifier, self.read = tiny_vit(), nn.Linear(24, 5), read

    def forward(self, images):
        return self.classifier(self.read(self.encoder, images))


@pytest.mark.parametrize("method", ["rollout", "raw", "generic", "grad_rollout"])
def test_a_probe_that_pools_by_itself_is_asked_what_it_reads(method):
    probe = Probe(lambda encoder, images: encoder.forward_features(images)[:, 1:].mean(1)).eval()
    images = noise(2, 3, 32, 32)
    with pytest.raises(UsageError, match=r"expected the pooling of VisionTransformer itself.*pass layout=TokenLayout"):
        explain(probe, images, method=method, target=0)
    layout = TokenLayout(prefix=("class",), grid=(4, 4), query="mean")
    assert explain(probe, images, method=method, target=0, layout=layout).maps.std() > 0
    assert explain(probe, images, method="grad_cam", target=0).maps.shape == (2, 4, 4)


def test_a_probe_on_what_the_encoder_pools_is_explained():
    def pooled(encoder, images):
        encoder.head = nn.Identity()
        return encoder(images)

    def called_without_hooks(encoder, images):
        return encoder.forward(images)

    images = noise(2, 3, 32, 32)
    probe = Probe(pooled).eval()
    expected = explain(tiny_vit(), images, method="rollout").maps
    torch.testing.assert_close(explain(probe, images, method="rollout").maps, expected)
    peft_like = Probe(called_without_hooks).eval()
    peft_like.classifier = nn.Identity()
    torch.testing.assert_close(explain(peft_like, images, method="rollout").maps, expected)

"""raw in models of windows, stages and late class tokens: unwindowed by hand from the same attention."""

import sys

import pytest
import timm
import torch
from test_encoders import hf_model, noise, timm_model, tiny_vit
from test_positions import records_of, timm_swin, windows_of
from torch import nn
from torch.nn import functional as F

from vision_attn.attribution import explain, raw
from vision_attn.attribution.base import working_methods
from vision_attn.errors import UsageError


def sharpened(model):
    """The model with attention that is far from even."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(20)
    return model


def unwindowed(weights, windows, grid):
    """The attention (B, W, Q, K) that places receive from queries that are places, in loops."""
    maps = torch.zeros(len(weights), grid[0] * grid[1])
    count = int((windows >= 0).sum())
    for window, places in enumerate(windows):
        for query, asking in enumerate(places):
            for key, place in enumerate(places):
                if asking >= 0 and place >= 0:
                    maps[:, place] += weights[:, window, query, key] / count
    return maps.unflatten(1, grid)


@pytest.mark.parametrize(("layer", "shift"), [(0, 0), (1, 2)])
def test_raw_of_swin_is_its_attention_put_back_in_place(layer, shift):
    model, size = timm_swin()
    model, images = sharpened(model), noise(2, 3, *size)
    record = records_of(model, images)[layer]
    weights = record.weights.unflatten(0, (2, -1))
    windows = windows_of((10, 18), (4, 4), shift, pad_first=False)

    def check(fused, **options):
        maps = explain(model, images, method="raw", layer=layer, **options).maps
        torch.testing.assert_close(maps, unwindowed(fused, windows, (10, 18)), atol=1e-7, rtol=1e-4)

    check(weights.mean(2))
    check(weights.amax(2), head_fusion="max")
    check(weights[:, :, 1], head=1)


def test_raw_of_a_patch_is_its_row_in_its_window():
    model, size = timm_swin()
    model, images = sharpened(model), noise(2, 3, *size)
    record = records_of(model, images)[1]
    windows = windows_of((10, 18), (4, 4), 2, pad_first=False)
    window, query = (windows == 3 * 18 + 4).nonzero()[0].tolist()
    maps = explain(model, images, method="raw", layer=1, query_patch=(3, 4)).maps
    row = record.weights.unflatten(0, (2, -1)).mean(2)[:, window, query]
    expected = torch.zeros(2, 180).index_add(1, windows[window], row).unflatten(1, (10, 18))
    torch.testing.assert_close(maps, expected)
    assert (maps[0] > 0).sum() <= 16
    with pytest.raises(UsageError, match=r"query_patch as \(row, column\) on the 10 x 18 grid, got \(10, 0\)"):
        explain(model, images, method="raw", layer=1, query_patch=(10, 0))


def test_last_layer_is_shown_where_none_is_named_and_batches_agree_with_single_images():
    model, size = timm_swin()
    images = noise(2, 3, *size)
    maps = explain(model, images, method="raw").maps
    torch.testing.assert_close(maps, explain(model, images, method="raw", layer=3).maps)
    assert maps.shape == (2, 5, 9)
    for index in range(2):
        torch.testing.assert_close(explain(model, images[index : index + 1], method="raw").maps[0], maps[index])


def test_raw_of_reduced_keys_stands_on_their_grid_and_is_asked_on_that_of_the_queries():
    torch.manual_seed(0)
    model, images = timm.create_model("pvt_v2_b0", num_classes=3).eval(), noise(2, 3, 64, 96)
    record = records_of(model, images)[0]
    maps = explain(model, images, method="raw", layer=0).maps
    torch.testing.assert_close(maps, record.weights.mean((1, 2)).unflatten(1, (2, 3)))
    row = explain(model, images, method="raw", layer=0, query_patch=(15, 23)).maps
    torch.testing.assert_close(row, record.weights.mean(1)[:, -1].unflatten(1, (2, 3)))


def test_blocks_of_rows_add_up(monkeypatch):
    model, size = timm_swin()
    images = noise(2, 3, *size)
    dynamic = tiny_vit(global_pool="avg")
    expected = [explain(model, images, method="raw", layer=1).maps]
    expected += [explain(dynamic, noise(2, 3, 32, 32), method="raw").maps]
    monkeypatch.setattr(sys.modules[raw.__module__], "_AT_ONCE", {"cpu": 150})
    torch.testing.assert_close(explain(model, images, method="raw", layer=1).maps, expected[0])
    torch.testing.assert_close(explain(dynamic, noise(2, 3, 32, 32), method="raw").maps, expected[1])


def test_class_attention_shows_the_patches_that_the_late_class_token_attends_to():
    model, images = timm_model("cait_xxs24_224", embed_dim=48, num_heads=2), noise(2, 3, 64, 64)
    last = records_of(model, images)[-1]
    assert (last.query_length, last.key_length) == (1, 17)
    maps = explain(model, images, method="raw").maps
    torch.testing.assert_close(maps, last.weights.mean(1)[:, 0, 1:].unflatten(1, (4, 4)))
    first = records_of(model, images)[0]
    maps = explain(model, images, method="raw", layer=0).maps
    torch.testing.assert_close(maps, first.weights.mean((1, 2)).unflatten(1, (4, 4)))


def test_attention_between_channels_is_refused_and_the_layers_that_work_are_named():
    model, images = timm_model("xcit_nano_12_p16_224"), noise(1, 3, 64, 64)
    with pytest.raises(UsageError, match=r"between channels in 'blocks.0.attn': choose cls_attn_blocks.0.attn"):
        explain(model, images, method="raw", layer=0)
    assert explain(model, images, method="raw").maps.shape == (1, 4, 4)


def test_raw_of_hugging_face_and_of_class_token_and_mean():
    model, images = hf_model("dinov2"), noise(2, 3, 24, 40)
    weights = records_of(model, images)[-1].weights.mean(1)
    expected = (weights[:, 0] + weights[:, 1:].mean(1)) / 2
    maps = explain(model, images, method="raw").maps
    torch.testing.assert_close(maps, expected[:, 1:].unflatten(1, (3, 5)))


class Plain(nn.Module):
    """A ViT by nobody: its layout is stated nowhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.mix = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for _ in range(2):
            q, k, v = (part[:, None] for part in self.mix(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.head(x[:, 0])


def test_raw_of_a_vit_that_nobody_knows_finds_its_patches():
    model, images = Plain().eval(), noise(2, 3, 24, 40)
    weights = records_of(model, images)[1].weights[:, 0]
    maps = explain(model, images, method="raw").maps
    torch.testing.assert_close(maps, weights[:, 1:, 1:].mean(1).unflatten(1, (3, 5)))


def test_raw_is_named_where_rollout_is_refused():
    model, size = timm_swin()
    assert "raw" in working_methods("attention")
    with pytest.raises(UsageError, match="raw"):
        explain(model, noise(1, 3, *size), method="rollout")

"""find_positions: where the keys of windows lie, against partitions of an index grid that are written out here."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import timm
import torch
from timm.models.nest import Nest
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn
from torch.nn import functional as F

from vision_attn.attribution import positions as module
from vision_attn.attribution.positions import KeyPositions, find_positions, unwindow
from vision_attn.capture import AttentionCapture
from vision_attn.errors import UsageError


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def created(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **options).eval()


def records_of(model, images):
    with torch.no_grad(), AttentionCapture(model, keep="queries_keys") as capture:
        model(images)
    return capture.records


def windows_of(grid, size, shift=0, pad_first=True):
    """Numbers of the places (h, w), padded by -1 to whole windows, rolled, cut into windows (W, K)."""
    rows, columns = grid
    index = torch.arange(rows * columns).view(rows, columns)
    pad = (0, -columns % size[1], 0, -rows % size[0])
    index = F.pad(index, pad, value=-1) if pad_first else index
    index = index.roll((-shift, -shift), (0, 1))
    index = index if pad_first else F.pad(index, pad, value=-1)
    parts = index.unflatten(0, (-1, size[0])).unflatten(2, (-1, size[1]))
    return parts.permute(0, 2, 1, 3).reshape(-1, size[0] * size[1])


def timm_swin(**options):
    sizes = {"img_size": (40, 72), "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    name = options.pop("name", "swin_tiny_patch4_window7_224")
    return created(name, **sizes | options), (40, 72)


def torchvision_swin(version=""):
    from torchvision.models import swin_transformer as swin

    torch.manual_seed(0)
    parts = {} if not version else {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    model = swin.SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=[4, 4], num_classes=3, **parts
    )
    return model.eval(), (40, 72)


def hugging_face_swin():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=[40, 72], patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinForImageClassification(config).eval(), (40, 72)


SWINS = {
    "timm": timm_swin,
    "timm v2": lambda: timm_swin(name="swinv2_tiny_window8_256"),
    "torchvision": torchvision_swin,
    "torchvision v2": lambda: torchvision_swin("v2"),
    "hugging face": hugging_face_swin,
}


@pytest.mark.parametrize("kind", SWINS)
def test_swin_windows_are_shifted_padded_and_not_square(kind):
    model, size = SWINS[kind]()
    images = noise(2, 3, *size)
    records = records_of(model, images)
    assert len(records) == 4
    # 10 x 18 places pad to 12 x 20, the 5 x 9 of the next stage to 8 x 12.
    for record, grid, shift in [(records[0], (10, 18), 0), (records[1], (10, 18), 2), (records[3], (5, 9), 2)]:
        found = find_positions(model, images, record)
        assert found.grid == found.query_grid == grid
        # timm rolls before it pads, the others after.
        assert torch.equal(found.keys, windows_of(grid, (4, 4), shift, pad_first="timm" not in kind))
        assert torch.equal(found.queries, found.keys)
        assert (found.keys < 0).any()


def test_maxvits_windows_are_blocks_and_then_grids():
    model = created("maxvit_rmlp_pico_rw_256", img_size=(64, 128), embed_dim=(32,) * 4, depths=(1,) * 4, stem_width=16)
    images = noise(2, 3, 64, 128)
    records = records_of(model, images)
    assert len(records) == 8
    several = 0
    for record in records[:4]:
        found = find_positions(model, images, record)
        partition = model.get_submodule(record.name.rsplit(".", 1)[0])
        height, width = partition.partition_size
        expected = windows_of(found.grid, (height, width))
        if record.name.endswith("attn_grid.attn"):
            # A window holds every n-th row and column.
            index = torch.arange(found.grid[0] * found.grid[1]).view(found.grid)
            expected = index.unflatten(0, (height, -1)).unflatten(2, (width, -1)).permute(1, 3, 0, 2)
            expected = expected.reshape(-1, height * width)
        assert torch.equal(found.keys, expected), record.name
        several += len(found.keys) > 1
    assert several == 4


def test_halonets_keys_overlap():
    from timm.layers.halo_attn import HaloAttn

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 4, 4), HaloAttn(16, num_heads=2, block_size=4, halo_size=1), nn.Flatten(2)
    ).eval()
    nn.init.normal_(model[1].pos_embed.height_rel)
    images = noise(2, 3, 32, 48)
    (record,) = records_of(model, images)
    found = find_positions(model, images, record)
    index = torch.arange(8 * 12).view(8, 12)
    padded = F.pad(index[None, None], (1, 1, 1, 1), value=-1)[0, 0]
    expected = padded.unfold(0, 6, 4).unfold(1, 6, 4).reshape(-1, 36)
    assert found.grid == found.query_grid == (8, 12)
    assert torch.equal(found.keys, expected)
    assert torch.equal(found.queries, windows_of((8, 12), (4, 4)))


def test_nests_blocks_are_not_taken_for_a_grid():
    # 16 blocks of 16 tokens have the form of their 16 x 16 grid.
    torch.manual_seed(0)
    model = Nest(img_size=64, embed_dims=(16, 16, 16), num_heads=(2, 2, 2), depths=(1, 1, 1), num_classes=3).eval()
    images = noise(2, 3, 64, 64)
    record = records_of(model, images)[0]
    found = find_positions(model, images, record)
    assert found.grid == (16, 16)
    assert torch.equal(found.keys, windows_of((16, 16), (4, 4)))


def test_sams_only_window_is_padded():
    sizes = {"img_size": 112, "patch_size": 16, "embed_dim": 16, "num_heads": 2, "depth": 2, "window_size": 14}
    torch.manual_seed(0)
    model = VisionTransformerSAM(**sizes, global_attn_indexes=(1,), use_rel_pos=True, num_classes=3).eval()
    images = noise(2, 3, 112, 112)
    windowed, everywhere = records_of(model, images)
    # Padded to the window, the 7 x 7 places have the form of a map of half the stride.
    found = find_positions(model, images, windowed)
    assert found.grid == (7, 7)
    assert torch.equal(found.keys, windows_of((7, 7), (14, 14)))
    assert torch.equal(find_positions(model, images, everywhere).keys, torch.arange(49)[None])


@pytest.mark.parametrize(("name", "stride"), [("pvt_v2_b0", 32), ("twins_pcpvt_small", 32)])
def test_keys_that_are_reduced_lie_on_a_grid_of_their_own(name, stride):
    model, images = created(name), noise(2, 3, 64, 96)
    record = records_of(model, images)[0]
    found = find_positions(model, images, record)
    assert (found.grid, found.query_grid) == ((64 // stride, 96 // stride), (16, 24))
    assert torch.equal(found.keys, torch.arange(6)[None])
    assert torch.equal(found.queries, torch.arange(16 * 24)[None])


def test_a_downsampling_layer_has_fewer_queries_than_keys_and_the_next_layer_is_found_behind_it():
    model, images = created("levit_128s"), noise(2, 3, 224, 224)
    records = records_of(model, images)
    (index,) = [place for place, record in enumerate(records) if record.query_length == 49 and record.key_length == 196]
    found = find_positions(model, images, records[index])
    assert (found.grid, found.query_grid) == ((14, 14), (7, 7))
    after = find_positions(model, images, records[index + 1])
    assert after.grid == (7, 7)
    assert torch.equal(after.keys, torch.arange(49)[None])


def test_class_tokens_are_no_places():
    model, images = created("vit_tiny_patch16_224", img_size=(48, 64), depth=2), noise(2, 3, 48, 64)
    found = find_positions(model, images, records_of(model, images)[1])
    assert found.grid == (3, 4)
    assert torch.equal(found.keys, torch.cat([torch.tensor([-1]), torch.arange(12)])[None])


def test_a_planted_value_changes_the_values_of_the_keys_that_lie_there():
    model, size = timm_swin()
    images = noise(1, 3, *size)
    record = records_of(model, images)[1]
    found = find_positions(model, images, record)
    block = model.layers[0].blocks[1]

    def values(place=None):
        def plant(_module, args):
            features = args[0].clone()
            if place is not None:
                features[0, place // 18, place % 18] += torch.randn(16, generator=torch.Generator().manual_seed(3))
            return (features, *args[1:])

        handle = block.register_forward_pre_hook(plant)
        try:
            return records_of(model, images)[1].values
        finally:
            handle.remove()

    before = values()
    for place in (0, 17, 95, 179):
        changed = (values(place) - before).abs().amax((1, 3)) > 1e-4
        assert torch.equal(changed, found.keys == place)
        assert changed.sum() == 1


class Blurred(nn.Module):
    """Attention whose keys are each made from several places."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.kernel = nn.Parameter(torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        x = self.stem(x)
        keys = F.conv2d(x, self.kernel, padding=1, groups=8).flatten(2).transpose(1, 2)[:, None]
        return F.scaled_dot_product_attention(keys, keys, keys).mean((1, 2))


def test_keys_that_are_mixtures_are_refused():
    model, images = Blurred().eval(), noise(1, 3, 32, 32)
    with pytest.raises(
        UsageError, match=r"expected keys that each come from one place of the image.*layout=TokenLayout"
    ):
        find_positions(model, images, records_of(model, images)[0])


def test_attention_between_channels_is_refused():
    model, images = created("xcit_nano_12_p16_224", depth=1), noise(1, 3, 64, 64)
    with pytest.raises(UsageError, match="expected attention between places, got attention between channels"):
        find_positions(model, images, records_of(model, images)[0])


def test_model_is_left_as_it_was_found():
    model, size = timm_swin(drop_path_rate=0.5)
    images = noise(1, 3, *size)
    record = records_of(model, images)[1]
    model.train()
    model.layers[0].eval()
    model.patch_embed.proj.weight.requires_grad_(False)

    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        modes = [m.training for m in model.modules()]
        gradients = [(p.requires_grad, p.grad) for p in model.parameters()]
        return hooks, modes, gradients, torch.get_rng_state().tolist(), torch.is_grad_enabled()

    before, weights = state(), copy.deepcopy(model.state_dict())
    find_positions(model, images, record)
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        module._KNOWN.clear()
        find_positions(model, images, record)
    assert state() == before


def test_positions_are_found_once_for_each_model_size_and_layer():
    model, size = timm_swin()
    images = noise(1, 3, *size)
    count = []
    model.register_forward_pre_hook(lambda _m, _a: count.append(1))
    records = records_of(model, images)
    first = find_positions(model, images, records[0])
    found = len(count)
    assert find_positions(model, images, records[0]) is first
    assert len(count) == found
    assert find_positions(model, images, records[1]) is not first
    assert model in module._KNOWN
    alive, model = weakref.ref(model), None
    del records
    gc.collect()
    assert alive() is None


# Unwindowing.

POSITIONS = KeyPositions(
    grid=(1, 3), keys=torch.tensor([[0, 1], [2, -1]]), queries=torch.tensor([[0, 1], [2, -1]]), query_grid=(1, 3)
)
WEIGHTS = torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.7, 0.3], [0.2, 0.8]]])


def test_unwindowed_attention_is_the_mean_over_the_queries_that_are_places():
    maps = unwindow(torch.cat([WEIGHTS, WEIGHTS * 0]), POSITIONS)
    torch.testing.assert_close(maps, torch.tensor([[[1.3, 0.7, 0.7]], [[0.0, 0.0, 0.0]]]) / 3)


def test_unwindowed_row_of_a_query_is_zero_outside_its_window():
    torch.testing.assert_close(unwindow(WEIGHTS, POSITIONS, (0, 1)), torch.tensor([[[0.4, 0.6, 0.0]]]))
    torch.testing.assert_close(unwindow(WEIGHTS, POSITIONS, (0, 2)), torch.tensor([[[0.0, 0.0, 0.7]]]))
    with pytest.raises(UsageError, match=r"on the 1 x 3 grid, got \(1, 0\)"):
        unwindow(WEIGHTS, POSITIONS, (1, 0))


def test_keys_of_several_windows_receive_the_sum():
    positions = KeyPositions((1, 2), torch.tensor([[0, 1], [0, 1]]))
    torch.testing.assert_close(unwindow(WEIGHTS, positions), torch.tensor([[[2.2, 1.8]]]) / 4)
    with pytest.raises(UsageError, match="in which it is known where queries lie"):
        unwindow(WEIGHTS, positions, (0, 0))


def test_keys_of_each_query_are_put_back_one_by_one():
    # Two windows of two queries on a 2 x 3 grid, each query with three keys of its own, some of them padding.
    keys = torch.tensor([[[0, 1, -1], [1, 1, 2]], [[3, 4, 5], [5, 0, -1]]])
    queries = torch.tensor([[0, 1], [3, -1]])
    positions = KeyPositions((2, 3), keys, queries)
    weights = noise(6, 2, 3).softmax(-1)  # three images
    parts = weights.unflatten(0, (3, 2))
    for patch, asking in ((None, [(0, 0), (0, 1), (1, 0)]), ((0, 1), [(0, 1)]), ((1, 2), [])):
        expected = torch.zeros(3, 6)
        for window, query in asking:
            for key, place in enumerate(keys[window, query].tolist()):
                if place >= 0:
                    expected[:, place] += parts[:, window, query, key] / len(asking)
        torch.testing.assert_close(unwindow(weights, positions, patch), expected.unflatten(1, (2, 3)))


class Stated(nn.Module):
    """A block of attention that says where its queries and keys lie: turned by half."""

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)[:, None].flip(2)
        mixed = F.scaled_dot_product_attention(tokens, tokens, tokens).flip(2)
        return mixed[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])

    def key_positions(self, height, width):
        places = torch.arange(height * width).flip(0)[None]
        return KeyPositions((height, width), places, places)


def test_places_that_a_block_states_are_taken_without_running_the_model():
    model, images = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Stated()), noise(1, 3, 16, 24)
    (record,) = records_of(model, images)
    runs = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    found = find_positions(model, images, record)
    handle.remove()
    assert found is record.positions
    assert not runs
    # The search finds the same places where nothing is stated.
    searched = find_positions(model, images, replace(record, positions=None))
    assert torch.equal(searched.keys, found.keys) and torch.equal(searched.queries, found.queries)

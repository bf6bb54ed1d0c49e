"""Maps of a model whose weights are drawn anew, and of photos under noise; and the model as it was afterwards."""

import pytest
import timm
import torch
from torch import nn

from vision_attn.errors import UsageError
from vision_attn.metrics.sanity import randomized, stability, top_down_layers, weight_randomization


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(784, 3)
    ).eval()


def gradient(model, images):
    images = images.clone().requires_grad_()
    return torch.autograd.grad(model(images)[:, 0].sum(), images)[0].abs().sum(1)


def test_layers_come_from_the_top_down_and_each_once(network, images):
    layers = top_down_layers(network, images)
    assert [name for name, _ in layers] == ["5", "3", "1", "0"]
    held = [module for _, modules in layers for module in modules]
    assert len(held) == len(set(held)) == 4


def test_a_vits_blocks_are_layers_and_its_own_tokens_stand_at_the_entrance():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=4)
    layers = top_down_layers(vit.eval(), torch.randn(1, 3, 32, 32))
    assert [name for name, _ in layers] == ["head", "norm", "blocks.1", "blocks.0", "patch_embed", ""]
    parameters = {id(p) for _, modules in layers for module in modules for p in module.parameters(recurse=False)}
    assert parameters == {id(p) for p in vit.parameters()}


def test_nothing_that_holds_parameters_is_left_out_nor_a_block_torn_apart():
    class Reader(nn.Module):  # reads its children's weights without calling them
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
            self.unused = nn.Linear(2, 2)
            self.head = nn.Linear(12, 3)

        def forward(self, images):
            tokens = images.flatten(2).transpose(1, 2)
            return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))

    reader = Reader()
    layers = top_down_layers(reader, torch.randn(1, 12, 2, 2))
    assert [name for name, _ in layers] == ["head", "unused", "attention"]
    assert layers[-1][1] == [reader.attention, reader.attention.out_proj]
    resnet = timm.create_model("resnet18", num_classes=3)
    names = [name for name, _ in top_down_layers(resnet, torch.randn(1, 3, 32, 32))]
    assert names[:3] == ["fc", "layer4.1", "layer4.0"] and names[-3:] == ["layer1.0", "bn1", "conv1"]
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, embed_dim=12, depths=(1, 2), num_heads=(1, 2))
    names = [name for name, _ in top_down_layers(swin, torch.randn(1, 3, 64, 64))]
    assert names[:4] == ["head", "norm", "layers.1.blocks.1", "layers.1.blocks.0"]
    assert names[4:] == ["layers.1.downsample", "layers.0.blocks.0", "patch_embed"]


def test_the_order_is_looked_for_without_a_trace(network, images):
    network.train()
    network[3].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    top_down_layers(network, images)
    assert [module.training for module in network] == [True, True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_running_statistics_are_measured_on_the_new_weights_and_given_back(network, images):
    network[1].running_mean.fill_(5.0)
    network[1].running_var.fill_(0.01)
    outputs = []
    network[1].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    with randomized(network, top_down_layers(network, images), images=images):
        network(images)
        scaled = (outputs[-1] - network[1].bias[:, None, None]) / network[1].weight[:, None, None]
        assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(8), atol=1e-4)
        assert torch.allclose(scaled.var((0, 2, 3), correction=0), torch.ones(8), atol=1e-2)
    assert network[1].running_mean.eq(5.0).all() and network[1].running_var.eq(0.01).all()
    assert network[1].num_batches_tracked == 0
    assert not network.training


def test_a_network_of_new_weights_still_tells_images_apart():
    torch.manual_seed(0)
    resnet, photos = timm.create_model("resnet18", num_classes=5).eval(), torch.randn(4, 3, 64, 64)
    for norm in (module for module in resnet.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.running_var.uniform_(0.01, 30.0)
    with torch.no_grad(), randomized(resnet, top_down_layers(resnet, photos), images=photos):
        logits = resnet(photos)
    assert 0.01 < logits.std(0).mean() < 100


def test_drawn_weights_keep_their_size_and_lose_their_order(network, images):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with randomized(network, top_down_layers(network, images)[:2], seed=1):
        drawn = network[5].weight
        assert torch.corrcoef(torch.stack([drawn.flatten(), before["5.weight"].flatten()]))[0, 1].abs() < 0.1
        assert drawn.std().item() == pytest.approx(before["5.weight"].std().item(), rel=0.1)
        assert torch.equal(network[0].weight, before["0.weight"])
        first = drawn.clone()
    with randomized(network, top_down_layers(network, images)[:2], seed=1):
        assert torch.equal(network[5].weight, first)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_model_is_as_it_was_after_an_exception(network, images):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="midway"), randomized(network, top_down_layers(network, images)):
        assert not torch.equal(network[0].weight, before["0.weight"])
        raise RuntimeError("midway")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_map_that_ignores_the_model_stays_and_a_gradient_falls(network, images):
    still = weight_randomization(lambda: images.abs().sum(1), network, images)
    assert torch.equal(still.rank_correlation, torch.ones(4, 2))
    assert torch.allclose(still.ssim, torch.ones(4, 2))
    moved = weight_randomization(lambda: gradient(network, images), network, images)
    assert moved.fractions == (0.25, 0.5, 0.75, 1.0)
    assert moved.names == ("5", "3", "1", "0")
    assert (moved.rank_correlation[-1] < 0.5).all()


def test_all_layers_down_to_the_level_are_random_and_no_other(network, images):
    seen = []
    before = [network[i].weight.clone() for i in (5, 3, 0)]

    def look():
        seen.append([not torch.equal(network[i].weight, kept) for i, kept in zip((5, 3, 0), before, strict=True)])
        return images[:, 0]

    weight_randomization(look, network, images)
    assert seen == [[False] * 3, [True, False, False], [True, True, False], [True, True, False], [True] * 3]


def test_a_smooth_map_is_stable_and_a_random_one_is_not(images):
    smooth = stability(lambda some: some.sum(1), images, noise=0.01)
    assert (smooth > 0.99).all()
    generator = torch.Generator().manual_seed(0)
    restless = stability(lambda some: torch.rand(2, 16, 16, generator=generator), images)
    assert (restless.abs() < 0.2).all()


def test_more_noise_moves_more_and_the_seed_decides(images):
    little, much = (stability(lambda some: some.sum(1), images, noise=noise) for noise in (0.05, 1.0))
    assert (much < little).all()
    assert torch.equal(stability(lambda some: some.sum(1), images, noise=1.0), much)


def test_the_noise_of_an_image_is_the_same_in_any_batch(images):
    maps = lambda some: some.sum(1)  # noqa: E731
    together = stability(maps, images, noise=1.0)
    assert torch.equal(together, torch.cat([stability(maps, image[None], noise=1.0) for image in images]))


def test_a_map_that_cannot_be_compared_gives_no_number(network, images):
    first = network[5].weight.clone()

    def only_trained():
        maps = images.abs().sum(1)
        return maps if torch.equal(network[5].weight, first) else maps * torch.tensor([torch.nan, 0.0])[:, None, None]

    found = weight_randomization(only_trained, network, images)
    assert found.rank_correlation.isnan().all() and found.ssim.isnan().all()


def test_wrong_options_are_refused(network, images):
    with pytest.raises(UsageError, match="at least 2 levels"):
        weight_randomization(lambda: images[:, 0], network, images, levels=1)
    with pytest.raises(UsageError, match="noise above 0"):
        stability(lambda some: some[:, 0], images, noise=0)
    with pytest.raises(UsageError, match="got one without: there is nothing to draw"):
        weight_randomization(lambda: images[:, 0], nn.Flatten(), images)

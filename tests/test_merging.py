"""Token merging, and explanations of a model that merges.

The reference for explanations is a second network: it has a token for every patch and, where the model merges, puts the
mean of each group in the place of its members. Its logits are the merged model's, and everything that is said of it is
written out in full matrices here.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_vit import fill, images_of
from torch import Tensor, nn

from vision_attn.attribution.base import explain
from vision_attn.attribution.rollout import rollout_row
from vision_attn.capture import AttentionCapture
from vision_attn.data.datamodule import ImageDataModule
from vision_attn.data.transforms import normalize
from vision_attn.errors import UsageError
from vision_attn.layers.merging import TokenMerging, bipartite_matching
from vision_attn.models.vit import ViT
from vision_attn.reporting import ReportMerge

TINY = {"img_size": (20, 28), "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
SCHEDULE = (5, 8, 4)
POOLINGS: dict[str, dict[str, object]] = {
    "class": {"reg_tokens": 2},
    "mean": {"global_pool": "avg", "reg_tokens": 1, "class_token": False},
    "map": {"global_pool": "map", "class_token": False},
}


def vit(**options: object) -> ViT:
    model = fill(ViT(**{**TINY, **options})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5 if parameter.ndim == 2 else 1.0)
    return model  # type: ignore[return-value]


def images(seed: int = 1) -> Tensor:
    return images_of(2, 3, 20, 28, seed=seed).double()


def matched_by_hand(metric: np.ndarray, r: int, num_prefix: int) -> list[int]:
    """The paper's matching for one image, token by token."""
    length = len(metric)
    patches = range(num_prefix, length)
    set_a, set_b = [i for i in patches if i % 2 == 0], [i for i in patches if i % 2]
    cosine = lambda i, j: metric[i] @ metric[j] / np.linalg.norm(metric[i]) / np.linalg.norm(metric[j])  # noqa: E731
    edges = []
    for i in set_a:
        best = max(set_b, key=lambda j: cosine(i, j))
        edges.append((cosine(i, best), i, best))
    goes = {i: j for _, i, j in sorted(edges, reverse=True)[:r]}
    order = [*range(num_prefix), *[i for i in set_a if i not in goes], *set_b]
    return [order.index(goes.get(i, i)) for i in range(length)]


@pytest.mark.parametrize(("length", "num_prefix", "r"), [(11, 1, 3), (12, 0, 6), (13, 5, 1), (9, 2, 3)])
def test_matching_is_that_of_the_paper(length: int, num_prefix: int, r: int) -> None:
    metric = images_of(3, length, 4).double()
    found = bipartite_matching(metric, r, num_prefix=num_prefix)
    assert found.tolist() == [matched_by_hand(one, r, num_prefix) for one in metric.numpy()]


def test_merged_tokens_are_the_means_of_what_they_hold() -> None:
    tokens = images_of(2, 17, 6).double()
    merging = TokenMerging((4, 3), 1, ReportMerge(), tokens)
    now, sizes_before = tokens, merging.sizes.sum(1)
    for number in range(2):
        merging.see(images_of(2, 3, now.shape[1], 4, seed=number).double())
        now = merging(now)
    assert now.shape == (2, 10, 6)
    torch.testing.assert_close(merging.sizes.sum(1), sizes_before)
    for image in range(2):
        for place in range(10):
            held = merging.places[image] == place
            assert merging.sizes[image, place] == held.sum() >= 1
            torch.testing.assert_close(now[image, place], tokens[image, held].mean(0))
    torch.testing.assert_close(merging.spread(now)[:, :1], tokens[:, :1])
    torch.testing.assert_close(merging.bias, merging.sizes.log()[:, None, None])


@torch.no_grad()
def test_no_merging_leaves_the_model_as_it_was_to_the_bit() -> None:
    model = vit()
    before = model(images())
    assert torch.equal(model.merge_tokens(0)(images()), before)
    merged = model.merge_tokens(4)(images())
    assert not torch.allclose(merged, before, atol=1e-3)
    assert torch.equal(model.merge_tokens([0, 0, 0])(images()), before)


@torch.no_grad()
def test_equal_tokens_merge_without_a_change_of_the_logits() -> None:
    for options in POOLINGS.values():
        model = vit(pos_embed="none", **options)
        image = images()[:, :, :4, :4].repeat(1, 1, 5, 7)
        torch.testing.assert_close(copy.deepcopy(model).merge_tokens(9)(image), model(image), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_images_of_a_batch_merge_on_their_own_and_no_more_than_half_at_once() -> None:
    model = vit(reg_tokens=2).merge_tokens(SCHEDULE)
    batch = images()
    torch.testing.assert_close(model(batch), torch.cat([model(image[None]) for image in batch]), atol=1e-10, rtol=0)
    with AttentionCapture(model.merge_tokens(1000)) as capture:
        model(batch)
    assert [record.key_length for record in capture.records] == [38, 38 - 17, 38 - 17 - 9]
    assert capture.records[-1].merged is not None
    assert capture.records[-1].merged[:, :3].tolist() == [[0, 1, 2]] * 2


@torch.no_grad()
def test_the_mean_of_a_layers_keys_says_what_merges_and_each_pass_begins_anew() -> None:
    model = vit(reg_tokens=1).merge_tokens(SCHEDULE)
    batch = images()
    block = model.blocks[0]
    keys = block.attn.qkv(block.norm1(model.embed(batch))).chunk(3, dim=-1)[1].unflatten(-1, (3, 8)).mean(2)
    expected = [matched_by_hand(one, 5, 2) for one in keys.numpy()]
    with AttentionCapture(model) as capture:
        model(batch)
        model(batch)
    merged = [record.merged for record in capture.records]
    assert merged[0] is None and merged[3] is None
    assert merged[1].tolist() == merged[4].tolist() == expected


@torch.no_grad()
def test_features_come_back_on_the_grid() -> None:
    model = vit().merge_tokens(SCHEDULE)
    tokens, maps = model.forward_intermediates(images())
    assert tokens.shape == (2, 36, 24)
    assert [tuple(one.shape) for one in maps] == [(2, 24, 5, 7)] * 3
    assert torch.unique(maps[-1][0].flatten(1), dim=1).shape[1] == 35 - sum(SCHEDULE)


class Grouped(nn.Module):
    """The network with a token for every patch that computes what a merged model does, for the groups of one run."""

    def __init__(self, model: ViT, groups: list[Tensor]) -> None:
        super().__init__()
        self.model, self.groups = model, groups

    def forward(self, batch: Tensor, leaf: int | None = None) -> Tensor:
        model, c = self.model, self.model.options
        self.attention, self.tokens = [], []
        x = model.embed(batch)
        for layer, block in enumerate(model.blocks):
            b, n, _ = x.shape
            q, k, v = block.attn.qkv(block.norm1(x)).reshape(b, n, 3, c.num_heads, -1).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
            self.attention.append(weights)
            x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
            x = mean_over(self.groups[layer + 1]) @ x
            x = x + block.mlp(block.norm2(x))
            if layer == leaf:
                self.leaf = x = x.detach().requires_grad_()
            self.tokens.append(x)
        return model.forward_head(model.norm(x))


def mean_over(groups: Tensor) -> Tensor:
    """(B, N, N): in the place of each token the mean of its group."""
    same = (groups[:, :, None] == groups[:, None]).double()
    return same / same.sum(-1, keepdim=True)


def groups_of(model: ViT, batch: Tensor) -> list[Tensor]:
    """Which tokens are one, before the first layer and after each."""
    groups = [torch.arange(model.token_layout(batch.shape[-2:]).num_tokens).expand(len(batch), -1)]
    handle = model.report_merge.register_forward_hook(lambda _module, _args, output: groups.append(output))
    with torch.no_grad():
        model(batch)
    handle.remove()
    return groups


@pytest.fixture(params=list(POOLINGS))
def pair(request: pytest.FixtureRequest) -> tuple[ViT, Grouped, Tensor]:
    model = vit(**POOLINGS[request.param]).merge_tokens(SCHEDULE)
    batch = images()
    return model, Grouped(copy.deepcopy(model).merge_tokens(0), groups_of(model, batch)), batch


def answer_of(model: ViT, batch: Tensor) -> Tensor:
    """The row (B, N) that answers for the image, where it is no MAP head's."""
    layout = model.token_layout(batch.shape[-2:])
    row = torch.zeros(len(batch), layout.num_tokens).double()
    if layout.query == "class":
        row[:, 0] = 1
    else:
        row[:, layout.num_prefix :] = 1 / layout.num_patches
    return row


def on_grid(model: ViT, row: Tensor) -> Tensor:
    return row[:, model.num_prefix_tokens :].unflatten(1, (5, 7))


@torch.no_grad()
def test_the_reference_computes_what_the_merged_model_does(pair: tuple[ViT, Grouped, Tensor]) -> None:
    model, reference, batch = pair
    torch.testing.assert_close(reference(batch), model(batch), atol=1e-10, rtol=1e-10)
    with AttentionCapture(model) as capture:
        model(batch)
    for record, weights, groups in zip(capture.records, reference.attention, reference.groups, strict=False):
        assert record.merged is None or torch.equal(record.merged, groups)
        columns = F.one_hot(groups).double()
        torch.testing.assert_close(weights.mean(1).sum(-1), torch.ones_like(groups).double())
        expected = (weights.mean(1) @ columns)[:, model.num_prefix_tokens]
        own = record.weights.mean(1)[torch.arange(2), groups[:, model.num_prefix_tokens]]
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("head_fusion", ["mean", "max"])
@pytest.mark.parametrize("discard_ratio", [0.0, 0.6])
@pytest.mark.parametrize("width", [24, 48])
def test_rollout_of_merged_tokens_is_the_product_of_full_matrices(
    head_fusion: str, discard_ratio: float, width: int
) -> None:
    # Of 38 tokens, a model of width 48 multiplies its matrices as it runs, one of width 24 keeps queries and keys.
    model = vit(**POOLINGS["class"], embed_dim=width).merge_tokens(SCHEDULE)
    batch = images()
    groups = groups_of(model, batch)
    reference = Grouped(copy.deepcopy(model).merge_tokens(0), groups)
    with torch.no_grad():
        reference(batch)
    count = groups[0].shape[1]
    product = torch.eye(count).double().expand(2, -1, -1)
    for weights, after in zip(reference.attention, groups[1:], strict=True):
        fused = weights.mean(1) if head_fusion == "mean" else weights.amax(1)
        if discard_ratio:
            border = fused.flatten(1).sort(1).values[:, int(discard_ratio * count**2)]
            # Equal weights of one group differ in the last digit here, and stay or go together.
            low = fused < border[:, None, None] * (1 - 1e-12)
            low[:, :, 0] = False
            fused = fused.masked_fill(low, 0)
        step = fused + torch.eye(count).double()
        product = mean_over(after) @ (step / step.sum(-1, keepdim=True)) @ product
    options = {"head_fusion": head_fusion, "discard_ratio": discard_ratio}
    result = explain(model, batch, method="rollout", **options)
    torch.testing.assert_close(result.maps, on_grid(model, product[:, 0]), atol=1e-10, rtol=1e-8)
    # The path that keeps no matrix, for many tokens.
    with AttentionCapture(model, keep="queries_keys") as capture, torch.no_grad():
        model(batch)
    row = rollout_row(capture.records, model.token_layout((20, 28)), **options)
    torch.testing.assert_close(row, product[:, 0], atol=1e-10, rtol=1e-8)
    assert torch.allclose(row.sum(1), torch.ones(2).double())


@torch.no_grad()
def test_rollout_and_raw_of_merged_tokens_are_those_of_the_reference(pair: tuple[ViT, Grouped, Tensor]) -> None:
    model, reference, batch = pair
    with AttentionCapture(reference) as capture:
        reference(batch)
    if model.options.global_pool == "map":
        row = last = capture.records[-1].weights.mean(1)[:, 0]
    else:
        row = answer_of(model, batch)
        last = torch.einsum("bq,bqk->bk", row, reference.attention[-1].mean(1))
    torch.testing.assert_close(explain(model, batch, method="raw").maps, on_grid(model, last))
    for weights in reversed(reference.attention):
        row = (row + torch.einsum("bq,bqk->bk", row, weights.mean(1))) / 2
    torch.testing.assert_close(explain(model, batch, method="rollout").maps, on_grid(model, row))


@pytest.mark.parametrize("width", [24, 48])
def test_a_patch_asks_as_the_token_that_it_is_part_of(width: int) -> None:
    model = vit(**POOLINGS["class"], embed_dim=width).merge_tokens(SCHEDULE)
    batch = images()
    groups = groups_of(model, batch)
    reference = Grouped(copy.deepcopy(model).merge_tokens(0), groups)
    with AttentionCapture(model, keep="queries_keys") as capture, torch.no_grad():
        model(batch)
        reference(batch)
    place = model.num_prefix_tokens + 2 * 7 + 3
    raw = reference.attention[-1].mean(1)[:, place]
    torch.testing.assert_close(explain(model, batch, method="raw", query_patch=(2, 3)).maps, on_grid(model, raw))
    row = mean_over(groups[-2])[:, place]
    for weights in reversed(reference.attention):
        row = (row + torch.einsum("bq,bqk->bk", row, weights.mean(1))) / 2
    maps = explain(model, batch, method="rollout", query_patch=(2, 3)).maps
    torch.testing.assert_close(maps, on_grid(model, row))
    by_rows = rollout_row(capture.records, model.token_layout((20, 28)), query_patch=(2, 3))
    torch.testing.assert_close(by_rows, row)


def test_gradient_methods_of_merged_tokens_are_those_of_the_reference(pair: tuple[ViT, Grouped, Tensor]) -> None:
    model, reference, batch = pair
    target = torch.tensor([1, 3])
    with AttentionCapture(reference) as capture:
        chosen = reference(batch).gather(1, target[:, None]).sum()
    gradients = torch.autograd.grad(chosen, reference.attention, retain_graph=True)
    if model.options.global_pool == "map":
        head = capture.records[-1].weights
        product = head * torch.autograd.grad(chosen, head, retain_graph=True)[0]
        generic = product.clamp(min=0).mean((1, 2))
        grad_rollout = product.mean(1).clamp(min=0).mean(1)
        grad_rollout = grad_rollout / grad_rollout.sum(-1, keepdim=True)
    else:
        generic = grad_rollout = answer_of(model, batch)
    for weights, gradient in zip(reversed(reference.attention), reversed(gradients), strict=True):
        product = weights * gradient
        generic = generic + torch.einsum("bq,bqk->bk", generic, product.clamp(min=0).mean(1))
        step = product.mean(1).clamp(min=0) + torch.eye(weights.shape[-1]).double()
        grad_rollout = torch.einsum("bq,bqk->bk", grad_rollout, step / step.sum(-1, keepdim=True))
    for name, row in (("generic", generic), ("grad_rollout", grad_rollout)):
        maps = explain(model, batch, method=name, target=target).maps
        torch.testing.assert_close(maps, on_grid(model, row), atol=1e-10, rtol=1e-7)


def test_legrad_and_grad_cam_of_merged_tokens_are_those_of_the_reference(pair: tuple[ViT, Grouped, Tensor]) -> None:
    model, reference, batch = pair
    target = torch.tensor([1, 3])
    own = reference.model
    reference(batch)
    total = torch.zeros(2, reference.groups[0].shape[1]).double()
    for weights, tokens in zip(reference.attention, reference.tokens, strict=True):
        if own.options.global_pool == "map":
            with AttentionCapture(own) as capture:
                score = own.forward_head(own.norm(tokens)).gather(1, target[:, None]).sum()
            weights = capture.records[-1].weights
        else:
            tokens = tokens.mean(1, keepdim=True).expand_as(tokens)
            score = own.forward_head(own.norm(tokens)).gather(1, target[:, None]).sum()
        gradient = torch.autograd.grad(score, weights, retain_graph=True)[0]
        total = total + gradient.clamp(min=0).mean((1, 2))
    maps = explain(model, batch, method="legrad", target=target).maps
    torch.testing.assert_close(maps, on_grid(model, total), atol=1e-10, rtol=1e-7)

    chosen = reference(batch, leaf=1).gather(1, target[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, reference.leaf)
    part = slice(own.num_prefix_tokens, None)
    expected = (gradient[:, part].mean(1, keepdim=True) * reference.leaf[:, part]).sum(-1).clamp(min=0)
    result = explain(model, batch, method="grad_cam", target=target)
    assert result.options["layer"] == "blocks.1"
    torch.testing.assert_close(result.maps, expected.detach().unflatten(1, (5, 7)), atol=1e-10, rtol=1e-7)


def test_training_and_models_that_cannot_merge_are_refused() -> None:
    with pytest.raises(UsageError, match=r"got training: call eval\(\), or merge_tokens\(0\)"):
        vit().merge_tokens(2).train()(images())
    for r in (-1, 2.5, [1, 2], True, [1, 2, -1]):
        with pytest.raises(UsageError, match="from 0, or 3, one for each layer"):
            vit().merge_tokens(r)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="got rotary positions"):
        ViT(**{**TINY, "rope": "axial"}).merge_tokens(2)
    with pytest.raises(UsageError, match="got window or other attention"):
        ViT(**{**TINY, "attn_layer": ("window", "self")}).merge_tokens(2)
    biased = ViT(**TINY, attn_options={"self": {"relative_bias": (5, 7)}})
    with pytest.raises(UsageError, match="added once in every layer to merge tokens, got relative biases"):
        biased.merge_tokens(2)
    assert biased.merge_tokens(0).merged_tokens == ()


def test_merging_is_no_part_of_the_weights_and_survives_a_copy() -> None:
    model = vit().merge_tokens(3)
    assert model.state_dict().keys() == vit().state_dict().keys()
    assert "merged_tokens" not in model.config
    torch.testing.assert_close(copy.deepcopy(model)(images()), model(images()))


@pytest.mark.real
@torch.no_grad()
def test_the_real_vit_sees_the_same_with_merged_tokens(real_dir: Path) -> None:
    path = real_dir / "weights" / "vits14_saliency_fp16.safetensors"
    model = ViT.from_timm(
        "vit_small_patch14_dinov2", path, img_size=224, num_classes=10, pos_interpolation="hf", skip=("head.",)
    )
    head = load_file(real_dir / "weights" / "clothing_head_vits14_token.safetensors")
    model.head.load_state_dict({key.split(".")[1]: tensor for key, tensor in head.items()})
    data = ImageDataModule(path=str(real_dir / "data" / "clothing"), eval_batch_size=12, num_workers=0)
    batch = next(iter(data.test_dataloader())).images
    batch = normalize(batch, mean=model.pretrained_cfg["mean"], std=model.pretrained_cfg["std"])
    logits, maps = model.eval()(batch), explain(model, batch, method="rollout").maps.flatten(1)
    model.merge_tokens(12)
    assert (model(batch).argmax(1) == logits.argmax(1)).sum() >= 11
    merged = explain(model, batch, method="rollout").maps.flatten(1)
    for one, other in zip(maps, merged, strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.95

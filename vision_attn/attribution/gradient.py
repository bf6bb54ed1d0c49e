"""Class-specific maps: what the logit of one class owes to attention, or to a feature map.

One forward pass records every layer's attention with gradients on, and one backward pass differentiates the sum of the
images' target logits by all of them: images do not touch each other, so that each has its own gradients. Parameters
take no part. Only one row of the products is ever shown, so nothing is multiplied out: the row goes from the last layer
to the first.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vision_attn.attribution.base import (
    METHODS,
    captured,
    check_gradients,
    frozen,
    logits_of,
    seen_records,
    target_logits,
    working_methods,
)
from vision_attn.attribution.encoders import Encoder, find_encoder
from vision_attn.attribution.merged import expanded, group_means, group_sizes, merges_seen, num_tokens, of_members
from vision_attn.attribution.positions import token_attention
from vision_attn.attribution.rollout import kth_smallest, refuse_other_layers
from vision_attn.attribution.tokens import find_layout, is_known, query_row
from vision_attn.capture import AttentionCapture, AttentionRecord
from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout
from vision_attn.registry import unknown

_Pooling = Literal["mean", "model"]


@METHODS.register("grad_rollout", class_specific=True, needs="global attention", predicts=True, sees_once=True)
def grad_rollout(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layout: TokenLayout | None = None,
    discard_ratio: float = 0.0,
) -> Tensor:
    """Returns rollout of the attention that raises the target's logit, (B, h, w), from 0 up.

    R = Π_l norm(Ā_l + I), the last layer leftmost, with Ā_l = (E_h(A_l · ∂y/∂A_l))⁺ and rows normalised to sum 1; shown
    is the query row: the class token's, the mean of class and distillation token's, or the mean of the patches'. For a
    MAP head it is the head's own Ā, normalised to sum 1, times R. Each layer is weighted with its own gradient.

    Source: J. Gildenblat's vit-explain; its code pairs gradients and layers in opposite orders, which is not followed.

    Args:
        model: A model in which every token attends to every other in each layer (ViT and its kin).
        images: (B, 3, H, W), as the model wants them.
        target: (B,), the class asked about; None for the predicted one.
        layout: The tokens' layout; None to find it from the model.
        discard_ratio: The share of lowest weights that each image's Ā loses, from 0 to below 1; never those in the
            class token's column.

    Raises:
        AttentionNotFoundError: the model shows no attention.
        UsageError: its attention is not between all tokens, or an option is out of range.
    """
    number = isinstance(discard_ratio, int | float) and not isinstance(discard_ratio, bool)
    if not number or not 0 <= discard_ratio < 1:
        raise UsageError(f"expected discard_ratio from 0 to below 1, got {discard_ratio!r}: 0.9 drops nine tenths")
    layout, layers, pooling = _attention_and_gradients(model, images, target, layout, "grad_rollout")
    matrices = [layer.among_tokens((layer.weights * layer.gradients).mean(1).clamp(min=0)) for layer in layers]
    if discard_ratio:
        protected = layout.index("class") if "class" in layout.prefix else None
        matrices = [_discarded(matrix, discard_ratio, protected) for matrix in matrices]
    row = _query_row(layout, matrices[0])
    if pooling is not None:
        product = pooling.weights * pooling.gradients
        row = _over_all_tokens(product.mean(1).clamp(min=0).mean(1), layout)
        row = row / row.sum(-1, keepdim=True).clamp(min=torch.finfo(row.dtype).tiny)
    return layout.patches(grad_rollout_row(row, matrices))


def grad_rollout_row(row: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Returns row · Π_l norm(Ā_l + I), (B, N), of non-negative matrices (B, N, N) given from the first layer on."""
    for matrix in reversed(matrices):
        # Row q of norm(Ā + I) is (Ā_q + e_q) / (sum of Ā_q + 1).
        share = row / (matrix.sum(-1) + 1)
        row = share + _times(share, matrix)
    return row


@METHODS.register("generic", class_specific=True, needs="global attention", predicts=True, sees_once=True)
def generic(
    model: nn.Module, images: Tensor, target: Tensor | None = None, *, layout: TokenLayout | None = None
) -> Tensor:
    """Returns the relevance of each patch for the target's logit, (B, h, w), from 0 up.

    R = I, then R ← R + Ā_l R from the first layer to the last, with Ā_l = E_h((A_l · ∂y/∂A_l)⁺); shown is the query
    row: the class token's, the mean of class and distillation token's, or the mean of the patches'.

    A MAP head is the rule for attention between two sets of tokens, as its latents answer for the image: the row is
    Ā of the head times R, the mean over its latents. The paper's normalisation of R before that product (its eq. 8 and
    9) is left out, so that all heads read the same R; nor is anything added, as no residual goes past the head.

    Source: Chefer, Gur and Wolf, "Generic Attention-model Explainability", ICCV 2021, eq. 5 and 6 (and 10 for MAP).

    Args:
        model: A model in which every token attends to every other in each layer (ViT and its kin).
        images: (B, 3, H, W), as the model wants them.
        target: (B,), the class asked about; None for the predicted one.
        layout: The tokens' layout; None to find it from the model.

    Raises:
        AttentionNotFoundError: the model shows no attention.
        UsageError: its attention is not between all tokens.
    """
    layout, layers, pooling = _attention_and_gradients(model, images, target, layout, "generic")
    matrices = [layer.among_tokens((layer.weights * layer.gradients).clamp(min=0).mean(1)) for layer in layers]
    row = _query_row(layout, matrices[0])
    if pooling is not None:
        product = pooling.weights * pooling.gradients
        row = _over_all_tokens(product.clamp(min=0).mean((1, 2)), layout)
    return layout.patches(generic_row(row, matrices))


def generic_row(row: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Returns row · Π_l (I + Ā_l), the last layer leftmost, (B, N), of matrices (B, N, N) given from the first on."""
    for matrix in reversed(matrices):
        row = row + _times(row, matrix)
    return row


@METHODS.register("legrad", class_specific=True, needs="global attention", predicts=True)
def legrad(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layout: TokenLayout | None = None,
    last_layers: int | None = None,
    pooling: _Pooling = "mean",
) -> Tensor:
    """Returns how sensitive each layer's own answer is to attention on a patch, summed over layers, (B, h, w), from 0.

    Σ_l E_{h,q}((∂s_l/∂A_l)⁺), s_l being the target's logit of the model's head (final norm, classifier) on the mean of
    the tokens that block l gives out, prefix included. Prefix tokens are not shown. For a MAP head A_l is the attention
    of the head's latents over the tokens of block l; class attention over more than the layout's tokens (CaiT) is none,
    and the head answers for the tokens as they are.

    Source: Bousselham et al., "LeGrad", ICCV 2025, https://arxiv.org/abs/2404.03214; the mean of tokens and the MAP
    head as in the authors' code. Values are not rescaled to [0, 1] by minimum and maximum as in its last step, so that
    they can be compared.

    Args:
        model: A ViT of a family that is known: ours, timm's, torchvision's or one of transformers' classifiers.
        images: (B, 3, H, W), as the model wants them.
        target: (B,), the class asked about; None for the predicted one.
        layout: The tokens' layout; None to find it from the model.
        last_layers: How many layers, counted from the last, are summed; None for all.
        pooling: What the head answers for in each layer: "mean" for the mean of all tokens, "model" for the tokens as
            they are, which the head pools as the model does (its class token, say).

    Raises:
        AttentionNotFoundError: the model shows no attention.
        UsageError: its blocks or its head are not known, its attention is not between all tokens, it has fewer layers
            than are asked for, or the pooling is unknown.
    """
    if pooling not in get_args(_Pooling):
        raise unknown("pooling", str(pooling), get_args(_Pooling))
    encoder = _known_encoder(model, images, "legrad")
    layout = layout or find_layout(model, images)
    count = len(encoder.blocks)
    if last_layers is not None and not (type(last_layers) is int and 1 <= last_layers <= count):
        raise UsageError(f"expected last_layers from 1 to {count}, got {last_layers}: or None for all")
    names = {module: name for name, module in model.named_modules()}
    first = 0 if last_layers is None else count - last_layers
    blocks = [(names[block], block) for block in encoder.blocks[first:]]
    with (
        frozen(model),
        merges_seen(model) as merged,
        _outputs([block for _, block in blocks], merged) as tokens,
        AttentionCapture(model) as capture,
    ):
        logits = logits_of(model(images))
        target = logits.argmax(-1) if target is None else target
        records = token_attention(model, seen_records(capture), "legrad")
        refuse_parts(records, "legrad")
        refuse_other_layers(model, "legrad")
        check_gradients(logits, model, "legrad")
        if len(tokens) != count - first:
            raise UsageError(
                f"expected blocks that run once each for legrad, got {len(tokens)} runs of {count - first} in "
                f"{type(model).__name__}: use generic, or {_alternatives('legrad')}"
            )
        _check_head(encoder, tokens[-1], logits, model)
        total = images.new_zeros((), dtype=source_of(records[0]).dtype)
        for (name, _), tokens_of_block in zip(blocks, tokens, strict=True):
            before = len(capture.records)
            if pooling == "mean" and layout.query != "map":
                tokens_of_block = tokens_of_block.mean(1, keepdim=True).expand_as(tokens_of_block)
            score = target_logits(encoder.head(tokens_of_block), target)
            attended = [record for record in records if f"{record.name}.".startswith(f"{name}.")]
            if layout.query == "map":
                attended = _of_latents(capture.records[before:], layout) or attended
            if not attended:
                raise UsageError(
                    f"expected attention in every block, got none in {name!r}: use {_alternatives('legrad')}"
                )
            sources = [source_of(record) for record in attended]
            gradients = torch.autograd.grad(score.sum(), sources, retain_graph=True)
            for gradient, record in zip(gradients, attended, strict=True):
                total = total + _over_all_tokens(_sensitivity(gradient, record), layout)
    return layout.patches(total)


@METHODS.register("grad_cam", class_specific=True, needs="nothing", predicts=True)
def grad_cam(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layout: TokenLayout | None = None,
    layer: str | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Returns where features stand that raise the target's logit, (B, h, w), from 0 up, and the layer they are from.

    (Σ_k w_k F_k)⁺ with w_k the mean over all places of ∂y/∂F_k. F is the output of one module: a feature map (channels
    first or last) or tokens, whose patches are put on the grid and whose prefix is dropped.

    Left to itself, the method takes, in a ViT, the tokens entering the last block (those leaving it do not reach a
    class token's answer any more), and in other networks the last feature map before pooling that the answer depends
    on. That one is found by running the model on the first image. The result's options say which it was.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017.

    Args:
        model: Any classifier: a CNN, a ViT, Swin.
        images: (B, 3, H, W), as the model wants them.
        target: (B,), the class asked about; None for the predicted one.
        layout: The tokens' layout, where the model has one.
        layer: Name of the module whose output is taken ("layer4", "stages.3", "blocks.10"); None to find it.

    Raises:
        UsageError: there is no such layer, its output is nothing that lies on a grid, or the answer does not depend on
            it.
    """
    named = dict(model.named_modules())
    if layer is not None and layer not in named:
        raise unknown("layer", str(layer), filter(None, named))
    if layout is None and is_known(model):
        layout = find_layout(model, images)
    with frozen(model):
        name = _feature_layer(model, images[:1], layout) if layer is None else layer
        with merges_seen(model) as merged, _leaf_output(named[name], merged) as leaves:
            chosen = target_logits(logits_of(model(images)), target)
        if not leaves:
            raise UsageError(f"expected a layer that runs and gives a tensor, got {name!r}: choose another")
        features = leaves[-1]
        to_grid = _grid_reader(features, images, layout, named[name])
        if to_grid is None:
            raise UsageError(
                f"expected features on a grid from {name!r}, got {tuple(features.shape)}: choose another layer, or "
                "pass layout=TokenLayout(...) of these tokens"
            )
        gradients = None
        if chosen.requires_grad:
            (gradients,) = torch.autograd.grad(chosen.sum(), features, allow_unused=True)
    if gradients is None or (layout is not None and not to_grid(gradients).any()):
        raise UsageError(
            f"expected a layer that the answer depends on, got {name!r}, whose patches it never sees: "
            "choose one before it"
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    features, gradients = to_grid(features.detach()).to(dtype), to_grid(gradients).to(dtype)
    weights = gradients.mean((1, 2), keepdim=True)
    return (weights * features).sum(-1).clamp(min=0), {"layer": name}


def refuse_parts(records: Sequence[AttentionRecord], method: str) -> None:
    """Raises UsageError where attention is within windows or between channels, so that rows are not of all tokens."""
    parts = [record for record in records if record.kind not in ("self", "cross")]
    if parts:
        record = parts[0]
        what = f"windows of {record.query_length} tokens" if record.kind == "window" else f"{record.kind} attention"
        raise UsageError(
            f"expected attention between all tokens for {method}, got {what} in {record.name!r}: "
            f"use {_alternatives(method)}"
        )


def source_of(record: AttentionRecord) -> Tensor:
    """Returns what the logits can be differentiated by: what multiplied the values, as a rule the weights."""
    return record.applied


def _sensitivity(gradient: Tensor, record: AttentionRecord) -> Tensor:
    """Returns what attention on each token brings, (B, N): the mean of positive gradients over heads and queries.

    The N tokens that merged into n attend as n do and part the gradient among them, so that their mean is the sum over
    groups, divided by N.
    """
    gradient = gradient.clamp(min=0).mean(1)
    if record.merged is None:
        return gradient.mean(1)
    return (gradient.sum(1) / num_tokens(record)).gather(1, record.merged)


def _of_latents(records: Sequence[AttentionRecord], layout: TokenLayout) -> list[AttentionRecord]:
    """Returns the attention of a MAP head's latents over the layout's tokens, or over the patches alone."""
    lengths = (layout.num_tokens, layout.num_patches)
    return [record for record in records if record.kind == "cross" and record.key_length in lengths]


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer's weights (B, h, Q, K), the target logit's gradients by them, and what its tokens have merged into."""

    weights: Tensor
    gradients: Tensor
    merged: Tensor | None

    def among_tokens(self, matrix: Tensor) -> Tensor:
        """Returns a matrix (B, Q, K) of weights times gradients as that among all tokens, (B, N, N).

        The tokens of a group part its gradient among them: each of its rows has a share.
        """
        if self.merged is None:
            return matrix
        return expanded(matrix / group_sizes(self.merged, matrix)[..., None], self.merged)


def _attention_and_gradients(
    model: nn.Module, images: Tensor, target: Tensor | None, layout: TokenLayout | None, method: str
) -> tuple[TokenLayout, list[_Layer], _Layer | None]:
    """Returns the layout, each layer's weights and gradients, and a MAP head's.

    Raises:
        UsageError: attention is not among the layout's tokens, layer after layer, with no more than a MAP head after.
    """
    with frozen(model), AttentionCapture(model) as capture:
        chosen = target_logits(logits_of(model(images)), target)
        records = token_attention(model, seen_records(capture), method)
        refuse_parts(records, method)
        refuse_other_layers(model, method)
        check_gradients(chosen, model, method)
        layout = layout or find_layout(model, images)
        layers = [record for record in records if record.kind == "self"]
        pooling = [record for record in records if record.kind == "cross"]
        for record in layers:
            if num_tokens(record) != layout.num_tokens:
                raise UsageError(
                    f"expected {layout.num_tokens} tokens in every layer ({layout.num_prefix} prefix + "
                    f"{layout.grid[0]} x {layout.grid[1]}), got {num_tokens(record)} in {record.name!r}: pass the "
                    f"layout of this model at this image size, or use {_alternatives(method)}"
                )
        if not layers or len(pooling) != (layout.query == "map"):
            found = sorted({f"{record.kind} {record.query_length} x {record.key_length}" for record in records})
            raise UsageError(
                f"expected self-attention layers{' and a MAP head' * (layout.query == 'map')} only, got attention "
                f"{', '.join(found)}: use {_alternatives(method)}"
            )
        sources = [source_of(record) for record in layers + pooling]
        gradients = torch.autograd.grad(chosen.sum(), sources, allow_unused=True, materialize_grads=True)
    seen = [
        _Layer(weights.detach(), gradient, record.merged)
        for weights, gradient, record in zip(sources, gradients, layers + pooling, strict=True)
    ]
    return layout, seen[: len(layers)], seen[-1] if pooling else None


def _query_row(layout: TokenLayout, like: Tensor) -> Tensor:
    """Returns the image's answer over tokens, (B, N), for matrices like (B, N, N)."""
    return query_row(layout, like).expand(len(like), -1)


def _times(row: Tensor, matrix: Tensor) -> Tensor:
    """Returns row · matrix, (B, N), in their own precision, whatever the model ran in."""
    with torch.autocast(row.device.type, enabled=False):
        return torch.bmm(row[:, None], matrix)[:, 0]


def _over_all_tokens(row: Tensor, layout: TokenLayout) -> Tensor:
    """Returns a row over all tokens, (B, N): where the patches alone were attended to, the prefix has 0.

    Raises:
        UsageError: the row is of other tokens.
    """
    unseen = layout.num_tokens - row.shape[-1]
    if unseen not in (0, layout.num_prefix):
        raise UsageError(
            f"expected attention over {layout.num_tokens} tokens ({layout.num_prefix} prefix + {layout.grid[0]} x "
            f"{layout.grid[1]}), got {row.shape[-1]}: pass the layout of this model at this image size"
        )
    return nn.functional.pad(row, (unseen, 0))


def _discarded(matrix: Tensor, discard_ratio: float, protected: int | None) -> Tensor:
    """Returns a matrix (B, N, N) whose lowest entries are 0, as in rollout; of equal ones at the border all stay."""
    matrix = matrix + 0.0  # no -0.0, whose bits are those of no small number
    border = kth_smallest(lambda: [matrix.flatten(1)], int(discard_ratio * matrix.shape[-1] ** 2))
    low = matrix < border[:, None, None]
    if protected is not None:
        low[..., protected] = False
    return matrix.masked_fill(low, 0.0)


def _alternatives(method: str) -> str:
    """Returns the names of what works without global attention, for an error."""
    return " or ".join(name for name in working_methods("attention", "nothing") if name != method)


def _known_encoder(model: nn.Module, images: Tensor, method: str) -> Encoder:
    encoder = find_encoder(model)
    if encoder is None:
        refuse_parts(captured(model, images), method)
        raise UsageError(
            f"expected a ViT whose blocks and head are known for {method}, got {type(model).__name__}: use generic, or "
            f"{_alternatives(method)}"
        )
    return encoder


def _check_head(encoder: Encoder, tokens: Tensor, logits: Tensor, model: nn.Module) -> None:
    """Raises UsageError where the encoder's head does not give the model's own logits for the last block's tokens."""
    # With gradients on, as the model ran: a MAP head's attention is rounded in the same places.
    own, logits = encoder.head(tokens).detach().float(), logits.detach().float()
    tolerance = max(1e-3, 8 * torch.finfo(tokens.dtype).eps) * float(logits.abs().max())
    if own.shape != logits.shape or not torch.allclose(own, logits, rtol=0.0, atol=tolerance, equal_nan=True):
        raise UsageError(
            f"expected logits as the head of {type(encoder.module).__name__} gives them for legrad, got others from "
            f"{type(model).__name__}: explain the {type(encoder.module).__name__} itself, or use generic"
        )


@contextmanager
def _outputs(modules: Sequence[nn.Module], merged: Callable[[], Tensor | None]) -> Iterator[list[Tensor]]:
    """Gives a list that receives what each module gives out, or the first of it, in the order in which they run.

    Where tokens have `merged`, what is received has one for each of them as before.
    """
    seen: list[Tensor] = []

    def see(_module: nn.Module, _args: Any, output: Any) -> None:
        groups = merged()
        seen.append(_first(output) if groups is None else of_members(_first(output), groups))

    handles = [module.register_forward_hook(see) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# Grad-CAM's feature map.


@contextmanager
def _leaf_output(module: nn.Module, merged: Callable[[], Tensor | None]) -> Iterator[list[Tensor]]:
    """Cuts the graph at what a module gives out, so that the backward pass ends there; gives the leaves.

    Where tokens have `merged`, a leaf has one for each of them as before, and the model goes on with their means.
    """
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        first = _first(output)
        if not isinstance(first, Tensor):
            return output
        groups = merged()
        if groups is None or first.dim() != 3:
            leaves.append(first.detach().requires_grad_())
            # What comes next may work in place, which a leaf does not allow.
            changed = leaves[-1].clone()
        else:
            leaves.append(of_members(first.detach(), groups).requires_grad_())
            changed = group_means(leaves[-1], groups, first.shape[1])
        return changed if isinstance(output, Tensor) else _with_first(output, changed)

    handle = module.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


@dataclass(eq=False)
class _Call:
    """One call of a module: what went in and came out, at first and beside it, and what it called."""

    name: str
    module: nn.Module
    given: Tensor | None
    output: Tensor | None = None
    beside: list[Tensor] = field(default_factory=list)
    calls: list["_Call"] = field(default_factory=list)


def _feature_layer(model: nn.Module, image: Tensor, layout: TokenLayout | None) -> str:
    """Returns the name of the module whose output Grad-CAM takes, found on one image (1, 3, H, W)."""
    encoder = find_encoder(model)
    if encoder is not None and len(encoder.blocks) > 1:
        return next(name for name, module in model.named_modules() if module is encoder.blocks[-2])
    image = image.clone().requires_grad_()
    with _calls(model) as root:
        logits = logits_of(model(image))
    logit = logits.amax()
    search = _Search(dict(model.named_modules()), image, layout, logit, logits.shape[-1])
    found = search.last_below(root) or search.fallback
    if found is None:
        raise UsageError(
            f"expected a feature map on a grid before the answer of {type(model).__name__}, found none: give its "
            "module as layer, or layout=TokenLayout(...) where it has tokens"
        )
    return found.name


@contextmanager
def _calls(model: nn.Module) -> Iterator[_Call]:
    """Gives the root of a tree of all module calls that is filled while the model runs."""
    root = _Call("", model, None)
    stack = [root]
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _Call(names[module], module, _first((*args, *kwargs.values())))
        stack[-1].calls.append(call)
        stack.append(call)

    def leave(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        call = stack.pop()
        call.output, call.beside = _first(output), _all_tensors(output)[1:]

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    try:
        yield root
    finally:
        for handle in handles:
            handle.remove()


@dataclass(eq=False)
class _Search:
    """The search for the last feature map that an answer depends on.

    The way is from the last call to the first, and downwards only where the whole network is (its input is the image)
    or in a Sequential. What takes features in and gives one position out is pooling or a head: nothing in it is looked
    at, so that no key or value of an attention is ever taken. Where a block gives features that lie on no grid, or that
    the answer does not see, only its siblings in one list of blocks are tried: what comes before them would be the
    patch embedding.

    Args:
        modules: By name.
        image: (1, 3, H, W).
        layout: The tokens' layout, or None.
        logit: What the answer is, with its history.
        num_classes: The number of logits. As many channels are class scores rather than features.
    """

    modules: dict[str, nn.Module]
    image: Tensor
    layout: TokenLayout | None
    logit: Tensor
    num_classes: int
    fallback: _Call | None = None

    def last_below(self, call: _Call) -> _Call | None:
        """Returns the last call below `call` whose output is such a feature map, or None.

        The last one on a grid, if it be class scores or not seen, becomes the fallback.
        """
        blocks: nn.Module | None = None
        for one in reversed(call.calls):
            if blocks is not None and self._list_of(one) is not blocks:
                return None
            takes_image = one.given is not None and one.given.shape == self.image.shape
            if not self._has_places(one):
                if takes_image:
                    return self.last_below(one)
                continue
            if isinstance(one.module, nn.Identity | nn.modules.dropout._DropoutNd):
                continue
            sees, scores = self._sees(one), self._channels(one) == self.num_classes
            if sees and not scores:
                return one
            if sees is not None and self.fallback is None:
                self.fallback = one
            if sees is False and (takes_image or isinstance(one.module, nn.Sequential)):
                return self.last_below(one)
            if scores or next(one.module.children(), None) is None:
                continue
            blocks = self._list_of(one)
            if blocks is None:
                return None
        return None

    def _has_places(self, call: _Call) -> bool:
        """Returns whether a call gives features at more than one place of the image."""
        features = call.output
        if features is None or features.dim() not in (3, 4):
            return False
        if features.dim() == 3:
            return min(features.shape[1:]) > 1
        height, width = (
            features.shape[2:] if _channels_first(features, self.image, call.module) else features.shape[1:3]
        )
        return height * width > 1

    def _channels(self, call: _Call) -> int:
        assert call.output is not None
        first = call.output.dim() == 4 and _channels_first(call.output, self.image, call.module)
        return call.output.shape[1 if first else -1]

    def _sees(self, call: _Call) -> bool | None:
        """Returns whether the answer depends on a call's features; None where they lie on no grid."""
        assert call.output is not None
        to_grid = _grid_reader(call.output, self.image, self.layout, call.module)
        if to_grid is None or len(call.output) != len(self.image):
            return None
        if any(self._depends(self.logit, one) and self._depends(one, call.output) for one in call.beside):
            return False  # the module has pooled its features already, and the answer reads that
        (gradient,) = torch.autograd.grad(self.logit, call.output, retain_graph=True, allow_unused=True)
        return gradient is not None and bool(to_grid(gradient).any())

    def _depends(self, result: Tensor, source: Tensor) -> bool:
        if not (result.requires_grad and source.requires_grad):
            return False
        return torch.autograd.grad(result.sum(), source, retain_graph=True, allow_unused=True)[0] is not None

    def _list_of(self, call: _Call) -> nn.Module | None:
        """Returns the list of blocks that a call's module stands in, or None."""
        parent = self.modules[call.name.rpartition(".")[0]] if call.name else None
        return parent if isinstance(parent, nn.Sequential | nn.ModuleList) else None


def _channels_first(features: Tensor, images: Tensor, module: nn.Module) -> bool:
    """Returns whether a module's features are (B, C, h, w) rather than (B, h, w, C).

    The widths of its layers, from the last, tell which side is C. In a module without any, h and w are far from the
    proportions of the image where C is taken for one of them.
    """
    first, last = features.shape[1], features.shape[-1]
    for layer in reversed(list(module.modules())):
        for name in ("out_channels", "out_features", "num_features", "normalized_shape"):
            width = getattr(layer, name, None)
            width = width[-1] if isinstance(width, tuple) else width
            if first != last and width in (first, last):
                return width == first
    wanted = math.log(images.shape[-2] / images.shape[-1])
    as_first, as_last = (
        abs(math.log(side[0] / side[1]) - wanted) for side in (features.shape[2:], features.shape[1:3])
    )
    return as_first < math.log(2) or as_first <= as_last


def _grid_reader(
    features: Tensor, images: Tensor, layout: TokenLayout | None, module: nn.Module
) -> Callable[[Tensor], Tensor] | None:
    """Returns what brings features, and what has their shape, to (B, h, w, C); None where they lie on no grid."""
    if features.dim() == 4:
        first = _channels_first(features, images, module)
        return (lambda part: part.permute(0, 2, 3, 1)) if first else (lambda part: part)
    if features.dim() != 3:
        return None
    length = features.shape[1]
    if layout is not None and length in (layout.num_tokens, layout.num_patches):
        return lambda part: part[:, length - layout.num_patches :].unflatten(1, layout.grid)
    height, width = images.shape[-2:]
    # Tokens without prefix stand row by row, one for each square of pixels: there is one side that gives their number.
    for side in range(1, min(height, width) + 1):
        if height % side == 0 == width % side and (height // side) * (width // side) == length:
            return lambda part: part.unflatten(1, (height // side, width // side))
    return None


def _first(output: Any) -> Any:
    """Returns the first tensor in what a module took or gave, or None."""
    return next(iter(_all_tensors(output)), None)


def _all_tensors(output: Any) -> list[Tensor]:
    """Returns the tensors in what a module took or gave, in order; not those in parts of its parts."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [one for one in output if isinstance(one, Tensor)]
    return []


def _with_first(output: Any, changed: Tensor) -> Any:
    """Returns what a module gave with another tensor as the first."""
    if isinstance(output, Mapping):
        place = next(name for name, one in output.items() if isinstance(one, Tensor))
        output[place] = changed  # type: ignore[index]
        return output
    place = next(index for index, one in enumerate(output) if isinstance(one, Tensor))
    return type(output)(changed if index == place else one for index, one in enumerate(output))

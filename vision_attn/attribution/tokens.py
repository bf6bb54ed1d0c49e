"""The token layout of a model, found where it can be known, and the row of tokens that answers for the image.

Our encoder states its layout; timm's encoders carry what it follows from. Nothing is guessed from the number of tokens.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout

_REMEDY = 'pass layout=TokenLayout(prefix=("class",), grid=(h, w), query="class") with what the model does'

# Encoders of timm whose tokens are prefix and patches from the first block to the last, by module and class.
_TIMM_ENCODERS = (
    ("timm.models.vision_transformer", "VisionTransformer"),
    ("timm.models.eva", "Eva"),
    ("timm.models.beit", "Beit"),
)
_QUERY_OF_POOLING = {"token": "class", "": "class", "avg": "mean", "map": "map"}


def find_layout(model: nn.Module, images: Tensor) -> TokenLayout:
    """Returns the layout of `model`'s tokens for images of this size.

    Known are our own encoder (anything with a `token_layout` method), timm's VisionTransformer and its descendants
    (DeiT with and without distillation token, DINOv2 and v3, registers, SigLIP), Eva and BEiT; bare or inside another
    module (Lightning, DistributedDataParallel, a Sequential) that holds exactly one of them.

    Args:
        model: The model that `images` are for.
        images: (B, 3, H, W); only the size is read.

    Raises:
        UsageError: the model is not known, pools in a way that no single row stands for, or is built for another
            image size.
    """
    encoder = _find_encoder(model)
    if encoder is None:
        raise UsageError(f"expected a model whose token layout is known, got {type(model).__name__}: {_REMEDY}")
    height, width = images.shape[-2:]
    if hasattr(encoder, "token_layout"):
        return encoder.token_layout((height, width))
    prefix = _prefix(encoder)
    return TokenLayout(prefix=prefix, grid=_grid(encoder, height, width), query=_query(encoder, prefix))


def is_known(model: nn.Module) -> bool:
    """Whether `find_layout` knows the model."""
    return _find_encoder(model) is not None


def query_row(layout: TokenLayout, like: Tensor, *, query_patch: tuple[int, int] | None = None) -> Tensor:
    """Returns the weight of every token in the image's answer, (N,), in the type and on the device of `like`.

    One at the class token; a half at class and distillation token; evenly spread over the patches for mean pooling;
    one at `query_patch` (row, column) where it is given. Sums to 1. For a MAP head, whose answer is its own attention,
    this is the mean of the patches: methods that see the head put its attention in its place.

    Raises:
        UsageError: the patch is not on the grid.
    """
    row = torch.zeros(layout.num_tokens, dtype=like.dtype, device=like.device)
    if query_patch is not None:
        row[patch_index(layout, query_patch)] = 1.0
    elif layout.query == "class":
        row[layout.index("class")] = 1.0
    elif layout.query == "distilled":
        row[[layout.index("class"), layout.index("distillation")]] = 0.5
    else:
        row[layout.num_prefix :] = 1.0 / layout.num_patches
    return row


def patch_index(layout: TokenLayout, patch: tuple[int, int]) -> int:
    """Returns the position of patch (row, column) among all tokens.

    Raises:
        UsageError: the patch is not on the grid.
    """
    rows, columns = layout.grid
    row, column = patch
    if not (0 <= row < rows and 0 <= column < columns):
        raise UsageError(
            f"expected query_patch as (row, column) on the {rows} x {columns} grid, got {tuple(patch)}: "
            f"rows go from 0 to {rows - 1}, columns from 0 to {columns - 1}"
        )
    return layout.num_prefix + row * columns + column


def _find_encoder(model: nn.Module) -> Any:
    """Returns the one known encoder in `model`, itself or inside, or None."""
    # What was never imported cannot have built the model, and importing it would cost seconds.
    loaded = [getattr(sys.modules[module], name) for module, name in _TIMM_ENCODERS if module in sys.modules]
    known = tuple(loaded)

    def is_encoder(module: nn.Module) -> bool:
        return isinstance(module, known) or callable(getattr(module, "token_layout", None))

    if is_encoder(model):
        return model
    found = [module for module in model.modules() if is_encoder(module)]
    return found[0] if len(found) == 1 else None


def _prefix(encoder: Any) -> tuple[str, ...]:
    """Returns the names of a timm encoder's prefix tokens."""
    prefix = ["class"] if getattr(encoder, "cls_token", None) is not None else []
    prefix += ["distillation"] if getattr(encoder, "dist_token", None) is not None else []
    registers = getattr(encoder, "reg_token", None)
    prefix += ["register"] * (0 if registers is None else registers.shape[1])
    if len(prefix) != encoder.num_prefix_tokens:
        raise UsageError(
            f"expected {encoder.num_prefix_tokens} prefix tokens in {type(encoder).__name__}, found {prefix}: {_REMEDY}"
        )
    return tuple(prefix)


def _grid(encoder: Any, height: int, width: int) -> tuple[int, int]:
    """Returns a timm encoder's patches (h, w) for images of this size."""
    embed = encoder.patch_embed
    fixed = getattr(embed, "strict_img_size", True) and not getattr(encoder, "dynamic_img_size", False)
    if fixed and embed.img_size is not None and tuple(embed.img_size) != (height, width):
        raise UsageError(
            f"expected images of {embed.img_size[0]} x {embed.img_size[1]}, got {height} x {width}: resize them, or "
            f"create the model with img_size=({height}, {width}) or dynamic_img_size=True"
        )
    step = embed.feat_ratio(as_scalar=False)
    if not getattr(embed, "dynamic_img_pad", False) and (height % step[0] or width % step[1]):
        raise UsageError(
            f"expected a height and width that patches of {step[0]} x {step[1]} divide, got {height} x {width}: "
            f"resize the images to {height // step[0] * step[0]} x {width // step[1] * step[1]}"
        )
    rows, columns = embed.dynamic_feat_size((height, width))
    return int(rows), int(columns)


def _query(encoder: Any, prefix: tuple[str, ...]) -> str:
    """Returns which row a timm encoder's head reads."""
    if "distillation" in prefix and hasattr(encoder, "head_dist"):
        return "distilled"
    if getattr(encoder, "attn_pool", None) is not None and encoder.global_pool != "prr":
        return "map"
    query = _QUERY_OF_POOLING.get(encoder.global_pool)
    if query == "class" and "class" not in prefix:
        query = "mean" if encoder.global_pool == "" else None
    if query == "mean" and prefix and getattr(encoder, "pool_include_prefix", False):
        query = None
    if query is None:
        raise UsageError(
            f"expected class-token, mean or MAP pooling, got {encoder.global_pool!r} over the tokens of "
            f"{type(encoder).__name__}, which no one row stands for: {_REMEDY}"
        )
    return query

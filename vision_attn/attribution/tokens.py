"""The token layout of a model, found where it can be known, and the row of tokens that answers for the image.

Our encoder states its layout; those of timm, torchvision and transformers carry what it follows from. Nothing is
guessed from the number of tokens.
"""

import operator
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.attribution.encoders import Family, body_of, find_known, transformers_prefix
from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout

_REMEDY = (
    'pass layout=TokenLayout(prefix=("class",), grid=(h, w), query="class") with what the model does, '
    "or use a method that works without, as raw and grad_cam do"
)

_QUERY_OF_POOLING = {"token": "class", "": "class", "avg": "mean", "map": "map"}
# Classifiers of transformers that take images of every size that the patch divides, without being asked to.
_ANY_SIZE = ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification", "BeitForImageClassification")


def find_layout(model: nn.Module, images: Tensor) -> TokenLayout:
    """Returns the layout of `model`'s tokens for images of this size.

    Known are the models that `find_encoder` knows, and anything with a `token_layout` method. In CaiT and XCiT, whose
    class token joins after the blocks, the blocks' tokens are the patches alone, and the class token's attention is the
    query "map".

    Args:
        model: The model that `images` are for.
        images: (B, 3, H, W); only the size is read.

    Raises:
        UsageError: the model is not known, pools in a way that no single row stands for, or is built for another
            image size.
    """
    known = find_known(model)
    if known is None:
        raise UsageError(f"expected a model whose token layout is known, got {type(model).__name__}: {_REMEDY}")
    encoder, family, _ = known
    height, width = images.shape[-2:]
    if family.library == "ours":
        return encoder.token_layout((height, width))
    if family.library == "torchvision":
        size = (encoder.image_size, encoder.image_size)
        if size != (height, width):
            raise _wrong_size(size, height, width, f"create the model with image_size={height}, if they are square")
        return TokenLayout(prefix=("class",), grid=_divided(height, width, (encoder.patch_size,) * 2), query="class")
    if family.library == "transformers":
        return _transformers_layout(encoder, family, height, width, wrapped=encoder is not model)
    prefix = _prefix(encoder)
    return TokenLayout(prefix=prefix, grid=_grid(encoder, height, width), query=_query(encoder, prefix))


def is_known(model: nn.Module) -> bool:
    """Whether `find_layout` knows the model."""
    return find_known(model) is not None


def attends_globally(model: nn.Module) -> bool:
    """Whether the model is known, and its layers attend between all places.

    In XCiT they attend between channels; an encoder whose layers can be of several kinds says it (`attends_globally`).
    """
    known = find_known(model)
    return known is not None and known[1].name != "Xcit" and getattr(known[0], "attends_globally", True)


def answers_by_class(model: nn.Module) -> bool:
    """Whether the attention between a known model's tokens has gradients of a class.

    Not without a classifier; nor in CaiT, whose class token reads tokens that are in no layer's attention before.
    """
    known = find_known(model)
    if known is None or known[1].name == "Cait":
        return False
    return all(getattr(part, "num_classes", None) != 0 for part in (model, known[0]))


def query_row(layout: TokenLayout, like: Tensor, *, query_patch: tuple[int, int] | None = None) -> Tensor:
    """Returns the weight of every token in the image's answer, (N,), in the type and on the device of `like`.

    One at the class token; a half at class and distillation token; evenly spread over the patches for mean pooling;
    half of each for class token and mean side by side; one at `query_patch` (row, column) where it is given. Sums to 1.
    For a MAP head, whose answer is its own attention, this is the mean of the patches: methods that see the head put
    its attention in its place.

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
        if layout.query == "class_mean":
            row *= 0.5
            row[layout.index("class")] = 0.5
    return row


def patch_index(layout: TokenLayout, patch: tuple[int, int]) -> int:
    """Returns the position of patch (row, column) among all tokens.

    Raises:
        UsageError: the patch is not on the grid.
    """
    return layout.num_prefix + place_of(patch, layout.grid)


def place_of(patch: Any, grid: tuple[int, int]) -> int:
    """Returns the place of patch (row, column) on a grid (h, w), row by row.

    Raises:
        UsageError: the patch is not on the grid.
    """
    rows, columns = grid
    try:
        row, column = map(operator.index, patch)
    except (TypeError, ValueError):
        row = column = -1
    if not (0 <= row < rows and 0 <= column < columns):
        raise UsageError(
            f"expected query_patch as (row, column) on the {rows} x {columns} grid, got {patch}: "
            f"rows go from 0 to {rows - 1}, columns from 0 to {columns - 1}"
        )
    return row * columns + column


def _transformers_layout(encoder: Any, family: Family, height: int, width: int, *, wrapped: bool) -> TokenLayout:
    """Returns the layout of an image classifier of transformers."""
    body = body_of(encoder, family)
    size, patch = _pair(body.config.image_size), _pair(body.config.patch_size)
    # A wrapper can ask for it, and where it does not, the model says so itself.
    if size != (height, width) and not wrapped and family.name not in _ANY_SIZE:
        raise _wrong_size(size, height, width, "wrap the model in a module that passes interpolate_pos_encoding=True")
    prefix = transformers_prefix(encoder, family)
    query = family.pool
    if query == "pooler":
        query = "class" if body.pooler.layernorm is None else "mean"
    return TokenLayout(prefix=prefix, grid=_divided(height, width, patch), query=query)


def _pair(size: Any) -> tuple[int, int]:
    """Returns an image or patch size as (height, width)."""
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height), int(width)


def _wrong_size(size: tuple[int, int], height: int, width: int, remedy: str) -> UsageError:
    """Returns the error for images of another size than the model is built for."""
    return UsageError(f"expected images of {size[0]} x {size[1]}, got {height} x {width}: resize them, or {remedy}")


def _divided(height: int, width: int, step: tuple[int, int]) -> tuple[int, int]:
    """Returns the patches (h, w) of an image that they divide.

    Raises:
        UsageError: they do not.
    """
    if height % step[0] or width % step[1]:
        raise UsageError(
            f"expected a height and width that patches of {step[0]} x {step[1]} divide, got {height} x {width}: "
            f"resize the images to {height // step[0] * step[0]} x {width // step[1] * step[1]}"
        )
    return height // step[0], width // step[1]


def _joins_late(encoder: Any) -> bool:
    """Whether the class token of a timm encoder joins after its blocks, in class attention."""
    return any(getattr(encoder, name, None) is not None for name in ("blocks_token_only", "cls_attn_blocks"))


def _prefix(encoder: Any) -> tuple[str, ...]:
    """Returns the names of a timm encoder's prefix tokens."""
    if _joins_late(encoder):
        return ()
    owner = getattr(encoder, "embeds", encoder)  # NaFlexViT's
    prefix = ["class"] if getattr(owner, "cls_token", None) is not None else []
    prefix += ["distillation"] if getattr(owner, "dist_token", None) is not None else []
    registers = getattr(owner, "reg_token", None)
    prefix += ["register"] * (0 if registers is None else registers.shape[1])
    if len(prefix) != encoder.num_prefix_tokens:
        raise UsageError(
            f"expected {encoder.num_prefix_tokens} prefix tokens in {type(encoder).__name__}, found {prefix}: {_REMEDY}"
        )
    return tuple(prefix)


def _grid(encoder: Any, height: int, width: int) -> tuple[int, int]:
    """Returns a timm encoder's patches (h, w) for images of this size."""
    embed = getattr(encoder, "patch_embed", None) or encoder.embeds
    if not hasattr(embed, "feat_ratio"):  # XCiT's stem, which takes every size
        return _divided(height, width, _pair(embed.patch_size))
    size = getattr(embed, "img_size", None)
    fixed = getattr(embed, "strict_img_size", True) and not getattr(encoder, "dynamic_img_size", False)
    if fixed and size is not None and tuple(size) != (height, width):
        remedy = f"create the model with img_size=({height}, {width}) or dynamic_img_size=True"
        raise _wrong_size(size, height, width, remedy)
    if not getattr(embed, "dynamic_img_pad", False):
        _divided(height, width, _pair(embed.feat_ratio(as_scalar=False)))
    rows, columns = embed.dynamic_feat_size((height, width))
    return int(rows), int(columns)


def _query(encoder: Any, prefix: tuple[str, ...]) -> str:
    """Returns which row a timm encoder's head reads."""
    if "distillation" in prefix and hasattr(encoder, "head_dist"):
        return "distilled"
    if getattr(encoder, "attn_pool", None) is not None and encoder.global_pool != "prr":
        return "map"
    query = _QUERY_OF_POOLING.get(encoder.global_pool)
    if query == "class" and _joins_late(encoder):
        return "map"
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

"""Options that make our `ViT` the same network as a model of timm's `VisionTransformer` or `Eva` family.

EVA-02, DINOv3 and the rotary ViTs are `Eva`s. A model that has parts which ours lacks is refused with their names:
nothing is left out in silence.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import (
    AttentionRope,
    GluMlp,
    LayerNorm,
    Mlp,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    SwiGLU,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, PatchEmbed, VisionTransformer
from torch import nn

from vision_attn.errors import UsageError
from vision_attn.models.vit_config import ACTIVATIONS, POOLINGS
from vision_attn.models.weights import to_our_names


def options_of(theirs: Any, name: str) -> dict[str, Any]:
    """Returns the options that make our ViT the same network as a timm VisionTransformer or Eva.

    Raises:
        UsageError: it has parts that ours lacks.
    """
    if type(theirs) not in (VisionTransformer, Eva):
        kind = "a distillation token" if hasattr(theirs, "dist_token") else f"class {type(theirs).__name__}"
        raise _refusal(name, [f"{kind} (only timm's VisionTransformer and Eva are read)"])
    block = theirs.blocks[0]
    if type(block) not in (Block, EvaBlock) or type(theirs.patch_embed) is not PatchEmbed:
        raise _refusal(name, [type(block).__name__, type(theirs.patch_embed).__name__])
    if lacking := [part for part, found in _lacking(theirs).items() if found]:
        raise _refusal(name, lacking)
    attn, mlp = block.attn, block.mlp
    activations = {kind: word for word, kind in ACTIVATIONS.items()}
    final_norms = [not _absent(theirs.norm), not _absent(theirs.fc_norm)]
    (rows, columns), patch = theirs.patch_embed.grid_size, theirs.patch_embed.patch_size
    return {
        # Some of timm's sizes leave a remainder that its convolution drops (384 with patch 14): take what it sees.
        "img_size": (rows * patch[0], columns * patch[1]),
        "patch_size": patch,
        "in_chans": theirs.in_chans,
        "num_classes": theirs.num_classes,
        "embed_dim": theirs.embed_dim,
        "depth": len(theirs.blocks),
        "num_heads": attn.num_heads,
        "mlp_ratio": mlp.fc2.in_features / theirs.embed_dim,
        **_biases(attn),
        "proj_bias": attn.proj.bias is not None,
        "scale_attn_norm": not _absent(getattr(attn, "norm", None)),
        "mlp": "mlp" if type(mlp) is Mlp else "swiglu",
        "scale_mlp_norm": not _absent(getattr(mlp, "norm", None)),
        "qk_norm": not _absent(attn.q_norm),
        "init_values": _layer_scale(block),
        "class_token": theirs.cls_token is not None,
        "reg_tokens": 0 if theirs.reg_token is None else theirs.reg_token.shape[1],
        "no_embed_class": theirs.no_embed_class,
        "pos_embed": "none" if theirs.pos_embed is None else "learn",
        **_rotary(getattr(theirs, "rope", None)),
        "global_pool": theirs.global_pool,
        "pre_norm": not _absent(theirs.norm_pre),
        "final_norm": any(final_norms),
        "fc_norm": final_norms[1],
        "act": activations.get(type(mlp.act), "gelu"),
        "norm_eps": block.norm1.eps,
    }


def refuse_other_keys(ours: nn.Module, theirs: nn.Module, name: str) -> None:
    """Raises a UsageError where a timm model has parameters that ours would not, whatever part they belong to."""
    target = ours.state_dict()
    mine = {key: tuple(tensor.shape) for key, tensor in target.items()}
    its = {key: tuple(tensor.shape) for key, tensor in to_our_names(theirs.state_dict(), target)[0].items()}
    differing = sorted(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key))
    if differing:
        raise _refusal(name, [f"other parameters ({', '.join(differing[:5])}{', ...' if differing[5:] else ''})"])


def _lacking(theirs: Any) -> dict[str, bool]:
    """Returns the parts of which ViT has some kinds only, and whether this model has another."""
    block = theirs.blocks[0]
    attn, mlp, norm, rope = block.attn, block.mlp, block.norm1, getattr(theirs, "rope", None)
    act = getattr(mlp, "act", None)
    gated = type(mlp) is SwiGLU or (type(mlp) is GluMlp and not mlp.gate_last)
    known_act = type(act) is nn.SiLU if gated else type(act) in ACTIVATIONS.values()
    return {
        f"attention {type(attn).__name__}": type(attn) not in (Attention, EvaAttention, AttentionRope),
        "a gate on the attention's output": getattr(attn, "gate", None) is not None,
        "grouped heads": getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads,
        f"MLP {type(mlp).__name__}": type(mlp) is not Mlp and not gated,
        f"activation {type(act).__name__}": not known_act or getattr(act, "approximate", "none") != "none",
        f"norm {type(norm).__name__}": type(norm) not in (LayerNorm, nn.LayerNorm),
        "LayerScale on one branch only": hasattr(block, "gamma_1")
        and (block.gamma_1 is None) != (block.gamma_2 is None),
        f"rotary positions {type(rope).__name__}": rope is not None and type(rope) not in _ROTARY,
        "a norm in the patch embedding": not _absent(theirs.patch_embed.norm),
        "padding of the image": theirs.patch_embed.dynamic_img_pad,
        f"pooling {theirs.global_pool!r}": theirs.global_pool not in POOLINGS,
        # Eva's attention pooling takes all tokens.
        "pooling over prefix tokens": getattr(theirs, "pool_include_prefix", False)
        or (type(theirs) is Eva and theirs.attn_pool is not None and theirs.num_prefix_tokens > 0),
        "pooling with other heads": theirs.attn_pool is not None and theirs.attn_pool.num_heads != attn.num_heads,
        "two last norms": not _absent(theirs.norm) and not _absent(theirs.fc_norm),
    }


def _biases(attn: Any) -> dict[str, bool]:
    """Returns whether queries and values, and whether keys have a bias."""
    if getattr(attn, "q_bias", None) is not None:
        return {"qkv_bias": True, "k_bias": False}
    if attn.qkv is not None:
        return {"qkv_bias": attn.qkv.bias is not None}
    has = attn.q_proj.bias is not None
    return {"qkv_bias": has, "k_bias": not has or attn.k_proj.bias is not None}


def _layer_scale(block: Any) -> float | None:
    """Returns the start of LayerScale, None where there is none."""
    if isinstance(block, EvaBlock):
        return None if block.gamma_1 is None else block.init_values
    return None if _absent(block.ls1) else block.ls1.init_values


def _rotary(rope: Any) -> dict[str, Any]:
    """Returns the options for timm's rotary positions."""
    return {} if rope is None else _ROTARY[type(rope)](rope)


def _axial(rope: Any) -> dict[str, Any]:
    options = {
        "temperature": rope.temperature,
        "order": _ORDERS[rope.grid_indexing],
        "reference_grid": None if rope.ref_feat_shape is None else tuple(rope.ref_feat_shape),
        "offset": rope.grid_offset,
        "rotate_half": rope.rotate_half,
    }
    return {"rope": "axial", "rope_options": options | _augmentation(rope)}


def _centered(rope: Any) -> dict[str, Any]:
    options = {
        "temperature": rope.temperature,
        "coordinates": "centered",
        "order": _ORDERS[rope.grid_indexing],
        "offset": rope.grid_offset,
        "rotate_half": rope.rotate_half,
    }
    return {"rope": "axial", "rope_options": options | _augmentation(rope)}


def _mixed(rope: Any) -> dict[str, Any]:
    return {
        "rope": "mixed",
        "rope_options": {"temperature": rope.temperature, "order": _ORDERS[rope.grid_indexing]},
    }


def _augmentation(rope: Any) -> dict[str, float]:
    """Returns how the coordinates move in training."""
    values = {word: getattr(rope, f"{word}_coords", None) for word in ("shift", "jitter", "rescale")}
    return {word: value for word, value in values.items() if value is not None}


_ORDERS = {"ij": "yx", "xy": "xy"}
_ROTARY = {RotaryEmbeddingCat: _axial, RotaryEmbeddingDinoV3: _centered, RotaryEmbeddingMixed: _mixed}


def _refusal(name: str, parts: Sequence[str]) -> UsageError:
    return UsageError(
        f"expected a timm model with parts that ViT has, got {name!r} with {', '.join(parts)}: "
        f"use it as it is, timm.create_model({name!r})"
    )


def _absent(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)

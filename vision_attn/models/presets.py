"""Our presets in timm's registry: `timm.create_model("va_vit_tiny_patch16_224")` works after `import vision_attn`.

`register` is called when timm is imported, in whatever order the two come. timm and the encoder are imported inside the
functions: the hook may run while one of our modules is itself importing timm, when nothing below its import exists yet.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["PRESETS", "register"]

_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}

# Options of ViTConfig. `va_vit` is the general one: an export names it and gives all options as `model_args`.
PRESETS: dict[str, dict[str, Any]] = {
    "va_vit": {},
    "va_vit_micro_stem8_64": {
        "img_size": (64, 64),
        "patch_size": (8, 8),
        "stem": "conv",
        "stem_extra": 2,
        "weight_init": "xavier",
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 2.0,
    },
    "va_vit_tiny_patch16_224": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "va_vit_small_patch16_224": _SMALL,
    "va_vit_base_patch16_224": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "va_vit_small_patch14_reg4_224": {
        **_SMALL,
        "patch_size": (14, 14),
        "reg_tokens": 4,
        "no_embed_class": True,
        "init_values": 1e-5,
    },
    # Two layers of windows, then one in which all tokens meet: 7 x 7 divides the grid of 14 x 14.
    "va_vit_small_patch16_window7_224": {
        **_SMALL,
        "attn_layer": ("window", "window", "self"),
        "attn_options": {"window": {"window_size": 7}},
    },
    # Rotary positions alone, and SwiGLU as wide as leaves the parameters of an MLP of ratio 4 (Shazeer 2020).
    "va_vit_small_patch16_rope_swiglu_224": {
        **_SMALL,
        "pos_embed": "none",
        "rope": "axial",
        "mlp": "swiglu",
        "mlp_ratio": 8 / 3,
    },
}


# Descriptions (input, normalisation, first and last layer): where timm's registry looks for those of a module's models.
default_cfgs: dict[str, Any] = {}


def register() -> None:
    """Enters all presets into timm's registry; again does nothing."""
    from timm.models import generate_default_cfgs, is_model, register_model

    default_cfgs.update(generate_default_cfgs({name: _default_cfg(options) for name, options in PRESETS.items()}))
    for name in PRESETS:
        if not is_model(name):
            register_model(_entry_point(name))


def _default_cfg(options: dict[str, Any]) -> dict[str, Any]:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    return {
        "num_classes": 1000,
        "input_size": (3, *options.get("img_size", (224, 224))),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.stem.0" if options.get("stem") == "conv" else "patch_embed.proj",
        "classifier": "head",
    }


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        from vision_attn.models.vit import ViT

        return build_model_with_cfg(
            ViT,
            name,
            pretrained,
            pretrained_filter_fn=_fit_to_model,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **{**PRESETS[name], **options},
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Returns our ViT {name}; options are those of ViTConfig."
    return build


def _fit_to_model(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Returns the state dict with positions on the model's grid, which `img_size` may have changed."""
    from vision_attn.models.weights import fit_positions

    saved = getattr(model, "pretrained_model_args", {}).get("img_size")
    patch = model.patch_embed.patch_size
    grid = (saved[0] // patch[0], saved[1] // patch[1]) if saved else None
    return fit_positions(model, state, source_grid=grid)[0]

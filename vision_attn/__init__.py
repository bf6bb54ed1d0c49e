"""Attention blocks, a ViT encoder, a trainer, and overlays of where a model looks that are measured for truth.

The public names load on first use (PEP 562), so that `import vision_attn` itself costs next to nothing. Where timm is
(or will be) imported, our presets are entered into its model registry, so that `timm.create_model` builds them.
"""

from importlib import import_module
from typing import Any

from wrapt import register_post_import_hook

__version__ = "0.1.0"

_PUBLIC = {
    "AttentionCapture": "vision_attn.capture",
    "AttentionNotFoundError": "vision_attn.errors",
    "CheckpointMismatchError": "vision_attn.errors",
    "Explanation": "vision_attn.attribution.base",
    "Geometry": "vision_attn.geometry",
    "LAYERS": "vision_attn.layers.base",
    "METHODS": "vision_attn.attribution.base",
    "SheetRow": "vision_attn.viz.sheets",
    "TokenLayout": "vision_attn.layout",
    "UsageError": "vision_attn.errors",
    "ViT": "vision_attn.models.vit",
    "attach_attention": "vision_attn.layers.attach",
    "attachments": "vision_attn.layers.attach",
    "create_layer": "vision_attn.layers.factory",
    "create_model": "vision_attn.models.factory",
    "create_token_layer": "vision_attn.layers.tokens",
    "detach_attention": "vision_attn.layers.attach",
    "distance_figure": "vision_attn.viz.figures",
    "attention_health": "vision_attn.evaluate",
    "evaluate_explanations": "vision_attn.evaluate",
    "evaluate_photos": "vision_attn.evaluate",
    "explain": "vision_attn.attribution.base",
    "explain_photos": "vision_attn.look",
    "heads_figure": "vision_attn.viz.figures",
    "layer_maps": "vision_attn.look.sheets",
    "list_layers": "vision_attn.layers.factory",
    "list_token_layers": "vision_attn.layers.tokens",
    "load_model": "vision_attn.models.factory",
    "methods_figure": "vision_attn.viz.figures",
    "movement_figure": "vision_attn.viz.figures",
    "open_model": "vision_attn.models.factory",
    "overlay": "vision_attn.viz.overlay",
    "removal_figure": "vision_attn.viz.figures",
    "report_photos": "vision_attn.report",
    "watched_photos": "vision_attn.training.watching",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vision_attn' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _register_presets(_timm: Any) -> None:
    import_module("vision_attn.models.presets").register()


register_post_import_hook(_register_presets, "timm")

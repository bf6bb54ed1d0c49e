"""The artefact: one folder that anyone can load, with this package or, where no blocks are attached, with timm alone.

`config.json` is timm's, with the class names under timm's `label_names` and what timm has no word for (the exact
preprocessing, the token layout, attached blocks) under `vision_attn`; `model.safetensors` are the network's weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vision_attn import __version__
from vision_attn.attribution.tokens import find_layout
from vision_attn.data.transforms import Preprocessing, spec_options
from vision_attn.errors import UsageError
from vision_attn.export.card import SAMPLES, write_card
from vision_attn.files import new_folder
from vision_attn.layout import TokenLayout
from vision_attn.models.factory import CONFIG_FILE, WEIGHTS_FILE, load_model
from vision_attn.training.checkpoints import LAST
from vision_attn.training.run import Run


def save_model(
    folder: str | Path,
    model: nn.Module,
    *,
    architecture: str,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    layout: TokenLayout | None = None,
    model_args: dict[str, Any] | None = None,
    temperature: float = 1.0,
    multi_label: bool = False,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Writes an artefact, whole or not at all.

    Args:
        folder: Where to; must not exist.
        model: The network: timm's or ours.
        architecture: Its name in timm's registry.
        classes: Names, in the order of the logits.
        preprocessing: What happens to a photo before the network.
        layout: The order of its tokens, for networks that have tokens.
        model_args: What its constructor took besides the number of classes.
        temperature: What logits are divided by for probabilities that hold.
        multi_label: Whether a photo has any number of labels, so that each class has a probability by itself.
        facts: Whatever else is to be kept with it (metrics), ready for JSON.

    Returns:
        The folder.

    Raises:
        UsageError: the folder exists, or the written artefact would not load again.
    """
    config = {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": getattr(model, "num_features", None),
        "model_args": model_args or {},
        "label_names": list(classes),
        "pretrained_cfg": _timm_cfg(model, preprocessing, len(classes)),
        "vision_attn": {
            "version": __version__,
            "preprocessing": preprocessing.to_dict(),
            "layout": layout.to_dict() if layout else None,
            "attention": getattr(model, "attached_attention", None),
            "temperature": float(temperature),
            "multi_label": bool(multi_label),
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
            **(facts or {}),
        },
    }
    with new_folder(folder) as part:
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
        save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (part / CONFIG_FILE).write_text(text, encoding="utf-8")
        # What cannot be loaded again must not take the name.
        load_model(part)
    return Path(folder)


def export_run(run: Run, *, samples: int = SAMPLES) -> Path:
    """Writes the artefact of a finished run to `export` in its folder, with its model card, and returns that.

    Args:
        run: After `fit`.
        samples: How many validation photos are drawn into the card; 0 keeps all photos out of the folder.
    """
    classifier, data = run.classifier, run.data
    # The network comes off the device, and off Lightning, as it is.
    network: Any = classifier.network.cpu().eval()
    preprocessing = Preprocessing(
        image_size=data.image_size, mean=classifier.mean, std=classifier.std, transforms=data.eval_specs
    )
    facts: dict[str, Any] = {"metrics": run.metrics, "position_interpolation": classifier.position_interpolation}
    seconds = _seconds(run)
    folder = save_model(
        run.run_dir / "export",
        network,
        architecture=network.architecture,
        classes=data.classes,
        preprocessing=preprocessing,
        layout=find_token_layout(network, data.image_size),
        model_args=network.model_args,
        temperature=run.temperature,
        multi_label=data.multi_label,
        facts=facts if seconds is None else {**facts, "seconds": round(seconds)},
    )
    write_card(folder, run_dir=run.run_dir, data=data, samples=samples)
    return folder


def _seconds(run: Run) -> float | None:
    """Returns the time from the run's config to its last checkpoint, which are written at its start and its end."""
    start, end = run.run_dir / "config.yaml", run.run_dir / LAST
    if not (start.is_file() and end.is_file()):
        return None
    return max(0.0, end.stat().st_mtime - start.stat().st_mtime)


def find_token_layout(network: nn.Module, image_size: tuple[int, int]) -> TokenLayout | None:
    """Returns the order of a network's tokens at an image size, or None where it has none that are known."""
    images = torch.zeros(1, 3, *image_size, device=next(network.parameters()).device)
    try:
        return find_layout(network, images)
    except UsageError:
        return None


def _timm_cfg(model: nn.Module, preprocessing: Preprocessing, num_classes: int) -> dict[str, Any]:
    """Returns timm's description of the input. Pipelines that timm has no word for are given as the nearest it has."""
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    height, width = preprocessing.image_size
    kept = ("first_conv", "classifier", "pool_size", "fixed_input_size", "license")
    crop_pct, crop_mode, interpolation = _timm_resize(preprocessing)
    return {
        **{key: cfg[key] for key in kept if cfg.get(key) is not None},
        "num_classes": num_classes,
        "input_size": [3, height, width],
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
    }


def _timm_resize(preprocessing: Preprocessing) -> tuple[float, str, str]:
    """Returns timm's crop_pct, crop_mode and interpolation for the pipelines that `eval_transforms` makes."""
    steps = [spec_options(spec) for spec in preprocessing.transforms]
    names = tuple(name for name, _ in steps)
    options = steps[0][1] if steps else {}
    interpolation = str(options.get("interpolation", "bilinear"))
    interpolation = interpolation if interpolation in ("bilinear", "bicubic", "nearest") else "bicubic"
    height, _ = preprocessing.image_size
    if names == ("SmallestMaxSize", "CenterCrop") and options.get("max_size_hw"):
        return height / options["max_size_hw"][0], "center", interpolation
    if names == ("LongestMaxSize", "PadIfNeeded"):
        return 1.0, "border", interpolation
    if names == ("Resize",):
        return 1.0, "squash", interpolation
    return 1.0, "center", interpolation

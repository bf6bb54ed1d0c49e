"""Networks by name, and artefacts by folder."""

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import Tensor, nn

from vision_attn.data.transforms import Preprocessing, image_hw
from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout
from vision_attn.models import presets
from vision_attn.models.weights import LoadReport, load_into, load_state_dict_file
from vision_attn.registry import unknown

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

presets.register()


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | Mapping[str, Tensor] | None = None,
    image_size: int | Sequence[int] | None = None,
    position_interpolation: str | None = None,
    **options: Any,
) -> nn.Module:
    """Returns a network of timm's or ours (`va_vit_*`), on the CPU.

    Args:
        name: Any name that `timm.create_model` takes, `hf-hub:` and `local-dir:` included.
        num_classes: Classes of the head; 0 for none; the network's own where left out.
        pretrained: Load timm's weights from the hub.
        checkpoint: Weights from a file (`.safetensors`, or plain tensors in `.pth`, `.pt`, `.bin`, `.ckpt`) or a state
            dict. All keys have to fit, but for the head where its classes differ in number, or where the checkpoint has
            none: it then starts anew, which is logged.
        image_size: (height, width) or one number, for networks that are built for one size (ViT, Swin); others take
            any.
        position_interpolation: How a checkpoint's positions come to another grid: "timm" (antialiased) or "hf" (plain
            bicubic); see `models.weights.load_into`.
        options: What the network's constructor takes besides.

    Raises:
        UsageError: the name is unknown, an option is not taken, the size does not fit, or the weights cannot be had.
        CheckpointMismatchError: the checkpoint does not fit; all differences are listed.

    Example:
        >>> model = create_model("va_vit_tiny_patch16_224", num_classes=10)
        >>> model.num_classes
        10
    """
    if pretrained and checkpoint is not None:
        raise UsageError("expected pretrained weights or a checkpoint, got both: leave one out")
    architecture, own_options = resolve_name(name)
    options = {**own_options, **options}
    if image_size is not None and has_fixed_size(architecture):
        options["img_size"] = list(image_hw(image_size))
    if position_interpolation is not None and architecture.startswith("va_vit"):
        options["pos_interpolation"] = position_interpolation
    model_args = dict(options)
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except UsageError:
        raise
    except TypeError as error:
        raise UsageError(f"expected options that {name} takes, got {options}: {error}") from error
    except (AssertionError, ValueError) as error:
        raise UsageError(f"expected options that fit {name}, got {options}: {_first_line(error)}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise UsageError(
            f"expected the pretrained weights of {name} from the hub, got an error: {_first_line(error)}: check the "
            "network, or give a file as checkpoint"
        ) from error
    if image_size is not None:
        _check_patches(model, name, image_hw(image_size))
    if checkpoint is not None:
        report = load_checkpoint(model, checkpoint, position_interpolation=position_interpolation)
        for line in str(report).splitlines():
            log.info("%s: %s", name, line)
    # What an artefact needs to build the network again, from timm's registry alone.
    model.architecture = architecture  # type: ignore[assignment]
    model.model_args = model_args  # type: ignore[assignment]
    return model


def resolve_name(name: str) -> tuple[str, dict[str, Any]]:
    """Returns the name in timm's registry, and the constructor's options, that a name stands for.

    Raises:
        UsageError: the name is unknown (close ones are offered), or the folder or hub that it names cannot be read.
    """
    source, _, place = name.partition(":")
    if source not in ("hf-hub", "hf_hub", "local-dir"):
        if not timm.is_model(name.split(".")[0]):
            raise unknown("model", name, timm.list_models())
        return name, {}
    try:
        read = load_model_config_from_path if source == "local-dir" else load_model_config_from_hf
        found = read(place)
    except Exception as error:  # the hub's client, files and JSON each have errors of their own
        raise UsageError(f"expected a network at {name}, got an error: {_first_line(error)}: check the name") from error
    return str(found[1]), dict(found[2] or {}) if len(found) > 2 else {}


def _check_patches(model: nn.Module, name: str, image_size: tuple[int, int]) -> None:
    """Refuses an image size that a network's patches do not divide: timm would drop the last pixels without a word."""
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if not isinstance(patch, tuple) or getattr(embed, "dynamic_img_pad", False):
        return
    if any(side % p for side, p in zip(image_size, patch, strict=True)):
        near = [tuple(side // p * p + more * p for side, p in zip(image_size, patch, strict=True)) for more in (0, 1)]
        raise UsageError(
            f"expected image sides divisible by the patch {patch[0]} x {patch[1]} of {name}, got {image_size[0]} x "
            f"{image_size[1]}: use {near[0][0]} x {near[0][1]} or {near[1][0]} x {near[1][1]}"
        )


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Tensor],
    *,
    position_interpolation: str | None = None,
) -> LoadReport:
    """Copies a checkpoint into a network, all but a head of another number of classes, and returns what was done.

    Raises:
        CheckpointMismatchError: anything but the head does not fit.
    """
    state = checkpoint if isinstance(checkpoint, Mapping) else load_state_dict_file(checkpoint)
    own = model.state_dict()
    heads = classifier_names(model)
    head_keys = [key for key in own if any(key == f"{head}.{part}" for head in heads for part in ("weight", "bias"))]
    fits = all(key in state and state[key].shape == own[key].shape for key in head_keys)
    left_out = () if fits else tuple(f"{head}." for head in heads)
    return load_into(model, state, skip=left_out, allow_missing=left_out, interpolation=position_interpolation)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the qualified names of a timm network's classifiers (two for distilled ones, none without a head)."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    modules = dict(model.named_modules())
    return tuple(name for name in names if name in modules and not isinstance(modules[name], nn.Identity))


def has_fixed_size(name: str) -> bool:
    """Returns whether a network is built for one image size, and so has to be told which."""
    try:
        entrypoint = timm.models.model_entrypoint(name.split(".")[0])
    except (KeyError, RuntimeError):
        return False
    cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is not None and cfg.fixed_input_size:
        return True
    return name.startswith("va_vit") or "img_size" in inspect.signature(entrypoint).parameters


def load_model(folder: str | Path) -> nn.Module:
    """Returns the network of an artefact, in evaluation mode, on the CPU.

    Args:
        folder: What a run left in `export`: `config.json` and `model.safetensors`.

    Returns:
        The network, (B, 3, H, W) normalised images to (B, classes) logits, with `classes` (tuple of names),
        `preprocessing` (`data.transforms.Preprocessing`) and `layout` (`TokenLayout`, None where there are no tokens).

    Raises:
        UsageError: the folder is not an artefact of ours, or something in it is damaged.
        CheckpointMismatchError: the weights are not those of the network.

    Example:
        >>> model = load_model("runs/shapes/export")  # doctest: +SKIP
        >>> logits = model(model.preprocessing.normalize(images))  # doctest: +SKIP
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        ours = config["vision_attn"]
        classes = tuple(config["label_names"])
        preprocessing = Preprocessing.from_dict(ours["preprocessing"])
        layout = TokenLayout.from_dict(ours["layout"]) if ours["layout"] else None
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"expected preprocessing and layout in {folder / CONFIG_FILE}, got {error!r}: export the run again"
        ) from error
    model = create_model(config["architecture"], num_classes=config["num_classes"], **config.get("model_args", {}))
    load_into(model, load_state_dict_file(folder / WEIGHTS_FILE))
    # Plain attributes: the state dict stays that of the network, so that timm loads the same file.
    model.classes = classes  # type: ignore[assignment]
    model.preprocessing = preprocessing  # type: ignore[assignment]
    model.layout = layout  # type: ignore[assignment]
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config of an artefact.

    Raises:
        UsageError: there is none, it is damaged, or not of ours.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        there = "nothing" if not folder.exists() else f"no {' and no '.join(missing)}"
        raise UsageError(
            f"expected an artefact ({CONFIG_FILE} and {WEIGHTS_FILE}) in {folder}, got {there}: give runs/<name>/export"
        )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"expected JSON in {folder / CONFIG_FILE}, got {error}: export the run again") from error
    absent = [key for key in ("architecture", "num_classes", "label_names", "vision_attn") if key not in config]
    if absent:
        raise UsageError(
            f"expected an artefact of vision_attn in {folder}, got a config without {', '.join(absent)}: export "
            "the run, or load the folder with timm"
        )
    return config


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

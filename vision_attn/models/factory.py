"""Networks by name, and artefacts by folder."""

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.data import ImageNetInfo, resolve_model_data_config
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import Tensor, nn

from vision_attn.data.transforms import INTERPOLATIONS, Preprocessing, eval_transforms, image_hw
from vision_attn.errors import UsageError
from vision_attn.layers.attach import Attached, attach_all, attachments
from vision_attn.layout import TokenLayout
from vision_attn.models import presets
from vision_attn.models.lora import LoraConfig, add_lora, merge_lora
from vision_attn.models.weights import LoadReport, load_into, load_state_dict_file
from vision_attn.registry import unknown

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_NAME_SOURCES = ("hf-hub", "hf_hub", "local-dir")

presets.register()


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | Mapping[str, Tensor] | None = None,
    image_size: int | Sequence[int] | None = None,
    position_interpolation: str | None = None,
    attention: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
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
        attention: Blocks to attach, as `{"name": "cbam", "where": "stages"}` or a list of such; see
            `layers.attach.attach_attention`. A checkpoint may have their weights, or be the network's without them.
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
    if attention:
        attach_all(model, attention, image_size=image_size)
        log.info("%s: %s", name, attachments(model).line)
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
    if source not in _NAME_SOURCES:
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

    Attached blocks of which the checkpoint has nothing keep what they have.

    Raises:
        CheckpointMismatchError: anything but the head does not fit.
    """
    state = checkpoint if isinstance(checkpoint, Mapping) else load_state_dict_file(checkpoint)
    own = model.state_dict()
    heads = classifier_names(model)
    head_keys = [key for key in own if any(key == f"{head}.{part}" for head in heads for part in ("weight", "bias"))]
    fits = all(key in state and state[key].shape == own[key].shape for key in head_keys)
    left_out = () if fits else tuple(f"{head}." for head in heads)
    new = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, Attached) and not any(f"{name}." in key for key in state)
    )
    allowed = (*left_out, *new)
    report = load_into(model, state, skip=left_out, allow_missing=allowed, interpolation=position_interpolation)
    # A block is one entry, whatever it consists of.
    missing = [key for key in report.missing if not key.startswith(new)] if new else report.missing
    return replace(report, missing=(*missing, *(f"{name}*" for name in new)))


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
        `preprocessing` (`data.transforms.Preprocessing`), `layout` (`TokenLayout`, None where there are no tokens),
        `temperature` (what logits are divided by for probabilities that hold) and `multi_label` (whether these are of
        each class by itself: sigmoid instead of softmax).

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
        attention = ours.get("attention")
        temperature, multi_label = float(ours.get("temperature", 1.0)), bool(ours.get("multi_label", False))
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature {temperature}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"expected preprocessing and layout in {folder / CONFIG_FILE}, got {error!r}: export the run again"
        ) from error
    model = create_model(config["architecture"], num_classes=config["num_classes"], **config.get("model_args", {}))
    attach_all(model, attention or [])
    load_into(model, load_state_dict_file(folder / WEIGHTS_FILE))
    # Plain attributes: the state dict stays that of the network, so that timm loads the same file.
    model.classes = classes  # type: ignore[assignment]
    model.preprocessing = preprocessing  # type: ignore[assignment]
    model.layout = layout  # type: ignore[assignment]
    model.temperature = temperature  # type: ignore[assignment]
    model.multi_label = multi_label  # type: ignore[assignment]
    return model.eval()


def open_model(
    model: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool | None = None,
    classes: Sequence[str] | None = None,
    image_size: int | Sequence[int] | None = None,
) -> nn.Module:
    """Returns a network with all that photos need, from whatever a person has: an artefact, a run's checkpoint, a name.

    Args:
        model: A folder that `load_model` takes; the `.ckpt` of a run, with its `config.yaml` above it; or a name that
            `timm.create_model` takes.
        checkpoint: The weights for a name, from a file; its head tells how many classes there are.
        pretrained: For a name, timm's weights from the hub; by default where no checkpoint is given. False without a
            checkpoint leaves the weights random, the same ones each time.
        classes: Names, in the order of the logits. By default those of the artefact or the run; ImageNet's for 1,000
            classes; numbers for the rest.
        image_size: For a name, (height, width) or one number; timm's by default.

    Returns:
        As `load_model`. Without a classifier (`num_classes` 0 in timm) `classes` is None.

    Raises:
        UsageError: there is no such model, its weights cannot be had, or options do not go together.
        CheckpointMismatchError: the weights are not those of the network.

    Example:
        >>> model = open_model("vit_tiny_patch16_224", pretrained=False)
        >>> model.classes[281], model.preprocessing.image_size
        ('tabby', (224, 224))
    """
    path, given = Path(model), {"checkpoint": checkpoint, "pretrained": pretrained, "image_size": image_size}
    known_name = timm.is_model(str(model).split(".")[0]) or str(model).partition(":")[0] in _NAME_SOURCES
    if known_name and not (path / CONFIG_FILE).is_file():
        opened = _open_name(str(model), checkpoint, pretrained, image_size)
    else:
        superfluous = [name for name, value in given.items() if value is not None]
        if path.exists() and superfluous:
            raise UsageError(
                f"expected {' and '.join(superfluous)} with the name of a network only, got {path}, which has weights "
                "and size of its own: leave it out"
            )
        if path.is_dir():
            opened = load_model(path)
        elif path.suffix == ".ckpt" and path.is_file():
            opened = _open_run(path)
        elif path.is_file():
            raise UsageError(
                f"expected an artefact, a run's .ckpt or the name of a network, got {path}, a file of weights: give "
                "the network's name, and the file as checkpoint"
            )
        elif len(path.parts) > 1 or path.suffix:
            raise UsageError(
                f"expected an artefact (runs/<name>/export), a run's .ckpt or the name of a network, got {model}, "
                "where there is nothing: check the path"
            )
        else:
            raise unknown("model", str(model), timm.list_models())
    if classes is not None:
        count = getattr(opened, "num_classes", len(classes))
        if len(classes) != count:
            raise UsageError(f"expected {count} class names for this network, got {len(classes)}: one for each logit")
        opened.classes = tuple(classes)  # type: ignore[assignment]
    return opened.eval()


def timm_preprocessing(model: nn.Module, image_size: int | Sequence[int] | None = None) -> Preprocessing:
    """Returns what timm does to photos in evaluation, for one of its networks: size, crop, colours.

    Reducing averages areas where timm's PIL resize antialiases; the two differ by a grey level or two.
    """
    cfg = resolve_model_data_config(model)
    size = image_hw(tuple(cfg["input_size"][1:]) if image_size is None else image_size)
    modes = {"center": "crop", "border": "pad", "squash": "squash"}
    interpolation = cfg["interpolation"] if cfg["interpolation"] in INTERPOLATIONS else "bicubic"
    transforms = eval_transforms(
        size,
        resize_mode=modes.get(cfg["crop_mode"], "crop"),
        crop_pct=cfg["crop_pct"],
        interpolation=interpolation,
    )
    return Preprocessing(size, mean=tuple(cfg["mean"]), std=tuple(cfg["std"]), transforms=transforms)


def _open_name(
    name: str, checkpoint: str | Path | None, pretrained: bool | None, image_size: int | Sequence[int] | None
) -> nn.Module:
    if pretrained and checkpoint is not None:
        raise UsageError("expected pretrained weights or a checkpoint, got both: leave one out")
    state = None if checkpoint is None else load_state_dict_file(checkpoint)
    num_classes = None if state is None else _classes_of_head(name, state)
    pretrained = state is None if pretrained is None else pretrained
    try:
        # What stays random is the same each time, so that a command can be stopped and gone on with.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create_model(
                name, num_classes=num_classes, pretrained=pretrained, checkpoint=state, image_size=image_size
            )
    except UsageError as error:
        if not pretrained or "from the hub" not in str(error):
            raise
        raise UsageError(
            f"expected the pretrained weights of {name}, which could not be fetched from the hub: check the network, "
            "give them with --checkpoint FILE, or take random ones with --pretrained false"
        ) from error
    model.classes = default_classes(int(getattr(model, "num_classes", 0))) or None  # type: ignore[assignment]
    model.preprocessing = timm_preprocessing(model, image_size)  # type: ignore[assignment]
    model.layout = None  # type: ignore[assignment]
    model.temperature, model.multi_label = 1.0, False  # type: ignore[assignment]
    return model


def _classes_of_head(name: str, state: Mapping[str, Tensor]) -> int | None:
    """Returns how many classes the head in a checkpoint has; 0 where it has none; None where that cannot be told."""
    cfg = timm.models.get_pretrained_cfg(name.split(":")[-1], allow_unregistered=True)
    heads = getattr(cfg, "classifier", None) or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    found = [state[key] for head in heads for key in (f"{head}.weight", f"{head}.bias") if key in state]
    return int(found[0].shape[0]) if found else (0 if heads else None)


def default_classes(num_classes: int) -> tuple[str, ...]:
    """Returns ImageNet's names for 1,000 classes, and numbers for any other count.

    A name is the first that ImageNet has for a class, with the WordNet number where two classes share it.
    """
    if num_classes != 1000:
        return tuple(str(index) for index in range(num_classes))
    imagenet = ImageNetInfo("imagenet-1k")
    names = [imagenet.index_to_description(index).split(",")[0] for index in range(num_classes)]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({imagenet.index_to_label_name(index)})"
        for index, name in enumerate(names)
    )


def _open_run(path: Path) -> nn.Module:
    """Returns the network of a run's checkpoint, built as the run's `config.yaml` says."""
    config_file = next((parent / "config.yaml" for parent in path.absolute().parents[:2]
                        if (parent / "config.yaml").is_file()), None)  # fmt: skip
    if config_file is None:
        raise UsageError(
            f"expected the config.yaml of the run beside {path} or in the folder above, got none: put it there, or "
            "give runs/<name>/export"
        )
    try:
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
        network, data = config["model"], config["data"]
        size = image_hw(data["image_size"])
        transforms = data.get("eval_transforms") or eval_transforms(
            size, **{key: data[key] for key in ("resize_mode", "crop_pct", "interpolation") if key in data}
        )
        name, options = str(network["name"]), dict(network.get("options") or {})
        attention = network.get("attention")
        lora = LoraConfig(**network["lora"]) if network.get("lora") else None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"expected the config of a run in {config_file}, got {error!r}: give the run's own") from error
    content = load_state_dict_file(path, key="state_dict")
    state = {key.removeprefix("network."): tensor for key, tensor in content.items() if key.startswith("network.")}
    num_classes = _classes_of_head(name, state)
    model = create_model(name, num_classes=num_classes, image_size=data["image_size"], attention=attention, **options)
    if lora is not None:
        add_lora(model, lora, heads=classifier_names(model))
    load_into(model, state)
    if lora is not None:
        merge_lora(model)
    own = resolve_model_data_config(model)
    model.classes = _classes_of_run(path, config_file.parent, int(model.num_classes))  # type: ignore
    model.preprocessing = Preprocessing(  # type: ignore[assignment]
        size,
        mean=tuple(network.get("mean") or own["mean"]),
        std=tuple(network.get("std") or own["std"]),
        transforms=transforms,
    )
    model.layout = None  # type: ignore[assignment]
    model.temperature, model.multi_label = _answers_of_run(path, config_file.parent)  # type: ignore[assignment]
    return model


def _answers_of_run(path: Path, run_dir: Path) -> tuple[float, bool]:
    """Returns the temperature and whether a photo has several labels, for a checkpoint of a run.

    The run's export says both. Its temperature is that of the best weights, and 1 for all others.
    """
    export = run_dir / "export"
    ours = read_config(export)["vision_attn"] if (export / CONFIG_FILE).is_file() else {}
    several = ours.get("multi_label")
    if several is None:
        several = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("multi_label", False)
    return float(ours.get("temperature", 1.0)) if path.stem == "best" else 1.0, bool(several)


def _classes_of_run(path: Path, run_dir: Path, num_classes: int) -> tuple[str, ...]:
    """Returns the class names that a checkpoint keeps, or those of the run's export."""
    names = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("classes")
    export = run_dir / "export"
    if names is None and (export / CONFIG_FILE).is_file():
        names = read_config(export)["label_names"]
    if names is None or len(names) != num_classes:
        return default_classes(num_classes)
    return tuple(names)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config of an artefact.

    Raises:
        UsageError: there is none, it is damaged, or not of ours.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        there = "nothing" if not folder.exists() else f"no {' and no '.join(missing)}"
        place = folder / "export" if (folder / "export" / CONFIG_FILE).is_file() else "runs/<name>/export"
        raise UsageError(
            f"expected an artefact ({CONFIG_FILE} and {WEIGHTS_FILE}) in {folder}, got {there}: give {place}"
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

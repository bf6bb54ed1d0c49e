"""The model card: what an artefact is, what it was made from, how good it is, and how to use it, in plain words.

Written from the run: its config, its photos and its figures, in the form that Hugging Face reads (YAML, then Markdown).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from vision_attn.attribution.base import default_method, explain
from vision_attn.data.datamodule import ImageDataModule
from vision_attn.data.sources.base import SPLITS, ImageSet
from vision_attn.data.transforms import spec_options
from vision_attn.errors import UsageError
from vision_attn.files import write_whole
from vision_attn.layers.attach import attachments
from vision_attn.metrics.intervals import wilson_interval
from vision_attn.models.factory import CONFIG_FILE, load_model, read_config
from vision_attn.training.checkpoints import BEST
from vision_attn.training.results import read_results
from vision_attn.viz.plots import SheetItem, contact_sheet

CARD_FILE, SAMPLES_FILE = "README.md", "samples.png"
SAMPLES = 6
"""Photos on the sheet of a card."""

# Fewer photos than these, and a figure for a class says little.
_FEW_TRAINED, _FEW_TESTED = 30, 20
_MARK = "<!-- written by vision-attn; sha256 "
# What a class name may hold as it is: in Markdown and HTML it means nothing.
_PLAIN = re.compile(r"[^\w ,.'%-]")


def write_card(
    folder: str | Path,
    *,
    run_dir: str | Path | None = None,
    data: ImageDataModule | None = None,
    samples: int = SAMPLES,
    license: str | None = None,
) -> Path:
    """Writes the model card of an artefact, and the sheet of sample photos that it shows, and returns its path.

    A card that is there is written anew where it is as this function left it: after a test, say. One that somebody
    changed is left alone.

    Args:
        folder: The artefact, or the run's folder with the artefact in `export`.
        run_dir: The run that it came from; the folder above where that has a `config.yaml`.
        data: The photos of the run; where left out, they are looked for as the run's config says, and where they are no
            longer there, the card says so.
        samples: How many validation photos are shown, with overlays; 0 keeps all photos out of the folder.
        license: Of the weights, in Hugging Face's words ("apache-2.0"); the card says that it is not known otherwise.

    Raises:
        UsageError: the folder is no artefact, or its card was changed by hand.
    """
    folder = artefact_in(folder)
    config = read_config(folder)
    _check_card(folder / CARD_FILE)
    run_dir = _run_of(folder) if run_dir is None else Path(run_dir)
    settings = _settings(run_dir)
    splits, problem = _splits(data, settings)
    model = load_model(folder)
    shown = _draw_samples(model, splits.get("validation"), folder / SAMPLES_FILE, samples)
    found = _results(run_dir, config, splits)
    body = "\n\n".join(
        part
        for part in (
            _head(model, config, settings),
            _sample_part(shown, model),
            _data_part(config, settings, splits, problem),
            _figures_part(found, config),
            _training_part(config, settings),
            _usage_part(model, config),
            _limits_part(config, splits, found),
        )
        if part
    )
    text = f"---\n{_header(model, config, settings, found, license)}\n---\n\n{body}\n"
    return write_whole(folder / CARD_FILE, f"{text}\n{_MARK}{_digest(text)} -->\n")


def artefact_in(folder: str | Path) -> Path:
    """Returns the folder of an artefact, given that or the folder of its run."""
    folder = Path(folder)
    below = folder / "export"
    return below if (below / CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file() else folder


def escaped(text: str) -> str:
    """Returns a name as Markdown and HTML show it and nothing else: what has a meaning there becomes an entity."""
    return _PLAIN.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split())).replace("_", "&#95;")


# ------------------------------------------------------------------------------------------------ what is known


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _check_card(path: Path) -> None:
    """Refuses to write over a card that is not as it was written here."""
    if not path.is_file():
        return
    text, mark, rest = path.read_text(encoding="utf-8", errors="replace").rpartition(_MARK)
    if not mark or rest.partition(" ")[0] != _digest(text):
        raise UsageError(
            f"expected a model card as it was written, got {path}, which was changed: move it away for a new one"
        )


def _run_of(folder: Path) -> Path | None:
    above = folder.absolute().parent
    return above if (above / "config.yaml").is_file() else None


def _settings(run_dir: Path | None) -> dict[str, Any]:
    """Returns the run's config, empty where there is none."""
    path = None if run_dir is None else run_dir / "config.yaml"
    if path is None or not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"expected the config of a run in {path}, got {error}: give the run's own") from error
    return found if isinstance(found, dict) else {}


def _splits(data: ImageDataModule | None, settings: Mapping[str, Any]) -> tuple[Mapping[str, ImageSet], str]:
    """Returns the photos by split; or none, and why."""
    if data is not None:
        return data.splits, ""
    if not settings.get("data"):
        return {}, "The run's config is not there, so its photos are not known."
    try:
        return ImageDataModule(**settings["data"]).splits, ""
    except (UsageError, TypeError):
        return {}, "The photos of the run are not where its config says, so they could not be counted."


def _results(
    run_dir: Path | None, config: Mapping[str, Any], splits: Mapping[str, ImageSet]
) -> dict[str, dict[str, Any]]:
    """Returns the newest figures by stage, "test" and "val"; the artefact's own metrics where no file has them."""
    found: dict[str, dict[str, Any]] = {}
    step = _best_step(run_dir)
    for stage in ("test", "val"):
        files = [] if run_dir is None else run_dir.glob(f"{stage}*.json")
        paths = [path for path in files if re.fullmatch(rf"{stage}(-\d+)?", path.stem)]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime):
            content = read_results(path)
            if _is_of(content, config["label_names"], step):
                found[stage] = content
    metrics = config["vision_attn"].get("metrics") or {}
    if "val" not in found and any(key.startswith("val/") for key in metrics):
        found["val"] = dict(metrics)
        if "val/top1" in metrics and "validation" in splits:
            total = len(splits["validation"])
            correct = round(metrics["val/top1"] * total)
            found["val"] |= {"correct": correct, "total": total}
            found["val"]["top1_interval_95"] = list(wilson_interval(correct, total))
    return found


def _best_step(run_dir: Path | None) -> int | None:
    """Returns the training step of the run's best weights, which the artefact has; None where it is not known."""
    path = None if run_dir is None else run_dir / BEST
    if path is None or not path.is_file():
        return None
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("global_step")


def _is_of(result: Mapping[str, Any], classes: Sequence[str], step: int | None) -> bool:
    """Whether figures are those of the artefact's classes and weights, as far as they say it."""
    same_step = step is None or result.get("step") in (None, step)
    return bool(result) and list(result.get("classes", classes)) == list(classes) and same_step


def _class_counts(images: ImageSet, count: int) -> np.ndarray:
    """Returns how many photos have each class, (classes,)."""
    labels = np.asarray(images.labels)
    return labels.astype(bool).sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=count)


def _recalls(result: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Returns for each class how many of its photos were found, and how many there are; empty where it is not known."""
    matrix = np.asarray(result.get("confusion") or [])
    if matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]:
        return [(int(matrix[i, i]), int(matrix[i].sum())) for i in range(len(matrix))]
    if matrix.ndim == 3 and matrix.shape[1:] == (2, 2):  # of each class by itself
        return [(int(one[1, 1]), int(one[1].sum())) for one in matrix]
    return []


# ------------------------------------------------------------------------------------------------ parts


def _header(
    model: nn.Module,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    license: str | None,
) -> str:
    """Returns the card's YAML, as Hugging Face's own classes write it."""
    from huggingface_hub import EvalResult, ModelCardData

    name = _data_name(settings)
    multi_label = bool(config["vision_attn"].get("multi_label"))
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="custom",
            dataset_name=name,
            dataset_split="validation" if stage == "val" else stage,
            metric_type="mAP" if multi_label else "accuracy",
            metric_value=round(float(result[key]), 4),
        )
        for stage, result in found.items()
        if (key := f"{stage}/{'map' if multi_label else 'top1'}") in result
    ]
    data = ModelCardData(
        library_name="timm" if _loads_in_timm(config) else "vision_attn",
        pipeline_tag="image-classification",
        tags=["image-classification", "vision-attn", str(config["architecture"])],
        metrics=["mAP" if multi_label else "accuracy"],
        license=license or "unknown",
        model_name=str(config["architecture"]) if results else None,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _loads_in_timm(config: Mapping[str, Any]) -> bool:
    return not config["vision_attn"].get("attention")


def _data_name(settings: Mapping[str, Any]) -> str:
    """Returns what the data is called: never the whole path, which is nobody else's business."""
    data = settings.get("data") or {}
    source = str(data.get("source") or "")
    path = str(data.get("path") or "")
    if ":" in source:
        return source
    return Path(path).name or source or "unknown"


def _head(model: nn.Module, config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    height, width = config["vision_attn"]["preprocessing"]["image_size"]
    classes = config["label_names"]
    kind = "any number of the classes" if config["vision_attn"].get("multi_label") else "one class"
    blocks = ""
    if config["vision_attn"].get("attention"):
        blocks = f" Attached: {escaped(attachments(model).line)}."
    return (
        f"# `{config['architecture']}`: {len(classes)} classes of {escaped(_data_name(settings))}\n\n"
        f"A classifier that gives a photo {kind} of {len(classes)}. Network: `{config['architecture']}`, "
        f"{parameters / 1e6:.2f} million parameters, input {height} x {width} pixels.{blocks}"
    )


def _sample_part(shown: str, model: nn.Module) -> str:
    if not shown:
        return ""
    return (
        f"![validation photos, and where the network looks]({SAMPLES_FILE})\n\n"
        f"Validation photos drawn at random, {shown}, and where the network looks (`{default_method(model)}`). A tick "
        "stands for a right answer, a cross for a wrong one."
    )


def _data_part(
    config: Mapping[str, Any], settings: Mapping[str, Any], splits: Mapping[str, ImageSet], problem: str
) -> str:
    classes = config["label_names"]
    lines = ["## Data", "", f"Source: {escaped(_data_name(settings))}."]
    data = settings.get("data") or {}
    if data.get("folds"):
        lines[-1] += f" Fold {data.get('fold')} of {data['folds']}."
    if problem:
        return "\n".join([*lines[:-1], f"{lines[-1]} {problem}", "", f"Classes: {_listed(classes)}."])
    there = [split for split in SPLITS if split in splits]
    counts = {split: _class_counts(splits[split], len(classes)) for split in there}
    lines += ["", f"| class | {' | '.join(there)} |", f"|---|{'---:|' * len(there)}"]
    lines += [
        f"| {escaped(name)} | {' | '.join(f'{counts[split][i]:,}' for split in there)} |"
        for i, name in enumerate(classes)
    ]
    lines.append(f"| **photos** | {' | '.join(f'**{len(splits[split]):,}**' for split in there)} |")
    return "\n".join(lines)


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(escaped(name) for name in classes)


def _figures_part(found: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    lines = ["## Figures", ""]
    if not found:
        return "\n".join([*lines, "None: the run was not evaluated."])
    stages = {"test": "test photos", "val": "validation photos, which chose the best epoch"}
    for stage, result in found.items():
        lines += [f"On {_photos(result)}{stages[stage]}:", "", "| figure | value | 95 % interval |", "|---|---:|---|"]
        values = {key.partition("/")[2]: value for key, value in result.items() if key.startswith(f"{stage}/")}
        for name in sorted(values, key=_figure_place):
            value = values[name]
            if name != "loss" and isinstance(value, int | float):
                lines.append(f"| {_FIGURES.get(name, name)} | {_figure(name, value)} | {_interval(result, name)} |")
        recalls = _recalls(result)
        lines.append("")
        if recalls:
            lines += ["| class | found | of | share | 95 % interval |", "|---|---:|---:|---:|---|"]
            for name, (right, total) in zip(config["label_names"], recalls, strict=True):
                share = f"{right / total:.1%}" if total else "-"
                low_high = _span(wilson_interval(right, total)) if total else "-"
                lines.append(f"| {escaped(name)} | {right} | {total} | {share} | {low_high} |")
            lines.append("")
    lines.append(_calibration_line(config, found))
    return "\n".join(lines)


_FIGURES = {
    "top1": "accuracy",
    "top5": "class among the first five",
    "f1": "F1, mean over classes",
    "map": "average precision, mean over classes",
    "ece": "calibration error (ECE)",
}


def _figure_place(name: str) -> tuple[int, str]:
    """Returns what figures are sorted by: those that are known first, in their order."""
    known = list(_FIGURES)
    return (known.index(name) if name in known else len(known), name)


def _photos(result: Mapping[str, Any]) -> str:
    return f"{int(result['total']):,} " if result.get("total") else ""


def _figure(name: str, value: float) -> str:
    return f"{value:.4f}" if name.endswith(("nll", "brier")) else f"{value:.1%}"


def _interval(result: Mapping[str, Any], name: str) -> str:
    """Returns the interval of a figure where the file has one."""
    span = result.get(f"{name}_interval_95") or ((result.get("macro") or {}).get(name) or {}).get("interval_95")
    return _span(span) if isinstance(span, Sequence) and len(span) == 2 else ""


def _span(span: Sequence[float]) -> str:
    return f"{span[0]:.1%} to {span[1]:.1%}"


def _calibration_line(config: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what is known of the probabilities: whether they were calibrated, and how far they are off."""
    stage = "test" if "test" in found else "val"
    calibration = (found.get(stage) or {}).get("calibration") or {}
    plain, mended = calibration.get("ece"), (calibration.get("calibrated") or {}).get("ece")
    where = "test" if stage == "test" else "validation"
    temperature = float(config["vision_attn"].get("temperature", 1.0))
    if temperature == 1.0:
        off = (
            "" if plain is None else f" On the {where} photos they are off by {plain:.1%} (expected calibration error)."
        )
        return f"Probabilities are those of the network as it is (temperature 1): they were not calibrated.{off}"
    off = ""
    if plain is not None and mended is not None:
        off = (
            f" On the {where} photos they are off by {mended:.1%}, by {plain:.1%} without (expected calibration error)."
        )
    return (
        f"Probabilities are calibrated: logits are divided by the temperature {temperature:.3f}, which was found on "
        f"the validation photos.{off}"
    )


def _training_part(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Returns what the run was: the config's essential values, and versions."""
    ours = config["vision_attn"]
    model, data, trainer = (settings.get(name) or {} for name in ("model", "data", "trainer"))
    optim = model.get("optim") or {}
    rows: list[tuple[str, Any]] = []
    if settings:
        start = "timm's pretrained weights" if model.get("pretrained") else "random weights"
        if model.get("checkpoint"):
            start = f"the checkpoint {Path(str(model['checkpoint'])).name}"
        rows = [
            ("start", start),
            ("epochs", trainer.get("max_epochs")),
            ("batch", data.get("batch_size")),
            ("optimizer", optim.get("name")),
            ("learning rate", optim.get("lr")),
            ("weight decay", optim.get("weight_decay")),
            ("layer-wise decay of the learning rate", optim.get("layer_decay")),
            ("warm-up epochs", optim.get("warmup_epochs")),
            ("loss", (model.get("loss") or {}).get("name")),
            ("label smoothing", model.get("label_smoothing")),
            ("frozen", _joined(model.get("freeze"))),
            ("LoRA", _options(model.get("lora"))),
            ("attached blocks", _options(model.get("attention"))),
            ("weight average (EMA)", settings.get("ema")),
            ("gradient clipping", trainer.get("gradient_clip_val")),
            ("precision", trainer.get("precision")),
            ("augmentation", _names(data.get("train_transforms"))),
            ("mixing of photos", _options(data.get("mixing") or model.get("mixing"))),
            ("seed", settings.get("seed_everything")),
            ("seed of the split", data.get("seed")),
        ]
    if ours.get("seconds") is not None:
        rows.append(("time, from start to the last checkpoint", _duration(float(ours["seconds"]))))
    versions = {"vision_attn": ours.get("version"), **(ours.get("versions") or {})}
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    kept = [(name, value) for name, value in rows if value not in (None, "", False)]
    lines = ["## How it was trained", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {escaped(str(value))} |" for name, value in kept]
    return "\n".join(lines)


def _joined(names: Any) -> str:
    return ", ".join(map(str, names)) if isinstance(names, list | tuple) else str(names or "")


def _options(given: Any) -> str:
    """Returns options of a config in a line: of a mapping, or of a list of such."""
    if isinstance(given, list):
        return "; ".join(map(_options, given))
    if isinstance(given, Mapping):
        return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
    return str(given or "")


def _names(transforms: Any) -> str:
    """Returns the names of a pipeline's transforms; empty where it is the usual one."""
    if not isinstance(transforms, list):
        return "a random resized crop, a flip and a little colour" if transforms is None else ""
    return ", ".join(spec_options(spec)[0] for spec in transforms)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"


LOCAL_FOLDER = 'folder = "."  # where config.json and model.safetensors are'
LOCAL_TIMM = '"local-dir:."'


def _usage_part(model: nn.Module, config: Mapping[str, Any]) -> str:
    several = bool(config["vision_attn"].get("multi_label"))
    answer = (
        [
            "    probabilities = (model(images) / model.temperature).sigmoid()[0]",
            "print([name for name, p in zip(model.classes, probabilities) if p > 0.5])",
        ]
        if several
        else [
            "    probabilities = (model(images) / model.temperature).softmax(-1)[0]",
            "print(model.classes[int(probabilities.argmax())], float(probabilities.max()))",
        ]
    )
    lines = [
        "## How to use it",
        "",
        "```python",
        "import torch",
        "import vision_attn as va",
        "from vision_attn.data.reading import read_image",
        "",
        LOCAL_FOLDER,
        "model = va.load_model(folder)",
        'photo = read_image("photo.jpg")',
        "pixels, geometry = model.preprocessing(photo)",
        "images = model.preprocessing.normalize(pixels[None])",
        "with torch.no_grad():",
        *answer,
        "",
        "result = va.explain(model, images)  # where it looked",
        "picture = va.overlay(photo, result.maps[0], geometry=geometry)",
        "```",
    ]
    if not _loads_in_timm(config):
        return "\n".join([*lines, "", "timm alone cannot build it, because of the attached blocks."])
    ours = str(config["architecture"]).startswith("va_")
    temperature = float(config["vision_attn"].get("temperature", 1.0))
    last = "sigmoid()" if several else "softmax(-1)"
    return "\n".join(
        [
            *lines,
            "",
            "The same with timm" + (", which finds the network once `vision_attn` is imported:" if ours else " alone:"),
            "",
            "```python",
            "import timm",
            "import torch",
            *(["import vision_attn"] if ours else []),
            "from PIL import Image",
            "",
            f"model = timm.create_model({LOCAL_TIMM}, pretrained=True).eval()",
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            'images = transform(Image.open("photo.jpg").convert("RGB"))[None]',
            "with torch.no_grad():",
            f"    probabilities = (model(images) / {temperature!r}).{last}[0]",
            'names = model.pretrained_cfg["label_names"]',
            "print(names[int(probabilities.argmax())], float(probabilities.max()))",
            "```",
        ]
    )


def _limits_part(
    config: Mapping[str, Any], splits: Mapping[str, ImageSet], found: Mapping[str, Mapping[str, Any]]
) -> str:
    classes = config["label_names"]
    lines = ["## Limits", ""]
    if config["vision_attn"].get("multi_label"):
        lines.append(f"- It knows these {len(classes)} classes and no others.")
    else:
        lines.append(
            f"- It knows these {len(classes)} classes and no others: a photo of anything else is given one of them, "
            "too, sometimes with a high probability."
        )
    lines.append(
        "- The figures are for photos of the kind it was trained on. Photos from another place, camera or time can be "
        "harder; how much is not known."
    )
    if "test" not in found and found:
        lines.append(
            "- It was not tested on photos that had no part in the choice of the weights: its figures are kind."
        )
    counts = _class_counts(splits["train"], len(classes)).tolist() if "train" in splits else []
    few = [name for name, count in zip(classes, counts, strict=False) if count < _FEW_TRAINED]
    if few:
        lines.append(f"- Fewer than {_FEW_TRAINED} training photos: {_listed(few)}.")
    recalls = _recalls(found.get("test") or found.get("val") or {})
    unsure = [name for name, (_, total) in zip(classes, recalls, strict=False) if total < _FEW_TESTED]
    if unsure:
        lines.append(
            f"- Fewer than {_FEW_TESTED} photos to test on, so that the figure says little: {_listed(unsure)}."
        )
    lines += _confusions(classes, found.get("test") or found.get("val") or {})
    lines.append(
        "- A map of where the network looks is no proof that it looks for the right reason, and a high probability is "
        "no proof that it is right."
    )
    return "\n".join(lines)


def _confusions(classes: Sequence[str], result: Mapping[str, Any], *, count: int = 3) -> Iterable[str]:
    """Gives a line with the most frequent mistakes, where there are any."""
    matrix = np.asarray(result.get("confusion") or [])
    if matrix.ndim != 2 or matrix.shape != (len(classes),) * 2:
        return
    wrong = matrix - np.diag(matrix.diagonal())
    places = sorted(zip(*np.nonzero(wrong), strict=True), key=lambda place: -wrong[place])[:count]
    if places:
        told = ", ".join(f"{escaped(classes[i])} for {escaped(classes[j])} ({wrong[i, j]})" for i, j in places)
        yield f"- It most often mistakes {told}."


# ------------------------------------------------------------------------------------------------ samples


def _draw_samples(model: nn.Module, images: ImageSet | None, path: Path, count: int) -> str:
    """Draws photos of different classes, chosen at random, and returns which; an empty text where none are wanted."""
    if count < 1 or images is None or not len(images):
        path.unlink(missing_ok=True)
        return ""
    classes: Sequence[str] = model.classes  # type: ignore[assignment]
    chosen = _chosen(images, len(classes), count)
    items = [item for index in chosen if (item := _sample(model, images, index)) is not None]
    if not items:
        path.unlink(missing_ok=True)
        return ""
    contact_sheet(path, items, cell=160)
    return "one of each class" if len(items) == len(classes) else f"of {len(items)} different classes"


def _chosen(images: ImageSet, num_classes: int, count: int) -> list[int]:
    """Returns photos of different classes, always the same ones."""
    rng = np.random.default_rng(0)
    labels = np.asarray(images.labels)
    chosen: list[int] = []
    for label in rng.permutation(num_classes):
        have = np.flatnonzero(labels[:, label] if labels.ndim == 2 else labels == label)
        have = have[~np.isin(have, chosen)]
        if len(have) and len(chosen) < count:
            chosen.append(int(rng.choice(have)))
    return chosen


def _sample(model: nn.Module, images: ImageSet, index: int) -> SheetItem | None:
    """Returns a photo with its map; None where it cannot be read."""
    preprocessing: Any = model.preprocessing
    classes: Any = model.classes
    try:
        photo = images.read(index)
    except UsageError:
        return None
    pixels, geometry = preprocessing(photo)
    given = preprocessing.normalize(pixels[None])
    with torch.no_grad():
        scaled = model(given)[0].double() / float(model.temperature)  # type: ignore[arg-type]
    probabilities = scaled.sigmoid() if model.multi_label else scaled.softmax(-1)
    best = int(probabilities.argmax())
    label = np.asarray(images.labels)[index]
    truth = ", ".join(classes[i] for i in np.flatnonzero(label)) if label.ndim else classes[int(label)]
    result = explain(model, given, target=best, layout=model.layout)  # type: ignore[arg-type]
    return SheetItem(
        image=photo,
        map=result.maps[0].numpy(),
        geometry=geometry,
        truth=truth,
        prediction=classes[best],
        probability=float(probabilities[best]),
    )

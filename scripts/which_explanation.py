"""Writes docs/which-explanation.md: which explanation to believe, for three models on real photos with real weights.

    python scripts/which_explanation.py ../shared docs/which-explanation.md --work runs/which

The folder holds `data/clothing`, `data/clothing_masks`, `data/photos` and `weights`.
Stopped, the same command goes on. What a person wrote between the two marks of "what surprised" stays.
"""

import argparse
import json
import logging
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from vision_attn.evaluate import Evaluated, Evaluation, Protocol, evaluate_photos
from vision_attn.evaluate.protocol import CONTROL_WORDS, METRICS
from vision_attn.evaluate.record import judged_from_dict
from vision_attn.files import write_whole
from vision_attn.metrics.intervals import bootstrap_mean, sign_flip_test
from vision_attn.models.factory import create_model, open_model, timm_preprocessing

FAST = "raw,rollout,grad_rollout,generic,legrad,grad_cam"
# Fewer passes than the defaults: 16 points on the way, 49 windows.
OPTIONS = {"integrated_gradients.steps": 16, "occlusion.window": 56, "occlusion.stride": 28}
MARKS = ("<!-- what surprised: begin -->", "<!-- what surprised: end -->")
# ViT-B/16, ImageNet, percent: Chefer, Gur and Wolf, CVPR 2021, as reprinted in doi 10.5281/zenodo.6574631.
PUBLISHED = {
    "transformer attribution (not here: patented rules)": (54.16, 17.03, 79.70, 86.03, 61.95),
    "rollout": (53.10, 20.05, 73.54, 84.76, 55.42),
    "raw": (45.55, 23.99, 67.84, 80.24, 46.37),
    "grad_cam": (41.52, 34.06, 64.44, 71.60, 40.82),
}


@dataclass(frozen=True)
class Case:
    """One model on one set of photos.

    Attributes:
        name: Of its folder and pictures.
        title: Its heading.
        network: "vits14", "lite0" (clothing heads) or "lite0_imagenet".
        photos: Below the folder with data.
        masks: The same; empty without.
        methods: As for `evaluate_photos`; "all" or names.
    """

    name: str
    title: str
    network: str
    photos: str
    masks: str = ""
    methods: str = "all"


CASES = (
    Case("vits14_test", "ViT-S/14 with clothing head, clothing test photos", "vits14", "data/clothing/test"),
    Case(
        "vits14_masks",
        "ViT-S/14 with clothing head, street photos with masks of the classes",
        "vits14",
        "data/clothing_masks/images",
        "data/clothing_masks/masks",
        FAST,
    ),
    Case("lite0_test", "EfficientNet-Lite0 with clothing head, clothing test photos", "lite0", "data/clothing/test"),
    Case(
        "lite0_masks",
        "EfficientNet-Lite0 with clothing head, street photos with masks of the classes",
        "lite0",
        "data/clothing_masks/images",
        "data/clothing_masks/masks",
        "grad_cam,integrated_gradients",
    ),
    Case("lite0_imagenet", "EfficientNet-Lite0, ImageNet sample photos", "lite0_imagenet", "data/photos"),
)


def main() -> None:
    """Evaluates all cases and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="folder with data and weights")
    parser.add_argument("page", type=Path, help="the page to write")
    parser.add_argument("--work", type=Path, default=Path("runs/which"), help="where the numbers are kept (runs/which)")
    parser.add_argument("--samples", type=int, default=24, help="photos a case (24)")
    parser.add_argument("--only", default="", help="cases to evaluate, with commas; the page is written with all there")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    wanted = [name for name in options.only.split(",") if name]
    parts = []
    for case in CASES:
        if wanted and case.name not in wanted and not (options.work / case.name).is_dir():
            continue
        parts.append((case, _evaluated(case, options.shared, options.work / case.name, options.samples)))
    write_whole(options.page, _page(parts, options.page, options.samples))
    print(options.page)


def _evaluated(case: Case, shared: Path, out: Path, samples: int) -> Evaluated:
    found = evaluate_photos(
        _network(case.network, shared),
        [shared / case.photos],
        out,
        methods=case.methods,
        options={
            name: value
            for name, value in OPTIONS.items()
            if case.methods == "all" or name.split(".")[0] in case.methods
        },
        masks=shared / case.masks if case.masks else None,
        samples=samples,
        protocol=Protocol(sanity_photos=3),
        health=case.network == "vits14",
    )
    Console().print(f"{case.name}: {found.seconds:.0f} s, {found.done_before} photos were done before")
    return found


def _network(name: str, shared: Path) -> nn.Module:
    """Returns a model with its real weights, as `open_model` gives one."""
    weights = shared / "weights"
    if name == "lite0_imagenet":
        return open_model("tf_efficientnet_lite0", checkpoint=weights / "tf_efficientnet_lite0.safetensors")
    architecture, body, head = {
        "vits14": ("vit_small_patch14_dinov2", "vits14_saliency_fp16", "clothing_head_vits14_token"),
        "lite0": ("tf_efficientnet_lite0", "tf_efficientnet_lite0", "clothing_head_efficientnet_lite0"),
    }[name]
    model = create_model(
        architecture,
        num_classes=10,
        image_size=224,
        checkpoint=weights / f"{body}.safetensors",
        position_interpolation="hf",
    )
    state = {key.split(".")[1]: tensor for key, tensor in load_file(weights / f"{head}.safetensors").items()}
    model.get_classifier().load_state_dict(state)  # type: ignore[operator]
    classes = sorted(path.name for path in (shared / "data/clothing/train").iterdir() if path.is_dir())
    model.classes = tuple(classes)  # type: ignore[assignment]
    model.preprocessing = timm_preprocessing(model, 224)  # type: ignore[assignment]
    model.layout, model.multi_label = None, False  # type: ignore[assignment]
    return model.eval()


# ------------------------------------------------------------------------------------------------ the page


def _page(parts: list[tuple[Case, Evaluated]], page: Path, samples: int) -> str:
    lines = [
        "# Which explanation to believe",
        "",
        f"Written by `python scripts/which_explanation.py ../shared docs/which-explanation.md` on {date.today()}, "
        f"torch {torch.__version__}; {samples} photos a case, chosen by seed 0. Each number is a mean over photos with "
        "its 95 % bootstrap interval; +, - and = say whether a method is better, worse or not better than the best "
        "control (*random* noise, a *center*ed blob, *edges*) in a paired test (Holm, 5 %). `vision-attn evaluate` "
        "does the same for your model and photos.",
        "",
        "## In short",
        "",
        *(f"- **{case.title}.** {found.evaluation.verdict[0]}" for case, found in parts),
        "",
        "## What surprised",
        "",
        MARKS[0],
        *_written_before(page),
        MARKS[1],
        "",
    ]
    for case, found in parts:
        lines += _case_lines(case, found, page)
    lines += _ordering(parts)
    return "\n".join(lines) + "\n"


def _written_before(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if not all(mark in text for mark in MARKS):
        return []
    return text.split(MARKS[0])[1].split(MARKS[1])[0].strip("\n").splitlines()


def _case_lines(case: Case, found: Evaluated, page: Path) -> list[str]:
    evaluation = found.evaluation
    lines = [f"## {case.title}", "", "\n>\n".join(f"> {sentence}" for sentence in evaluation.verdict), ""]
    lines += _table(evaluation)
    lines += ["", *_against_the_blob(found)]
    named = {name: methods for name, methods in evaluation.classes.items() if name != "object"}
    if named:
        lines += ["", "Share of the map for a class that lies on it (mass), by class:", "", *_class_table(evaluation)]
    if evaluation.sanity is not None:
        lines += ["", *_sanity_lines(evaluation)]
    for name, alt in (("curves", "Deletion and insertion curves"), ("distances", "Differences from the best control")):
        source = found.out / f"{name}.png"
        if source.is_file():
            picture = f"which_{case.name}_{name}.png"
            write_whole(page.parent / "images" / picture, source.read_bytes())
            lines += ["", f"![{alt}: {case.title}](images/{picture})"]
    if found.health is not None and case.name.endswith("_test"):
        picture = f"which_{case.name}_health.png"
        write_whole(page.parent / "images" / picture, (found.out / "health.png").read_bytes())
        lines += ["", "The attention itself:", "", *(f"- {remark}" for remark in found.health.remarks)]
        lines += ["", f"![Attention health: {case.title}](images/{picture})"]
    return [*lines, "", *(f"- {remark}" for remark in evaluation.remarks), ""]


def _table(evaluation: Evaluation) -> list[str]:
    marks = {"better": " **+**", "worse": " **-**", "not better": " =", "": ""}
    heads = ["method", *(METRICS[name].title for name in evaluation.metrics)]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---|' * len(evaluation.metrics)}"]
    for method in (*evaluation.methods, *evaluation.controls):
        cells = []
        for metric in evaluation.metrics:
            cell = evaluation.cells[method, metric]
            one = cell.estimate
            text = f"{one.mean:.3f} ({one.low:.2f} to {one.high:.2f})" if one.count else "-"
            cells.append(text + marks[cell.verdict])
        name = f"*{method}*" if method in evaluation.controls else method
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _against_the_blob(found: Evaluated) -> list[str]:
    """Returns what the usual methods of attention gain over the centred blob, which is not always the best control."""
    photos = [
        judged_from_dict({key: value for key, value in json.loads(line).items() if key != "fractions"})
        for line in (found.out / "photos.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    lines = []
    for method in ("rollout", "grad_rollout", "grad_cam"):
        if method not in found.evaluation.methods:
            continue
        parts = []
        for metric in ("deletion", "insertion", "saco"):
            gaps = torch.tensor(
                [
                    METRICS[metric].sign * (photo.scores[method][metric] - photo.scores["center"][metric])
                    for photo in photos
                    if metric in photo.scores.get(method, {})
                ]
            )
            gap, p = bootstrap_mean(gaps), sign_flip_test(gaps)
            parts.append(f"{metric} {gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}, p = {p:.2g})")
        lines.append(f"- {method} less the centred blob (positive: better): {'; '.join(parts)}")
    return lines


def _class_table(evaluation: Evaluation) -> list[str]:
    methods = [*evaluation.methods, "center"]
    lines = [f"| class | photos | {' | '.join(methods)} |", f"|---|---|{'---|' * len(methods)}"]
    for name, found in evaluation.classes.items():
        estimates = [found.get(method, {}).get("mass_in_mask") for method in methods]
        count = max((one.count for one in estimates if one), default=0)
        lines.append(
            f"| {name} | {count} | {' | '.join('-' if one is None else f'{one.mean:.2f}' for one in estimates)} |"
        )
    return lines


def _sanity_lines(evaluation: Evaluation) -> list[str]:
    sanity = evaluation.sanity
    assert sanity is not None
    heads = [f"{level:.0%} random" for level in sanity.levels]
    lines = [
        f"Rank correlation with the map itself when layers are drawn anew from the top down, and under small noise "
        f"({sanity.photos} photos):",
        "",
        f"| method | {' | '.join(heads)} | noise |",
        f"|---|{'---|' * (len(heads) + 1)}",
    ]
    for method, values in sanity.randomized.items():
        if method not in CONTROL_WORDS:
            row = " | ".join(f"{value:.2f}" for value in (*values, sanity.stability[method]))
            lines.append(f"| {method} | {row} |")
    return lines


def _ordering(parts: list[tuple[Case, Evaluated]]) -> list[str]:
    """Returns the published table, and the order of its methods there and here."""
    lines = [
        "## Beside the published numbers",
        "",
        "ViT-B/16 on ImageNet, percent, as reprinted by the ReScience replication (doi 10.5281/zenodo.6574631) of "
        "Chefer, Gur and Wolf, CVPR 2021. Another model, other photos, pixels instead of patches, other averages: "
        "only the order can be compared.",
        "",
        "| method | negative ↑ | positive ↓ | pixel accuracy ↑ | mAP ↑ | mIoU ↑ |",
        "|---|---|---|---|---|---|",
        *(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |" for name, values in PUBLISHED.items()),
        "",
    ]
    names = [name for name in PUBLISHED if " " not in name]
    for case, found in parts:
        cells = found.evaluation.cells
        if not all((name, "negative") in cells for name in names):
            continue
        for metric, column in (("negative", 0), ("positive", 1), ("pixel_accuracy", 2), ("iou", 4)):
            if (names[0], metric) not in cells:
                continue
            sign = METRICS[metric].sign
            theirs = sorted(names, key=lambda name: -sign * PUBLISHED[name][column])
            ours = sorted(names, key=lambda name: -sign * cells[name, metric].estimate.mean)
            lines.append(f"- {metric}: there {' > '.join(theirs)}; here ({case.name}) {' > '.join(ours)}")
    return lines


if __name__ == "__main__":
    main()

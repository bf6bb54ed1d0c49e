"""One batch of photos, all its maps, all that is measured of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.attribution.base import METHODS, Explanation, Method, explain, logits_of
from vision_attn.attribution.tokens import find_layout, is_known
from vision_attn.evaluate.judged import Judged, Sanity
from vision_attn.evaluate.places import NAMES, hide_places, hide_shown, place_mask
from vision_attn.evaluate.protocol import METRICS, Protocol
from vision_attn.layout import TokenLayout
from vision_attn.look.asking import takes_option
from vision_attn.look.maps import memory_format_for
from vision_attn.metrics.agreement import rank_correlation
from vision_attn.metrics.baselines import fill
from vision_attn.metrics.faithfulness import (
    area,
    cell_scores,
    group_effects,
    perturbation_areas,
    removal_curves,
    removal_order,
    saco,
    saco_groups,
)
from vision_attn.metrics.localization import (
    average_precision,
    class_separation,
    iou,
    mass_in_mask,
    pixel_accuracy,
    pointing_game,
)
from vision_attn.metrics.sanity import stability, weight_randomization

Masks = Mapping[int | None, Tensor]
"""By class index, or None for an object whatever its class: (H, W) booleans on the model's input."""

SMALLEST_SHARE = 0.005
"""A class whose mask covers less of the model's input is left out: there is nothing to point at."""


@dataclass
class Scorer:
    """Makes and judges the maps of a model.

    Args:
        model: A classifier, normalised images (B, 3, H, W) to logits; in the mode and on the device that it runs in.
        methods: Options by registered name, the controls among them. What a method settles itself on the first photos
            (Grad-CAM's layer) is kept for the others.
        functions: Methods that are no registered ones, by name.
        protocol: How photos are taken apart.
        layout: The tokens' layout, where the model is none that `find_layout` knows.
        mean: Per colour, of the normalisation, for the baseline "black".
        std: The same.
        batch_size: Images a forward pass, at most.
        at_once: Photos explained together.
    """

    model: nn.Module
    methods: dict[str, dict[str, Any]]
    protocol: Protocol
    functions: Mapping[str, Method] = field(default_factory=dict)
    layout: TokenLayout | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    batch_size: int = 32
    at_once: int = 8

    def __post_init__(self) -> None:
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.memory_format = memory_format_for(self.model, self.device)
        self.lower = use_bfloat16(self.protocol.precision, self.model, self.device)
        self.several_labels = bool(getattr(self.model, "multi_label", False))
        self.fractions: list[float] = []

    # -------------------------------------------------------------------------------------------- the model

    def predict(self, images: Tensor, *, exact: bool = False) -> Tensor:
        """Returns probabilities (n, classes): softmax of the logits, or sigmoid where a photo has several labels.

        Args:
            images: (n, 3, H, W), normalised.
            exact: In the model's own precision whatever the protocol says.
        """
        lower = self.lower and not exact
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=lower):
            logits = logits_of(self.model(images.contiguous(memory_format=self.memory_format)))
        return logits.float().sigmoid() if self.several_labels else logits.float().softmax(-1)

    def maps(self, name: str, images: Tensor, targets: Tensor) -> Tensor:
        """Returns the raw maps (B, h, w) of a method for one class of each image."""
        result = self._explained(name, images, targets)
        if not result.maps.isfinite().all() or name in self.functions:
            return result.maps
        settled = {option: value for option, value in result.options.items() if takes_option(name, option)}
        self.methods[name] = {**self.methods[name], **settled}
        return result.maps

    def _explained(self, name: str, images: Tensor, targets: Tensor) -> Explanation:
        return explain(
            self.model,
            images,
            method=self.functions.get(name, name),
            target=targets,
            layout=self.layout,
            **self.methods[name],
        )

    def is_class_specific(self, name: str) -> bool:
        """Whether a method's map depends on the class that is asked about."""
        return name in self.functions or bool(METHODS.info(name)["class_specific"])

    def cells(self, images: Tensor) -> tuple[int, int]:
        """Returns (rows, columns) of the blocks that are removed: asked for, the model's patches, or 14 x 14.

        14 x 14 also where there are fewer patches than steps or groups; less on images below 56 pixels.
        """
        if self.protocol.cells is not None:
            return self.protocol.cells
        if self.layout is None and is_known(self.model):
            self.layout = find_layout(self.model, images)
        fewest = max(self.protocol.steps, self.protocol.groups)
        if self.layout is not None and self.layout.num_patches >= fewest:
            return self.layout.grid
        height, width = images.shape[-2:]
        return min(14, height // 4), min(14, width // 4)

    # -------------------------------------------------------------------------------------------- a batch

    def score(
        self,
        images: Tensor,
        names: Sequence[str],
        *,
        target: Tensor | None = None,
        masks: Sequence[Masks | None] | None = None,
        ignore: Tensor | None = None,
        asked_class: int | None = None,
    ) -> list[Judged]:
        """Returns what was measured of each photo of a batch.

        Args:
            images: (B, 3, H, W), normalised.
            names: Of the photos.
            target: (B,), the class asked about; None for the predicted one.
            masks: Of each photo, on the model's input; None for a photo without any.
            ignore: (B, H, W) booleans, what is padding.
            asked_class: The one class whose masks count; None for all of them.
        """
        images = images.to(self.device)
        whole = torch.cat([self.predict(part, exact=True) for part in images.split(self.batch_size)])
        predicted = whole.argmax(-1)
        target = predicted if target is None else target.to(self.device)
        maps, failed = self._all_maps(images, target)
        ignore = torch.zeros_like(images[:, 0], dtype=torch.bool) if ignore is None else ignore.to(self.device)
        per_photo = self._faithfulness(images, maps, target)
        places, own = self._places(images, target, whole, masks)
        agreement = self._agreement(maps, images)
        judged = []
        for i, name in enumerate(names):
            found = {} if masks is None or masks[i] is None else dict(masks[i])  # type: ignore[arg-type]
            classes, note = self._classes(images[i], found, ignore[i], int(target[i]), maps, i, asked_class)
            scores = {
                method: {**per_photo[method][i][0], **_over_classes(classes, method)}
                for method in self.methods
                if method not in failed[i]
            }
            judged.append(
                Judged(
                    name=name,
                    prediction=int(predicted[i]),
                    target=int(target[i]),
                    probability=float(whole[i, target[i]]),
                    scores=scores,
                    curves={method: per_photo[method][i][1] for method in scores},
                    failed=failed[i],
                    classes=classes,
                    places=places[i],
                    object_in_place=None if own[i] is None else own[i][0],  # type: ignore[index]
                    object_effect=None if own[i] is None else own[i][1],  # type: ignore[index]
                    agreement={pair: value for pair, value in agreement[i].items() if not set(pair) & set(failed[i])},
                    note=note,
                )
            )
        return judged

    def _all_maps(self, images: Tensor, target: Tensor) -> tuple[dict[str, Tensor], list[dict[str, str]]]:
        """Returns the maps by method, and for each photo which of them cannot be used, and why."""
        maps: dict[str, Tensor] = {}
        failed: list[dict[str, str]] = [{} for _ in images]
        for name in self.methods:
            parts = [
                self.maps(name, image, asked)
                for image, asked in zip(images.split(self.at_once), target.split(self.at_once), strict=True)
            ]
            found = torch.cat(parts)
            for i, one in enumerate(found):
                if reason := why_unusable(one):
                    failed[i][name] = reason
            maps[name] = found.nan_to_num(0.0, 0.0, 0.0)
        return maps, failed

    def _faithfulness(
        self, images: Tensor, maps: Mapping[str, Tensor], target: Tensor
    ) -> dict[str, list[tuple[dict[str, float], dict[str, list[float]]]]]:
        """Returns, by method and photo, what the model answers when parts are removed: scores and curves."""
        cells = self.cells(images)
        salience = torch.stack([cell_scores(found.to(images), cells) for found in maps.values()], 1)
        orders = removal_order(salience, seed=self.protocol.seed)
        curves = removal_curves(
            self.predict,
            images,
            orders,
            target,
            cells=cells,
            fill=fill(images, self.protocol.baseline, mean=self.mean, std=self.std, seed=self.protocol.seed),
            steps=self.protocol.steps,
            batch_size=self.batch_size,
        )
        effects = group_effects(
            self.predict,
            images,
            orders,
            target,
            cells=cells,
            fill=fill(images, "own_mean"),
            groups=self.protocol.groups,
            batch_size=self.batch_size,
            whole=curves.deletion[:, 0, 0],
        )
        self.fractions = curves.fractions.tolist()
        positive, negative = perturbation_areas(curves)
        columns = {
            "deletion": area(curves.deletion, curves.fractions),
            "insertion": area(curves.insertion, curves.fractions),
            "saco": saco(saco_groups(salience, orders, groups=self.protocol.groups), effects),
            "positive": positive,
            "negative": negative,
        }
        found: dict[str, list[tuple[dict[str, float], dict[str, list[float]]]]] = {}
        for number, name in enumerate(maps):
            found[name] = [
                (
                    {metric: float(values[i, number]) for metric, values in columns.items()},
                    {
                        "deletion": curves.deletion[i, number].tolist(),
                        "insertion": curves.insertion[i, number].tolist(),
                    },
                )
                for i in range(len(images))
            ]
        return found

    def _places(
        self, images: Tensor, target: Tensor, whole: Tensor, masks: Sequence[Masks | None] | None
    ) -> tuple[list[list[float]], list[tuple[list[float], float] | None]]:
        """Returns the effect of hiding each place of a photo; and of its object, with where that lies."""
        before = whole.gather(-1, target[:, None])[:, 0]
        grey = fill(images, "own_mean")
        effects = hide_places(self.predict, images, target, before, grey, batch_size=self.batch_size)
        own: list[tuple[list[float], float] | None] = [None] * len(images)
        for i in range(len(images)):
            mask = _mask_of(masks[i] if masks else None, int(target[i]))
            if mask is None or not mask.any():
                continue
            mask = mask.to(images.device)
            size = (mask.shape[0], mask.shape[1])
            shares = [float(mask[place_mask(place, size)].float().mean()) for place in range(len(NAMES))]
            hidden = hide_shown(images[i : i + 1], mask[None], grey[i : i + 1])
            after = self.predict(hidden)[0, target[i]]
            own[i] = (shares, float(before[i] - after))
        return effects.tolist(), own

    def _agreement(self, maps: Mapping[str, Tensor], images: Tensor) -> list[dict[tuple[str, str], float]]:
        """Returns the rank correlation of each pair of maps, for each photo."""
        cells = self.cells(images)
        rows = {name: cell_scores(found.to(images), cells).view(-1, *cells) for name, found in maps.items()}
        names = list(rows)
        found: list[dict[tuple[str, str], float]] = [{} for _ in images]
        for place, first in enumerate(names):
            for second in names[place + 1 :]:
                for i, value in enumerate(rank_correlation(rows[first], rows[second]).tolist()):
                    found[i][first, second] = value
        return found

    # -------------------------------------------------------------------------------------------- where classes are

    def _classes(
        self,
        image: Tensor,
        masks: dict[int | None, Tensor],
        ignore: Tensor,
        target: int,
        maps: Mapping[str, Tensor],
        index: int,
        asked_class: int | None,
    ) -> tuple[dict[int | None, dict[str, dict[str, float]]], str]:
        """Returns, by class and method, how the map for a class lies on its mask; and what could not be asked."""
        seen = max(int((~ignore).sum()), 1)
        large = {
            name: mask.to(image.device)
            for name, mask in masks.items()
            if int((mask.to(image.device) & ~ignore).sum()) >= SMALLEST_SHARE * seen
        }
        wanted = list(large)
        if asked_class is not None and None not in large:
            wanted = [asked_class] if asked_class in large else []
        if not wanted:
            note = "" if not masks else "class not on it" if asked_class is not None else "nothing to point at"
            return {}, note
        found: dict[int | None, dict[str, dict[str, float]]] = {name: {} for name in wanted}
        for method in self.methods:
            asked = [target if name is None else name for name in large]
            own = self._class_maps(method, image, asked, target, maps[method][index])
            for name, one in zip(large, own, strict=True):
                if name in found and not why_unusable(one):
                    found[name][method] = _localised(one, large[name], ignore)
            if len(large) > 1 and not any(map(why_unusable, own)):
                # As in `_localised`, evidence against a class lies nowhere.
                shown, own_masks = torch.stack(own).clamp(min=0), torch.stack(list(large.values()))
                shares = class_separation(shown, own_masks, ignore=ignore)
                for name, share in zip(large, shares.tolist(), strict=True):
                    if name in found:
                        found[name][method]["separation"] = share
        return found, ""

    def _class_maps(self, method: str, image: Tensor, asked: Sequence[int], target: int, known: Tensor) -> list[Tensor]:
        """Returns a photo's map for each of some classes; `known` is the one for `target`."""
        if not self.is_class_specific(method):
            return [known] * len(asked)
        others = [name for name in asked if name != target]
        made = {target: known}
        for some in (others[start : start + self.at_once] for start in range(0, len(others), self.at_once)):
            images = image.expand(len(some), -1, -1, -1).contiguous()
            made.update(zip(some, self.maps(method, images, torch.tensor(some, device=image.device)), strict=True))
        return [made[name] for name in asked]


# ------------------------------------------------------------------------------------------------ sanity


def check_sanity(scorer: Scorer, images: Tensor, *, tell: Callable[[int], None] = lambda done: None) -> Sanity:
    """Returns what randomised weights and small noise make of every method's maps (Adebayo et al. 2018).

    The class asked about is the one that the whole model predicts, throughout.

    Args:
        scorer: With the methods.
        images: (B, 3, H, W), normalised.
        tell: Called with the number of methods that are done.
    """
    images = images.to(scorer.device)
    target = scorer.predict(images, exact=True).argmax(-1)
    seed = scorer.protocol.seed
    randomized, similarity, stable, levels = {}, {}, {}, []
    for done, name in enumerate(list(scorer.methods), start=1):

        def made(images: Tensor, name: str = name) -> Tensor:
            return scorer.maps(name, images, target)

        found = weight_randomization(lambda: made(images), scorer.model, images, seed=seed)
        randomized[name] = [_mean(row) for row in found.rank_correlation]
        similarity[name] = [_mean(row) for row in found.ssim]
        levels = list(found.fractions)
        stable[name] = _mean(stability(made, images, seed=seed))
        tell(done)
    return Sanity(randomized, similarity, levels, stable, len(images))


def _mean(values: Tensor) -> float:
    return float(values.float().nanmean())


# ------------------------------------------------------------------------------------------------ details


def use_bfloat16(precision: str, model: nn.Module, device: torch.device) -> bool:
    """Returns whether photos in parts go through the model in bfloat16.

    Of a processor, "auto" takes it where it multiplies bfloat16 matrices itself (else it is emulated, slower than
    float32), and for networks of matrices: convolutions gain nothing there, and lose more.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return device.type == "cpu" and convolutions <= 1 and torch.cpu._is_amx_tile_supported()


def why_unusable(one: Tensor) -> str:
    """Returns why a map (h, w) orders nothing: "NaN", "constant"; empty where it does."""
    if not one.isfinite().all():
        return "NaN"
    return "constant" if float(one.max()) == float(one.min()) else ""


def _mask_of(masks: Masks | None, target: int) -> Tensor | None:
    return None if masks is None else masks.get(None, masks.get(target))


def _localised(one: Tensor, mask: Tensor, ignore: Tensor) -> dict[str, float]:
    """Returns how one map (h, w) lies on one mask (H, W)."""
    # Where evidence against a class lies is no place of the class.
    maps, masks, ignore = one[None].clamp(min=0), mask[None], ignore[None]
    found = {
        "pointing_game": pointing_game(maps, masks, ignore=ignore),
        "mass_in_mask": mass_in_mask(maps, masks, ignore=ignore),
        "iou": iou(maps, masks, ignore=ignore),
        "pixel_accuracy": pixel_accuracy(maps, masks, ignore=ignore),
        "average_precision": average_precision(maps, masks, ignore=ignore),
    }
    return {name: float(value) for name, value in found.items()}


def _over_classes(classes: Mapping[int | None, Mapping[str, Mapping[str, float]]], method: str) -> dict[str, float]:
    """Returns a method's localisation metrics on a photo, the mean over its classes: photos are what is drawn anew."""
    found: dict[str, list[float]] = {}
    for scores in classes.values():
        for metric, value in scores.get(method, {}).items():
            if not math.isnan(value):
                found.setdefault(metric, []).append(value)
    return {metric: sum(values) / len(values) for metric, values in found.items() if metric in METRICS}

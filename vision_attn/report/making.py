"""Photos and a model in, one HTML file out."""

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vision_attn.attribution.base import METHODS, explain
from vision_attn.capture import AttentionRecord
from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.files import is_taken, write_whole
from vision_attn.geometry import Geometry
from vision_attn.look.asking import check_classes, chosen_methods, find_photos, method_options, takes_option
from vision_attn.look.folder import model_settings, progress_bar
from vision_attn.look.maps import Look, look
from vision_attn.look.sheets import gate_rows
from vision_attn.metrics.health import SINK_TIMES
from vision_attn.registry import unknown
from vision_attn.report.attention import attention_of, packed_attention
from vision_attn.report.facts import installed, run_facts, trust_facts
from vision_attn.report.packing import Blobs, jpeg, packed_map
from vision_attn.report.page import write_page
from vision_attn.viz.overlay import COLORMAP, SIGNED_COLORMAP, colours_of

Attention = Literal["last", "full", "none"]

TOP_CLASSES = 5  # listed with their probabilities
CLASS_MAPS = 3  # of these, drawn side by side
_HEAVY = 150_000_000  # bytes of a page that a browser takes seconds to read
_MOST_GATES = 4096  # channels of a block whose gates are drawn as bars


@dataclass(frozen=True)
class Reported:
    """What came of a report.

    Attributes:
        path: The page.
        photos: How many photos it shows.
        damaged: What was wrong, by photo, with those that could not be read.
        seconds: How long it took.
        notes: What the page has not, and why; and what else has to be known of it.
    """

    path: Path
    photos: int
    damaged: Mapping[Path, str]
    seconds: float
    notes: tuple[str, ...]


def report_photos(
    model: nn.Module,
    photos: Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    method: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    attention: Attention = "last",
    explored: int = 3,
    evaluation: str | Path | None = None,
    run: str | Path | None = None,
    title: str | None = None,
    photo_size: int = 640,
    batch_size: int = 16,
    command: str = "",
    progress: bool = True,
) -> Reported:
    """Writes one HTML file that opens in any browser, without a server and without the internet.

    Args:
        model: From `load_model` or `open_model`.
        photos: Files, folders (searched to any depth) and patterns. A photo in a folder with the name of a class is
            known to be of that class.
        out: A new file.
        method: As for `look.look`; several can be switched on the page.
        options: Of the methods, by name.
        attention: Of every photo: of its last layer, of all layers ("full"), or none.
        explored: How many photos get the attention of all layers and heads, maps of their likeliest classes and the
            gates of blocks: the most confident mistakes where the truth is known, then the first.
        evaluation: A folder that `evaluate` wrote, for the page's part on trust.
        run: The folder of the training run, for the page's part on it.
        title: Of the page.
        photo_size: The longer side of photos on the page, in pixels.
        batch_size: Photos a forward pass.
        command: How the page was asked for, told on it.
        progress: Show a progress bar, on a terminal.

    Raises:
        UsageError: there is nothing to show, `out` exists or cannot be written, a folder is none of ours, or as `look`.
    """
    out = Path(out)
    started = time.perf_counter()
    if attention not in get_args(Attention):
        raise unknown("attention", str(attention), get_args(Attention))
    _check_place(out)
    classes = tuple(getattr(model, "classes", None) or ())
    methods = method_options(chosen_methods(method, model), options or {})
    check_classes(methods, classes)
    trust = trust_facts(evaluation, model_settings(model)) if evaluation is not None else None
    training = run_facts(run) if run is not None else None
    found = find_photos(photos)
    maker = _Maker(model, methods, classes, photo_size, attention, explored=explored)
    damaged: dict[Path, str] = {}
    with progress_bar("reporting", total=len(found), done=0, shown=progress) as step:
        looks = look(
            model,
            list(found),
            damaged,
            method=tuple(methods),
            options=options,
            batch_size=batch_size,
            keep_attention=attention != "none",
        )
        for batch in _batches(looks, batch_size):
            maker.enter(batch)
            step(len(maker.photos) + len(damaged))
    if not maker.photos:
        raise UsageError(
            f"expected at least one photo that can be read, got none of {len(found)} (the first: "
            f"{next(iter(damaged.values()))}): nothing was written"
        )
    maker.explore()
    if trust is not None and trust["otherModel"]:
        maker.notes.append(
            f"the evaluation in {evaluation} is of another model: other weights, classes or preprocessing"
        )
    _tell_apart(maker.photos)
    data = {
        "version": 1,
        "title": title or f"{_about_model(model, classes)['name']}: what it looks at",
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "versions": installed(),
        "sinkTimes": SINK_TIMES,
        "attention": attention,
        "model": _about_model(model, classes),
        "methods": [_about_method(name, maker.settled.get(name, given)) for name, given in methods.items()],
        "colours": {
            "heat": [COLORMAP, _colours(COLORMAP)],
            "signed": [SIGNED_COLORMAP, _colours(SIGNED_COLORMAP)],
            "attention": ["viridis", _colours("viridis")],
        },
        "photos": maker.photos,
        "damaged": list(damaged.values()),
        "trust": trust,
        "run": training,
        "notes": maker.notes,
    }
    # A name that is no UTF-8 stands in the data as an escape of JSON, which is how a browser reads it.
    write_whole(out, write_page(data, maker.blobs).encode("utf-8", "backslashreplace"))
    size = out.stat().st_size
    heavy = [f"{size / 1e6:.0f} MB open slowly: attention none leaves out most of it"] if size > _HEAVY else []
    return Reported(out, len(maker.photos), damaged, time.perf_counter() - started, (*maker.notes, *heavy))


def _check_place(out: Path) -> None:
    """Raises where the page could not be written, before anything is computed."""
    try:
        if is_taken(out) or out.is_dir():
            raise UsageError(
                f"expected a new file, got {out}, which exists: choose another name with --out or move it away"
            )
        folder = next((parent for parent in out.absolute().parents if parent.exists()), Path("/"))
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"expected a place that can be written for {out}, got {folder}: choose another with --out")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"expected a place that can be written, got {out} ({reason}): choose another") from error


@dataclass
class _Maker:
    """Turns photos into what the page holds of them."""

    model: nn.Module
    methods: Mapping[str, Mapping[str, Any]]
    classes: Sequence[str]
    photo_size: int
    attention: Attention
    blobs: Blobs = field(default_factory=Blobs)
    photos: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settled: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    explored: int = 0
    kept: dict[int, tuple[Tensor, Geometry]] = field(default_factory=dict)  # the inputs of those to be explored, so far
    gateless: bool = False

    def enter(self, looks: Sequence[Look]) -> None:
        """Takes a batch of explained photos."""
        for one in looks:
            assert one.pixels is not None
            self.kept[len(self.photos)] = (one.pixels, one.geometry)
            self.photos.append(self._photo(one))
            self.settled = {name: found.options for name, found in one.explanations.items()}
        if self.attention != "none":
            pixels = torch.stack([one.pixels for one in looks if one.pixels is not None])
            kept = looks[0].attention
            self._attend(
                self._normalized(pixels),
                self.photos[-len(looks) :],
                full=self.attention == "full",
                records=kept[0] if kept else None,
            )
            if kept:
                kept[0].clear()  # the next batch is explained before this one is let go
        order = sorted(self.kept, key=lambda place: (-_mistake(self.photos[place]), place))
        self.kept = {place: self.kept[place] for place in order[: self.explored]}

    def explore(self) -> None:
        """Adds all layers, the maps of the likeliest classes and the gates to some photos."""
        for place, (pixels, geometry) in self.kept.items():
            photo = self.photos[place]
            images = self._normalized(pixels[None])
            if self.attention == "last":
                self._attend(images, [photo], full=True)
            self._see_gates(images, photo)
            self._explain_classes(images, photo, geometry)

    def _normalized(self, pixels: Tensor) -> Tensor:
        preprocessing: Preprocessing = self.model.preprocessing  # type: ignore[assignment]
        return preprocessing.normalize(pixels.to(next(self.model.parameters()).device))

    def _photo(self, one: Look) -> dict[str, Any]:
        image = one.image
        content, shown = jpeg(image, self.photo_size)
        top: list[tuple[int, float]] = []
        if one.probabilities is not None:
            values, places = one.probabilities.topk(min(TOP_CLASSES, len(one.probabilities)))
            top = [(place, _short(value)) for place, value in zip(places.tolist(), values.tolist(), strict=True)]
        # Where a photo may have several labels, its folder is no more than one of them.
        known = one.path.parent.name in self.classes and not getattr(self.model, "multi_label", False)
        truth = self.classes.index(one.path.parent.name) if known else None
        return {
            "name": one.path.name,
            "file": str(one.path),
            "size": list(image.shape[:2]),
            "shown": list(shown),
            "photo": self.blobs.add(content, deflate=False),
            "place": _place(one.geometry),
            "top": top,
            "truth": truth,
            "maps": [
                {"method": place, "class": top[0][0] if top else None, **packed_map(one.map(name), self.blobs)}
                for place, name in enumerate(self.methods)
            ],
            "attention": None,
            "gates": None,
        }

    def _attend(
        self,
        images: Tensor,
        photos: Sequence[dict[str, Any]],
        *,
        full: bool,
        records: Sequence[AttentionRecord] | None = None,
    ) -> None:
        try:
            found, notes = attention_of(self.model, images, last=not full, records=records)
        except (AttentionNotFoundError, UsageError) as error:
            self.attention = "none"
            return self._note(f"no attention is shown: {error}")
        for note in notes:
            self._note(f"not shown: attention of {note}")
        for photo, layers in zip(photos, found, strict=True):
            if layers:
                photo["attention"] = packed_attention(layers, self.blobs, full=full)
        return None

    def _see_gates(self, images: Tensor, photo: dict[str, Any]) -> None:
        if self.gateless:
            return None
        try:
            rows = gate_rows(self.model, images)
        except AttentionNotFoundError:
            self.gateless = True
            return self._note(f"no gates are shown: no block of {type(self.model).__name__} gates a feature map")
        except UsageError as error:
            self.gateless = True
            return self._note(f"no gates are shown: {error}")
        photo["gates"] = [
            {
                "name": row.name,
                "what": row.what,
                "gain": row.gain,
                "turned": row.turned,
                "map": packed_map(torch.as_tensor(row.map), self.blobs),
                "channels": _gates(row.channels),
                "strongest": [
                    [number, _short(gate), packed_map(torch.as_tensor(values), self.blobs)]
                    for number, gate, values in row.strongest
                ],
            }
            for row in rows
        ]
        return None

    def _explain_classes(self, images: Tensor, photo: dict[str, Any], geometry: Geometry) -> None:
        """Adds the maps of the likeliest classes, and of the true one, by the first method that asks for a class."""
        name = next((name for name in self.methods if METHODS.info(name)["class_specific"]), None)
        if name is None or len(photo["top"]) < 2:
            return
        wanted = [place for place, _ in photo["top"][:CLASS_MAPS]]
        if photo["truth"] is not None and photo["truth"] not in wanted:
            wanted.append(photo["truth"])
        given = {key: value for key, value in self.settled[name].items() if takes_option(name, key)}
        method = list(self.methods).index(name)
        predicted = photo["maps"][method]  # is there already
        result = explain(
            self.model,
            images,
            method=name,
            target=[wanted[1:]],
            layout=self.model.layout,  # type: ignore[arg-type]
            geometry=[geometry],
            **given,
        )
        others = zip(wanted[1:], result.maps[0].cpu(), strict=True)
        photo["classMaps"] = [
            predicted,
            *({"method": method, "class": place, **packed_map(values, self.blobs)} for place, values in others),
        ]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _batches(looks: Iterator[Look], size: int) -> Iterator[list[Look]]:
    batch: list[Look] = []
    for one in looks:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _tell_apart(photos: Sequence[dict[str, Any]]) -> None:
    """Gives photos whose files have the same name that of their folder, too."""
    counts = Counter(photo["name"] for photo in photos)
    for photo in photos:
        if counts[photo["name"]] > 1:
            photo["name"] = "/".join(Path(photo["file"]).parts[-2:])


def _mistake(photo: Mapping[str, Any]) -> float:
    """Returns how sure a wrong prediction was, 0 for a right one or where the truth is not known."""
    if photo["truth"] is None or not photo["top"] or photo["top"][0][0] == photo["truth"]:
        return 0.0
    return float(photo["top"][0][1])


def _place(geometry: Geometry) -> list[float]:
    """Returns a, b, c, d, e, f: the photo's point (s, t), from 0 to 1, is (as + bt + c, ds + et + f) of the input."""
    (a, b, c), (d, e, f) = geometry.matrix
    (height, width), (rows, columns) = geometry.original_size, geometry.input_size
    values = (a * width / columns, b * height / columns, c / columns, d * width / rows, e * height / rows, f / rows)
    return [round(value, 6) for value in values]


def _gates(channels: Any) -> list[list[float]] | None:
    """Returns the gates of channels by path, (P, C) as lists."""
    if channels is None:
        return None
    values = torch.as_tensor(channels).float()
    values = values[None] if values.dim() == 1 else values
    return [[_short(value) for value in row[:_MOST_GATES].tolist()] for row in values]


def _short(value: float) -> float:
    return float(f"{value:.5g}") if math.isfinite(value) else 0.0


def _colours(name: str) -> list[int]:
    return [int(value) for value in colours_of(name).reshape(-1)]


def _about_model(model: nn.Module, classes: Sequence[str]) -> dict[str, Any]:
    preprocessing: Preprocessing = model.preprocessing  # type: ignore[assignment]
    configured = getattr(model, "pretrained_cfg", None) or {}
    name = getattr(model, "name", None) or configured.get("architecture") or type(model).__name__
    return {
        "name": str(name),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "temperature": _short(float(getattr(model, "temperature", 1.0))),
        "multiLabel": bool(getattr(model, "multi_label", False)),
        "classes": list(classes),
        "input": list(preprocessing.image_size),
    }


def _about_method(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    info = METHODS.info(name)
    return {
        "name": name,
        "options": {key: str(value) for key, value in options.items()},
        "asksForClass": bool(info["class_specific"]),
        "control": bool(info.get("control")),
    }

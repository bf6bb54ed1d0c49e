"""Sheets beside a folder of overlays: photos by methods; of single photos all heads, one patch's view, all gates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.attribution.base import Explanation, captured
from vision_attn.attribution.gates import GateView, see_gates
from vision_attn.attribution.positions import find_positions, unwindow
from vision_attn.attribution.tokens import find_layout, is_known, place_of, query_row
from vision_attn.capture import AttentionRecord
from vision_attn.data.reading import read_image
from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.layout import TokenLayout
from vision_attn.registry import unknown
from vision_attn.viz.sheets import GateRow, SheetRow, gates_sheet, heads_sheet, methods_sheet, patch_sheet

SHEETS = ("methods", "heads", "patch", "gates")
_ASKED = ("patch", "gates")  # sheets that a patch can be asked for
_STRONGEST = 3  # channels of a gate whose maps are shown


def check_sheets(model: nn.Module, sheets: Sequence[str], query_patch: tuple[int, int] | None, *, raw: bool) -> None:
    """Raises a `UsageError` where one of the sheets cannot be drawn: tried on a blank photo."""
    for sheet in sheets:
        if sheet not in SHEETS:
            raise unknown("sheet", sheet, SHEETS)
    if "methods" in sheets and not raw:
        raise UsageError("expected raw maps to be kept for the sheet of methods, got none: leave --no-raw out")
    if query_patch is not None and not set(_ASKED) & set(sheets):
        raise UsageError(
            f"expected the sheet 'patch' or 'gates' for query_patch {query_patch}, got neither: ask for one"
        )
    preprocessing: Preprocessing = model.preprocessing  # type: ignore[assignment]
    blank = torch.zeros(1, 3, *preprocessing.image_size)
    if "gates" in sheets:
        gate_rows(model, blank, query_patch=query_patch)
    if {"heads", "patch"} & set(sheets):
        layers = layer_maps(model, blank)
        if "patch" in sheets:
            layer_maps(model, blank, query_patch=query_patch or _middle(layers))


def write_sheets(
    model: nn.Module,
    photos: Sequence[Sequence[Mapping[str, str]]],
    targets: Sequence[str],
    drawing: Mapping[str, Any],
    out: Path,
    sheets: Sequence[str],
    query_patch: tuple[int, int] | None,
) -> tuple[Path, ...]:
    """Writes the sheets that are asked for, and returns their paths.

    Args:
        model: From `load_model`.
        photos: The rows of the index for each photo on them.
        targets: What was asked for.
        drawing: How maps are drawn: style, colormap, and scale or (by method) scales.
        out: The folder of the overlays.
        sheets: Of `SHEETS`.
        query_patch: For "patch" (the middle one where it is None) and "gates" (what each place receives where it is
            None).
    """
    preprocessing: Preprocessing = model.preprocessing  # type: ignore[assignment]
    written = []
    if "methods" in sheets:
        written.append(_methods(photos, targets, drawing, out))
    for kind in ("heads", "patch", "gates"):
        if kind not in sheets:
            continue
        for rows in photos:
            image = read_image(rows[0]["file"])
            pixels, geometry = preprocessing(image)
            images = preprocessing.normalize(pixels[None])
            name = Path(rows[0]["raw"] or rows[0]["overlay"]).relative_to(rows[0]["method"]).with_suffix(".png")
            title = f"{Path(rows[0]['file']).name}: {_predicted(rows[0])}".removesuffix(": ")
            if kind == "gates":
                seen = gate_rows(model, images, query_patch=query_patch)
                colours = {name: value for name, value in drawing.items() if name in ("style", "colormap")}
                written.append(
                    gates_sheet(_place(out, kind, name), image, seen, geometry=geometry, title=title, **colours)
                )
                continue
            layers = layer_maps(model, images)
            if kind == "heads":
                written.append(heads_sheet(_place(out, kind, name), image, layers, geometry=geometry, title=title))
                continue
            patch = query_patch or _middle(layers)
            views = [(layer, maps.mean(0)) for layer, maps in layer_maps(model, images, query_patch=patch)]
            written.append(patch_sheet(_place(out, kind, name), image, views, patch, geometry=geometry, title=title))
    return tuple(written)


def _place(out: Path, kind: str, name: Path) -> Path:
    return out / "sheets" / kind / name


def _methods(
    photos: Sequence[Sequence[Mapping[str, str]]], targets: Sequence[str], drawing: Mapping[str, Any], out: Path
) -> Path:
    columns: dict[tuple[str, int], str] = {}
    for method in dict.fromkeys(row["method"] for row in photos[0]):
        mine = [row for row in photos[0] if row["method"] == method]
        alone = len({row["overlay"] for row in mine}) == 1
        for place in range(1 if alone else len(mine)):
            columns[method, place] = method if alone else f"{method}: {targets[place]}"
    rows = []
    for photo in photos:
        results = {row["method"]: Explanation.load(out / row["raw"]) for row in photo}
        maps = [_map(results[method], place) for method, place in columns]
        geometry = next(iter(results.values())).geometry
        caption = [_predicted(photo[0])] if photo[0]["prediction"] else []
        for target, probability in dict.fromkeys((row["target"], row["target_probability"]) for row in photo):
            if target != photo[0]["prediction"]:
                caption.append(f"{target} {float(probability):.0%}")
        caption.append(Path(photo[0]["file"]).name)
        image = read_image(photo[0]["file"])
        rows.append(SheetRow(image, maps, None if geometry is None else geometry[0], tuple(caption)))
    scales = drawing.get("scales")
    scale = [scales[method] for method, _ in columns] if scales else drawing["scale"]
    kept = {name: value for name, value in drawing.items() if name in ("style", "colormap")}
    return methods_sheet(out / "sheets" / "methods.png", rows, list(columns.values()), scale=scale, **kept)


def _map(result: Explanation, place: int) -> Tensor:
    """Returns the map of one photo for one of its targets."""
    return result.maps[0, place] if result.maps.dim() == 4 else result.maps[0]


def _predicted(row: Mapping[str, str]) -> str:
    return f"{row['prediction']} {float(row['probability']):.0%}" if row["prediction"] else ""


def layer_maps(
    model: nn.Module, images: Tensor, *, query_patch: tuple[int, int] | None = None
) -> list[tuple[str, Tensor]]:
    """Returns what each head of each layer attends to in one image: names, and maps (heads, h, w).

    In layers of global attention what the image's answer attends to, elsewhere what each place receives. Attention
    between channels, or to descriptors, has no places and is left out.

    Args:
        model: Any model with attention on a grid.
        images: (1, 3, H, W), normalised.
        query_patch: (row, column) of the patch that asks, in place of these, on the grid of the first layer's maps. In
            layers of another grid the patch at its middle asks.

    Raises:
        AttentionNotFoundError: there is none.
        UsageError: the patch is not on the grid, or what tokens stand for cannot be known.
    """
    images = images.to(next(model.parameters()))
    layout: TokenLayout | None = getattr(model, "layout", None)
    if layout is None and is_known(model):
        layout = find_layout(model, images)
    layers: list[tuple[str, Tensor]] = []
    first: tuple[int, int] | None = None
    for record in captured(model, images):
        placed = record.positions is not None
        if record.kind == "channel" or (record.positions is not None and not record.positions.has_places):
            continue
        if record.kind == "cross" and query_patch is not None and layout is not None and not placed:
            continue
        if _is_global(record, layout):
            assert layout is not None
            first = first or layout.grid
            maps = _global_maps(record, layout, _on_grid(query_patch, first, layout.grid))
        else:
            positions = find_positions(model, images, record)
            if (record.kind == "cross" or placed) and query_patch is not None and positions.queries is None:
                continue  # what asks is no patch
            first = first or positions.grid
            patch = _on_grid(query_patch, first, positions.query_grid or positions.grid)
            maps = torch.cat([unwindow(head, positions, patch) for head in record.weights.unbind(1)])
        layers.append((record.name, maps.float().cpu()))
    if not layers:
        raise AttentionNotFoundError("expected attention between places for a sheet, got none: leave it out")
    return layers


def gate_rows(model: nn.Module, images: Tensor, *, query_patch: tuple[int, int] | None = None) -> list[GateRow]:
    """Returns what every block lets through in one image, in the order in which they run.

    Args:
        model: Any model with blocks that gate, or attend on feature maps and say where.
        images: (1, 3, H, W), normalised.
        query_patch: (row, column) of the place whose attention is shown, on the grid of the first block of attention
            between places. In blocks of another grid the place at its middle asks; of other blocks nothing is asked.

    Raises:
        AttentionNotFoundError: there is none.
        UsageError: the patch is not on the grid, or no block has places that ask.
    """
    grids: list[tuple[int, int]] = []

    def patch(grid: tuple[int, int] | None) -> tuple[int, int] | None:
        if grid is None:
            return None
        grids.append(grid)
        return _on_grid(query_patch, grids[0], grid)

    views = see_gates(model, images.to(next(model.parameters())), patch=patch, strongest=_STRONGEST)
    if query_patch is not None and not grids:
        raise UsageError(
            f"expected a block in which places attend to places for query_patch {query_patch}, got none: leave it out"
        )
    asked = iter(grids if query_patch is not None else ())
    views = _told_apart(views)
    return [
        _gate_row(view, query_patch, grids, next(asked, None) if view.what == "attention" else None) for view in views
    ]


def _told_apart(views: Sequence[GateView]) -> list[GateView]:
    """Returns the views with names of their own: a block that attends twice has one name for both."""
    names = [view.name for view in views]
    return [
        replace(view, name=f"{view.name} ({names[:place].count(view.name) + 1} of {names.count(view.name)})")
        if names.count(view.name) > 1
        else view
        for place, view in enumerate(views)
    ]


def _gate_row(
    view: GateView,
    query_patch: tuple[int, int] | None,
    grids: Sequence[tuple[int, int]],
    grid: tuple[int, int] | None,
) -> GateRow:
    """Returns the row of a block, whose queries lie on `grid` where they are asked."""
    if isinstance(view.maps, UsageError):
        raise view.maps
    asking = None
    if grid is not None and (place := _on_grid(query_patch, grids[0], grid)) is not None:
        asking = torch.zeros(grid, dtype=torch.bool)
        asking[place] = True
    strongest = []
    if view.strongest is not None and view.channels is not None:
        numbers, maps = view.strongest
        strongest = [
            (int(number), float(view.channels[0, number]), values.float().cpu())
            for number, values in zip(numbers[0], maps[0], strict=True)
        ]
    return GateRow(
        name=view.name,
        what=view.what,
        map=view.maps[0].float().cpu(),
        channels=None if view.channels is None else view.channels[0].float().cpu(),
        strongest=strongest,
        asking=asking,
        gain=view.gain,
        turned=view.turned,
    )


def _is_global(record: AttentionRecord, layout: TokenLayout | None) -> bool:
    among_tokens = layout is not None and record.key_length == layout.num_tokens
    return among_tokens and record.positions is None and record.kind in ("self", "cross")


def _global_maps(record: AttentionRecord, layout: TokenLayout, query_patch: tuple[int, int] | None) -> Tensor:
    if record.kind == "cross":
        return layout.patches(record.weights[0].mean(-2))
    row = query_row(layout, record.rows(0, 1), query_patch=query_patch)
    asking = row.nonzero()[:, 0]
    first, last = int(asking[0]), int(asking[-1]) + 1
    return layout.patches((row[first:last, None] * record.rows(first, last)[0]).sum(-2))


def _on_grid(
    query_patch: tuple[int, int] | None, first: tuple[int, int], grid: tuple[int, int]
) -> tuple[int, int] | None:
    """Returns the patch of a grid at the middle of one of the first layer's grid."""
    if query_patch is None:
        return None
    place_of(query_patch, first)  # raises where it is not on that grid
    row, column = ((2 * i + 1) * n // (2 * m) for i, m, n in zip(query_patch, first, grid, strict=True))
    return row, column


def _middle(layers: Sequence[tuple[str, Tensor]]) -> tuple[int, int]:
    height, width = layers[0][1].shape[-2:]
    return height // 2, width // 2

"""What an explanation looks like in a notebook: its maps in a row, whom they are for, and how they were made."""

from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vision_attn.geometry import Geometry
from vision_attn.inline import MOST, block, figure, listed, number, painted, row, scale
from vision_attn.layout import TokenLayout

if TYPE_CHECKING:
    from vision_attn.attribution.base import Explanation

_SIDE = 160  # pixels: the longer one of a picture


def explanation_html(explanation: "Explanation") -> str:
    """Returns HTML with at most `MOST` maps, drawn without the photos, which an explanation does not hold."""
    maps = explanation.maps if explanation.maps.dim() == 4 else explanation.maps[:, None]
    images, targets = maps.shape[:2]
    places = [divmod(place, targets) for place in range(min(images * targets, MOST))]
    drawn = [
        _on_photo(maps[image, target], None if explanation.geometry is None else explanation.geometry[image])
        for image, target in places
    ]
    signed = any(bool((values < 0).any() and (values > 0).any()) for values in drawn)
    pictures = []
    for (image, target), values in zip(places, drawn, strict=True):
        low, high = _ends(values)
        most = max(abs(low), abs(high))
        lines = [
            _target(explanation, image, target),
            "constant " + number(low) if low == high else f"{low:.3g} to {high:.3g}",
        ]
        picture = painted(values, -most if signed else low, most if signed else high, signed=signed)
        pictures.append(figure(picture, lines if images == 1 else [lines[0], f"image {image}", lines[1]]))
    words = "each map on its own scale" + (", zero in the middle" if signed else "")
    if any(np.isnan(values).any() for values in drawn):
        words += "; grey: not seen by the model"
    parts = [
        row(pictures, more=images * targets - len(places), what="maps"),
        scale(("-", "+") if signed else ("lowest", "highest"), words, signed=signed),
    ]
    facts = {
        "maps": f"{images} image{'s' * (images != 1)}, {targets} target{'s' * (targets != 1)} each, "
        f"{maps.shape[2]} × {maps.shape[3]} values, raw",
        "options": listed(explanation.options),
        "tokens": "" if explanation.layout is None else _tokens(explanation.layout),
        "photos": "" if explanation.geometry is None else _photos(explanation.geometry),
        "made with": listed(explanation.versions, between=" "),
    }
    return block("Explanation by", explanation.method, parts if images else ["<div>no images</div>"], facts)


def _on_photo(values: Tensor, geometry: Geometry | None) -> NDArray[np.floating]:
    """Returns a map as it is shown: of the photo's shape where that is known, NaN where the model did not see it."""
    values = values.detach().to("cpu", torch.float32)
    if geometry is not None:
        height, width = _fitted(*geometry.original_size)
        laid, seen = geometry.of_copy((height, width)).to_original(values)
        return laid.masked_fill(~seen, torch.nan).numpy()
    height, width = _fitted(*values.shape)
    smaller = height < values.shape[0]
    kind = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(values.numpy(), (width, height), interpolation=kind), dtype=np.float32)


def _fitted(height: int, width: int) -> tuple[int, int]:
    factor = _SIDE / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _ends(values: NDArray[np.floating]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if known.size else (np.nan, np.nan)


def _target(explanation: "Explanation", image: int, target: int) -> str:
    """Returns the class that a map is for, with its probability."""
    classes, several = explanation.classes, explanation.targets.dim() == 2
    place = (image, target) if several else (image,)
    index, probability = int(explanation.targets[place]), float(explanation.probabilities[place])
    name = classes[index] if classes is not None and 0 <= index < len(classes) else f"class {index}"
    return f"{name} {100 * probability:.0f} %"


def _tokens(layout: TokenLayout) -> str:
    prefix = "".join(f"{name}, " for name in layout.prefix)
    return f"{prefix}{layout.grid[0]} × {layout.grid[1]} patches; the answer comes from: {layout.query}"


def _photos(geometry: tuple[Geometry, ...]) -> str:
    sizes = list(dict.fromkeys((*one.original_size, *one.input_size) for one in geometry))
    told = [f"{height} × {width} given as {h} × {w}" for height, width, h, w in sizes[:3]]
    return ", ".join(told) + (f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else "")

"""The strip below an overlay that says what its colours mean."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

UNSEEN = "hatched: not seen by the model"


def add_colorbar(
    picture: NDArray[np.uint8],
    colours: NDArray[np.uint8],
    ends: tuple[str, str],
    notes: Sequence[str],
    *,
    ticks: Sequence[float] = (),
) -> NDArray[np.uint8]:
    """A picture with its legend below: (H + strip, max(W, text), 3) RGB uint8, the picture at the top left.

    Args:
        picture: (H, W, 3) RGB uint8.
        colours: as for `legend`.
        ends: as for `legend`.
        notes: as for `legend`.
        ticks: as for `legend`.
    """
    height, width = picture.shape[:2]
    strip = legend(colours, ends, notes, width=width, size=int(np.clip(width / 36, 12, 64)), ticks=ticks)
    out = np.full((height + strip.shape[0], strip.shape[1], 3), 255, dtype=np.uint8)
    out[:height, :width] = picture
    out[height:] = strip
    return out


def legend(
    colours: NDArray[np.uint8],
    ends: tuple[str, str],
    notes: Sequence[str],
    *,
    width: int,
    size: int,
    ticks: Sequence[float] = (),
) -> NDArray[np.uint8]:
    """A colour bar with its values and notes below it, (h, w, 3) RGB uint8 on white, w at least `width`.

    Args:
        colours: (256, 3) RGB uint8, from the low end of the scale to the high end.
        ends: the values at the low and at the high end.
        notes: at least one line: what the scale is.
        width: of the strip, in pixels; it is wider where the text needs it.
        size: of the letters, in pixels.
        ticks: places on the scale (0 to 1) to mark, where contours run.
    """
    font = _font(size)
    pad, line = size // 2, round(size * 1.4)
    text = max(*(font.getlength(note) for note in notes), font.getlength("".join(ends)) + 2 * size)
    width = max(width, int(text) + 2 * pad)
    bar_width, below = width - 2 * pad, pad + size + pad // 2

    strip = Image.new("RGB", (width, below + line * (1 + len(notes)) + pad // 2), "white")
    steps = np.linspace(0, 255, bar_width).round().astype(np.uint8)
    strip.paste(Image.fromarray(colours[steps][None].repeat(size, axis=0)), (pad, pad))
    draw = ImageDraw.Draw(strip)
    draw.rectangle((pad - 1, pad - 1, pad + bar_width, pad + size), outline="black")
    for tick in ticks:
        x = pad + round(tick * (bar_width - 1))
        draw.line((x, pad + size + 1, x, below), fill="black")
    draw.text((pad, below), ends[0], "black", font)
    draw.text((width - pad, below), ends[1], "black", font, anchor="ra")
    for row, note in enumerate(notes, start=1):
        draw.text((pad, below + row * line), note, "black", font)
    return np.asarray(strip)


def font_file(*, bold: bool = False) -> Path:
    """The font of all our pictures. matplotlib ships it: the same letters on every machine, and it has ≤ and ≥."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_file(), size)

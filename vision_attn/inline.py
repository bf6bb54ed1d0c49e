"""Pictures inside of HTML: what a result looks like in a notebook, with nothing to be loaded from anywhere.

Stands below `capture` and `attribution`, whose results show themselves and which know no `viz`: a map becomes a small
PNG, a name becomes text, whatever it holds.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

MOST = 8  # pictures in a row; how many more there are stands behind them
_BAR = (160, 10)  # pixels

# ColorBrewer's RdBu from its blue end, as in matplotlib: even steps to both sides of a near white zero.
_SIGNED = (
    (5, 48, 97), (33, 102, 172), (67, 147, 195), (146, 197, 222), (209, 229, 240), (247, 247, 247),
    (253, 219, 199), (244, 165, 130), (214, 96, 77), (178, 24, 43), (103, 0, 31),
)  # fmt: skip
_UP, _DOWN = (0, 114, 178), (213, 94, 0)  # Okabe and Ito 2008
_SMALL = "font-size:85%;line-height:1.3"


def colours(*, signed: bool = False) -> Picture:
    """The colours of a scale from its low end to its high end, (256, 3) RGB: inferno, or red and blue about zero."""
    if not signed:
        steps = np.arange(256, dtype=np.uint8)[:, None]
        return np.ascontiguousarray(cv2.applyColorMap(steps, cv2.COLORMAP_INFERNO)[:, 0, ::-1])
    places, anchors = np.linspace(0, 1, 256), np.linspace(0, 1, len(_SIGNED))
    table = np.stack([np.interp(places, anchors, channel) for channel in zip(*_SIGNED, strict=True)], axis=1)
    return table.round().astype(np.uint8)


def painted(values: NDArray[np.floating], low: float, high: float, *, signed: bool = False) -> Picture:
    """Values as colours, (h, w, 3) RGB: `low` and below in the first, `high` and above in the last, no number in grey.

    Where `low` is `high` all are the middle colour.
    """
    known = np.isfinite(values)
    width = high - low
    places = np.clip((np.where(known, values, low) - low) / width, 0, 1) if width > 0 else np.full(values.shape, 0.5)
    picture = colours(signed=signed)[(255 * places).round().astype(np.uint8)]
    picture[~known] = 160
    return picture


def bars(values: NDArray[np.floating], *, width: int = 256, height: int = 64) -> Picture:
    """A bar for each value, upwards from zero or downwards, (height, w, 3) RGB with w at most `width`.

    Where there are more values than pixels each bar is the value of largest size among its neighbours.
    """
    step = -(-len(values) // width)
    padded = np.pad(np.nan_to_num(values), (0, -len(values) % step)).reshape(-1, step)
    kept = padded[np.arange(len(padded)), np.abs(padded).argmax(1)]
    kept = kept.repeat(max(1, width // len(kept)))
    low, high = min(0.0, float(kept.min())), max(0.0, float(kept.max()))
    rows = (high - np.linspace(0, 1, height) * ((high - low) or 1.0))[:, None]
    picture = np.full((height, len(kept), 3), 255, dtype=np.uint8)
    picture[(rows > 0) & (kept >= rows)] = _UP
    picture[(rows < 0) & (kept <= rows)] = _DOWN
    return picture


def png_uri(picture: Picture) -> str:
    """A picture (H, W, 3) RGB uint8 as a data URI of a PNG."""
    _, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return "data:image/png;base64," + base64.b64encode(data.tobytes()).decode("ascii")


def figure(picture: Picture, lines: Sequence[str], *, size: tuple[int, int] | None = None) -> str:
    """A picture with lines of text below it, the first in bold.

    Args:
        picture: (H, W, 3) RGB uint8.
        lines: text, not HTML.
        size: (height, width) at which it is shown, its pixels as squares; its own size where left out.
    """
    height, width = size or picture.shape[:2]
    told = "<br>".join(f"<b>{escape(line)}</b>" if number == 0 else escape(line) for number, line in enumerate(lines))
    squares = ";image-rendering:pixelated" if size else ""
    style = f"display:block;max-width:none;width:{width}px;height:{height}px{squares}"
    # Names of classes can be long: they are wrapped, not cut. The size is a style: a notebook's rules undo others.
    return (
        f'<div style="margin:0 10px 8px 0;max-width:{max(width, 110)}px;overflow-wrap:anywhere">'
        f'<img src="{png_uri(picture)}" width="{width}" height="{height}" alt="{escape(", ".join(lines))}" '
        f'style="{style}"><div style="{_SMALL}">{told}</div></div>'
    )


def row(figures: Sequence[str], *, more: int = 0, what: str = "") -> str:
    """Figures side by side, and how many more there are."""
    rest = f'<div style="align-self:center">and {more:,} more {escape(what)}</div>' if more else ""
    return f'<div style="display:flex;flex-wrap:wrap;align-items:flex-start">{"".join(figures)}{rest}</div>'


def scale(ends: tuple[str, str], words: str, *, signed: bool = False) -> str:
    """A colour bar between what its ends are, and what it means."""
    width, height = _BAR
    strip = colours(signed=signed)[None]
    return (
        f'<div style="{_SMALL};margin-bottom:6px">{escape(ends[0])} <img src="{png_uri(strip)}" width="{width}" '
        f'height="{height}" alt="colour bar" style="display:inline;vertical-align:middle;margin:0;width:{width}px;'
        f'height:{height}px"> '
        f"{escape(ends[1])}: {escape(words)}</div>"
    )


def block(heading: str, name: str, parts: Sequence[str], facts: Mapping[str, str]) -> str:
    """A whole result: what it is, its pictures, and a table of what else is known of it.

    Args:
        heading: what it is, text.
        name: of it, text; empty where it has none.
        parts: HTML.
        facts: text.
    """
    cells = "".join(
        f'<tr><td style="text-align:left;vertical-align:top;padding:0 12px 0 0;white-space:nowrap">{escape(key)}</td>'
        f'<td style="text-align:left;padding:0;overflow-wrap:anywhere">{escape(value)}</td></tr>'
        for key, value in facts.items()
        if value
    )
    table = f'<table style="{_SMALL};border-collapse:collapse;margin:0"><tbody>{cells}</tbody></table>'
    title = f"<b>{escape(heading)}</b>" + (f" <code>{escape(name)}</code>" if name else "")
    return f'<div class="vision-attn"><div style="margin-bottom:6px">{title}</div>{"".join(parts)}{table}</div>'


def number(value: float) -> str:
    """A number in three digits."""
    return f"{value:.3g}"


def listed(options: Mapping[str, object], *, between: str = " = ", room: int = 600) -> str:
    """Options as text, cut where there are very many."""
    texts = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in options.items()}
    text = ", ".join(f"{key}{between}{value}" for key, value in texts.items())
    return text if len(text) <= room else text[: room - 1] + "…"

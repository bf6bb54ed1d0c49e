"""Letters in matplotlib's figures: drawn as they stand, measured, and cut to the room that they have."""

from functools import lru_cache

from PIL import ImageFont

from vision_attn.viz.colorbar import font_file


def plain(text: str) -> str:
    """Text that matplotlib draws as it stands: names of classes may hold dollar signs."""
    return text.replace("$", r"\$")


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """How wide a text is in letters of `size`, in matplotlib's default font; both in pixels, or both in points."""
    return _font(bold).getlength(text) * size / 100


def cut(text: str, size: float, room: float, *, bold: bool = False) -> str:
    """The text in one line, cut with an ellipsis where it is wider than `room`, in the unit of `size`."""
    text = " ".join(text.split())
    if text_width(text, size, bold=bold) <= room:
        return text
    while text and text_width(text + "…", size, bold=bold) > room:
        text = text[:-1]
    return text + "…"


@lru_cache
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_file(bold=bold), 100)

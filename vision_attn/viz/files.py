"""Pictures on disk, whole or not at all: an interrupted run leaves no half picture under its name."""

import io
import os
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vision_attn.errors import UsageError
from vision_attn.files import write_whole

PICTURE_SUFFIXES = (".png", ".jpg")
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
_JPEG_QUALITY = 92


def save_picture(path: str | os.PathLike[str], rgb: NDArray[np.uint8]) -> Path:
    """The path of a new PNG or JPEG file, by its suffix, that holds an (H, W, 3) RGB uint8 picture.

    PNG keeps every pixel. JPEG takes a fifth of the time and under a third of the room, and blurs thin lines.

    Raises:
        UsageError: the name ends in something else, or the picture is not (H, W, 3) uint8.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in PICTURE_SUFFIXES:
        raise UsageError(
            f"expected a file name that ends in {' or '.join(PICTURE_SUFFIXES)}, got {path.name!r}: rename it"
        )
    check_picture(rgb)
    quality = (cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY) if suffix == ".jpg" else ()
    _, data = cv2.imencode(suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)
    return write_whole(path, data.tobytes())


def save_png(path: str | os.PathLike[str], rgb: NDArray[np.uint8]) -> Path:
    """The path of a new PNG file that holds an (H, W, 3) RGB uint8 picture.

    Missing folders are made; a file that is there is replaced in one step.

    Raises:
        UsageError: the name does not end in .png, or the picture is not (H, W, 3) uint8.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UsageError(f"expected a file name that ends in .png, got {path.name!r}: PNG is what is written")
    return save_picture(path, rgb)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """The path of a new file, .png, .svg or .pdf by its suffix, that holds a matplotlib figure.

    The letters of an SVG are text, which can be searched, copied and set in another font. No file holds the time: the
    same figure gives the same bytes.

    Raises:
        UsageError: the name ends in something else.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FIGURE_SUFFIXES:
        raise UsageError(
            f"expected a file name that ends in {', '.join(FIGURE_SUFFIXES)}, got {path.name!r}: rename it"
        )
    times = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    data = io.BytesIO()
    # The salt makes the names of clip paths, which would be drawn at random.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vision_attn", "pdf.fonttype": 42}):
        figure.savefig(data, format=suffix[1:], dpi="figure", metadata=times[suffix])
    return write_whole(path, data.getvalue())


def check_picture(picture: object) -> None:
    """Raises UsageError where something is not an (H, W, 3) uint8 array with at least one pixel."""
    if not isinstance(picture, np.ndarray):
        raise UsageError(
            f"expected an (H, W, 3) uint8 RGB array, got {type(picture).__name__}: "
            'convert it, for example np.asarray(photo.convert("RGB"))'
        )
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        hint = "move the channels to the end" if picture.ndim == 3 and picture.shape[0] == 3 else "convert it to RGB"
        raise UsageError(f"expected an (H, W, 3) RGB picture, got shape {picture.shape}: {hint}")
    if picture.dtype != np.uint8:
        raise UsageError(f"expected uint8 values 0 to 255, got {picture.dtype}: give the photo before normalisation")

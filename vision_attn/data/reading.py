"""Photos from files, read right: upright, three colours, eight bits.

OpenCV decodes the ordinary JPEG (it is the fastest); everything unusual goes through Pillow, which reports damage. What
users trip over elsewhere and not here: EXIF orientation is applied, 16-bit files are scaled (not clipped), CMYK is
converted, transparency is laid on white (not on whatever colour hides under it), and a truncated JPEG is an error
(OpenCV alone returns it half grey).
"""

import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vision_attn.errors import UsageError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
"""File names with these endings, in any case, are taken for photos."""

SMALLEST_SIDE = 4
"""Pixels; what is smaller is no photo, but the mark of a failed download or a tracking pixel."""

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
# OpenCV's reduced flags come in grey and in BGR; the grey ones are only the factor's bit, to which RGB is added.
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
# How whole files end, by Pillow's name of the format. Only the very end counts: the thumbnail in a JPEG's EXIF has an
# end marker of its own. What cameras append (previews, depth maps, a film) puts a photo in doubt, and it is decoded.
_ENDS = {"JPEG": _JPEG_END, "MPO": _JPEG_END, "PNG": b"IEND\xaeB`\x82"}
_TAIL = 1024


def read_image(path: str | Path, *, min_size: int | None = None) -> np.ndarray:
    """Returns the photo in a file as upright RGB.

    Args:
        path: The file.
        min_size: Where given, the photo comes at 1/2, 1/4 or 1/8 of its size, as long as its short side keeps at least
            this many pixels. JPEGs are decoded at that size, which is faster; others are averaged down to it.

    Returns:
        uint8 array (H, W, 3).

    Raises:
        UsageError: there is no such file, it is no image, it is damaged, or a side has fewer than 4 pixels.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"expected a photo at {path}, got {error.strerror or error}") from error
    return decode_image(content, name=str(path), min_size=min_size)


def decode_image(content: bytes, *, name: str = "the image", min_size: int | None = None) -> np.ndarray:
    """Returns the photo encoded in `content` as upright RGB, uint8 (H, W, 3); `name` is used in errors.

    See `read_image` for `min_size` and what is raised.
    """
    if content.startswith(_JPEG_START) and content.rstrip(b"\0")[-2:] == _JPEG_END:
        flag = _jpeg_flag(content, min_size)
        if flag is not None:
            image = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
            if image is not None:
                return _checked(image, name)
    return _shrink(_checked(_decode_with_pillow(content, name), name), min_size)


def _shrink(image: np.ndarray, min_size: int | None) -> np.ndarray:
    """Returns the photo at the size at which a JPEG of it would have been decoded."""
    factor = _factor(image.shape[:2], min_size)
    if factor == 1:
        return image
    size = (-(-image.shape[1] // factor), -(-image.shape[0] // factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _factor(size: Sequence[int], min_size: int | None) -> int:
    return 1 if min_size is None else next((factor for factor in (8, 4, 2) if min(size) >= factor * min_size), 1)


def _checked(image: np.ndarray, name: str) -> np.ndarray:
    if min(image.shape[:2]) < SMALLEST_SIDE:
        raise UsageError(
            f"expected a photo of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels at {name}, got {image.shape[1]} x "
            f"{image.shape[0]}: remove or replace it"
        )
    return image


def _jpeg_flag(content: bytes, min_size: int | None) -> int | None:
    """Returns OpenCV's flag for a JPEG of one or three colours, None for those that Pillow has to read."""
    try:
        with Image.open(io.BytesIO(content)) as header:
            mode, size = header.mode, header.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if mode not in ("L", "RGB"):
        return None
    return cv2.IMREAD_COLOR_RGB | _REDUCED[_factor(size, min_size)]


def _decode_with_pillow(content: bytes, name: str) -> np.ndarray:
    if not content:
        raise UsageError(f"expected a photo at {name}, got an empty file: remove or replace it")
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata in photos that it reads perfectly well.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise UsageError(f"expected a photo at {name}, got a file that is no image: remove or replace it") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UsageError(f"expected a photo of at most {limit:,} pixels at {name}: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise UsageError(
            f"expected a whole photo at {name}, got a damaged one ({error}): remove or replace it"
        ) from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Returns a Pillow image of any mode as uint8 RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_to_eight_bits(np.asarray(image))[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _to_eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Returns grey pixels of 16 or more bits, or of floats, as uint8.

    Integers up to 65,535 are taken as 16-bit intensities, floats within [0, 1] as fractions; anything else is stretched
    between its minimum and maximum, for there is no agreed white.
    """
    if pixels.dtype == np.uint8:
        return pixels
    low, high = float(pixels.min()), float(pixels.max())
    if np.issubdtype(pixels.dtype, np.integer) and low >= 0 and high <= 65_535:
        # 65535 / 257 is 255 exactly: white stays white, and 8-bit values stored as v * 257 come back as v.
        return np.rint(pixels / 257).astype(np.uint8)
    if low >= 0 and high <= 1:
        return np.rint(pixels * 255).astype(np.uint8)
    return np.rint((pixels - low) / max(high - low, float(np.finfo(np.float32).tiny)) * 255).astype(np.uint8)


def find_damage(path: str | Path, *, decode: bool = False) -> str | None:
    """Returns what is wrong with a photo file, in one line, or None.

    Without `decode` only the frame is checked, which takes about a tenth of a millisecond: the header can be read, the
    image has pixels, and a JPEG or PNG ends in its end marker (a truncated file does not). A file whose frame is in
    doubt is decoded, so that a good one is never accused.
    """
    path = Path(path)
    try:
        if not decode:
            with path.open("rb") as file:
                if _has_frame(file):
                    return None
        read_image(path)
    except UsageError as error:
        return str(error)
    except OSError as error:
        return f"expected a photo at {path}, got {error.strerror or error}"
    return None


def find_damage_in(content: bytes, *, name: str, decode: bool = False) -> str | None:
    """Returns what is wrong with the photo encoded in `content`, or None; see `find_damage`."""
    try:
        if decode or not _has_frame(io.BytesIO(content)):
            decode_image(content, name=name)
    except UsageError as error:
        return str(error)
    return None


def _has_frame(file: BinaryIO) -> bool:
    """Returns whether an image's header and its end marker are there; False means in doubt."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as header:
                kind, size = header.format, header.size
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError, OSError):
        return False
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - _TAIL))
    tail = file.read()
    return kind in _ENDS and tail.rstrip(b"\0").endswith(_ENDS[kind]) and min(size) >= SMALLEST_SIDE


def is_image_name(path: Path) -> bool:
    """Returns whether the file's name is that of a photo; hidden files (such as macOS's `._*.jpg`) are none."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Returns the photos that files and folders (searched to any depth) name, each once, in the order given.

    Raises:
        UsageError: a path does not exist, or nothing was found.
    """
    found: dict[Path, None] = {}
    asked = [Path(path) for path in paths]
    for path in asked:
        if path.is_dir():
            found.update(dict.fromkeys(sorted(p for p in path.rglob("*") if is_image_name(p) and p.is_file())))
        elif path.is_file():
            found[path] = None
        else:
            raise UsageError(
                f"expected a photo or a folder of photos, got {path}, which does not exist: check the path"
            )
    if not found:
        names = ", ".join(str(path) for path in asked) or "no path"
        raise UsageError(
            f"expected at least one photo ({', '.join(sorted(IMAGE_SUFFIXES))}), got none in {names}: check the path"
        )
    return list(found)

"""Shapes on clutter: the embedded data set, whose true evidence is known to the pixel.

Nothing needs to be downloaded to try the trainer, and an explanation can be judged, because the picture comes with the
mask of the one thing that decides its class. A scene is built in layers, each from a random stream of its own:

    background    clouds of colour, a texture, distractors       stream "background"
    object        one outline, filled                            stream "object": place, size, rotation, colours
    foreground    a few thin strokes, which may cross the object stream "foreground"
    camera        noise                                          stream "camera"

The label chooses the outline and nothing else: no stream knows it, and every outline has the same circumscribed circle,
so image `i` drawn with another label has the same background, the same place, size and colours, the same strokes. A
stream is `SeedSequence(seed, spawn_key=(split, index, layer))`: image `i` is the same whichever images were drawn
before it, and the splits share no stream.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence

from vision_attn.errors import UsageError
from vision_attn.files import new_folder

SHAPES = ("circle", "crescent", "cross", "heart", "ring", "square", "star", "triangle")
"""The classes, in the order of their labels (alphabetical, as an image folder has them)."""

SPLITS = ("train", "val", "test")
"""The splits: streams that share no image."""

SMALLEST_SIDE = 16

_LAYERS = ("background", "object", "foreground", "camera")
# The last draws what is planted: a tag's class, the second of two objects (`vision_attn.data.planted`).
_STREAMS = (*_LAYERS, "planted")
# Outlines are filled at this many times the resolution, then averaged: exact coverage to 1/64, the same on any machine.
_SUPERSAMPLING = 8
# OpenCV's fixed-point coordinates: four binary digits. They round away what libm and SIMD may differ in.
_SHIFT = 4
_ANGLES = 2 * math.pi * np.arange(32) / 32
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


@dataclass(frozen=True)
class ShapeImage:
    """A picture with its answer.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        mask: (H, W) bool, the pixels where the object is seen: half covered by it or more, and not by a stroke.
        label: index into `SHAPES`.
    """

    image: np.ndarray
    mask: np.ndarray
    label: int


@dataclass(frozen=True)
class _Pose:
    """Where an object stands. Pixel-edge coordinates: the picture's top-left corner is (0, 0)."""

    x: float
    y: float
    radius: float
    rotation: float


def draw(
    index: int,
    *,
    seed: int = 0,
    split: str = "train",
    size: int | tuple[int, int] = 64,
    label: int | None = None,
) -> ShapeImage:
    """Image `index` of a seed and split, with its mask.

    Args:
        index: which image, from 0.
        seed: which data set, from 0.
        split: "train", "val" or "test". They share no random stream.
        size: side, or (height, width), in pixels; at least 16.
        label: the outline to draw, an index into `SHAPES`. Default: `index % len(SHAPES)`, which balances any run
            of indices. The rest of the picture does not depend on it.

    Raises:
        UsageError: a negative index or seed, an unknown split or label, a size below 16 pixels.

    Example:
        >>> picture = draw(5, seed=0, size=(48, 64))
        >>> picture.image.shape, picture.mask.shape, SHAPES[picture.label]
        ((48, 64, 3), (48, 64), 'square')
    """
    label = index % len(SHAPES) if label is None else label
    picture, (mask,) = compose(index, (label,), seed=seed, split=split, size=size)
    return ShapeImage(picture, mask, label)


def compose(
    index: int,
    labels: Sequence[int],
    *,
    seed: int = 0,
    split: str = "train",
    size: int | tuple[int, int] = 64,
    keep_free: tuple[slice, slice] | None = None,
    overlay: Callable[[np.ndarray], None] | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The picture of one object or two, (H, W, 3) uint8, with the mask of each, (H, W) bool.

    It is what `draw` draws, with room for evidence that is planted: see `vision_attn.data.planted`.

    Args:
        index: which image, from 0.
        labels: the outline of one object, or of two, which stand apart and are smaller (a radius of 0.20 to 0.24 of
            the short side, where one alone has 0.21 to 0.34).
        seed: which data set, from 0.
        split: "train", "val" or "test".
        size: side, or (height, width), in pixels; at least 16.
        keep_free: rows and columns at one corner, where no object may reach: one that would is moved to the point
            opposite, through the picture's centre.
        overlay: what paints over all, in place, before the camera's noise.

    Raises:
        UsageError: as `draw`.
    """
    height, width = check_size(size)
    check_count("an index", index)
    check_count("a seed", seed)
    check_split(split)
    for label in labels:
        if not 0 <= label < len(SHAPES):
            raise UsageError(f"expected a label from 0 to {len(SHAPES) - 1}, got {label}: choose an index into SHAPES")

    background, placing, foreground, camera = (stream(index, seed, split, layer) for layer in _LAYERS)
    picture = _background(background, height, width)
    poses = _apart(placing, height, width) if len(labels) == 2 else [_random_pose(placing, height, width)]
    if keep_free is not None:
        poses = [_out_of(keep_free, pose, height, width) for pose in poses]
    masks = [_paint_object(picture, label, pose, placing) for label, pose in zip(labels, poses, strict=True)]
    hidden = _paint_foreground(picture, foreground)
    if overlay is not None:
        overlay(picture)
    _add_noise(picture, camera)
    return picture, [mask & ~hidden for mask in masks]


def stream(index: int, seed: int, split: str, layer: str) -> Generator:
    """The random stream of one layer of one image."""
    return Generator(PCG64(SeedSequence(seed, spawn_key=(SPLITS.index(split), index, _STREAMS.index(layer)))))


class ShapesDataset(torch.utils.data.Dataset):
    """The images of one split as (uint8 (H, W, 3) RGB array, label), drawn when asked for.

    Args:
        length: number of images.
        split: "train", "val" or "test".
        size: side, or (height, width), in pixels.
        seed: which data set.
        preload: draw all images now and keep them (12 KiB each at 64 px, and 4 KiB for the mask). Drawing costs about
            a millisecond, so training for many epochs wants it.

    Attributes:
        classes: the class names.
        targets: the label of each image.

    Raises:
        UsageError: as `draw`.

    Example:
        >>> dataset = ShapesDataset(8)
        >>> image, label = dataset[3]
        >>> image.shape, dataset.classes[label], dataset.mask(3).shape
        ((64, 64, 3), 'heart', (64, 64))
    """

    def __init__(
        self,
        length: int,
        *,
        split: str = "train",
        size: int | tuple[int, int] = 64,
        seed: int = 0,
        preload: bool = False,
    ) -> None:
        check_count("a number of images", length)
        draw(0, seed=seed, split=split, size=size)  # wrong options are told here, not in a worker process
        self.classes = list(SHAPES)
        self.targets = [index % len(SHAPES) for index in range(length)]
        self.split, self.size, self.seed = split, check_size(size), seed
        self._images = self._masks = None
        if preload:
            images = np.empty((length, *self.size, 3), np.uint8)
            masks = np.empty((length, *self.size), bool)
            for index in range(length):
                drawn = self._draw(index)
                images[index], masks[index] = drawn.image, drawn.mask
            self._images, self._masks = images, masks

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        index = self._check_index(index)
        image = self._draw(index).image if self._images is None else self._images[index].copy()
        return image, self.targets[index]

    def mask(self, index: int) -> np.ndarray:
        """(H, W) bool, the object's visible pixels."""
        index = self._check_index(index)
        return self._draw(index).mask if self._masks is None else self._masks[index].copy()

    def _draw(self, index: int) -> ShapeImage:
        return draw(index, seed=self.seed, split=self.split, size=self.size)

    def _check_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")  # the protocol of sequences: it ends a for loop
        return index % len(self)


def write_image_folder(
    path: str | os.PathLike[str],
    *,
    train: int,
    val: int,
    test: int = 0,
    size: int | tuple[int, int] = 64,
    seed: int = 0,
) -> Path:
    """The path of a new folder with `<split>/<class>/<index>.png` and `masks/<split>/<class>/<index>.png`.

    Masks are grey PNGs, 255 on the object and 0 elsewhere. A split of 0 images has no folder. The folder appears whole
    or not at all.

    Args:
        path: the folder to make; its parents are made as needed.
        train: number of training images.
        val: number of validation images.
        test: number of test images.
        size: side, or (height, width), in pixels.
        seed: which data set.

    Raises:
        UsageError: the folder exists, no image is asked for, a split is too small to show each class, or as `draw`.
    """
    path = Path(path)
    lengths = check_lengths(train=train, val=val, test=test)
    if os.path.lexists(path):
        raise UsageError(f"expected a new folder, got {path}, which exists: name another or remove it")

    with new_folder(path) as unfinished:
        for split, length in lengths.items():
            _write_split(unfinished, ShapesDataset(length, split=split, size=size, seed=seed))
    return path


def check_lengths(**lengths: int) -> dict[str, int]:
    """The number of images of each split, if a folder can be written of them."""
    for split, length in lengths.items():
        check_count(f"a number of {split} images", length)
        if 0 < length < len(SHAPES):
            raise UsageError(f"expected at least {len(SHAPES)} {split} images, one a class, got {length}: ask for more")
    if not any(lengths.values()):
        raise UsageError("expected at least one image to write, got none: ask for some train, val or test images")
    return lengths


def _write_split(root: Path, dataset: ShapesDataset) -> None:
    for index, label in enumerate(dataset.targets):
        drawn = dataset._draw(index)
        name = Path(dataset.split, dataset.classes[label], f"{index:06d}.png")
        write_png(root / name, cv2.cvtColor(drawn.image, cv2.COLOR_RGB2BGR))
        write_png(root / "masks" / name, drawn.mask.astype(np.uint8) * 255)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes grey values or BGR, and makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not cv2.imwrite, which answers a full disk with False.
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


def check_split(split: str) -> None:
    """Refuses what is not in `SPLITS`."""
    if split not in SPLITS:
        raise UsageError(f"expected a split among {', '.join(SPLITS)}, got {split!r}: choose one of these")


def check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a side or of (height, width)."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise UsageError(f"expected a side or (height, width) in pixels, got {size!r}: give one or two numbers")
    height, width = sides
    if min(height, width) < SMALLEST_SIDE:
        raise UsageError(f"expected sides of at least {SMALLEST_SIDE} pixels, got {height} x {width}: ask for larger")
    return height, width


def check_count(what: str, number: int) -> None:
    """Refuses a number below 0."""
    if number < 0:
        raise UsageError(f"expected {what} from 0, got {number}: give a number that is not negative")


# Outlines: closed contours of (x, y) inside the unit circle, which they touch. Even-odd filling makes a ring's hole.


def _polar(radii: list[float], *, start: float = -math.pi / 2) -> np.ndarray:
    """(len(radii), 2) points at equal steps of angle."""
    angles = start + 2 * math.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.asarray(radii)[:, None]


def _crescent() -> np.ndarray:
    """The unit disc less a disc of radius 0.8 whose centre is 0.5 to the right."""
    distance, radius = 0.5, 0.8
    x = (1 - radius**2 + distance**2) / (2 * distance)
    y = math.sqrt(1 - x**2)
    outer = np.linspace(math.atan2(y, x), 2 * math.pi - math.atan2(y, x), 64)
    inner = np.linspace(math.atan2(-y, x - distance) + 2 * math.pi, math.atan2(y, x - distance), 64)
    arcs = [
        np.stack([np.cos(outer), np.sin(outer)], axis=1),
        np.stack([distance + radius * np.cos(inner), radius * np.sin(inner)], axis=1),
    ]
    return np.concatenate(arcs)


def _heart() -> np.ndarray:
    """The usual heart curve, x = 16 sin^3 t, moved and scaled into the unit circle."""
    t = 2 * math.pi * np.arange(96) / 96
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    points = np.stack([16 * np.sin(t) ** 3, -y], axis=1)
    (x, y), radius = cv2.minEnclosingCircle(points.astype(np.float32))
    return (points - (x, y)) / radius


@cache
def _outlines() -> dict[str, list[np.ndarray]]:
    arm = 0.36  # half the width of the cross's bar, over half its length
    cross = np.array([(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)])
    disc = _polar([1.0] * 96)
    return {
        "circle": [disc],
        "crescent": [_crescent()],
        "cross": [np.concatenate([cross, -cross]) / math.hypot(1, arm)],
        "heart": [_heart()],
        "ring": [disc, 0.55 * disc],
        "square": [_polar([1.0] * 4)],
        "star": [_polar([1.0, 0.42] * 5)],
        "triangle": [_polar([1.0] * 3)],
    }


# The object


def _random_pose(rng: Generator, height: int, width: int) -> _Pose:
    """A place anywhere in the picture, the object whole; off the centre more often than a uniform draw has it."""
    radius = min(height, width) * rng.uniform(0.21, 0.34)
    # An arc-sine distribution on the free interval: the edges are as likely as in photos that nobody composed.
    x, y = (0.5 - 0.5 * math.cos(math.pi * turn) for turn in rng.random(2))
    rotation = rng.uniform(0, 2 * math.pi)
    return _Pose(radius + x * (width - 2 * radius), radius + y * (height - 2 * radius), radius, rotation)


def _apart(rng: Generator, height: int, width: int) -> list[_Pose]:
    """Two places: the squares around the two circles, in which colours are chosen, share no pixel."""
    short = min(height, width)
    while True:
        # Radii too are drawn anew: two of the largest may not find room in a picture of 16 pixels.
        radii = short * rng.uniform(0.20, 0.24, 2)
        turns = rng.random((2, 2))
        xs, ys = (
            radii + (0.5 - 0.5 * np.cos(math.pi * turn)) * (side - 2 * radii)
            for turn, side in zip(turns, (width, height), strict=True)
        )
        rotations = rng.uniform(0, 2 * math.pi, 2)
        if max(abs(xs[0] - xs[1]), abs(ys[0] - ys[1])) >= radii.sum() + 1:
            return [_Pose(*map(float, pose)) for pose in zip(xs, ys, radii, rotations, strict=True)]


def _out_of(part: tuple[slice, slice], pose: _Pose, height: int, width: int) -> _Pose:
    """The pose, or where its circle reaches into a part of the picture, the one opposite."""
    rows, columns = part
    down = pose.y - min(max(pose.y, rows.start), rows.stop)
    across = pose.x - min(max(pose.x, columns.start), columns.stop)
    # One more pixel: the rim is blended.
    if math.hypot(across, down) >= pose.radius + 1:
        return pose
    return replace(pose, x=width - pose.x, y=height - pose.y)


def _paint_object(picture: np.ndarray, label: int, pose: _Pose, rng: Generator) -> np.ndarray:
    """Draws one object into the picture; (H, W) bool, the pixels that it covers by half or more."""
    height, width = picture.shape[:2]
    left, top = max(0, math.floor(pose.x - pose.radius)), max(0, math.floor(pose.y - pose.radius))
    right, bottom = min(width, math.ceil(pose.x + pose.radius)), min(height, math.ceil(pose.y + pose.radius))
    # Colours are chosen within the square around the circumscribed circle, so that the label stays out of them.
    part = np.s_[top:bottom, left:right]
    color = _contrasting_color(rng, picture[part])
    coverage = _coverage(label, pose, part)
    _blend(picture[part], coverage, _fill(rng, color, *coverage.shape))
    mask = np.zeros((height, width), bool)
    mask[part] = coverage >= 128
    return mask


def _coverage(label: int, pose: _Pose, part: tuple[slice, slice]) -> np.ndarray:
    """uint8, the share of each pixel of a part of the picture that lies inside the outline, 0 to 255."""
    rows, columns = part
    height, width = rows.stop - rows.start, columns.stop - columns.start
    cosine, sine = math.cos(pose.rotation), math.sin(pose.rotation)
    turn = pose.radius * np.array([[cosine, sine], [-sine, cosine]])
    center = np.array([pose.x - columns.start, pose.y - rows.start])
    fine = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    # OpenCV counts from the centre of the first pixel, poses from its edge.
    contours = [_fixed((outline @ turn + center) * _SUPERSAMPLING - 0.5) for outline in _outlines()[SHAPES[label]]]
    cv2.fillPoly(fine, contours, 255, shift=_SHIFT)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)


def _contrasting_color(rng: Generator, surrounding: np.ndarray) -> np.ndarray:
    """(3,), of sixteen random colours the one whose distance to the surrounding is nearest to a random contrast."""
    mean, deviation = cv2.meanStdDev(surrounding)
    # A restless surrounding hides what a calm one shows.
    wanted = rng.uniform(80, 190) + deviation.mean()
    candidates = rng.random((16, 3)) * 256
    distance = np.sqrt(((candidates - mean.ravel()) ** 2).sum(axis=1))
    return candidates[np.abs(distance - wanted).argmin()]


def _fill(rng: Generator, color: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3), 0 to 255, the object's paint: its colour with a slope and a grain."""
    down, across = rng.uniform(-30, 30, 2)
    shade = np.add.outer(_ramp(height) * down, _ramp(width) * across)
    shade += _texture(rng, height, width) * rng.uniform(0, 14)
    return np.clip(color + shade[:, :, None], 0, 255)


def _blend(picture: np.ndarray, coverage: np.ndarray, paint: np.ndarray) -> None:
    """Lays paint ((3,) or (H, W, 3), 0 to 255) over the picture where the coverage (0 to 255) says, in place."""
    x, y, width, height = cv2.boundingRect(coverage)
    part = np.s_[y : y + height, x : x + width]
    alpha = coverage[part].astype(np.float32)[:, :, None] * np.float32(1 / 255)
    below = picture[part].astype(np.float32)
    mixed = (paint[part] if paint.ndim == 3 else paint).astype(np.float32) - below
    mixed *= alpha
    mixed += below
    mixed += np.float32(0.5)
    picture[part] = mixed  # between the two: nothing to clip, and the cast rounds down


# What carries no class


def _background(rng: Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: clouds of colour under a texture, strewn with distractors."""
    rows, columns = rng.integers(2, 6, 2)
    base, reach = rng.uniform(50, 206) + rng.uniform(-25, 25, 3), rng.uniform(10, 40)
    clouds = _enlarge(base + (rng.random((rows, columns, 3)) * 2 - 1) * reach, height, width)
    tint = (rng.uniform(0.5, 1, 3) * rng.uniform(4, 20)).astype(np.float32)
    clouds += _texture(rng, height, width)[:, :, None] * tint
    np.rint(clouds, out=clouds)
    picture = np.clip(clouds, 0, 255, out=clouds).astype(np.uint8)
    for kind in rng.integers(len(_DISTRACTORS), size=rng.integers(2, 7)):
        _DISTRACTORS[kind](picture, rng)
    return picture


def _texture(rng: Generator, height: int, width: int) -> np.ndarray:
    """(H, W) float32, -1 to 1: a grating, a weave of two gratings, or noise of some grain size."""
    kind = rng.integers(3)
    if kind == 0:
        return _grating(rng, height, width)
    if kind == 1:
        return _grating(rng, height, width) * _grating(rng, height, width)
    grain = min(height, width) * rng.uniform(1 / 64, 1 / 8)
    cells = max(2, round(height / grain)), max(2, round(width / grain))
    return _enlarge(rng.random(cells) * 2 - 1, height, width)


def _grating(rng: Generator, height: int, width: int) -> np.ndarray:
    """(H, W) float32, -1 to 1: plane waves of any direction, 2 to 12 in the short side."""
    wave = 2 * math.pi * rng.uniform(2, 12) / min(height, width)
    turn, phase = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
    down = np.arange(height) * (wave * math.sin(turn)) + phase
    across = np.arange(width) * (wave * math.cos(turn))
    # sin(a + b) from vectors: no sine of a whole picture.
    waves = np.multiply.outer(np.sin(down), np.cos(across)) + np.multiply.outer(np.cos(down), np.sin(across))
    return waves.astype(np.float32)


def _segment(picture: np.ndarray, rng: Generator) -> None:
    """A straight stroke."""
    _stroke(picture, rng, _points(rng, picture, 2, spread=0.6))


def _scribble(picture: np.ndarray, rng: Generator) -> None:
    """A stroke with corners."""
    _stroke(picture, rng, _points(rng, picture, int(rng.integers(3, 7)), spread=0.35))


def _arc(picture: np.ndarray, rng: Generator) -> None:
    """Part of an ellipse's outline."""
    short = min(picture.shape[:2])
    center, (a, b) = _points(rng, picture, 1), rng.uniform(0.08, 0.35, 2)
    angles = rng.uniform(0, 2 * math.pi) + rng.uniform(0.5, 2.2) * _ramp(24)
    turn = rng.uniform(0, math.pi)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    points = np.stack([a * short * np.cos(angles), b * short * np.sin(angles)], axis=1)
    _stroke(picture, rng, points @ rotation + center)


def _blob(picture: np.ndarray, rng: Generator) -> None:
    """A filled, lumpy, closed curve."""
    center, (a, b) = _points(rng, picture, 1), rng.uniform(0.5, 1, 2)
    radii = np.full(len(_CIRCLE), 1.0)
    for wave, strength, phase in zip((2, 3, 5), rng.uniform(0.1, 0.4, 3), rng.uniform(0, 2 * math.pi, 3), strict=True):
        radii += strength / wave * np.cos(wave * _ANGLES + phase)
    radii *= min(picture.shape[:2]) * rng.uniform(0.04, 0.14)
    points = _CIRCLE * radii[:, None] * (a, b) + center
    cv2.fillPoly(picture, [_fixed(points)], _color(rng), cv2.LINE_AA, _SHIFT)


def _noise_patch(picture: np.ndarray, rng: Generator) -> None:
    """A cloud of coarse noise that fades out."""
    height, width = picture.shape[:2]
    ((x, y),) = _points(rng, picture, 1)
    spread_x, spread_y = min(height, width) * rng.uniform(0.06, 0.16, 2)
    down = np.exp(-0.5 * ((np.arange(height) - y) / spread_y) ** 2) * 255
    across = np.exp(-0.5 * ((np.arange(width) - x) / spread_x) ** 2) * rng.uniform(0.5, 1)
    coverage = np.multiply.outer(down, across).astype(np.uint8)
    noise = rng.integers(0, 256, (max(2, height // 4), max(2, width // 4), 3), np.uint8)
    _blend(picture, coverage, cv2.resize(noise, (width, height), interpolation=cv2.INTER_NEAREST))


def _band(picture: np.ndarray, rng: Generator) -> None:
    """A see-through band from one side of the picture to the other, as a shadow or a beam of light."""
    height, width = picture.shape[:2]
    ((x, y),) = _points(rng, picture, 1)
    turn, thickness = rng.uniform(0, math.pi), min(height, width) * rng.uniform(0.05, 0.2)
    depth = np.add.outer(
        (np.arange(height) - y) * (math.sin(turn) / thickness), (np.arange(width) - x) * (math.cos(turn) / thickness)
    )
    inside = (depth > 0) & (depth < 1)
    coverage = (depth * inside * (255 * rng.uniform(0.2, 0.6))).astype(np.uint8)
    _blend(picture, coverage, np.array(_color(rng)))


_DISTRACTORS: tuple[Callable[[np.ndarray, Generator], None], ...] = (
    _segment,
    _scribble,
    _arc,
    _blob,
    _noise_patch,
    _band,
)


def _paint_foreground(picture: np.ndarray, rng: Generator) -> np.ndarray:
    """Draws up to two thin strokes over the picture; (H, W) bool, the pixels that they cover by half or more."""
    height, width = picture.shape[:2]
    hidden = np.zeros((height, width), bool)
    for _ in range(rng.integers(0, 2)):
        points = _points(rng, picture, int(rng.integers(2, 5)), spread=0.5)
        coverage = np.zeros((height, width), np.uint8)
        thickness = max(1, round(min(height, width) / 64 * rng.uniform(0.5, 1.5)))
        cv2.polylines(coverage, [_fixed(points)], False, 255, thickness, cv2.LINE_AA, _SHIFT)
        _blend(picture, coverage, np.array(_color(rng)))
        hidden |= coverage >= 128
    return hidden


def _add_noise(picture: np.ndarray, rng: Generator) -> None:
    """Adds the camera's noise: triangular, up to 5 to 15 levels either way."""
    # One random byte gives two dice of sixteen; their difference is triangular.
    first, second = np.divmod(np.arange(256), 16)
    levels = np.rint((first - second) * rng.uniform(1 / 3, 1)).astype(np.int16)
    noise = levels.take(np.frombuffer(rng.bytes(picture.size), np.uint8)).reshape(picture.shape)
    cv2.add(picture, noise, dst=picture, dtype=cv2.CV_8U)


# Drawing


def _points(rng: Generator, picture: np.ndarray, number: int, *, spread: float = 0.0) -> np.ndarray:
    """(number, 2) points (x, y): one anywhere, the others near it; `spread` is a share of the short side."""
    height, width = picture.shape[:2]
    points = rng.random((number, 2))
    points *= 2 * spread * min(height, width)
    x, y = rng.random(2).tolist()
    points += (x * width, y * height) - points[0]
    return points


def _stroke(picture: np.ndarray, rng: Generator, points: np.ndarray) -> None:
    thickness = max(1, round(min(picture.shape[:2]) / 64 * rng.uniform(0.5, 2)))
    cv2.polylines(picture, [_fixed(points)], False, _color(rng), thickness, cv2.LINE_AA, _SHIFT)


def _color(rng: Generator) -> tuple[int, ...]:
    """A muted colour, halfway to some grey: what strews the background is mostly, not always, duller than objects."""
    gray = 128 * rng.random()
    return tuple(int(128 * level + gray) for level in rng.random(3).tolist())


def _fixed(points: np.ndarray) -> np.ndarray:
    return np.rint(points * (1 << _SHIFT)).astype(np.int32)


def _ramp(length: int) -> np.ndarray:
    """(length,), -1 to 1."""
    return np.arange(length) * (2 / max(length - 1, 1)) - 1


def _enlarge(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """(rows, columns, ...) values on (height, width) pixels, float32: value noise, smooth between the given points."""
    # Not cv2.resize: its float arithmetic differs with the processor's vector instructions.
    values = values.astype(np.float32)
    for axis, length in ((1, width), (0, height)):
        place = np.arange(length) * ((values.shape[axis] - 1) / (length - 1))
        before = np.minimum(place.astype(np.intp), values.shape[axis] - 2)
        step = place - before
        weight = (step * step * (3 - 2 * step)).astype(np.float32)
        low, high = values.take(before, axis), values.take(before + 1, axis)
        high -= low
        high *= weight.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        low += high
        values = low
    return values

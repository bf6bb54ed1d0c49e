"""Albumentations pipelines written in YAML, and the preprocessing that an artefact carries.

A pipeline is a list of transforms, each a name or a name with its options:

    - RandomResizedCrop: {size: [224, 224], scale: [0.25, 1.0], interpolation: area}
    - HorizontalFlip
    - RandAugment: {num_ops: 2, magnitude: 9}

torchvision's policies stand in it under their own names and draw from the pipeline's seed, as all else does.

Pixels stay uint8 here; they become normalised floats in one step on the device (`Preprocessing.normalize`). What a
pipeline did to a photo's geometry is found by sending the photo's corners through it as key points, so that it is
known for any pipeline of resizes, crops, pads and flips, declared by anyone.
"""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

# Albumentations asks the network for its newest version while it is imported, unless told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A

from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.registry import unknown

TransformSpec = str | Mapping[str, Mapping[str, Any] | None]
"""One transform of a pipeline: its name, or `{name: options}`."""

INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}
RESIZE_MODES = ("crop", "pad", "squash")

POLICIES: dict[str, type[v2.Transform]] = {
    "RandAugment": v2.RandAugment,
    "TrivialAugmentWide": v2.TrivialAugmentWide,
    "AutoAugment": v2.AutoAugment,
    "AugMix": v2.AugMix,
}
"""torchvision's policies of augmentation, in whose names and options they are written."""

ERASING = "RandomErasing"
"""torchvision's name and options (p, scale, ratio, value) of what Albumentations calls Erasing."""


class Policy(A.ImageOnlyTransform):
    """A transform of torchvision, drawing from Albumentations' generator.

    It works on Pillow's images, as the papers' and timm's do: RandAugment on uint8 tensors takes five times as long.
    """

    def __init__(self, transform: v2.Transform, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.transform = transform

    def get_params(self) -> dict[str, Any]:
        """Returns the seed of one photo's draw."""
        return {"seed": int(self.random_generator.integers(2**63))}

    def apply(self, img: np.ndarray, seed: int, **params: Any) -> np.ndarray:
        """Returns the image transformed; torch's random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed GPUs, too.
            torch.default_generator.manual_seed(seed)
            return np.array(self.transform(Image.fromarray(img)))


def image_hw(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) from one number (a square) or two.

    Raises:
        UsageError: it is neither, or a side is below 1.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
        raise UsageError(f"expected an image size such as 224 or [height, width], got {image_size!r}")
    return size[0], size[1]


def train_transforms(image_size: int | Sequence[int], *, min_scale: float = 0.25) -> list[TransformSpec]:
    """Returns the pipeline for training where none is declared: a random crop, a flip, a little colour."""
    return [
        # Bilinear is enough: photos are read at less than three times the image size, and averaging areas takes as long
        # as a third of the decoding.
        {"RandomResizedCrop": {"size": list(image_hw(image_size)), "scale": [min_scale, 1.0]}},
        "HorizontalFlip",
        {"ColorJitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02, "p": 0.5}},
    ]


def eval_transforms(
    image_size: int | Sequence[int],
    *,
    resize_mode: str = "crop",
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
) -> list[TransformSpec]:
    """Returns the pipeline for evaluation where none is declared.

    Args:
        image_size: What the model takes, in pixels, one number or (height, width).
        resize_mode: "crop" resizes until the photo covers the image size divided by `crop_pct` and takes the centre;
            "pad" resizes until the photo fits and pads with black; "squash" resizes without regard to the aspect ratio.
        crop_pct: The share of the resized photo's side that the centre crop keeps, in (0, 1].
        interpolation: For enlarging. Reducing always averages areas, for OpenCV's other interpolations alias there.
    """
    if resize_mode not in RESIZE_MODES:
        raise unknown("resize mode", resize_mode, RESIZE_MODES)
    if not 0 < crop_pct <= 1:
        raise UsageError(f"expected crop_pct within (0, 1], got {crop_pct}: 0.875 is usual")
    height, width = image_hw(image_size)
    options = {"interpolation": interpolation, "area_for_downscale": "image"}
    if resize_mode == "squash":
        return [{"Resize": {"height": height, "width": width, **options}}]
    if resize_mode == "pad":
        return [
            {"LongestMaxSize": {"max_size_hw": [height, width], **options}},
            {"PadIfNeeded": {"min_height": height, "min_width": width}},
        ]
    cover = [round(height / crop_pct), round(width / crop_pct)]
    return [
        {"SmallestMaxSize": {"max_size_hw": cover, **options}},
        {"CenterCrop": {"height": height, "width": width}},
    ]


def build_pipeline(transforms: Sequence[TransformSpec], *, seed: int | None = None) -> A.Compose:
    """Returns the Albumentations pipeline that a list of transforms describes; `POLICIES` can be among them.

    Raises:
        UsageError: a transform is unknown (close names are offered), or does not take its options.
    """
    known = {
        name for name in dir(A) if isinstance(thing := getattr(A, name), type) and issubclass(thing, A.BasicTransform)
    }
    built = [_build_transform(spec, known) for spec in transforms]
    with warnings.catch_warnings():
        # Where no transform moves anything.
        warnings.filterwarnings("ignore", "Got processor for keypoints, but no transform")
        return A.Compose(built, keypoint_params=A.KeypointParams(format="xy", remove_invisible=False), seed=seed)


def spec_options(spec: TransformSpec) -> tuple[str, dict[str, Any]]:
    """Returns the name and the options of one transform as it is written in YAML."""
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        name, options = next(iter(spec.items()))
        if options is None or isinstance(options, Mapping):
            return str(name), dict(options or {})
    raise UsageError(f"expected a transform as Name or {{Name: {{option: value}}}}, got {spec!r}")


def _build_transform(spec: TransformSpec, known: set[str]) -> A.BasicTransform:
    written, given = spec_options(spec)
    name, options = written, dict(given)
    if name in POLICIES:
        return _build_policy(name, options)
    if name == ERASING:
        # Noise where nothing is said (what Zhong et al. 2020 found best, and DeiT uses), not torchvision's 0: that is
        # the mean colour after normalisation only.
        name, options = "Erasing", {"fill": options.pop("value", "random"), **options}
    if name not in known:
        raise unknown("transform", name, known | {*POLICIES, ERASING})
    for key in ("interpolation", "mask_interpolation"):
        if isinstance(options.get(key), str):
            if options[key] not in INTERPOLATIONS:
                raise unknown("interpolation", options[key], INTERPOLATIONS)
            options[key] = INTERPOLATIONS[options[key]]
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        # Without `strict`, Albumentations only warns of an option that it does not know, and goes on without it.
        return getattr(A, name)(**options, strict=True)
    except (TypeError, ValueError) as error:
        raise _wrong_options(written, given, error) from error


def _wrong_options(name: str, options: Mapping[str, Any], error: Exception) -> UsageError:
    # Pydantic's errors run over several lines and end in a link; the reason stands before "[type=".
    reason = re.sub(r"\s+", " ", str(error)).split(" [type=")[0].strip()
    return UsageError(f"expected options that {name} takes, got {options}: {reason}")


def _build_policy(name: str, options: dict[str, Any]) -> Policy:
    given, share = dict(options), options.pop("p", 1.0)
    try:
        if not 0 <= share <= 1:
            raise ValueError("p is within [0, 1]")
        if "interpolation" in options:
            options["interpolation"] = v2.InterpolationMode(options["interpolation"])
        if "policy" in options:
            options["policy"] = v2.AutoAugmentPolicy(options["policy"])
        policy = POLICIES[name](**options)
        # torchvision finds these wrong only in the midst of an epoch, if at all.
        bins = getattr(policy, "num_magnitude_bins", 31)
        limits = {"num_magnitude_bins": (2, 1000), "num_ops": (1, 100), "magnitude": (0, bins - 1)}
        for option, (low, high) in limits.items():
            value = getattr(policy, option, low)
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{option} is a whole number from {low} to {high}")
    except (TypeError, ValueError) as error:
        raise _wrong_options(name, given, error) from error
    return Policy(policy, p=share)


def check_is_fixed(transforms: Sequence[TransformSpec]) -> None:
    """Refuses random policies in a pipeline for evaluation, of which the artefact would not know what they did."""
    for spec in transforms:
        name, _ = spec_options(spec)
        if name in POLICIES or name in (ERASING, "Erasing"):
            raise UsageError(
                f"expected data.eval_transforms that do the same to a photo each time, got {name}: leave it to "
                "data.train_transforms"
            )


def find_geometry(pipeline: A.Compose, image: np.ndarray) -> tuple[np.ndarray, Geometry]:
    """Returns what a pipeline makes of a photo, and where it put it.

    Exact for resizes, crops and pads. Albumentations mirrors key points about the centres of pixels and scales them
    about their edges, so a flip or a quarter turn in an evaluation pipeline is off by up to a pixel.

    Args:
        pipeline: From `build_pipeline`; its spatial transforms must be affine (resize, crop, pad, flip, quarter turns).
        image: uint8 (H, W, 3).

    Returns:
        The model's input, uint8 (h, w, 3), and the geometry between the two.
    """
    height, width = image.shape[:2]
    corners = np.array([(0, 0), (width, 0), (0, height), (width, height)], np.float32)
    out = pipeline(image=image, keypoints=corners)
    points = [(float(x), float(y)) for x, y in np.asarray(out["keypoints"])[:, :2]]
    return out["image"], Geometry.from_corners((height, width), out["image"].shape[:2], points)


@dataclass(frozen=True)
class Preprocessing:
    """All that happens to a photo between its file and the model.

    Attributes:
        image_size: (height, width) of the model's input.
        mean: Per colour, on the scale [0, 1].
        std: Per colour, on the same scale.
        transforms: The evaluation pipeline, as it is written in YAML.
    """

    image_size: tuple[int, int]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    transforms: list[TransformSpec] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.transforms:
            object.__setattr__(self, "transforms", eval_transforms(self.image_size))

    def __call__(self, image: np.ndarray) -> tuple[Tensor, Geometry]:
        """Returns a photo as the model's input before normalisation, and where it was put.

        Args:
            image: uint8 RGB (H, W, 3).

        Returns:
            uint8 tensor (3, h, w), and the geometry.

        Raises:
            UsageError: the pipeline leaves another size than `image_size`.
        """
        out, geometry = find_geometry(self.pipeline(), image)
        if out.shape[:2] != self.image_size:
            raise UsageError(
                f"expected transforms that leave {self.image_size[0]} x {self.image_size[1]} pixels, got "
                f"{out.shape[0]} x {out.shape[1]} from a photo of {image.shape[0]} x {image.shape[1]}: end with a "
                "crop, a pad or a Resize to that size"
            )
        return to_tensor(out), geometry

    def pipeline(self) -> A.Compose:
        """Returns the evaluation pipeline, built once."""
        if "_pipeline" not in self.__dict__:
            object.__setattr__(self, "_pipeline", build_pipeline(self.transforms))
        return self.__dict__["_pipeline"]

    def normalize(self, images: Tensor) -> Tensor:
        """Returns uint8 images (B, 3, h, w) as floats with this mean and standard deviation, on their own device."""
        return normalize(images, mean=self.mean, std=self.std)

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` takes, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Returns the preprocessing that `to_dict` described."""
        return cls(
            image_size=image_hw(values["image_size"]),
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            transforms=list(values["transforms"]),
        )


def normalize(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns uint8 images (B, 3, H, W) on [0, 255] as float32 (x / 255 - mean) / std, in one pass over the pixels."""
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float32, device=images.device))
    shift = -torch.tensor(mean, dtype=torch.float32, device=images.device) * 255 * scale
    return torch.addcmul(shift.view(1, -1, 1, 1), images.float(), scale.view(1, -1, 1, 1))


def to_tensor(image: np.ndarray) -> Tensor:
    """Returns an image (H, W, 3) as a tensor (3, H, W) of the same memory."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)

"""Test-time augmentation: several views of a photo, and one answer.

Views are cut from a canvas that is a little larger than the network's input, so that a crop is no enlarged input. Two
steps, for whoever reads photos himself:

    views = tta_preprocessing(model.preprocessing, "ten_crop")      # in place of model.preprocessing
    images = views.normalize(torch.stack([views(photo)[0] for photo in photos]))
    logits = tta_logits(model, images, "ten_crop", image_size=model.preprocessing.image_size)
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_attn.data.transforms import Preprocessing, TransformSpec, spec_options
from vision_attn.errors import UsageError
from vision_attn.registry import unknown

TTA = {
    "none": "the photo as it is",
    "flip": "the photo and its mirror image",
    "scales": "crops of three sizes from the middle: the canvas whole, the input's share of it, and half-way between",
    "five_crop": "the middle and the four corners of the canvas",
    "ten_crop": "those five and their mirror images (Krizhevsky et al. 2012)",
}
"""What each kind of augmentation looks at."""

_MARGIN = 8 / 7  # 256 for 224, as of old, where the preprocessing crops nothing off


def check_tta(kind: str) -> str:
    """Returns `kind`.

    Raises:
        UsageError: it is unknown; close names are offered.
    """
    if kind not in TTA:
        raise unknown("test-time augmentation", kind, TTA)
    return kind


def tta_preprocessing(preprocessing: Preprocessing, kind: str) -> Preprocessing:
    """Returns the preprocessing that leaves the canvas from which the views of a photo are cut.

    Where the middle of the resized photo is cropped (`crop_pct` below 1), the canvas is what that resize leaves; where
    nothing is cropped off, the photo is made an eighth larger.
    """
    if check_tta(kind) in ("none", "flip"):
        return preprocessing
    height, width = preprocessing.image_size
    canvas = (round(height * _MARGIN), round(width * _MARGIN))
    steps = [spec_options(spec) for spec in preprocessing.transforms]
    names, options = [name for name, _ in steps], steps[0][1]
    covers = tuple(options.get("max_size_hw") or ())
    specs: list[TransformSpec]
    if names == ["SmallestMaxSize", "CenterCrop"] and len(covers) == 2:
        if covers == (height, width):
            resize: TransformSpec = {"SmallestMaxSize": {**options, "max_size_hw": list(canvas)}}
        else:
            resize = preprocessing.transforms[0]
            # As many pixels on either side, so that the canvas's middle is the plain input to the pixel.
            canvas = (height + (covers[0] - height) // 2 * 2, width + (covers[1] - width) // 2 * 2)
        specs = [resize, {"CenterCrop": {"height": canvas[0], "width": canvas[1]}}]
    elif names == ["LongestMaxSize", "PadIfNeeded"] and len(covers) == 2:
        resize = {"LongestMaxSize": {**options, "max_size_hw": list(canvas)}}
        specs = [resize, {"PadIfNeeded": {**steps[1][1], "min_height": canvas[0], "min_width": canvas[1]}}]
    elif names == ["Resize"]:
        specs = [{"Resize": {**options, "height": canvas[0], "width": canvas[1]}}]
    else:
        last = {"Resize": {"height": canvas[0], "width": canvas[1], "interpolation": "bicubic"}}
        specs = [*preprocessing.transforms, last]
    return Preprocessing(canvas, preprocessing.mean, preprocessing.std, specs)


def tta_logits(
    model: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    kind: str,
    *,
    image_size: tuple[int, int] | None = None,
    multi_label: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """Returns logits whose softmax is the mean of the views' softmaxes (B, classes): log(1/V sum_v softmax(z_v / T)).

    With several labels a photo, the logit of the mean of the views' sigmoids. The mean is taken of probabilities, not
    of logits: one view that sees nothing then weighs no more than the others.

    Args:
        model: From normalised images (B, 3, h, w) to logits.
        images: Normalised canvases (B, 3, H, W), from `tta_preprocessing`.
        kind: One of `TTA`.
        image_size: (height, width) of the network's input; the canvases' where left out.
        multi_label: Whether a photo has any number of labels.
        temperature: What each view's logits are divided by.

    Raises:
        UsageError: the kind is unknown, or the canvases are smaller than the input.
    """
    size = image_size or (images.shape[2], images.shape[3])
    if images.shape[2] < size[0] or images.shape[3] < size[1]:
        raise UsageError(
            f"expected images of at least {size[0]} x {size[1]} pixels, got {images.shape[2]} x {images.shape[3]}: "
            "prepare them with tta_preprocessing"
        )
    found = [model(view).double() / temperature for view in _views(images, check_tta(kind), size)]
    if len(found) == 1:
        return found[0].float()
    views = torch.stack(found)
    if multi_label:
        return views.sigmoid().mean(0).logit(eps=1e-12).float()
    return (views.log_softmax(-1).logsumexp(0) - torch.tensor(len(found)).log()).float()


def _views(images: Tensor, kind: str, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yields what the network is shown, each (B, 3, *size); the plain photo first."""
    high, wide = images.shape[2], images.shape[3]
    height, width = size
    top, left = (high - height) // 2, (wide - width) // 2
    middle = images[:, :, top : top + height, left : left + width]
    yield middle
    if kind == "flip":
        yield middle.flip(-1)
    elif kind == "scales":
        between = images[:, :, top // 2 : high - top // 2, left // 2 : wide - left // 2]
        for view in (between, images):
            yield F.interpolate(view, size, mode="bicubic", antialias=True, align_corners=False)
    elif kind in ("five_crop", "ten_crop"):
        corners = [
            images[:, :, down : down + height, right : right + width]
            for down in (0, high - height)
            for right in (0, wide - width)
        ]
        yield from corners
        if kind == "ten_crop":
            for view in (middle, *corners):
                yield view.flip(-1)

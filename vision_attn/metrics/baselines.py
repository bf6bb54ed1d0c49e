"""What stands where pixels were removed.

A network cannot be asked about a photo with a hole: something has to stand there, and each choice has its bias. A flat
colour (`mean`, `own_mean`, `black`) draws edges that no photo has; `blur` draws none but lets coarse colours through;
`noise` brings a texture of its own. A result that turns with the choice says little: name the baseline with every
number, and try a second one.
"""

import zlib
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_attn.errors import UsageError
from vision_attn.registry import unknown

Baseline = Literal["blur", "mean", "own_mean", "noise", "black"]

BASELINES: tuple[str, ...] = get_args(Baseline)
"""The names that `fill` knows."""


def fill(
    images: Tensor,
    baseline: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Tensor:
    """Returns what stands where pixels of each image are removed, (B, 3, H, W), normalised as the images are.

    An image's fill follows from the image, the options and `seed` alone: it is the same in every batch and every order,
    and torch's random state is not touched.

    Args:
        images: (B, 3, H, W), normalised.
        baseline: "blur" (the image under a Gaussian of a tenth of its longer side), "mean" (0 after normalisation, the
            colour that it subtracts), "own_mean" (the image's own mean colour), "noise" (Gaussian around 0 with
            deviation 1 after normalisation, each pixel and colour on its own) or "black" (0 before normalisation).
        mean: Per colour, of the normalisation; only "black" needs it.
        std: The same.
        seed: Of the noise.

    Raises:
        UsageError: the baseline is unknown, images are no normalised batch, or "black" lacks mean and std.

    Example:
        >>> image = torch.tensor([1.0, 3.0]).expand(1, 3, 1, 2)
        >>> fill(image, "own_mean")[0, 0]
        tensor([[2., 2.]])
    """
    if baseline not in BASELINES:
        raise unknown("baseline", str(baseline), BASELINES)
    if images.dim() != 4 or not images.is_floating_point():
        raise UsageError(
            f"expected normalised images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}: "
            "add a batch dimension with images[None], and normalise first"
        )
    if baseline == "blur":
        return blurred(images, max(images.shape[-2:]) / 10)
    if baseline == "mean":
        return torch.zeros_like(images)
    if baseline == "own_mean":
        return images.mean((2, 3), keepdim=True).expand_as(images).clone()
    if baseline == "noise":
        return torch.stack([_noise(image, seed) for image in images]) if len(images) else images.clone()
    if mean is None or std is None:
        raise UsageError(
            "expected mean and std of the normalisation for baseline 'black', got none: give both, or use 'mean'"
        )
    shift, scale = (images.new_tensor(value)[:, None, None] for value in (mean, std))
    return (-shift / scale).expand_as(images).clone()


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Returns images under a Gaussian of `sigma` pixels, cut at 3 sigma; the border is reflected.

    Args:
        images: (B, C, H, W).
        sigma: Standard deviation, in pixels.
    """
    for axis in (-2, -1):
        length = images.shape[axis]
        radius = min(int(3 * sigma), length - 1)
        x = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-x.square() / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).view((1, 1, -1, 1) if axis == -2 else (1, 1, 1, -1))
        padding = (0, 0, radius, radius) if axis == -2 else (radius, radius, 0, 0)
        padded = F.pad(images, padding, mode="reflect")
        images = F.conv2d(padded, kernel.expand(images.shape[1], 1, -1, -1), groups=images.shape[1])
    return images


def _noise(image: Tensor, seed: int) -> Tensor:
    """Returns Gaussian noise in the shape of an image (3, H, W) that follows from its pixels and the seed."""
    content = zlib.crc32(image.float().contiguous().cpu().numpy().tobytes(), seed)
    # Another stream than that of the control `random`, which starts from the same pixels.
    generator = torch.Generator().manual_seed(zlib.crc32(b"noise", content))
    return torch.randn(image.shape, generator=generator).to(image)

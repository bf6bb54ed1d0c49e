"""Maps that know nothing of the model: what a true explanation has to beat.

They stand on the patch grid where the model has one, so that they are compared at the resolution of the methods, and on
pixels where it has none.

Source of `edges`: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, where an edge detector looks as
convincing as some explanations.
"""

import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_attn.attribution.base import METHODS
from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout

_GREY = (0.299, 0.587, 0.114)


@METHODS.register("random", class_specific=False, needs="nothing", control=True)
def random(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layout: TokenLayout | None = None,
    seed: int = 0,
) -> Tensor:
    """Returns uniform noise in [0, 1), (B, h, w); an image's noise follows from its pixels and `seed` alone.

    So it is the same in every batch and every order, and torch's random state is not touched.

    Args:
        model: Not used.
        images: (B, 3, H, W).
        target: Not used.
        layout: Gives the grid; None for pixels.
        seed: Another seed gives other noise.
    """
    size = _size(images, layout)
    maps = []
    for image in images:
        pixels = image.float().contiguous().cpu().numpy()
        generator = torch.Generator().manual_seed(zlib.crc32(pixels.tobytes(), seed))
        maps.append(torch.rand(size, generator=generator))
    return torch.stack(maps).to(images)


@METHODS.register("center", class_specific=False, needs="nothing", control=True)
def center(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layout: TokenLayout | None = None,
    sigma: float = 0.25,
) -> Tensor:
    """Returns a Gaussian around the middle, (B, h, w), 1 at its peak.

    Args:
        model: Not used.
        images: (B, 3, H, W).
        target: Not used.
        layout: Gives the grid; None for pixels.
        sigma: Standard deviation, as a share of the height and of the width.
    """
    if not sigma > 0:
        raise UsageError(f"expected a sigma above 0, got {sigma}: it is a share of the image's side")
    rows, columns = (_bell(length, sigma, images) for length in _size(images, layout))
    return (rows[:, None] * columns).expand(len(images), -1, -1).clone()


@METHODS.register("edges", class_specific=False, needs="nothing", control=True)
def edges(
    model: nn.Module, images: Tensor, target: Tensor | None = None, *, layout: TokenLayout | None = None
) -> Tensor:
    """Returns the Sobel magnitude of the grey image, (B, h, w), as the mean over each patch where there is a grid.

    Args:
        model: Not used.
        images: (B, 3, H, W).
        target: Not used.
        layout: Gives the grid; None for pixels.
    """
    grey = (images * images.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)
    slope = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    gradients = F.conv2d(padded, torch.stack([slope, slope.T])[:, None])
    magnitude = gradients.square().sum(1).sqrt()
    return F.adaptive_avg_pool2d(magnitude, _size(images, layout))


def _size(images: Tensor, layout: TokenLayout | None) -> tuple[int, int]:
    """Returns the size of a control's maps."""
    return (images.shape[-2], images.shape[-1]) if layout is None else layout.grid


def _bell(length: int, sigma: float, like: Tensor) -> Tensor:
    """Returns exp(-x² / 2σ²) at the centres of `length` cells that share the range -0.5 to 0.5."""
    x = (torch.arange(length, dtype=like.dtype, device=like.device) + 0.5) / length - 0.5
    return torch.exp(-x.square() / (2 * sigma**2))

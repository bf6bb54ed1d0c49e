"""Does the model read a fixed place of the photo, wherever the object is? A tag in a corner, a ruler, a caption.

No map is asked: each place is hidden and the model answers again. So a shortcut is found also where every explanation
method misses it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vision_attn.metrics.faithfulness import Predict

GRID = (3, 3)

NAMES = (
    "the top left corner",
    "the middle of the top edge",
    "the top right corner",
    "the middle of the left edge",
    "the centre",
    "the middle of the right edge",
    "the bottom left corner",
    "the middle of the bottom edge",
    "the bottom right corner",
)
"""Of the places, row by row."""

CENTRE = 4


def place_mask(place: int, size: tuple[int, int]) -> Tensor:
    """Returns (H, W) booleans, true in one of the 3 x 3 places; together they are the image."""
    rows, columns = (
        torch.arange(length).mul(3).div(length, rounding_mode="floor") == part
        for length, part in zip(size, divmod(place, GRID[1]), strict=True)
    )
    return rows[:, None] & columns


def hide_shown(images: Tensor, masks: Tensor, fill: Tensor) -> Tensor:
    """Returns images (n, 3, H, W) with what stands in `fill` where masks (n, H, W) are true."""
    return torch.where(masks[:, None], fill, images)


def hide_places(
    predict: Predict, images: Tensor, target: Tensor, before: Tensor, fill: Tensor, *, batch_size: int
) -> Tensor:
    """Returns the fall of the target's probability when each place is hidden, (B, 9).

    Args:
        predict: From images (n, 3, H, W) to probabilities (n, classes).
        images: (B, 3, H, W).
        target: (B,), class indices.
        before: (B,), the target's probability on the whole image.
        fill: (B, 3, H, W), what stands in a hidden place.
        batch_size: Images a forward pass.
    """
    count = GRID[0] * GRID[1]
    size = (images.shape[-2], images.shape[-1])
    places = torch.stack([place_mask(place, size) for place in range(count)]).to(images.device)
    pairs = [(image, place) for image in range(len(images)) for place in range(count)]
    after = []
    for start in range(0, len(pairs), batch_size):
        which, where = torch.tensor(pairs[start : start + batch_size], device=images.device).T
        answers = predict(hide_shown(images[which], places[where], fill[which]))
        after.append(answers.gather(-1, target[which][:, None])[:, 0])
    return before[:, None] - torch.cat(after).view(len(images), count)


def elsewhere(object_in_place: Sequence[float] | None, place: int, *, most: float = 0.01) -> bool:
    """Returns whether a photo's object is known to leave a place free, but for a sliver."""
    return object_in_place is not None and object_in_place[place] <= most

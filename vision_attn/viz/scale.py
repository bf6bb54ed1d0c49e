"""Which value of a map gets which colour: found openly, carried along, and written on the picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vision_attn.errors import UsageError

Map = torch.Tensor | NDArray[np.generic]


@dataclass(frozen=True)
class Scale:
    """The range of values that the colours cover.

    Attributes:
        low: the value of the first colour; everything below is drawn in it too.
        high: the value of the last colour; everything above is drawn in it too.
        text: where the range comes from, as it is written beside the colour bar.
        signed: the range is symmetric about zero, and asks for a diverging colour map.
    """

    low: float
    high: float
    text: str
    signed: bool = False

    @property
    def flat(self) -> bool:
        """Has the range no width? Less than float32 tells apart is none: interpolating a constant map rounds it."""
        return self.high - self.low <= 1e-6 * max(abs(self.low), abs(self.high))

    def place(self, values: NDArray[np.floating]) -> NDArray[np.float32]:
        """Where values stand on the scale, 0 to 1; 0.5 everywhere on a scale without width.

        A constant map says nothing about places: it is drawn flat, in the middle colour, which is neither "nothing
        here" nor "everything here", and for a signed map is the colour of zero.
        """
        if self.flat:
            return np.full(values.shape, 0.5, dtype=np.float32)
        # The division comes first: a range such as 1e-40 to 3e-40 would vanish in float32.
        return np.clip((values - self.low) / (self.high - self.low), 0, 1).astype(np.float32)

    def ends(self, lowest: float, highest: float) -> tuple[str, str]:
        """Both ends as text, for a picture with values from `lowest` to `highest`: ≤ and ≥ tell of values beyond."""
        if self.flat:
            return f"constant {self.low:.3g}", ""
        below, above = ("≤ " if lowest < self.low else ""), ("≥ " if highest > self.high else "")
        return f"{below}{self.low:.3g}", f"{above}{self.high:.3g}"


ScaleChoice = Literal["image"] | float | tuple[float, float] | Scale


def find_scale(maps: Map | Sequence[Map], *, scale: ScaleChoice = "image", signed: bool | None = None) -> Scale:
    """The scale of one map, or one scale for a set of maps.

    Args:
        maps: a map of any shape, or a sequence of them, which then share the scale.
        scale: "image" from the smallest to the largest value; a number p between 50 and 100 for the percentiles
            100 - p to p (99 keeps single hot pixels from darkening the rest); (low, high) as given; or a `Scale`,
            which is returned as it is.
        signed: make the range symmetric about zero; by default where the maps have values of both signs. Its half
            width is then the largest absolute value, the p-th percentile of the absolute values, or the larger of
            the two given ends.

    Raises:
        UsageError: values that are not finite, an empty set, or a choice that is none of the above.
    """
    if isinstance(scale, Scale):
        return scale
    several = isinstance(maps, Sequence)
    arrays = [as_array(one).ravel() for one in (maps if isinstance(maps, Sequence) else [maps])]
    values = np.concatenate(arrays) if arrays else np.empty(0)
    if values.size == 0:
        raise UsageError("expected at least one map with values, got none: give the maps that share the scale")
    low, high = float(values.min()), float(values.max())
    both = low < 0 < high
    name = f"all {len(arrays)} maps" if several else "this map"

    if isinstance(scale, str):
        if scale != "image":
            raise UsageError(f"expected scale 'image', a percentile or (low, high), got {scale!r}: choose one of them")
        text = f"{name}, " + ("largest absolute value" if (both if signed is None else signed) else "lowest to highest")
    elif isinstance(scale, (int, float)) and not isinstance(scale, bool):
        if not 50 < scale <= 100:
            raise UsageError(f"expected a percentile above 50 and up to 100, got {scale}: 99 is usual")
        text = f"{name}, percentiles {100 - scale:g} to {scale:g}"
        low, high = (float(value) for value in np.percentile(values, [100 - scale, scale]))
        if both if signed is None else signed:
            high = float(np.percentile(np.abs(values), scale))
            low = -high
            text = f"{name}, percentile {scale:g} of the absolute values"
    else:
        low, high = _given_range(scale)
        both = both and low < 0 < high
        text = "given range"

    if signed is None:
        signed = both
    if signed:
        high = max(abs(low), abs(high))
        low = -high
    return Scale(low, high, text, signed)


def as_array(values: Map) -> NDArray[np.floating]:
    """A map as a finite floating-point NumPy array, float32 at least.

    Raises:
        UsageError: it is neither a tensor nor an array, not of real numbers, or has NaN or infinite values.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu")
        values = (values.float() if values.dtype != torch.float64 else values).numpy()
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        kind = getattr(values, "dtype", type(values).__name__)
        raise UsageError(f"expected a map of real numbers, got {kind}: give a tensor or an array of shape (h, w)")
    array = values.astype(np.promote_types(values.dtype, np.float32), copy=False)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise UsageError(
            f"expected finite values in the map, got {bad} of {array.size} NaN or infinite: "
            "look at the model's weights and at the method's options"
        )
    return array


def _given_range(scale: object) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in scale)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise UsageError(
            f"expected scale 'image', a percentile or (low, high), got {scale!r}: choose one of them"
        ) from None
    if not low < high or not np.isfinite([low, high]).all():
        raise UsageError(f"expected a scale (low, high) with low < high, got ({low:g}, {high:g}): turn them around")
    return low, high

"""Which tokens of a sequence are what: the prefix, the patches on their grid, and the row that answers for the image.

Stands at the foot of the house, so that models can state their layout and explanations can read it without knowing each
other. A layout is always stated or found from the model, never guessed: 196 tokens are SigLIP's 14 x 14 patches, 197 a
ViT's with its class token, 198 a distilled DeiT's, 201 a DINOv2's with four registers, and images need not be square.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from vision_attn.errors import UsageError

Query = Literal["class", "distilled", "mean", "class_mean", "map"]
QUERIES: tuple[str, ...] = get_args(Query)
_NEEDED = {"class": ("class",), "distilled": ("class", "distillation"), "class_mean": ("class",)}


@dataclass(frozen=True)
class TokenLayout:
    """The order of the tokens that a model's self-attention works on.

    Args:
        prefix: Names of the tokens before the patches, in order: "class", "distillation", "register".
        grid: Patches as (h, w), row by row after the prefix.
        query: What becomes the image's answer: "class" (the class token), "distilled" (the mean of class and
            distillation token), "mean" (the mean of the patches), "class_mean" (class token and mean of the patches
            side by side, as in DINOv2's classifier) or "map" (a latent that attends to all tokens: multi-head attention
            pooling, or a class token that joins after the blocks). Left out, it is the class token where there is one,
            else the mean.

    Raises:
        UsageError: the grid is not two positive integers, the query is unknown or asks for a token that is not there.

    Example:
        >>> layout = TokenLayout(prefix=("class", "register"), grid=(2, 3))
        >>> layout.query, layout.num_tokens, layout.num_prefix
        ('class', 8, 2)
    """

    prefix: tuple[str, ...]
    grid: tuple[int, int]
    query: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", tuple(self.prefix))
        object.__setattr__(self, "grid", tuple(int(side) for side in self.grid))
        if not self.query:
            object.__setattr__(self, "query", "class" if "class" in self.prefix else "mean")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise UsageError(f"expected a grid (h, w) of positive integers, got {self.grid}: give rows, then columns")
        if self.query not in QUERIES:
            raise UsageError(f"expected a query of {', '.join(QUERIES)}, got {self.query!r}: choose one of them")
        needed = _NEEDED.get(self.query, ())
        if missing := [name for name in needed if name not in self.prefix]:
            raise UsageError(
                f"expected a {missing[0]!r} token for query {self.query!r}, got prefix {self.prefix}: "
                "name it in the prefix or use query 'mean'"
            )

    @property
    def num_prefix(self) -> int:
        """The number of tokens before the first patch."""
        return len(self.prefix)

    @property
    def num_patches(self) -> int:
        """The number of patches, h * w."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """The length of the sequence: prefix and patches."""
        return self.num_prefix + self.num_patches

    def index(self, name: str) -> int:
        """Returns the position of the first prefix token called `name`; the caller knows that it is there."""
        return self.prefix.index(name)

    def patches(self, row: Tensor) -> Tensor:
        """Returns the patch part of `row` (..., N) on the grid, (..., h, w).

        Raises:
            UsageError: the row's length is not the number of tokens.
        """
        if row.shape[-1] != self.num_tokens:
            raise UsageError(
                f"expected rows of {self.num_tokens} tokens ({self.num_prefix} prefix + {self.grid[0]} x "
                f"{self.grid[1]}), got {row.shape[-1]}: pass the TokenLayout of this model at this image size"
            )
        return row[..., self.num_prefix :].unflatten(-1, self.grid)

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold; `from_dict` reads it back."""
        return {"prefix": list(self.prefix), "grid": list(self.grid), "query": self.query}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TokenLayout":
        """Returns the layout that `to_dict` wrote."""
        return cls(prefix=tuple(values["prefix"]), grid=tuple(values["grid"]), query=values["query"])


@dataclass(frozen=True, eq=False)
class KeyPositions:
    """Places of one attention's keys and queries, the same for every image of one size.

    Letters: W windows of an image (1 where attention is global), Q queries, K keys.

    Args:
        grid: Places as (h, w), row by row.
        keys: (W, K), the place of every key of every window, or (W, Q, K) where each query has keys of its own
            (criss-cross); -1 where it is padding or no part of the image, such as a descriptor of all of it. None where
            keys are channels: then each channel has values at all places of the grid.
        queries: (W, Q), the same for the queries, on `query_grid`; None where queries are no places (latents,
            descriptors, channels) or it is not known.
        query_grid: The grid of the queries where it is another than that of the keys (pooled keys); else `grid`.
    """

    grid: tuple[int, int]
    keys: Tensor | None
    queries: Tensor | None = None
    query_grid: tuple[int, int] | None = None

    @property
    def has_places(self) -> bool:
        """Whether any key is a place: not where all are channels or descriptors."""
        return self.keys is not None and bool((self.keys >= 0).any())

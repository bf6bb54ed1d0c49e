"""How a block tells what it multiplies with.

Stands at the foot of the house, so that blocks can tell and `AttentionCapture` can listen without knowing each other.
The modules here hand on what they are given and hold nothing: a network without a listener computes the same, and its
state dict, its compiled graph and its ONNX graph are those of the block without them.
"""

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from vision_attn.layout import KeyPositions


class ReportGate(nn.Module):
    """Hands a gate on; `AttentionCapture(model, kinds=("gate",))` records it with the features that it multiplies.

    For gates that nobody could find by watching what is squashed and multiplied: signed ones, ones that come from
    convolutions alone. A block that has one child of this kind calls it `report`, and the record carries the name of
    the block; a block with several gates calls them `report_channel`, `report_spatial`, and each record carries its
    child's name.

    The block goes on with what is returned. What else its `forward` squashes, or softmaxes on the way to the gate, is
    not recorded, unless it has `key_positions` and so says where that attention lies.
    """

    def forward(self, gate: Tensor, features: Tensor) -> Tensor:
        """Returns `gate` unchanged.

        Args:
            gate: What broadcasts to `features`: (B, C, 1, 1), (B, 1, H, W), (B, C, H, W), (B, C, H, 1), (B, C, 1, W),
                or with P paths or groups in front of the channels (B, P, C or 1, H or 1, W or 1). Among paths it sums
                to 1.
            features: What it multiplies: (B, C, H, W), or (B, P, C, H, W).
        """
        return gate


class ReportAttention(nn.Module):
    """Hands attention weights on; `AttentionCapture` records them with their values.

    For attention that is not one softmax and one product of matrices (criss-cross: two products share a softmax;
    external: normalised twice). Everything else is seen without it.

    Args:
        kind: What the record says, see `AttentionRecord`.
    """

    def __init__(self, kind: Literal["self", "cross", "window", "channel"] = "self") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, weights: Tensor, values: Tensor) -> Tensor:
        """Returns `weights` unchanged.

        Args:
            weights: (B, h, Q, K), or with windows of one image together (B x W, h, Q, K).
            values: (B, h, N, d) what is averaged; N is K, or all places where each query has keys of its own.
        """
        return weights


class ReportMerge(nn.Module):
    """Hands on what merged into what; `AttentionCapture` keeps it with the attention that runs afterwards."""

    def forward(self, places: Tensor) -> Tensor:
        """Returns `places` unchanged.

        Args:
            places: (B, N), for each token of the sequence before any merging the place of that which it is part of.
        """
        return places


@runtime_checkable
class HasKeyPositions(Protocol):
    """A module that says where on its input map the queries and keys of its attention lie."""

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns the places for an input map (B, C, height, width)."""

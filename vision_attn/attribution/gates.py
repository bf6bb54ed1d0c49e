"""What attention blocks in a network let through: squeeze-and-excitation, CBAM and kin, attention on feature maps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.attribution.base import METHODS, working_methods
from vision_attn.attribution.raw import placed_attention
from vision_attn.capture import AttentionCapture, AttentionRecord
from vision_attn.capture.recorder import DEFAULT_KINDS
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.registry import unknown

Patch = tuple[int, int]

# Gates that sum to 1 over their second dimension, to this much, choose among paths; others are of groups of channels.
_SUM_TO_ONE = 1e-2


@dataclass(frozen=True, eq=False)
class GateView:
    """What one block let through, for every image.

    Args:
        name: Of the block, as its record has it.
        what: "spatial gate", "channel gate", "gate among paths", "gate of channels and places" (or rows, or columns),
            "attention", "context maps" or "channel attention".
        maps: (B, h, w), or what is wrong with the options for this block.
        channels: The gate of each channel, (B, C), or (B, P, C) among P paths; None where places differ.
        strongest: Of the channels with the largest gates their numbers (B, n), and what they let through (B, n, h, w).
        layer: What names this block alone: its name, or its place where another block stands for the name.
        gain: How much of the block the network lets in, the mean of absolute values, where it was attached with a gain
            of its own; None where it was not.
        turned: The share of channels whose gain is negative, so that the block works the other way round in them.
    """

    name: str
    what: str
    maps: Tensor | UsageError
    channels: Tensor | None = None
    strongest: tuple[Tensor, Tensor] | None = None
    layer: int | str = -1
    gain: float | None = None
    turned: float = 0.0


@METHODS.register("gates", class_specific=False, needs="gates")
def gates(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layer: int | str = -1,
    query_patch: tuple[int, int] | None = None,
    head: int | None = None,
    descriptor: int | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Returns what one attention block lets through, (B, h, w), at its feature map's size, and which block it is.

    A gate is what a block reports that it multiplies a feature map F with, or (in networks of others) what was squashed
    (sigmoid, tanh, softmax) and then multiplies one. A spatial gate g(h, w) is shown as it is, with its sign. A channel
    gate g(k), which knows no places, is shown by the map that it weights: E_k(g_k F_k), summed over paths where it
    chooses among them (selective kernels, split attention). A gate with channels and places g(k, h, w) is shown as its
    mean over channels, and over groups; one that differs by rows or by columns alone as stripes.

    Attention of a block that says where it lies is shown as what each place receives: the mean over heads and queries,
    or the row of one place with `query_patch`: a cross in criss-cross attention, a row or column in axial attention, a
    window, a neighbourhood. Where queries are descriptors (double, external, efficient attention, global context) it is
    their mean, or one `descriptor`. Channel attention A is shown as the channel gate that each channel receives from
    all, g_k = E_q A_qk, by the map that it weights.

    Where the block was attached to a network with a gain of its own, x + gain (block(x) - x), the network's map is
    multiplied with 1 + gain_k (g_k - 1), and that is shown in place of g, so that the highest is what passes most also
    where the gain is negative; with several gates, each as if the others were 1. As long as the gain is 0 the block's
    own gate is shown. The result's options say the `gain`, the mean of its absolute values (at 0 the block has no
    effect, whatever it lets through), and `turned`, the share of channels in which it is negative: there a block that
    attends, or chooses among paths, takes away what it shows.

    Source: each block's paper: Hu et al., CVPR 2018 (SE); Woo et al., ECCV 2018 (CBAM); Wang et al., CVPR 2020 (ECA);
    Huang et al., ICCV 2019 (criss-cross).

    Args:
        model: A network with such blocks.
        images: (B, 3, H, W), as the model wants them.
        target: Not used: gates do not depend on the class.
        layer: A place among the blocks that have more than one place to show, in the order in which they run, from 0,
            or from the end with -1; or the name of a module ("layer4.1.se"; a name stands for all below it, of which
            the last is shown).
        query_patch: (row, column) of the place whose attention is shown, on the grid of the block's queries.
        head: One head of an attention, from 0; None for their mean.
        descriptor: One descriptor of an attention whose queries are no places, from 0; None for their mean.

    Raises:
        AttentionNotFoundError: the network has no such blocks; the message names the methods that work without.
        UsageError: there is no such layer, head, descriptor or patch, or the block has none to choose from.
    """
    view = _chosen(see_gates(model, images, patch=lambda _: query_patch, head=head, descriptor=descriptor), layer)
    if isinstance(view.maps, UsageError):
        raise view.maps
    gain = {} if view.gain is None else {"gain": view.gain, "turned": view.turned}
    return view.maps.expand(len(images), -1, -1), {"layer": view.layer, **gain}


def see_gates(
    model: nn.Module,
    images: Tensor,
    *,
    patch: Callable[[tuple[int, int] | None], Patch | None],
    head: int | None = None,
    descriptor: int | None = None,
    strongest: int = 0,
) -> list[GateView]:
    """Returns what every block lets through, in the order in which they run, of one forward pass; see `gates`.

    Args:
        model: A network with such blocks.
        images: (B, 3, H, W), as the model wants them.
        patch: From the grid of a block's queries (None where it has none on a grid) to the place that asks, or None.
        head: As in `gates`.
        descriptor: As in `gates`.
        strongest: For how many channels of the largest gates what they let through is kept.

    Raises:
        AttentionNotFoundError: the network has no such blocks; the message names the methods that work without.
    """
    look = _Reduction(model, patch, head, descriptor, strongest)
    with AttentionCapture(model, keep=look, kinds=(*DEFAULT_KINDS, "gate")) as capture, torch.no_grad():
        model(images)
    others = " or ".join(working_methods("nothing"))
    try:
        records = [record for record in capture.records if record.kind == "gate" or record.positions is not None]
    except AttentionNotFoundError:
        records = []
    if not records:
        raise AttentionNotFoundError(
            f"expected blocks that gate a feature map in {type(model).__name__}, got none: use {others}"
        )
    views = [record.reduced for record in records if record.reduced is not None]
    if not views:
        raise AttentionNotFoundError(
            f"expected a gated feature map of more than one place in {type(model).__name__}, got one place at this "
            f"image size: use larger images, or {others}"
        )
    # A module can have two gates, of which the name stands for the last.
    alone = [_chosen(views, view.name) is view for view in views]
    return [
        replace(view, layer=view.name if named else place, **_gain_of(model, view.name))
        for place, (view, named) in enumerate(zip(views, alone, strict=True))
    ]


@dataclass(frozen=True)
class _Reduction:
    """Makes a view of each record while the model runs, so that no feature map is kept; see `see_gates`."""

    model: nn.Module
    patch: Callable[[tuple[int, int] | None], Patch | None]
    head: int | None
    descriptor: int | None
    strongest: int

    def __call__(self, record: AttentionRecord) -> GateView | None:
        """Returns the view; None where there is no more than one place, or it is not known which."""
        try:
            if record.kind == "gate":
                return self._gate(record)
            if record.positions is None or record.positions.grid == (1, 1):
                return None
            if record.positions.keys is None:
                return self._channels(record)
            return self._places(record) if record.positions.has_places else None
        except UsageError as error:
            # Options for one block need not fit another: told where this one is asked for.
            return GateView(record.name, "attention" if record.kind != "gate" else "gate", error)

    def _gate(self, record: AttentionRecord) -> GateView | None:
        """Returns the view of a gate."""
        dtype = torch.promote_types(record.values.dtype, torch.float32)
        gate, features = record.weights.to(dtype), record.values.to(dtype)
        height, width = features.shape[-2:]
        if height * width == 1:
            return None
        asked = {"query_patch": self.patch(None), "head": self.head, "descriptor": self.descriptor}
        for option, value in asked.items():
            if value is not None:
                raise UsageError(
                    f"expected a block with attention for {option}, got a gate in {record.name!r}: leave {option} out, "
                    "or choose another layer"
                )
        what = _what(gate, features)
        gain = _gain(self.model, record.name)
        if gain is not None and gain.any() and gain.numel() == features.shape[1:-2].numel() and not _is_choice(gate):
            gate = 1 + gain.to(gate).view(*features.shape[1:-2], 1, 1) * (gate - 1)
            what += ", as attached"
        if gate.shape[-2:] != (1, 1):
            maps = gate.flatten(1, -3).mean(1).expand(-1, height, width).clone()
            return GateView(record.name, what, maps)
        if _is_choice(gate):
            maps = (gate * features).sum(1).mean(1)
            return GateView(record.name, what, maps, gate.flatten(2))
        if gate.dim() == 5:  # groups of channels
            gate, features = gate.expand(*features.shape[:3], 1, 1).flatten(1, 2), features.flatten(1, 2)
        gated = gate * features
        channels = gate.flatten(1)
        return GateView(record.name, what, gated.mean(1), channels, self._top(channels, gated))

    def _places(self, record: AttentionRecord) -> GateView:
        """Returns the view of attention to places."""
        positions = record.positions
        assert positions is not None
        self._check(record, "head", self.head, record.num_heads)
        on_grid = positions.queries is not None
        patch = self.patch((positions.query_grid or positions.grid) if on_grid else None)
        if self.descriptor is not None and on_grid:
            raise UsageError(
                f"expected a block whose queries are no places for descriptor, got places in {record.name!r}: use "
                "query_patch=(row, column)"
            )
        self._check(record, "descriptor", self.descriptor, record.query_length)
        maps = placed_attention(record, positions, head=self.head, query_patch=patch, descriptor=self.descriptor)
        return GateView(record.name, "attention" if on_grid else "context maps", maps)

    def _channels(self, record: AttentionRecord) -> GateView:
        """Returns the view of attention between channels."""
        assert record.positions is not None
        self._check(record, "head", self.head, record.num_heads)
        for option, value in {"query_patch": self.patch(None), "descriptor": self.descriptor}.items():
            if value is not None:
                raise UsageError(
                    f"expected a block that attends to places for {option}, got attention between channels in "
                    f"{record.name!r}: leave {option} out, or choose another layer"
                )
        heads = slice(None) if self.head is None else slice(self.head, self.head + 1)
        dtype = torch.promote_types(record.values.dtype, torch.float32)
        gate = record.weights[:, heads].to(dtype).mean(2).flatten(1)
        gated = (gate[..., None] * record.values[:, heads].to(dtype).flatten(1, 2)).unflatten(2, record.positions.grid)
        return GateView(record.name, "channel attention", gated.mean(1), gate, self._top(gate, gated))

    def _top(self, gate: Tensor, gated: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns the channels with the largest gates (B, n), and what they let through, (B, n, h, w)."""
        if not self.strongest:
            return None
        channels = gate.abs().topk(min(self.strongest, gate.shape[1]), 1).indices
        channels = channels.expand(len(gated), -1)
        return channels, gated[torch.arange(len(gated), device=gated.device)[:, None], channels]

    @staticmethod
    def _check(record: AttentionRecord, option: str, number: int | None, count: int) -> None:
        """Raises UsageError where there is no such head or descriptor."""
        if number is not None and not (type(number) is int and 0 <= number < count):
            raise UsageError(
                f"expected a {option} from 0 to {count - 1} in {record.name!r}, got {number}: choose one of them"
            )


def _is_choice(gate: Tensor) -> bool:
    """Whether a gate chooses among paths: its shares sum to 1."""
    return gate.dim() == 5 and gate.shape[-2:] == (1, 1) and bool(((gate.sum(1) - 1).abs() < _SUM_TO_ONE).all())


def _what(gate: Tensor, features: Tensor) -> str:
    """Returns what a gate is called."""
    if gate.shape[-2:] == (1, 1):
        return "gate among paths" if _is_choice(gate) else "channel gate"
    if gate.shape[1:-2].numel() == 1:
        return "spatial gate"
    for dim, places in ((-1, "rows"), (-2, "columns")):
        if gate.shape[dim] < features.shape[dim]:
            return f"gate of channels and {places}"
    return "gate of channels and places" if gate.shape[-3] > 1 else "spatial gate of each group"


def _chosen(views: list[GateView], layer: int | str) -> GateView:
    """Returns the view of a block given by place or name."""
    if isinstance(layer, str):
        named = [view for view in views if f"{view.name}.".startswith(f"{layer}.") or not layer]
        if not named:
            raise unknown("gate", layer, [view.name for view in views])
        return named[-1]
    if type(layer) is not int or not -len(views) <= layer < len(views):
        raise UsageError(f"expected a layer from 0 to {len(views) - 1} (or -1 for the last), got {layer}: choose one")
    return views[layer]


def _gain_of(model: nn.Module, name: str) -> dict[str, Any]:
    """Returns what a view says of the gain of the block called `name`."""
    gain = _gain(model, name)
    return {} if gain is None else {"gain": float(gain.abs().mean()), "turned": float((gain < 0).float().mean())}


def _gain(model: nn.Module, name: str) -> Tensor | None:
    """Returns the gain (C,) of the nearest module around a block that has one, None where there is none."""
    parts = name.split(".")
    for length in reversed(range(len(parts))):
        around = model.get_submodule(".".join(parts[:length]))
        if hasattr(around, "gain"):
            return around.gain.detach() if isinstance(around.gain, Tensor) else None
    return None

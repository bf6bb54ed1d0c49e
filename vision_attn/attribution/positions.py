"""Where on the image the keys of an attention lie, whoever partitioned, shifted, padded, dilated or pooled them.

Window attention sees (images x windows, K, d): which key is which place is known to the model's reshapes and rolls
alone, and every architecture has its own. So the model itself is asked. Each value is made from one place of a feature
map that still has one entry for each image, and its derivative by that map says which: with a tangent that is a random
vector a over the channels at every place, and tangents that are a times the row and a times the column, the quotients
of the derivatives are the row and the column, in every channel the same. Where a value comes from several places the
channels disagree, so that a wrong answer does not pass for a right one; where it comes from none, it is padding, or a
token that is no part of the image. Blocks that say themselves where their keys lie (`vision_attn.reporting`) are taken
at their word.

Attention mixes places: for the derivative, products of two activations are cut, and residual streams remain.

Letters: W windows of an image, K keys, Q queries; H, W a feature map; h, w the grid that the keys lie on.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vision_attn.attribution.base import working_methods
from vision_attn.attribution.tokens import place_of
from vision_attn.capture import AttentionCapture, AttentionInputs, AttentionRecord
from vision_attn.capture.products import MATMULS
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.layout import KeyPositions
from vision_attn.reporting import ReportGate

Grid = tuple[int, int]

# Feature maps that are looked at in one pass, nearest first; the last pass takes all that are left.
_AT_ONCE = (10, 40)
# So many maps that tokens depend on, but not with one place each, end the search: farther maps are mixed more.
_FAILURES = 8
# A key has one place if its derivatives are those of one to this share of their norm.
_TOLERANCE = 1e-2
# Attention whose places are remembered, for each model.
_REMEMBERED = 64
# Below this share of the largest key's squared derivative there is none.
_NOTHING = 1e-10
_KNOWN: "WeakKeyDictionary[nn.Module, OrderedDict[tuple[Any, ...], KeyPositions]]" = WeakKeyDictionary()


def find_positions(model: nn.Module, images: Tensor, record: AttentionRecord) -> KeyPositions:
    """Returns where on the image the keys and queries of `record` lie.

    For attention in windows (shifted, padded, dilated, overlapping), for pooled or convolved keys, which lie on a
    coarser grid of their own, and for global attention in models of stages or of unknown layout. The model runs on
    noise of one image's size, in evaluation mode, and is left as it was found. What was found is remembered for each
    model, size and layer, as long as the model lives.

    Args:
        model: The model that the record was captured from.
        images: (B, 3, H, W); only size, type and device are read.
        record: One attention of that model at that size.

    Raises:
        UsageError: keys are channels, or it cannot be known where they lie.
    """
    if record.kind in ("channel", "gate"):
        raise UsageError(
            f"expected attention between places, got attention between channels in {record.name!r}: choose another "
            f"layer, or use {' or '.join(working_methods('nothing'))}"
        )
    if record.positions is not None:
        return record.positions
    known = _KNOWN.setdefault(model, OrderedDict())
    windows = record.batch_size // len(images)
    key = (tuple(images.shape[1:]), record.index, record.name, windows, record.query_length, record.key_length)
    if key not in known:
        known[key] = _find_positions(model, images, record, windows)
        while len(known) > _REMEMBERED:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def _find_positions(model: nn.Module, images: Tensor, record: AttentionRecord, windows: int) -> KeyPositions:
    """Returns what `find_positions` does, found anew."""
    with _evaluating(model), torch.inference_mode(False), torch.no_grad():
        search = _Search(model, images, record, windows)
        keys = search.places(_values, follow=False) or search.places(_values, follow=True)
        if keys is None:
            raise UsageError(
                f"expected keys that each come from one place of the image, got keys in {record.name!r} that do not: "
                "choose another layer, pass layout=TokenLayout(...) if every token attends to every other, or use "
                f"{' or '.join(working_methods('nothing'))}"
            )
        if record.query_length == record.key_length:
            return KeyPositions(*keys, keys[1], keys[0])
        if record.query_length == 1:  # a class token or another latent, which lies nowhere
            return KeyPositions(*keys)
        queries = search.places(_queries, follow=True)
    return KeyPositions(*keys) if queries is None else KeyPositions(*keys, queries[1], queries[0])


def unwindow(weights: Tensor, positions: KeyPositions, query_patch: tuple[int, int] | None = None) -> Tensor:
    """Returns the attention that each place receives, (B, h, w): the mean over all queries, or one query's row.

    Queries that are padding do not count; what goes to padding is not shown, so that maps sum to 1 or less. A place
    that is a key of several windows (they overlap) receives the sum. A query's row is 0 outside its window.

    Args:
        weights: (B x W, Q, K), fused over heads, windows of one image together.
        positions: What `find_positions` returned.
        query_patch: (row, column) on the queries' grid.

    Raises:
        UsageError: the patch is not on the grid, or the places of queries are not known.
    """
    share = query_shares(positions, weights.shape[-2], query_patch).to(weights)
    received = share[..., None] * weights.unflatten(0, (-1, len(share)))
    return scatter(received if places_of_keys(positions).dim() == 3 else received.sum(-2), positions)


def query_shares(positions: KeyPositions, num_queries: int, query_patch: tuple[int, int] | None = None) -> Tensor:
    """Returns the weight of each query in what is shown, (W, Q), summing to 1 over an image.

    Raises:
        UsageError: the patch is not on the grid, or the places of queries are not known.
    """
    queries = positions.queries
    if query_patch is None:
        known = torch.ones(len(places_of_keys(positions)), num_queries) if queries is None else queries >= 0
        return known.double() / known.sum()
    if queries is None:
        raise UsageError(
            "expected a layer in which it is known where queries lie for query_patch, got one in which it is not: "
            "leave query_patch out, or choose another layer"
        )
    asking = queries == place_of(query_patch, positions.query_grid or positions.grid)
    return asking.double() / asking.sum().clamp(min=1)


def scatter(received: Tensor, positions: KeyPositions) -> Tensor:
    """Returns what keys received, summed at their places, (B, h, w).

    Args:
        received: (B, W, K), or (B, W, Q, K) where each query has keys of its own.
        positions: Of these keys.
    """
    rows, columns = positions.grid
    places = places_of_keys(positions).to(received.device).flatten()
    # Padding goes to one place more, which is dropped.
    maps = received.new_zeros(len(received), rows * columns + 1)
    maps.index_add_(1, places.where(places >= 0, places.new_tensor(rows * columns)), received.flatten(1))
    return maps[:, :-1].unflatten(1, positions.grid)


def places_of_keys(positions: KeyPositions) -> Tensor:
    """Returns the keys' places, (W, K) or (W, Q, K); the caller knows that keys are no channels."""
    assert positions.keys is not None
    return positions.keys


def token_attention(model: nn.Module, records: Sequence[AttentionRecord], method: str) -> list[AttentionRecord]:
    """Returns the records without those of blocks on the patch grid that let every place keep its own values.

    A block that only gates leaves rows of attention as they are: what a place holds is weighed, not mixed with others.
    So does attention between channels, and attention on the way to a gate.

    Raises:
        UsageError: a block mixes places by attention of its own, which is no layer among all tokens.
    """
    placed = [record for record in records if record.positions is not None and record.positions.keys is not None]
    mixing = [record for record in placed if not _makes_a_gate(model, record.name)]
    if mixing:
        raise UsageError(
            f"expected attention between all tokens for {method}, got a block that attends on a feature map in "
            f"{mixing[0].name!r}: detach it, or use {' or '.join(working_methods('attention', 'gates', 'nothing'))}"
        )
    return [record for record in records if record.positions is None]


def _makes_a_gate(model: nn.Module, name: str) -> bool:
    """Whether attention of this name is on the way to a gate that the module, or one around it, reports."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:length])) for length in range(len(parts) + 1))
    return any(isinstance(child, ReportGate) for module in around for child in module.children())


class _Search:
    """The search for a feature map that the tokens of one attention come from, nearest first."""

    def __init__(self, model: nn.Module, images: Tensor, record: AttentionRecord, windows: int) -> None:
        self.model, self.record, self.windows = model, record, windows
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.rand(1, *images.shape[1:], generator=generator).to(images)
        seen = self._events(None, follow=False).record
        # One image's windows may pass for the images of a batch; of two images they do not.
        if (seen.batch_size, seen.num_heads, seen.key_length) != (windows, record.num_heads, record.key_length):
            self.noise = self.noise.repeat(2, 1, 1, 1)

    def places(self, part: Callable[[AttentionRecord], Tensor], *, follow: bool) -> tuple[Grid, Tensor] | None:
        """Returns the grid and the places (W, N) of the tokens that `part` of the record is made of, or None.

        Args:
            part: From the record to tokens (B x W, h, N, d).
            follow: Whether what attention returns follows its queries, so that places are known behind a layer that
                has fewer queries than keys. Otherwise it has no derivative.
        """
        failures, tried = 0, self._events(None, follow).count
        for at_once in (*_AT_ONCE, tried):
            first = max(0, tried - at_once)
            if first == tried:
                break
            events = self._events(first, follow)
            tokens = part(events.record)
            kept = [carrier for number in reversed(range(first, tried)) for carrier in events.carriers[number]]
            for place, (carrier, grid, layout) in enumerate(kept):
                derivatives = _derivatives(tokens, carrier, grid, layout)
                if derivatives is None:
                    continue
                if (found := _sources(grid, *derivatives)) is not None:
                    padded = _before_padding(tokens, grid, kept[place + 1 :])
                    size, places = padded or found
                    return size, places[: self.windows]
                failures += 1
                if failures == _FAILURES:
                    return None
            tried = first
        return None

    def _events(self, first: int | None, follow: bool) -> "_Events":
        """Returns what went through the model until the attention, from number `first` on."""
        events = _Events(self.model, self.record, self.noise, self.windows)
        with events.watching(first, follow=follow):
            self.model(self.noise)
        return events


def _values(record: AttentionRecord) -> Tensor:
    """Returns what follows a record's keys, (B, h, K, d)."""
    return record.values


def _queries(record: AttentionRecord) -> Tensor:
    """Returns what follows a record's queries, (B, h, Q, d): rows of weights where the model formed these itself."""
    return record.source.queries if isinstance(record.source, AttentionInputs) else record.source


# How a tensor holds a feature map: the shape of a value for each place, and of one for each channel.
Layout = Callable[[Tensor, Tensor], Tensor]
Carrier = tuple[Tensor, Grid, Layout]


def _channels_first(places: Tensor, channels: Tensor) -> Tensor:
    return channels[:, None, None] * places


def _channels_last(places: Tensor, channels: Tensor) -> Tensor:
    return places[..., None] * channels


def _flat(places: Tensor, channels: Tensor) -> Tensor:
    return places.flatten()[:, None] * channels


def _derivatives(
    tokens: Tensor, carrier: Tensor, grid: Grid, layout: Layout
) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
    """Returns the derivative of `tokens` (W, h, N, d) by a feature map, or None where they do not depend on it.

    It is a function from a code for each place (H, W) to what tokens change by when the map moves by that much along a
    random direction of its channels, (W, N, h x d); the second result is its value for a code of 1 everywhere.
    """
    if not tokens.requires_grad or not carrier.requires_grad:
        return None
    cotangent = torch.ones_like(tokens, requires_grad=True)
    with torch.enable_grad():
        (pulled,) = torch.autograd.grad(tokens, carrier, cotangent, create_graph=True, allow_unused=True)
    if pulled is None or not pulled.requires_grad:
        return None
    generator = torch.Generator().manual_seed(1)
    num_channels = carrier[0].numel() // (grid[0] * grid[1])
    channels = torch.randn(num_channels, generator=generator).to(carrier)

    def pushed(code: Tensor) -> Tensor:
        # What is pulled back is linear in the cotangent, and its derivative by it is the push forward.
        tangent = layout(code.to(carrier), channels).expand_as(carrier)
        (derivative,) = torch.autograd.grad(pulled, cotangent, tangent, retain_graph=True)
        return derivative.transpose(1, 2).flatten(2).double()

    one = pushed(torch.ones(grid))
    return (pushed, one) if one.any() and one.isfinite().all() else None


def _sources(grid: Grid, pushed: Callable[[Tensor], Tensor], one: Tensor) -> tuple[Grid, Tensor] | None:
    """Returns the grid and the places (W, N) of tokens with these derivatives, None where they have not one each.

    Where tokens come from more than one place, larger and larger cells of the map are taken for one place (a patch of
    pixels, the area that a pooling step sees), until each token comes from one.
    """
    square = one.square().sum(-1)
    real = square > _NOTHING * square.max()
    norm = square.where(real, square.new_ones(()))

    def cells(side: int, code: Callable[[Tensor], Tensor]) -> tuple[int, Tensor] | None:
        """Returns the number of the largest cells of which each token sees one, and which it sees (W, N)."""
        for size in range(1, side // 2 + 1):
            if side % size == 0:
                derivative = pushed(code((torch.arange(side) // size).float()))
                number = ((derivative * one).sum(-1) / norm).round()
                wrong = (derivative - number[..., None] * one).square().sum(-1)
                if (wrong <= _TOLERANCE**2 * square)[real].all():
                    return side // size, number.long()
        return None

    if (rows := cells(grid[0], lambda index: index[:, None].expand(grid))) is None:
        return None
    if (columns := cells(grid[1], lambda index: index[None].expand(grid))) is None:
        return None
    places = (rows[1] * columns[0] + columns[1]).masked_fill(~real, -1).cpu()
    return _distinct((rows[0], columns[0]), places)


def _before_padding(tokens: Tensor, grid: Grid, earlier: Sequence[Carrier]) -> tuple[Grid, Tensor] | None:
    """Returns grid and places of `tokens` on an earlier and smaller map, which was padded to the one of `grid`."""
    for carrier, size, layout in earlier:
        if size != grid and size[0] <= grid[0] and size[1] <= grid[1]:
            derivatives = _derivatives(tokens, carrier, size, layout)
            if derivatives is not None and (found := _sources(size, *derivatives)) is not None:
                return found
    return None


def _distinct(grid: Grid, places: Tensor) -> tuple[Grid, Tensor] | None:
    """Returns grid and places (W, N) where no window has a place twice; rows and columns of no token are left out."""
    ordered = places.sort(-1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        return None
    real = places >= 0
    rows, row_of = torch.unique(places[real] // grid[1], return_inverse=True)
    columns, column_of = torch.unique(places[real] % grid[1], return_inverse=True)
    if not all(_even(used, side) for used, side in ((rows, grid[0]), (columns, grid[1]))):
        return None
    places = places.masked_scatter(real, row_of * len(columns) + column_of)
    return (len(rows), len(columns)), places


def _even(used: Tensor, side: int) -> bool:
    """Whether the used rows (or columns) of a map are all of them, or every n-th."""
    steps = used.diff()
    return len(used) == side or (
        len(used) > 1 and bool((steps == steps[0]).all()) and len(used) * int(steps[0]) >= side
    )


class _Events:
    """The tensors that go into and come out of a model's modules until one attention is computed, in order.

    Those that may be a feature map of an image are counted; from number `first` on they are kept, with the history
    that leads from there to the attention.
    """

    def __init__(self, model: nn.Module, record: AttentionRecord, images: Tensor, windows: int) -> None:
        self.model, self.images, self.num_heads = model, images, record.num_heads
        # Tokens parted into windows have the form of a feature map, too.
        self.parted = {(windows, record.key_length), (windows, record.query_length)}
        self.count = 0
        self.carriers: dict[int, list[Carrier]] = {}
        self._capture = AttentionCapture(model, keep="queries_keys", layers=[record.index], detach=False)
        self._first: int | None = None
        self._done = False
        self._last: Tensor | None = None

    @property
    def record(self) -> AttentionRecord:
        """The wanted record, with its history."""
        return self._capture.records[0]

    @contextmanager
    def watching(self, first: int | None, *, follow: bool) -> Iterator[None]:
        """Counts, and keeps from number `first` on; None keeps nothing."""
        self._first = first
        with ExitStack() as stack:
            for module in self.model.modules():
                stack.callback(module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            stack.enter_context(self._capture)
            stack.enter_context(_Products(self._look, follow))
            with torch.set_grad_enabled(False):
                yield

    def _look(self) -> None:
        """Ends the watching where the attention has been recorded."""
        if not self._done:
            try:
                self._done = bool(self._capture.records)
            except AttentionNotFoundError:
                return
            torch.set_grad_enabled(False)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sizes = [size for value in (*args, *kwargs.values()) if (size := _size(value))]
        seen = tuple(self._see(module, value, sizes) for value in args)
        return seen, {name: self._see(module, value, sizes) for name, value in kwargs.items()}

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> Any:
        if type(output) is tuple:
            return tuple(self._see(module, value) for value in output)
        return self._see(module, output)

    def _see(self, module: nn.Module, value: Any, sizes: Sequence[Grid] = ()) -> Any:
        """Returns what the model goes on with in place of `value`, an input or output of `module`."""
        if self._done or not isinstance(value, Tensor) or not value.is_floating_point() or value is self._last:
            return value
        readings = self._readings(value, sizes)
        if not isinstance(module, _ON_MAPS):
            readings = [(grid, layout) for grid, layout in readings if grid not in self.parted]
        if not readings:
            return value
        number = self.count
        self.count += 1
        self._last = value
        if self._first is None or number < self._first:
            return value
        if number == self._first:
            torch.set_grad_enabled(True)
            # A copy, because the model may work on it in place.
            self._last = value = value.detach().requires_grad_().clone()
        self.carriers[number] = [(value, grid, layout) for grid, layout in readings]
        return value

    def _readings(self, value: Tensor, sizes: Sequence[Grid]) -> list[tuple[Grid, Layout]]:
        """Returns the ways in which `value` may be a feature map of each image; none where it is not."""
        readings: list[tuple[Grid, Layout]] = []
        num_images = len(self.images)
        # Keys that are pooled as a feature map have their heads in front, and an image's heads share places.
        if value.dim() == 4 and len(value) in (num_images, num_images * self.num_heads):
            _, first, second, third = value.shape
            readings = [((second, third), _channels_first), ((first, second), _channels_last)]
        elif value.dim() == 3 and len(value) == num_images:
            readings = [(size, _flat) for size in dict.fromkeys(sizes) if size[0] * size[1] == value.shape[1]]
        height, width = self.images.shape[-2:]
        return [(grid, layout) for grid, layout in readings if grid != (1, 1) and _is_scaled(grid, height, width)]


_ON_MAPS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm2d)


def _is_scaled(grid: Grid, height: int, width: int) -> bool:
    """Whether a grid is that of an image, reduced by one whole number, to a row or column at the border."""
    if min(grid) < 1 or grid[0] > height + 1 or grid[1] > width + 1:
        return False
    longer = 0 if height >= width else 1
    step = round((height, width)[longer] / grid[longer])
    for stride in range(max(1, step - 1), step + 2):
        if all(
            side // stride - 1 <= cells <= -(-side // stride) + 1
            for side, cells in zip((height, width), grid, strict=True)
        ):
            return True
    return False


def _size(value: Any) -> Grid | None:
    """Returns an argument (H, W) of a module as integers, None where it is something else."""
    if isinstance(value, Tensor) and value.shape == (2,) and not value.is_floating_point():
        value = value.tolist()
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return int(value[0]), int(value[1])
    return None


class _Products(TorchFunctionMode):
    """Cuts the derivative of products of two activations, which is the way in which attention mixes places.

    What attention returns has no history then; its keys, queries and values have theirs, and so have residual streams.
    With `follow`, row i of a product has the derivative of row i of its left factor: what attention returns lies where
    its queries lie.
    """

    def __init__(self, done: Callable[[], None], follow: bool) -> None:
        super().__init__()
        self.done, self.follow = done, follow

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in _PRODUCTS or any(isinstance(value, nn.Parameter) for value in args[:2]):
            return output
        self.done()
        left = args[0] if args else (kwargs or {}).get("query")
        if isinstance(output, tuple):
            return self._cut(output[0], left), *output[1:]
        return self._cut(output, None if func is Tensor.__rmatmul__ else left)

    def _cut(self, output: Tensor, left: Any) -> Tensor:
        """Returns `output` without history, or with that of the rows of `left`."""
        follows = self.follow and isinstance(left, Tensor) and left.requires_grad and torch.is_grad_enabled()
        if not follows or left.shape[-2] != output.shape[-2] or left.dim() != output.dim():
            return output.detach()
        columns = torch.arange(output.shape[-1], device=output.device) % left.shape[-1]
        return output.detach() + (left - left.detach())[..., columns]


_PRODUCTS = frozenset((F.scaled_dot_product_attention, F.multi_head_attention_forward, torch.einsum, *MATMULS))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode; at the end its mode is restored, module by module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

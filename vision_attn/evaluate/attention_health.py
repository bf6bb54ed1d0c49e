"""What a model's attention is like on photos: how far it looks, how evenly, how alike its heads are, what takes it.

Everything is reduced while the model runs, image by image and row block by row block, so that memory does not grow with
the number of layers or photos by more than a number for each token. `metrics.health` has the definitions; here stand
the model, its layers, and what is said about them in plain words.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vision_attn.attribution.base import seen_records
from vision_attn.attribution.encoders import find_encoder
from vision_attn.attribution.merged import group_sizes, merges_seen, num_tokens
from vision_attn.attribution.tokens import find_layout, is_known
from vision_attn.capture import AttentionCapture, AttentionRecord
from vision_attn.capture.records import Kind
from vision_attn.errors import UsageError
from vision_attn.evaluate.health_remarks import layer_means, remarks_on
from vision_attn.layout import TokenLayout
from vision_attn.metrics import health as metrics
from vision_attn.viz.health import HealthView

FIGURES = ("distance", "locality", "prefix", "norms")
"""What can be undefined for a model, by name; entropy, similarity and sinks never are."""

_KINDS: tuple[Kind, ...] = ("self", "cross", "window")
_BLOCK_SIZE = {"cpu": 2**22, "cuda": 2**26}  # attention weights in memory at a time
_PAIR_QUERIES = 256  # heads are compared on no more queries than this, evenly spaced
_NORMS_KEPT = 256  # photos of which the norms in every layer are kept; of the last layer all are


@dataclass(frozen=True, eq=False)
class AttentionHealth:
    """The attention of one model, measured on some photos.

    Letters: L layers (all attention that was seen, in running order), h heads of the layer that has most, N tokens, D
    blocks of the encoder, n photos. Tables hold means over the photos; NaN where a layer has no such head, and where a
    figure is not defined for it.

    Attributes:
        model: Name of its class.
        images: n.
        image_size: (H, W) of the photos as the model takes them.
        names: (L) of the modules.
        kinds: (L) "self", "cross" (a pooling head, pooled keys) or "window".
        heads: (L) how many.
        tokens: (L) how many keys each query had; with merging fewer and fewer.
        layout: The tokens' layout, None where it is not known.
        sink_times: How many times the uniform share a sink receives.
        distance: (L, h) `attention_distance` in pixels.
        uniform_distance: (L,) that of even attention.
        entropy: (L, h) in nats.
        relative_entropy: (L, h) as a share of ln K.
        neighbourhood: (L, h) `locality` within 3 x 3 patches.
        itself: (L, h) `locality` on the patch itself.
        uniform_neighbourhood: (L,) that of even attention.
        similarity: (L, h, h) of heads.
        redundancy: (L,) its mean beside the diagonal.
        prefix: (L, h, prefix tokens) what each prefix token takes of the patches' attention.
        sink_count: (L, h) keys that are sinks, a photo.
        sink_share: (L, h) what they take of all attention.
        patch_sink_share: (L, h) what those among them that are patches take of the patches' attention.
        largest: (L, h) the most that one key receives, in multiples of the uniform share.
        errors: Standard errors over the photos of distance, relative_entropy, neighbourhood and sink_share, (L, h).
        norms: (D, photos, N) norms of the tokens that the blocks give, of at most 256 photos; None where not seen.
        last_norms: (n, N) those of the last block, of all photos; None where not seen.
        thresholds: (D,) the norm above which a patch stands out.
        high_norm_share: (D,) the share of patches above it.
        high_norm: (n, *grid) boolean, which patches stand out after the last block; None where not seen.
        sinks: (n, *grid) boolean, which patches are sinks for the mean of all heads of a layer, in one layer at least;
            None where the layout is not known.
        largest_group: (L,) patches in the largest merged token, mean over the photos; 1 where nothing merged.
        undefined: Names of `FIGURES` that say nothing of this model, and why.
        remarks: What stands out, in sentences.
    """

    model: str
    images: int
    image_size: tuple[int, int]
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    heads: tuple[int, ...]
    tokens: tuple[int, ...]
    layout: TokenLayout | None
    sink_times: float
    distance: Tensor
    uniform_distance: Tensor
    entropy: Tensor
    relative_entropy: Tensor
    neighbourhood: Tensor
    itself: Tensor
    uniform_neighbourhood: Tensor
    similarity: Tensor
    redundancy: Tensor
    prefix: Tensor
    sink_count: Tensor
    sink_share: Tensor
    patch_sink_share: Tensor
    largest: Tensor
    errors: Mapping[str, Tensor]
    norms: Tensor | None
    last_norms: Tensor | None
    thresholds: Tensor
    high_norm_share: Tensor
    high_norm: Tensor | None
    sinks: Tensor | None
    largest_group: Tensor
    undefined: Mapping[str, str]
    remarks: tuple[str, ...] = field(default=())

    @property
    def artefacts(self) -> Tensor | None:
        """Patches that stand out by their norm or as sinks, boolean (n, *grid); None where neither was seen."""
        known = [mask for mask in (self.high_norm, self.sinks) if mask is not None]
        return torch.stack(known).any(0) if known else None

    def dominated(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns for each method's maps (n, h, w) of the same photos whether artefacts make the picture, boolean (n,).

        See `metrics.health.map_dominated`. All False where no artefacts are known.

        Raises:
            UsageError: there are more or fewer maps than photos, or they are no maps.
        """
        found = {}
        for name, of_method in maps.items():
            if len(of_method) != self.images:
                raise UsageError(
                    f"expected {self.images} maps of {name}, one for each photo that was looked at, got "
                    f"{len(of_method)}: give the maps of the same photos in the same order"
                )
            mask = self.artefacts
            none = torch.zeros(self.images, dtype=torch.bool)
            found[name] = none if mask is None else metrics.map_dominated(of_method.cpu(), mask)
        return found

    def map_remarks(self, maps: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Returns a warning for each method whose maps (n, h, w) are made by sinks and artefact tokens on any photo."""
        return tuple(
            f"{name} shows single bright patches: on {int(hit.sum())} of {self.images} photos at least half of what "
            "its maps show hot lies on sink or high-norm patches, whose attention may say nothing of the place. "
            "Believe them only where deletion and SaCo do."
            for name, hit in self.dominated(maps).items()
            if hit.any()
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold: all tables (None for NaN), norms as quantiles, masks as counts a patch."""
        tables = {
            name: _listed(getattr(self, name))
            for name in (*_TABLES, "uniform_distance", "uniform_neighbourhood", "similarity", "redundancy", "prefix")
        }
        counts = {
            name: None if mask is None else mask.sum(0).tolist()
            for name, mask in (("high_norm_photos", self.high_norm), ("sink_photos", self.sinks))
        }
        quantiles = None
        if self.norms is not None and self.layout is not None:
            of_patches = self.norms[..., self.layout.num_prefix :].flatten(1).double()
            levels = torch.tensor(_QUANTILES, dtype=torch.float64)
            quantiles = {"levels": list(_QUANTILES), "blocks": _listed(torch.quantile(of_patches, levels, dim=1).T)}
        return {
            "model": self.model,
            "images": self.images,
            "image_size": list(self.image_size),
            "names": list(self.names),
            "kinds": list(self.kinds),
            "heads": list(self.heads),
            "tokens": list(self.tokens),
            "layout": None if self.layout is None else self.layout.to_dict(),
            "sink_times": self.sink_times,
            **tables,
            **counts,
            "standard_errors": {name: _listed(table) for name, table in self.errors.items()},
            "patch_norm_quantiles": quantiles,
            "norm_thresholds": _listed(self.thresholds),
            "high_norm_share": _listed(self.high_norm_share),
            "largest_group": _listed(self.largest_group),
            "undefined": dict(self.undefined),
            "remarks": list(self.remarks),
        }

    def view(self) -> HealthView:
        """Returns what `viz.health.health_figure` draws."""
        layout = self.layout
        kinds = () if layout is None else tuple(dict.fromkeys(layout.prefix))
        prefix = {
            kind: layer_means(self.prefix[..., [name == kind for name in layout.prefix]].sum(-1)).numpy()
            for kind in kinds
            if layout is not None
        }
        patches = 0 if layout is None else layout.num_prefix
        return HealthView(
            model=self.model,
            images=self.images,
            kinds=self.kinds,
            tokens=self.tokens,
            distance=self.distance.numpy(),
            uniform_distance=self.uniform_distance.numpy(),
            relative_entropy=self.relative_entropy.numpy(),
            neighbourhood=self.neighbourhood.numpy(),
            itself=self.itself.numpy(),
            uniform_neighbourhood=self.uniform_neighbourhood.numpy(),
            similarity=self.similarity.numpy(),
            prefix=prefix,
            patch_sinks=layer_means(self.patch_sink_share).numpy(),
            largest=self.largest.numpy(),
            errors={name: table.numpy() for name, table in self.errors.items()},
            norms=None if self.norms is None else self.norms[..., patches:].flatten(1).numpy(),
            last_norms=None if self.last_norms is None else self.last_norms[:, patches:].flatten().numpy(),
            prefix_norms={}
            if self.last_norms is None or layout is None
            else {
                kind: self.last_norms[:, [*(name == kind for name in layout.prefix), *[False] * layout.num_patches]]
                .flatten()
                .numpy()
                for kind in kinds
            },
            thresholds=self.thresholds.numpy(),
            places={
                name: mask.double().mean(0).numpy()
                for name, mask in (("high norm", self.high_norm), ("sink", self.sinks))
                if mask is not None
            },
            largest_group=self.largest_group.numpy(),
            undefined=dict(self.undefined),
            remarks=self.remarks,
        )


_HEADS = ("distance", "entropy", "relative_entropy", "neighbourhood", "itself")
_SINKS = ("sink_count", "sink_share", "patch_sink_share", "largest")
_TABLES = (*_HEADS, *_SINKS)
_ERRORS = ("distance", "relative_entropy", "neighbourhood", "sink_share")
_QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


def attention_health(
    model: nn.Module,
    images_batches: Iterable[Tensor],
    *,
    layout: TokenLayout | None = None,
    sink_times: float = 10.0,
) -> AttentionHealth:
    """Returns what the attention of `model` is like on some photos; the model is left as it was found.

    Any model that `AttentionCapture` sees. Where the layout is not known, where attention is within windows or a
    pooling head's, there are no patches to look from: entropy, similarity of heads and sinks are measured, and
    `undefined` says what is not and why. Attention among merged tokens counts as that among the patches they hold
    (entropy and similarity are those of the tokens themselves). Heads are compared on at most 256 queries of each
    attention, evenly spaced; all else is exact.

    Args:
        model: Any module with attention, (B, 3, H, W) in.
        images_batches: Batches (B, 3, H, W) of one image size, normalised as the model wants them; moved to its device.
            A few dozen photos settle the means of heads; the standard errors say how well.
        layout: The tokens' layout, where `find_layout` cannot know it.
        sink_times: How many times the uniform share a key has to receive to be a sink.

    Raises:
        UsageError: there is no photo, the photos have several sizes, or the layers change from batch to batch.
        AttentionNotFoundError: the model shows no attention (a CNN), or is compiled.

    Example:
        >>> health = attention_health(model, [images])
        >>> health.distance.shape, health.remarks[0]
        (torch.Size([12, 6]), 'Heads look ...')
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a model as torch.nn.Module, got {type(model).__name__}: wrap it in a module")
    if isinstance(images_batches, Tensor):
        raise UsageError("expected batches of images, got one tensor: pass [images]")
    if not sink_times > 1:
        raise UsageError(f"expected sink_times above 1, got {sink_times}: 10 asks for ten times even attention")
    looked: _Looked | None = None
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for images in images_batches:
            images = _checked_images(model, images)
            if looked is None:
                looked = _Looked(model, images, layout, sink_times)
            looked.look(images)
    finally:
        for module, training in modes.items():
            module.training = training
    if looked is None:
        raise UsageError("expected at least one batch of images, got none: give some photos")
    return looked.health()


class _Layer(NamedTuple):
    """One attention of the model, the same in every batch."""

    name: str
    kind: str
    heads: int
    keys: int
    layout: TokenLayout | None  # of the tokens that are both its queries and its keys


class _Looked:
    """What was seen of a model so far: a number a photo, layer and head."""

    def __init__(self, model: nn.Module, images: Tensor, layout: TokenLayout | None, sink_times: float) -> None:
        self.model, self.sink_times = model, sink_times
        self.size = (images.shape[-2], images.shape[-1])
        self.reason = ""  # why the layout is not known
        self.layout = layout or self._found_layout(images)
        encoder = find_encoder(model)
        self.blocks = () if encoder is None else encoder.blocks
        self.layers: tuple[_Layer, ...] = ()
        self.values: dict[str, list[list[Tensor]]] = {}  # by name: of each batch, of each layer
        self.norms: list[Tensor] = []  # of each batch, (D, b, N)
        self.last_norms: list[Tensor] = []
        self.sinks: list[Tensor] = []
        self.count = 0

    def _found_layout(self, images: Tensor) -> TokenLayout | None:
        self.reason = "the layout of its tokens is not known: pass layout="
        if not is_known(self.model):
            return None
        try:
            return find_layout(self.model, images)
        except UsageError as error:
            self.reason = str(error)
            return None

    def look(self, images: Tensor) -> None:
        """Runs the model on a batch and keeps the numbers."""
        if tuple(images.shape[-2:]) != self.size:
            raise UsageError(
                f"expected photos of one size, got {self.size[0]} x {self.size[1]} and then {images.shape[-2]} x "
                f"{images.shape[-1]}: distances in pixels need one, resize them"
            )
        norms: dict[int, Tensor] = {}
        capture = AttentionCapture(self.model, keep=partial(self._reduce, count=len(images)), kinds=_KINDS)
        with torch.no_grad(), ExitStack() as stack:
            merged = stack.enter_context(merges_seen(self.model))
            for place, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(partial(_keep_norms, norms, place, merged)).remove)
            stack.enter_context(capture)
            self.model(images)
        records = seen_records(capture)
        layers = tuple(self._layer(record) for record in records)
        if self.layers and [layer.name for layer in layers] != [layer.name for layer in self.layers]:
            raise UsageError(
                f"expected the same layers in every batch, got {len(self.layers)} and then {len(layers)}: look at a "
                "model that runs the same way for every photo"
            )
        self.layers = layers
        self._keep_sinks([record.reduced.pop("received").cpu() for record in records], len(images))
        for name in records[0].reduced:
            self.values.setdefault(name, []).append([record.reduced[name].cpu() for record in records])
        self._keep_norms([norms[place].cpu() for place in sorted(norms)], len(images))
        self.count += len(images)

    def _keep_sinks(self, received: Sequence[Tensor], count: int) -> None:
        """Keeps which patches are sinks for the heads of a layer together, in one layer at least."""
        layout = self.layout
        if layout is None:
            return
        mask = torch.zeros(count, *layout.grid, dtype=torch.bool)
        for layer, share in zip(self.layers, received, strict=True):
            if layer.layout is layout:
                mask |= layout.patches(metrics.sinks(share.mean(1), times=self.sink_times))
        self.sinks.append(mask)

    def _keep_norms(self, norms: Sequence[Tensor], count: int) -> None:
        layout = self.layout
        if layout is None or not norms or any(one.shape != (count, layout.num_tokens) for one in norms):
            return
        if self.count < _NORMS_KEPT:
            self.norms.append(torch.stack(list(norms))[:, : _NORMS_KEPT - self.count])
        self.last_norms.append(norms[-1])

    def _layer(self, record: AttentionRecord) -> _Layer:
        return _Layer(record.name, record.kind, record.num_heads, record.key_length, self._layout_of(record))

    def _layout_of(self, record: AttentionRecord) -> TokenLayout | None:
        """Returns the layout of the tokens that are both queries and keys of a record, None where there is none."""
        if record.kind != "self":
            return None
        positions, layout = record.positions, self.layout
        if positions is None:
            return layout if layout is not None and num_tokens(record) == layout.num_tokens else None
        # A block on a feature map whose queries and keys are all of its places, row by row.
        every = torch.arange(math.prod(positions.grid))
        row_by_row = [
            places is not None and places.shape == (1, len(every)) and torch.equal(places[0].cpu(), every)
            for places in (positions.keys, positions.queries)
        ]
        return TokenLayout(prefix=(), grid=positions.grid) if all(row_by_row) else None

    def _reduce(self, record: AttentionRecord, *, count: int) -> dict[str, Tensor]:
        """Returns the numbers of one attention, of each photo and head; windows of a photo as their mean."""
        weights = record.num_heads * record.query_length * record.key_length
        at_once = max(1, _block_size(record) // weights)
        parts = [
            self._of_images(record, slice(start, min(start + at_once, record.batch_size)))
            for start in range(0, record.batch_size, at_once)
        ]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        windows = record.batch_size // count
        return {name: values.unflatten(0, (count, windows)).mean(1) for name, values in found.items()}

    def _of_images(self, record: AttentionRecord, images: slice) -> dict[str, Tensor]:
        """Returns the numbers of some images of a record."""
        layout, means = self._layout_of(record), _Means()
        whole = layout is None or record.merged is None
        for first, weights in _row_blocks(record, images):
            means.add(weights.shape[2], entropy=metrics.entropy(weights))
            compared = weights[:, :, -first % math.ceil(record.query_length / _PAIR_QUERIES) :]
            compared = compared[:, :, :: math.ceil(record.query_length / _PAIR_QUERIES)]
            means.add(compared.shape[2], similarity=metrics.head_similarity(compared))
            if whole:
                self._add_places(means, weights, first, layout)
        if layout is not None and record.merged is not None:
            for first, weights in _spread_blocks(record, images):
                self._add_places(means, weights, first, layout)
        found = means.values()
        keys = record.key_length
        found["relative_entropy"] = found["entropy"] / math.log(keys) if keys > 1 else found["entropy"] * math.nan
        like = found["entropy"]
        for name in ("distance", "neighbourhood", "itself"):
            found.setdefault(name, torch.full_like(like, math.nan))
        if layout is not self.layout or layout is None:
            found["prefix"] = like.new_full((*like.shape, self.num_prefix), math.nan)
        ones = torch.ones(len(like), device=like.device)
        found["largest_group"] = (
            ones if record.merged is None else metrics.largest_group(record.merged[images]).to(ones)
        )
        return found | self._sinks_of(found["received"], found.pop("given", None), layout)

    @property
    def num_prefix(self) -> int:
        return 0 if self.layout is None else self.layout.num_prefix

    def _add_places(self, means: "_Means", weights: Tensor, first: int, layout: TokenLayout | None) -> None:
        """Adds what is said of rows by where their queries and keys lie."""
        rows = weights.shape[2]
        means.add(rows, received=metrics.received_share(weights))
        if layout is None:
            return
        patches = rows - min(rows, max(0, layout.num_prefix - first))
        if patches:
            near, same = metrics.locality(weights, layout, first=first)
            distance = metrics.attention_distance(weights, layout, self._patch(layout), first=first)
            prefix = metrics.prefix_share(weights, layout, first=first)
            given = metrics.received_share(weights[:, :, rows - patches :])
            means.add(patches, distance=distance, neighbourhood=near, itself=same, prefix=prefix, given=given)

    def _patch(self, layout: TokenLayout) -> tuple[float, float]:
        return self.size[0] / layout.grid[0], self.size[1] / layout.grid[1]

    def _sinks_of(self, received: Tensor, given: Tensor | None, layout: TokenLayout | None) -> dict[str, Tensor]:
        """Returns how many keys are sinks, and what they take; `given` is what patches give, (b, h, N)."""
        marked = metrics.sinks(received, times=self.sink_times)
        share = (received * marked).sum(-1)
        if layout is None or given is None:
            of_patches = torch.full_like(share, math.nan)
        else:
            of_patches = (given * marked)[..., layout.num_prefix :].sum(-1)
        return {
            "sink_count": marked.sum(-1).to(received),
            "sink_share": share,
            "patch_sink_share": of_patches,
            "largest": received.amax(-1) * received.shape[-1],
        }

    def health(self) -> AttentionHealth:
        """Returns what was seen in all batches."""
        each = {
            name: [torch.cat(parts).double() for parts in zip(*batches, strict=True)]
            for name, batches in self.values.items()
        }
        heads = max(layer.heads for layer in self.layers)
        tables: dict[str, Any] = {name: _table([one.mean(0) for one in each[name]], heads) for name in _TABLES}
        errors = {name: _table([_standard_error(one) for one in each[name]], heads) for name in _ERRORS}
        similarity = torch.full((len(self.layers), heads, heads), math.nan, dtype=torch.float64)
        for place, one in enumerate(each["similarity"]):
            similarity[place, : one.shape[1], : one.shape[1]] = one.mean(0)
        redundancy = [metrics.redundancy_of(one.mean(0)) for one in each["similarity"]]
        prefix = torch.full((len(self.layers), heads, self.num_prefix), math.nan, dtype=torch.float64)
        for place, one in enumerate(each["prefix"]):
            prefix[place, : one.shape[1]] = one.mean(0)
        health = AttentionHealth(
            model=type(self.model).__name__,
            images=self.count,
            image_size=self.size,
            names=tuple(layer.name for layer in self.layers),
            kinds=tuple(layer.kind for layer in self.layers),
            heads=tuple(layer.heads for layer in self.layers),
            tokens=tuple(layer.keys for layer in self.layers),
            layout=self.layout,
            sink_times=self.sink_times,
            **tables,
            **self._references(),
            similarity=similarity,
            redundancy=torch.stack(redundancy),
            prefix=prefix,
            errors=errors,
            **self._norms(),
            sinks=torch.cat(self.sinks) if any(layer.layout is self.layout for layer in self._placed()) else None,
            largest_group=torch.stack([one.mean() for one in each["largest_group"]]),
            undefined=self._undefined(),
        )
        return replace(health, remarks=tuple(remarks_on(health)))

    def _placed(self) -> list[_Layer]:
        return [layer for layer in self.layers if layer.layout is not None]

    def _references(self) -> dict[str, Any]:
        """Returns what even attention gives in each layer."""
        distance, near = [], []
        for layer in self.layers:
            there = layer.layout
            distance.append(math.nan if there is None else metrics.uniform_distance(there, self._patch(there)))
            near.append(math.nan if there is None else metrics.uniform_locality(there)[0])
        return {
            "uniform_distance": torch.tensor(distance, dtype=torch.float64),
            "uniform_neighbourhood": torch.tensor(near, dtype=torch.float64),
        }

    def _norms(self) -> dict[str, Any]:
        """Returns norms, thresholds and what is above them."""
        none = torch.zeros(0, dtype=torch.float64)
        if self.layout is None or not self.norms:
            return {"norms": None, "last_norms": None, "thresholds": none, "high_norm_share": none, "high_norm": None}
        norms, last = torch.cat(self.norms, 1), torch.cat(self.last_norms)
        patches = norms[..., self.num_prefix :]
        thresholds = torch.tensor([metrics.norm_threshold(one) for one in patches], dtype=torch.float64)
        # Of all photos, also where there are more than have their norms kept in every layer.
        thresholds[-1] = metrics.norm_threshold(last[:, self.num_prefix :])
        high = self.layout.patches(last) > thresholds[-1]
        share = (patches.double() > thresholds[:, None, None]).double().mean((1, 2))
        share[-1] = high.double().mean()
        return {
            "norms": norms,
            "last_norms": last,
            "thresholds": thresholds,
            "high_norm_share": share,
            "high_norm": high,
        }

    def _undefined(self) -> dict[str, str]:
        """Returns which figures say nothing of this model, and why."""
        found: dict[str, str] = {}
        if not self._placed():
            windows = any(layer.kind == "window" for layer in self.layers)
            reason = "its attention is within windows" if windows else self.reason
            reason = reason if windows or self.layout is None else "no layer attends between all its patches"
            found |= dict.fromkeys(("distance", "locality"), reason)
        if self.layout is None:
            found["prefix"] = found.get("distance", self.reason)
        elif not self.num_prefix:
            found["prefix"] = "it has no class, distillation or register token"
        elif "distance" in found:
            found["prefix"] = found["distance"]
        if not self.norms:
            found["norms"] = "the tokens that its blocks give are not known" if self.layout else self.reason
        return found


class _Means:
    """Means over the rows of several blocks, each block with the number of rows that its mean is of."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, rows: int, **means: Tensor) -> None:
        """Adds the means of a block of so many rows."""
        for name, mean in means.items():
            if rows:
                self.sums[name] = self.sums[name] + mean * rows if name in self.sums else mean * rows
                self.counts[name] = self.counts.get(name, 0) + rows

    def values(self) -> dict[str, Tensor]:
        """Returns the means over all rows."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


def _checked_images(model: nn.Module, images: Any) -> Tensor:
    """Returns a batch on the model's device and in its floating type."""
    if not isinstance(images, Tensor) or images.dim() != 4 or not len(images) or not images.is_floating_point():
        got = f"{tuple(images.shape)} of {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise UsageError(
            f"expected batches of (B, 3, H, W) float images, got {got}: give the photos, normalised, without labels"
        )
    parameter = next((one for one in model.parameters() if one.is_floating_point()), None)
    return images if parameter is None else images.to(parameter.device, parameter.dtype)


def _keep_norms(
    norms: dict[int, Tensor],
    place: int,
    merged: Callable[[], Tensor | None],
    _module: nn.Module,
    _args: Any,
    output: Any,
) -> None:
    """Keeps the norms of the tokens that a block gives, one for each token before any merging."""
    tokens = output[0] if isinstance(output, tuple) else output
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        return
    lengths = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).norm(dim=-1)
    groups = merged()
    norms[place] = lengths if groups is None else lengths.gather(1, groups)


def _block_size(record: AttentionRecord) -> int:
    return _BLOCK_SIZE.get(record.values.device.type, _BLOCK_SIZE["cpu"])


def _row_blocks(record: AttentionRecord, images: slice) -> Iterator[tuple[int, Tensor]]:
    """Gives the first query and the weights (images, h, some queries, K) of all queries, block by block."""
    rows = max(1, _block_size(record) // (record.num_heads * record.key_length * (images.stop - images.start)))
    for first in range(0, record.query_length, rows):
        yield first, record.rows(first, min(first + rows, record.query_length), images=images)


def _spread_blocks(record: AttentionRecord, images: slice) -> Iterator[tuple[int, Tensor]]:
    """Gives what `_row_blocks` does for merged tokens as attention among all tokens, (images, h, some queries, N).

    Rows are those of the token's group; what a group receives is shared equally by its tokens.
    """
    assert record.merged is not None
    merged, weights = record.merged[images], record.rows(images=images)
    shares = weights / group_sizes(merged, weights[:, 0])[:, None, None]
    length = merged.shape[1]
    rows = max(1, _block_size(record) // (record.num_heads * length * len(merged)))
    for first in range(0, length, rows):
        asked = merged[:, None, first : first + rows, None].expand(-1, record.num_heads, -1, shares.shape[3])
        of_groups = shares.gather(2, asked)
        yield first, of_groups.gather(3, merged[:, None, None].expand(*of_groups.shape[:3], length))


def _table(rows: Sequence[Tensor], heads: int) -> Tensor:
    """Returns rows of several lengths as one table (L, heads), NaN where there is nothing."""
    table = torch.full((len(rows), heads), math.nan, dtype=torch.float64)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def _standard_error(values: Tensor) -> Tensor:
    """Returns the standard error of the mean over photos (n, ...); NaN of a single one."""
    return values.std(0) / math.sqrt(len(values)) if len(values) > 1 else torch.full_like(values[0], math.nan)


def _listed(values: Tensor) -> Any:
    """Returns a tensor as nested lists, with None for NaN."""
    if values.dim():
        return [_listed(one) for one in values]
    number = float(values)
    return None if math.isnan(number) else number

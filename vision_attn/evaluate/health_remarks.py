"""What stands out in a model's attention, said in plain words.

The borders that these words stand for are here, in one place; the numbers are all in `AttentionHealth`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from vision_attn.evaluate.attention_health import AttentionHealth

# What the remarks call so. Of the most entropy there can be; of the similarity of two heads; of the distance of even
# attention; of a patch's attention.
_EVEN, _NARROW, _ALIKE, _LOCAL, _TAKEN = 0.97, 0.1, 0.9, 0.5, 0.2
_FEW = 8  # photos; below, numbers are said to be of few


def remarks_on(health: "AttentionHealth") -> Iterator[str]:
    """Gives what stands out in the health of a model's attention, in sentences."""
    if health.images < _FEW:
        yield f"Measured on {health.images} photo{'s' * (health.images > 1)} only: give a few dozen to rely on it."
    yield from _of_distance(health)
    yield from _of_entropy(health)
    yield from _of_heads(health)
    yield from _of_prefix(health)
    yield from _of_sinks(health)
    yield from _of_norms(health)
    yield from _of_merging(health)
    for reason in dict.fromkeys(health.undefined.values()):
        names = [name for name, given in health.undefined.items() if given == reason]
        yield f"Not measured ({', '.join(names)}): {reason}."


def _of_distance(health: "AttentionHealth") -> Iterator[str]:
    relative = health.distance / health.uniform_distance[:, None]
    layers = [int(place) for place in (~relative.isnan()).any(1).nonzero()[:, 0]]
    if not layers:
        return
    first, last = layers[0], layers[-1]
    means = layer_means(health.distance)
    even = float(health.uniform_distance[first])
    sides = " x ".join(map(str, health.image_size))
    if first == last:
        yield f"Heads look {means[first]:.0f} px far on average, in {sides} px (even attention: {even:.0f} px)."
    else:
        yield (
            f"Heads look {means[first]:.0f} px far on average in layer {first} and {means[last]:.0f} px in layer "
            f"{last}, on photos of {sides} px (even attention: {even:.0f} px)."
        )
    local = [int((relative[place] < _LOCAL).sum()) for place in layers]
    early = layers[: max(1, len(layers) // 3)]
    near = sum(local[: len(early)])
    if near:
        of_early = sum(health.heads[place] for place in early)
        name = f"layer {early[0]}" if len(early) == 1 else f"layers {early[0]} to {early[-1]}"
        yield f"{near} of {of_early} heads in {name} are local: they look less than half as far as even attention."
    else:
        yield "No head in the first third of the layers is local; in models trained on much data some are."
    diagonal = (health.itself > 0.5).nonzero().tolist()
    if diagonal:
        yield f"{_heads(diagonal)} mostly at the patch itself: a map of {_it(diagonal)} shows no context."


def _of_entropy(health: "AttentionHealth") -> Iterator[str]:
    even = (health.relative_entropy > _EVEN).nonzero().tolist()
    if even:
        yield (
            f"{_heads(even)} at all keys almost evenly (entropy above {_percent(_EVEN)} of the most there can be): "
            f"a map of {_it(even)} says little of the photo."
        )
    narrow = (health.relative_entropy < _NARROW).nonzero().tolist()
    if narrow:
        yield f"{_heads(narrow)} at very few keys (entropy below {_percent(_NARROW)} of the most there can be)."


def _of_heads(health: "AttentionHealth") -> Iterator[str]:
    alike = [place for place, value in enumerate(health.redundancy.tolist()) if value > _ALIKE]
    if alike:
        yield (
            f"The heads of {_layers(alike)} are nearly the same (mean similarity above {_ALIKE}): one of them says "
            "what all do."
        )


def _of_prefix(health: "AttentionHealth") -> Iterator[str]:
    layout = health.layout
    if layout is None:
        return
    for kind in dict.fromkeys(layout.prefix):
        tokens = [name == kind for name in layout.prefix]
        share = layer_means(health.prefix[..., tokens].sum(-1))
        if share.isnan().all():
            continue
        most = int(share.nan_to_num(-1.0).argmax())
        even = sum(tokens) / layout.num_tokens
        if float(share[most]) > _TAKEN and float(share[most]) > health.sink_times * even:
            whose = f"The {kind} token takes" if sum(tokens) == 1 else f"The {sum(tokens)} {kind} tokens take"
            yield (
                f"{whose} up to {_percent(share[most])} of what patches give (layer {most}; even attention: "
                f"{_percent(even, 1)}): "
                "attention that goes there says nothing of places."
            )


def _of_sinks(health: "AttentionHealth") -> Iterator[str]:
    share = layer_means(health.patch_sink_share)
    if share.isnan().all() or not health.patch_sink_share.nan_to_num().any():
        return
    most = int(share.nan_to_num(-1.0).argmax())
    found = int((health.patch_sink_share.nan_to_num() > _TAKEN).sum())
    if found:
        place = divmod(int(health.patch_sink_share.nan_to_num().argmax()), health.distance.shape[1])
        yield (
            f"Patches serve as sinks: in {found} head{'s' * (found > 1)} a few patches, each with more than "
            f"{health.sink_times:g} times the even share, take over {_percent(_TAKEN)} of the patches' attention "
            f"(most in layer {place[0]}, head {place[1]}: {_percent(health.patch_sink_share[place])}; mean of layer "
            f"{most}: {_percent(share[most])})."
        )
    if health.sinks is not None and health.sinks.any():
        photos = int(health.sinks.flatten(1).any(1).sum())
        yield (
            f"On {_share(photos, health.images)} photos some patches are sinks for all heads of a layer together "
            f"({_percent(health.sinks.double().mean(), 1)} of all patches): "
            "either they are sinks, which say nothing of the place, or a small thing that the model reads everywhere. "
            "Deletion tells which."
        )


def _of_norms(health: "AttentionHealth") -> Iterator[str]:
    if health.high_norm is None or health.last_norms is None or health.layout is None:
        return
    if not health.high_norm.any():
        yield "No patch stands out by its norm after the last block: no sign of artefact tokens."
        return
    norms = health.last_norms[:, health.layout.num_prefix :]
    photos = int(health.high_norm.flatten(1).any(1).sum())
    remedy = "" if "register" in health.layout.prefix else "; a model with registers has fewer (Darcet et al. 2024)"
    yield (
        f"{_percent(health.high_norm.double().mean(), 1)} of the patches, on {_share(photos, health.images)} photos, "
        f"have a norm above {health.thresholds[-1]:.3g} after the last block (median {norms.median():.3g}, largest "
        f"{norms.max():.3g}): artefact tokens, at which attention maps light up whatever lies there{remedy}."
    )


def _of_merging(health: "AttentionHealth") -> Iterator[str]:
    most = int(health.largest_group.argmax())
    if health.layout is None or float(health.largest_group[most]) <= 1:
        return
    yield (
        f"Merging leaves {health.tokens[-1]} of {health.layout.num_tokens} tokens in the last layer; the largest holds "
        f"{health.largest_group[most]:.1f} patches on average, which share one value in a map."
    )


def _percent(share: Any, digits: int = 0) -> str:
    return f"{100 * float(share):.{digits}f} %"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}"


def _layers(places: Sequence[int]) -> str:
    if len(places) == 1:
        return f"layer {places[0]}"
    return f"layers {', '.join(map(str, places[:-1]))} and {places[-1]}"


def _heads(places: Sequence[Sequence[int]]) -> str:
    """Returns which heads look, as the start of a sentence: one by name, several by number and layers."""
    if len(places) == 1:
        return f"Head {places[0][1]} of layer {places[0][0]} looks"
    layers = sorted({layer for layer, _ in places})
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    return f"{len(places)} heads of {where} look"


def _it(places: Sequence[Any]) -> str:
    return "it" if len(places) == 1 else "these"


def layer_means(table: Tensor) -> Tensor:
    """Returns the mean over the heads that a layer has, (L,); NaN where there is none."""
    return table.nanmean(-1)

"""Does a map depend on what it explains, and not on what it should not? Weights drawn anew, and a little noise.

Source: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018. A map that stays the same when the model knows
nothing any more does not explain the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.metrics.agreement import rank_correlation, ssim

Layer = tuple[str, list[nn.Module]]


@dataclass(frozen=True, eq=False)
class Randomization:
    """What became of maps while layers were drawn anew, from the top down.

    Attributes:
        names: (L,) the layer down to which all are random at each level.
        fractions: (L,) the share of the layers that is random, ending in 1.
        rank_correlation: (L, B) with the maps of the trained model.
        ssim: (L, B), the same of their structural similarity.
    """

    names: tuple[str, ...]
    fractions: tuple[float, ...]
    rank_correlation: Tensor
    ssim: Tensor


def top_down_layers(model: nn.Module, images: Tensor) -> list[Layer]:
    """Returns the parts of a model that hold parameters, last one to run first, each with its qualified name.

    A part is a child of a sequence of blocks (`blocks.11`), or a module that stands outside of one (`head`). Parameters
    that a module holds itself (a class token, positions, a gain) are its part's; those of the model itself come last,
    for they stand before the first layer. What does not run is left out.

    Args:
        model: Any module.
        images: (B, 3, H, W) for one forward pass.
    """
    seen: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    holders = [module for module in names if next(module.parameters(recurse=False), None) is not None]

    def see(module: nn.Module, _args: object, _output: object) -> None:
        seen.append(names[module])

    handles = [module.register_forward_hook(see) for module in holders]
    try:
        with torch.no_grad():
            model(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[str, list[nn.Module]] = {}
    for name in dict.fromkeys(reversed(seen)):
        module = model.get_submodule(name)
        groups.setdefault(_part_of(name), []).append(module)
    # The model runs as a whole, so it is seen last of all; what it holds itself stands at its entrance.
    own = groups.pop("", None)
    # Modules that hold parameters and whose forward is not called (a pooling head's latent, ...) go with their part.
    known = {module for group in groups.values() for module in group} | set(own or [])
    for module in holders:
        if module not in known and _part_of(names[module]) in groups:
            groups[_part_of(names[module])].append(module)
    layers = list(groups.items())
    return [*layers, ("", own)] if own else layers


def _part_of(name: str) -> str:
    """Returns a module's name up to the last number in it, or its first part: `blocks.3.attn.qkv` is in `blocks.3`."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else parts[0]


@contextmanager
def randomized(model: nn.Module, layers: Sequence[Layer], *, seed: int = 0) -> Iterator[None]:
    """Draws the parameters of layers anew for the time of the block; all of the model is restored to the bit after it.

    Every weight tensor gets normal values with the mean and deviation of its own, each gain and bias the same: so the
    layers know nothing, and still give activations of a size that the others can work with (with a constructor's
    initialisation a network without its running statistics mostly answers with one constant). Buffers, such as a batch
    norm's running statistics, stay. A parameter of one value, or of equal ones, stays as it is.

    Args:
        model: The model that they are in.
        layers: From `top_down_layers`.
        seed: Of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[nn.Parameter, Tensor]] = []
    done: set[int] = set()
    try:
        with torch.no_grad():
            for _, modules in layers:
                for module in modules:
                    for parameter in module.parameters(recurse=False):
                        # Two modules may share one.
                        if id(parameter) in done or not parameter.is_floating_point():
                            continue
                        done.add(id(parameter))
                        kept.append((parameter, parameter.detach().clone()))
                        parameter.copy_(_drawn(parameter, generator))
        yield
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)


def _drawn(parameter: Tensor, generator: torch.Generator) -> Tensor:
    values = parameter.detach().float().cpu()
    spread = float(values.std()) if values.numel() > 1 else 0.0
    return values.mean() + spread * torch.randn(values.shape, generator=generator)


def weight_randomization(
    make_maps: Callable[[], Tensor], model: nn.Module, images: Tensor, *, levels: int = 5, seed: int = 0
) -> Randomization:
    """Returns how alike maps stay while a model's layers are drawn anew, one after the other from the top down.

    Args:
        make_maps: Gives the maps (B, h, w) of the same images and classes each time, from the model as it is.
        model: The model that it asks.
        images: (B, 3, H, W) for the order of the layers.
        levels: At how many shares of the layers maps are made; the first is the last layer alone, the last all of them.
        seed: Of the values.

    Raises:
        UsageError: no module with parameters ran, or `levels` is below 2.
    """
    if levels < 2:
        raise UsageError(f"expected at least 2 levels, got {levels}: the last layer, and all of them")
    layers = top_down_layers(model, images)
    if not layers:
        raise UsageError("expected a model with parameters, got none that ran: there is nothing to draw anew")
    first = make_maps()
    counts = sorted({round(1 + (len(layers) - 1) * level / (levels - 1)) for level in range(levels)})
    correlations, similarities = [], []
    for count in counts:
        with randomized(model, layers[:count], seed=seed):
            maps = make_maps().nan_to_num(0.0, 0.0, 0.0)
        correlations.append(rank_correlation(first, maps))
        similarities.append(ssim(first, maps))
    return Randomization(
        names=tuple(layers[count - 1][0] for count in counts),
        fractions=tuple(count / len(layers) for count in counts),
        rank_correlation=torch.stack(correlations),
        ssim=torch.stack(similarities),
    )


def stability(
    make_maps: Callable[[Tensor], Tensor], images: Tensor, *, noise: float = 0.05, repeats: int = 3, seed: int = 0
) -> Tensor:
    """Returns how alike maps stay under small Gaussian noise, (B,): the mean rank correlation with those without it.

    Args:
        make_maps: From images (B, 3, H, W) to maps (B, h, w), for the same classes each time.
        images: (B, 3, H, W), normalised.
        noise: Its standard deviation, in units of the normalised image's (1 is that of natural photos).
        repeats: How many times it is drawn.
        seed: Of the noise.
    """
    if not noise > 0 or repeats < 1:
        raise UsageError(f"expected noise above 0 and at least 1 repeat, got {noise} and {repeats}")
    generator = torch.Generator().manual_seed(seed)
    first = make_maps(images)
    found = []
    for _ in range(repeats):
        drawn = torch.randn(images.shape, generator=generator).to(images)
        found.append(rank_correlation(first, make_maps(images + noise * drawn)))
    return torch.stack(found).mean(0)

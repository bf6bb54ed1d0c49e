"""Does a map depend on what it explains, and not on what it should not? Weights drawn anew, and a little noise.

Source: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018. A map that stays the same when the model knows
nothing any more does not explain the model.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vision_attn.errors import UsageError
from vision_attn.metrics.agreement import rank_correlation, ssim

Layer = tuple[str, list[nn.Module]]

_SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


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

    A part is a block of a sequence of blocks, whole (`blocks.11`, `layer4.1`), or a module that stands outside of one
    (`head`); its modules are those that hold parameters themselves. The order is that in which they are entered in one
    forward pass, so what the model itself holds (a class token, positions) comes last. A module that is not called,
    because its parent reads its parameters (the output projection in `nn.MultiheadAttention`) or because it is not
    used, stands where the module registered before it does: nothing that holds parameters is left out.

    The model is left as it was: it runs in evaluation mode and without gradients.

    Args:
        model: Any module.
        images: (B, 3, H, W); the first one is run.
    """
    names = {module: name for name, module in model.named_modules()}
    holders = [module for module in names if next(module.parameters(recurse=False), None) is not None]
    entered: dict[nn.Module, int] = {}

    def enter(module: nn.Module, _args: object) -> None:
        entered.setdefault(module, len(entered))

    handles = [module.register_forward_pre_hook(enter) for module in names]
    try:
        with _evaluating(model), torch.no_grad():
            model(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    place, places = -1, {}
    for module in names:
        place = places[module] = entered.get(module, place)
    parts: dict[str, list[nn.Module]] = {}
    # The sort is stable: what was not called stays behind its neighbour.
    for module in sorted(holders, key=lambda module: places[module]):
        parts.setdefault(_part_of(model, names[module]), []).append(module)
    return list(reversed(parts.items()))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and each of its modules back into its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _part_of(model: nn.Module, name: str) -> str:
    """Returns the part that a module belongs to: down from the model, the first that is no frame around blocks."""
    part, module = "", model
    for step in name.split(".") if name else ():
        if part and not _frames_blocks(module):
            break
        part, module = f"{part}.{step}".lstrip("."), module.get_submodule(step)
    return part


def _frames_blocks(module: nn.Module) -> bool:
    """Returns whether a module is a sequence (of blocks or single layers) or holds one of blocks, at any depth."""
    if isinstance(module, _SEQUENCES):
        return True
    return any(
        any(next(inner.parameters(), None) is not None for inner in block.children())
        for sequence in module.modules()
        if isinstance(sequence, _SEQUENCES)
        for block in sequence.children()
    )


@contextmanager
def randomized(
    model: nn.Module, layers: Sequence[Layer], *, seed: int = 0, images: Tensor | None = None
) -> Iterator[None]:
    """Draws the parameters of layers anew for the time of the block; all of them are restored to the bit after it.

    Each tensor gets normal values with its own mean and standard deviation. So the layers know nothing, and their
    activations keep about the size that the layers above expect: with a constructor's initialisation, which Adebayo et
    al. use, a deep network can answer every image with the same constant, and a map of a constant would be blamed on
    the method. A parameter of one value, or of equal ones, stays as it is. The same seed draws the same values for a
    layer whether few or many others are drawn after it.

    Running statistics of batch norms belong to the old weights: kept, they no longer centre anything. With `images`,
    those in the layers are measured anew on them, from the bottom up in one forward pass; without, they stay.

    Args:
        model: The model that they are in.
        layers: From `top_down_layers`.
        seed: Of the values; torch's random state is not touched.
        images: (B, 3, H, W) to measure running statistics on, where there are any.
    """
    modules = list(dict.fromkeys(module for _, several in layers for module in several))
    norms = [module for module in modules if isinstance(module, _BatchNorm) and module.running_mean is not None]
    # A tensor that two modules share is one.
    parameters = {id(p): p for module in modules for p in module.parameters(recurse=False) if p.is_floating_point()}
    statistics = {id(b): b for norm in norms for b in norm.buffers(recurse=False)}
    kept = [(tensor, tensor.detach().clone()) for tensor in (*parameters.values(), *statistics.values())]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.copy_(_drawn(parameter, generator))
            if images is not None and norms:
                _measure(model, norms, images)
        yield
    finally:
        with torch.no_grad():
            for tensor, values in kept:
                tensor.copy_(values)


def _drawn(parameter: Tensor, generator: torch.Generator) -> Tensor:
    # On the CPU, so that every device has the same values.
    values = parameter.detach().double().cpu()
    spread = float(values.std()) if values.numel() > 1 else 0.0
    if spread == 0:
        return values
    return float(values.mean()) + spread * torch.randn(values.shape, generator=generator, dtype=torch.float64)


def _measure(model: nn.Module, norms: Sequence[_BatchNorm], images: Tensor) -> None:
    """Sets running statistics to those of what comes in, each norm before it runs, so that the next sees its output."""

    def measure(norm: _BatchNorm, args: tuple[Tensor, ...]) -> None:
        rows = args[0].float().movedim(1, 0).flatten(1)
        assert norm.running_mean is not None and norm.running_var is not None
        if rows.shape[1] > 1:
            norm.running_mean.copy_(rows.mean(1))
            norm.running_var.copy_(rows.var(1, correction=0))

    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        with _evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()


def weight_randomization(
    make_maps: Callable[[], Tensor], model: nn.Module, images: Tensor, *, levels: int = 5, seed: int = 0
) -> Randomization:
    """Returns how alike maps stay while a model's layers are drawn anew, one after the other from the top down.

    The raw maps are compared, signs and all. A map of noise is unlike every other, so a low value is no praise by
    itself; a high one with all layers drawn is a verdict.

    Args:
        make_maps: Gives the maps (B, h, w) of the same images and classes each time, from the model as it is.
        model: The model that it asks.
        images: (B, 3, H, W), for the order of the layers and for running statistics; see `randomized`.
        levels: At how many shares of the layers maps are made; the first is the last layer alone, the last all of them.
        seed: Of the values.

    Returns:
        NaN at a level where an image's map is constant or not finite, or already was.

    Raises:
        UsageError: the model has no parameters, or `levels` is below 2.
    """
    if levels < 2:
        raise UsageError(f"expected at least 2 levels, got {levels}: the last layer, and all of them")
    layers = top_down_layers(model, images)
    if not layers:
        raise UsageError("expected a model with parameters, got one without: there is nothing to draw anew")
    # A copy: what is made later may be written to the same memory.
    first = make_maps().detach().clone()
    counts = sorted({round(1 + (len(layers) - 1) * level / (levels - 1)) for level in range(levels)})
    correlations, similarities = [], []
    for count in counts:
        with randomized(model, layers[:count], seed=seed, images=images):
            maps = make_maps().detach()
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
        seed: Of the noise. An image's noise follows from its pixels and `seed` alone, so it is the same in any batch.

    Returns:
        NaN where one of an image's maps is constant or not finite.

    Raises:
        UsageError: `noise` or `repeats` leaves nothing to compare.
    """
    if not 0 < noise < math.inf or repeats < 1:
        raise UsageError(
            f"expected noise above 0 and at least 1 repeat, got {noise} and {repeats}: 0.05 and 3 are usual"
        )
    first = make_maps(images).detach().clone()
    generators = [_generator_for(image, seed) for image in images]
    found = []
    for _ in range(repeats):
        drawn = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
        found.append(rank_correlation(first, make_maps(images + noise * drawn.to(images)).detach()))
    return torch.stack(found).mean(0)


def _generator_for(image: Tensor, seed: int) -> torch.Generator:
    pixels = image.detach().float().contiguous().cpu().numpy()
    return torch.Generator().manual_seed(zlib.crc32(pixels.tobytes(), seed))

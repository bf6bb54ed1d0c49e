"""`explain`: a model and images in, maps out, the model as it was.

Every method is a function `(model, images, target, **options) -> maps`, entered into `METHODS`. What all of them need
stands here once: the checks of what a person gives, the model's mode and random state, the logits, the result.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.attribution.tokens import find_layout, is_known
from vision_attn.capture import AttentionCapture, AttentionRecord
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.geometry import Geometry
from vision_attn.layout import TokenLayout
from vision_attn.registry import Registry, unknown

METHODS: Registry[Callable[..., Tensor]] = Registry("method")
"""Explanation methods by name. Info: `class_specific`, and `needs`, what a model must have: "global attention" (every
token attends to every other), "attention" or "nothing"."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """Maps, and what reproduces them.

    Args:
        maps: (B, h, w), raw values, on the patch grid or on pixels; never normalised.
        method: The method's registered name.
        options: All of its options, defaults included.
        targets: (B,), the class explained for each image. Methods that are not class-specific give the same map for
            every target.
        probabilities: (B,), the softmaxed logit of that class.
        layout: The tokens' layout, None where the method worked without.
        geometry: How each original image became the input, None where it was not given.
        versions: Versions of the libraries that made the maps.
    """

    maps: Tensor
    method: str
    options: Mapping[str, Any]
    targets: Tensor
    probabilities: Tensor
    layout: TokenLayout | None
    geometry: tuple[Geometry, ...] | None
    versions: Mapping[str, str]


def explain(
    model: nn.Module,
    images: Tensor,
    *,
    method: str = "rollout",
    target: int | Sequence[int] | Tensor | None = None,
    layout: TokenLayout | None = None,
    geometry: Geometry | Sequence[Geometry] | None = None,
    **options: Any,
) -> Explanation:
    """Returns where `model` looks in `images`, by one method.

    The model is left as it was found: mode, hooks, gradients, and torch's random state.

    Args:
        model: An image classifier, (B, 3, H, W) -> logits (B, classes).
        images: (B, 3, H, W) floats, normalised as the model wants them; moved to its device and floating type.
        method: A name in `METHODS`.
        target: The class asked about: None for the predicted one, one index, or one for each image.
        layout: The tokens' layout, where `find_layout` cannot know it.
        geometry: How each original image became the input; one for all, or one for each. Kept with the result.
        **options: The method's own.

    Raises:
        UsageError: an argument cannot be used, the method does not suit the model, or the layout cannot be known.
        AttentionNotFoundError: the method needs attention and the model shows none; the message names what works.

    Example:
        >>> result = explain(model, images, method="rollout", head_fusion="max", discard_ratio=0.9)
        >>> result.maps.shape
        torch.Size([8, 16, 16])
    """
    function = METHODS.get(method)
    options = _all_options(method, function, options)
    images = _checked_images(model, images)
    geometry = _one_each(geometry, len(images))
    if layout is None and is_known(model):
        layout = find_layout(model, images)
    with _as_found(model), _first_logits(model, images) as logits:
        chosen = None if target is None else _checked_target(target, images)
        if METHODS.info(method)["class_specific"] and chosen is None:
            chosen = _logits(model, images, logits).argmax(-1)
        arguments = {"layout": layout} if "layout" in inspect.signature(function).parameters else {}
        maps = function(model, images, chosen, **arguments, **options).detach()
        probabilities = _logits(model, images, logits).softmax(-1)
    chosen = probabilities.argmax(-1) if chosen is None else chosen
    if int(chosen.max()) >= probabilities.shape[-1]:
        raise UsageError(
            f"expected a target below {probabilities.shape[-1]}, the number of classes, got {int(chosen.max())}: "
            "classes count from 0"
        )
    return Explanation(
        maps=maps,
        method=method,
        options=options,
        targets=chosen,
        probabilities=probabilities.gather(-1, chosen[:, None])[:, 0],
        layout=layout if arguments else None,
        geometry=geometry,
        versions=_versions(),
    )


def captured(model: nn.Module, images: Tensor) -> list[AttentionRecord]:
    """Returns the attention of one forward pass, as queries and keys.

    Raises:
        AttentionNotFoundError: none was seen; the message names the methods that work without.
    """
    with AttentionCapture(model, keep="queries_keys") as capture, torch.no_grad():
        model(images)
    try:
        return capture.records
    except AttentionNotFoundError as error:
        raise AttentionNotFoundError(f"{error}: {', '.join(working_methods('nothing'))}") from None


def working_methods(*needs: str) -> list[str]:
    """Returns the names of the methods that ask no more of a model than `needs`."""
    return [name for name in METHODS.names() if METHODS.info(name)["needs"] in needs]


def _all_options(method: str, function: Callable[..., Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the method's options: its defaults, and over them what was given."""
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "layout"}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in given:
        if name not in defaults and not takes_any:
            error = unknown(f"option of {method}", name, defaults)
            raise error if defaults else UsageError(f"expected no options for {method}, got {name!r}: leave it out")
    return {**defaults, **given}


def _checked_images(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the images, detached, on the model's device and in its floating type."""
    if not isinstance(images, Tensor):
        raise UsageError(f"expected (B, 3, H, W) images as a tensor, got {type(images).__name__}: convert it first")
    shape = tuple(images.shape)
    if images.dim() == 3:
        raise UsageError(f"expected (B, 3, H, W) images, got {shape}: add a batch dimension with images[None]")
    if images.dim() != 4 or 0 in shape or shape[1] != 3:
        hint = "move the channels with images.permute(0, 3, 1, 2)" if shape[-1:] == (3,) else "give RGB images"
        raise UsageError(f"expected (B, 3, H, W) images, got {shape}: {hint}")
    if not images.is_floating_point():
        raise UsageError(
            f"expected float images, normalised as the model wants them, got {images.dtype}: normalise them first"
        )
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    images = images.detach()
    return images if parameter is None else images.to(parameter)


def _checked_target(target: int | Sequence[int] | Tensor, images: Tensor) -> Tensor:
    """Returns the targets, (B,), on the images' device."""
    try:
        targets = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        targets = torch.empty(0, 0)
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.shape not in {(), (len(images),)}:
        raise UsageError(
            f"expected a target of None, one class index or {len(images)} (one for each image), got {target!r}: "
            "give whole numbers"
        )
    if int(targets.min()) < 0:
        raise UsageError(f"expected a target of at least 0, got {int(targets.min())}: classes count from 0")
    return targets.to(images.device, torch.long).expand(len(images))


def _one_each(geometry: Geometry | Sequence[Geometry] | None, count: int) -> tuple[Geometry, ...] | None:
    """Returns one geometry for each of `count` images."""
    if geometry is None:
        return None
    each = (geometry,) * count if isinstance(geometry, Geometry) else tuple(geometry)
    if len(each) != count:
        raise UsageError(f"expected {count} geometries, one for each image, got {len(each)}: give one, or one each")
    return each


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode; at the end its mode, module by module, and the random state are restored."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def _first_logits(model: nn.Module, images: Tensor) -> Iterator[list[Tensor]]:
    """Gives a list that receives the logits when a method runs the model on `images`, so that nobody runs it twice."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not seen and args and args[0] is images:
            seen.append(_as_logits(output))

    handle = model.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _logits(model: nn.Module, images: Tensor, seen: list[Tensor]) -> Tensor:
    """Returns the logits for `images`, (B, classes); runs the model only if nobody has."""
    if not seen:
        with torch.no_grad():
            model(images)
    return seen[0]


def _as_logits(output: Any) -> Tensor:
    """Returns a model's logits (B, classes), detached and in float32 at least."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"expected a model that returns logits (B, classes), got {got}: wrap it so that it does")
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32))


def _versions() -> dict[str, str]:
    """Returns the versions of the libraries that take part in an explanation and are loaded."""
    names = ("vision_attn", "torch", "timm", "transformers", "torchvision")
    return {name: str(sys.modules[name].__version__) for name in names if name in sys.modules}

"""`explain`: a model and images in, maps out, the model as it was.

Every method is a function `(model, images, target, **options) -> maps`, entered into `METHODS`, or any callable that
takes the first three. What all of them need stands here once: the checks of what a person gives, the model's state, the
logits, the result and its file.
"""

import inspect
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from vision_attn.attribution.encoders import all_known, find_encoder
from vision_attn.attribution.notebook import explanation_html
from vision_attn.attribution.tokens import answers_by_class, attends_globally, find_layout, is_known
from vision_attn.capture import AttentionCapture, AttentionRecord
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.files import write_whole
from vision_attn.geometry import Geometry
from vision_attn.layout import TokenLayout
from vision_attn.registry import Registry, close_names, unknown

Method = Callable[..., Any]
Target = int | str | Sequence[Any] | Tensor | np.ndarray

METHODS: Registry[Method] = Registry("method")
"""Explanation methods by name. Info: `class_specific`; `needs`, what a model must have: "global attention" (every token
attends to every other), "attention", "gates" or "nothing"; `control`, for what explains nothing; and `predicts`, for a
class-specific method that takes None as the predicted class, which it sees in its own forward pass."""

_FORMAT = "vision_attn.explanation"
# A model's hooks and mode, and the random state, belong to all threads: what one puts back another would lose.
_ONE_AT_A_TIME = threading.RLock()
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Maps, and what reproduces them.

    Args:
        maps: (B, h, w), or (B, T, h, w) where several classes were asked for; raw values, on the patch grid, the
            feature map or on pixels; never normalised.
        method: The method's registered name, or the name of the callable.
        options: All of its options, defaults included; what the method chose itself stands as it was chosen.
        targets: (B,) or (B, T), the class explained for each image. Methods that are not class-specific give the same
            map for every target.
        probabilities: The softmaxed logits of those classes, in the same shape.
        layout: The tokens' layout, None where the method worked without.
        geometry: How each original image became the input, None where it was not given.
        versions: Versions of the libraries that made the maps.
        classes: The names of the model's classes, None where they are not known.
    """

    maps: Tensor
    method: str
    options: Mapping[str, Any]
    targets: Tensor
    probabilities: Tensor
    layout: TokenLayout | None
    geometry: tuple[Geometry, ...] | None
    versions: Mapping[str, str]
    classes: tuple[str, ...] | None = None

    def _repr_html_(self) -> str:
        return explanation_html(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Returns the path of one new safetensors file with everything in it: tensors, and the rest as JSON.

        Raises:
            UsageError: there is something at `path`, it cannot be written, or an option is nothing that JSON can hold.

        Example:
            >>> explain(model, images).save("cat.safetensors")  # doctest: +SKIP
            >>> Explanation.load("cat.safetensors").maps.shape  # doctest: +SKIP
            torch.Size([8, 16, 16])
        """
        path = Path(path)
        if os.path.lexists(path):
            raise UsageError(f"expected a new file, got {path}, which exists: choose another name or move it away")
        rest = {
            "version": 1,
            "method": self.method,
            "options": dict(self.options),
            "layout": None if self.layout is None else self.layout.to_dict(),
            "geometry": None if self.geometry is None else [geometry.to_dict() for geometry in self.geometry],
            "versions": dict(self.versions),
            "classes": self.classes,
        }
        try:
            metadata = json.dumps(rest, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"expected options that JSON can hold, got {self.options} ({error}): keep the maps with torch.save"
            ) from error
        tensors = {"maps": self.maps, "targets": self.targets, "probabilities": self.probabilities}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return write_whole(path, to_safetensors(tensors, {_FORMAT: metadata}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Explanation":
        """Returns the explanation that `save` wrote, on the CPU.

        Raises:
            UsageError: there is no such file, it is damaged, or it holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("maps", "targets", "probabilities")}
                rest = json.loads((file.metadata() or {})[_FORMAT])
            if rest["version"] != 1:
                raise UsageError(
                    f"expected an explanation of version 1 in {path}, got version {rest['version']}: "
                    "read it with the vision_attn that wrote it"
                )
            geometry, layout, classes = rest["geometry"], rest["layout"], rest["classes"]
            return cls(
                method=rest["method"],
                options={name: _hashable(value) for name, value in rest["options"].items()},
                layout=None if layout is None else TokenLayout.from_dict(layout),
                geometry=None if geometry is None else tuple(map(Geometry.from_dict, geometry)),
                versions=rest["versions"],
                classes=None if classes is None else tuple(classes),
                **tensors,
            )
        except OSError as error:
            raise UsageError(
                f"expected a file at {path}, got an error ({error.strerror or error}): check the path"
            ) from error
        except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise UsageError(
                f"expected an explanation in {path}, got a file that is damaged or holds something else ({error}): "
                "write it with Explanation.save"
            ) from error


def explain(
    model: nn.Module,
    images: Tensor,
    *,
    method: str | Method | None = None,
    target: Target | None = None,
    classes: Sequence[str] | None = None,
    layout: TokenLayout | None = None,
    geometry: Geometry | Sequence[Geometry] | None = None,
    **options: Any,
) -> Explanation:
    """Returns where `model` looks in `images`, by one method.

    The model is left as it was found, also after an exception: mode, hooks, gradients, and torch's random state. It may
    be in training, frozen, compiled (its original runs) or wrapped for distribution, and the caller without gradients.

    Args:
        model: An image classifier, (B, 3, H, W) -> logits (B, classes), or an output that holds them as `logits`.
        images: (B, 3, H, W) floats, normalised as the model wants them; moved to its device and floating type.
        method: A name in `METHODS`; None for that of `default_method`; or a callable
            `(model, images, target) -> maps`, with target (B,), the maps (B, h, w) or (B, 1, h, w), a tensor or an
            array: an object of another library goes into a lambda. It runs with gradients on; the hooks and gradients
            that it leaves are taken away.
        target: The class asked about: None for the predicted one; an index or a name; one for each image; or several at
            once, as (1, T) for all images or (B, T).
        classes: The classes' names, in the order of the logits; `model.classes` (or, in transformers' models, the
            configuration's labels) where left out.
        layout: The tokens' layout, where `find_layout` cannot know it.
        geometry: How each original image became the input; one for all, or one for each. Kept with the result.
        **options: The method's own.

    Raises:
        UsageError: an argument cannot be used, the method does not suit the model, or the layout cannot be known.
        AttentionNotFoundError: the method needs attention and the model shows none; the message names what works.

    Example:
        >>> explain(model, images).method
        'rollout'
        >>> result = explain(model, images, method="rollout", head_fusion="max", discard_ratio=0.9)
        >>> result.maps.shape
        torch.Size([8, 16, 16])
        >>> explain(model, images, method="generic", target=[["cat", "dog"]]).maps.shape
        torch.Size([8, 2, 16, 16])
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a model as torch.nn.Module, got {type(model).__name__}: wrap it in a module")
    if layout is not None and not isinstance(layout, TokenLayout):
        raise UsageError(f"expected a TokenLayout, got {layout!r}: pass layout=TokenLayout(prefix=..., grid=(h, w))")
    name, function, info = _resolve(default_method(model) if method is None else method)
    options = _all_options(name, function, options)
    geometry = _one_each(geometry, len(images) if isinstance(images, Tensor) else 0)
    names = _class_names(model, classes)
    model = _original(model)
    with _ONE_AT_A_TIME, torch.inference_mode(False), torch.enable_grad():
        images = _checked_images(model, images)
        takes_layout = "layout" in _parameters(function)
        found = layout is None and takes_layout and is_known(model)
        if found:
            layout = find_layout(model, images)
        arguments = {"layout": layout} if takes_layout else {}
        chosen = None if target is None else _checked_target(target, images, names)
        with ExitStack() as stack:
            stack.enter_context(_as_found(model))
            if takes_layout and not info.get("control"):
                stack.enter_context(_one_run(model))
            asks_a_row = found and info.get("needs") in ("global attention", "attention")
            pooling = stack.enter_context(_pooling_seen(model)) if asks_a_row else None
            logits = stack.enter_context(_first_logits(model, images))
            if info["class_specific"] and not info.get("predicts"):
                predicted = _logits(model, images, logits)
                chosen = predicted.argmax(-1) if chosen is None else chosen
                check_target(chosen, predicted.shape[-1])
            several = chosen is not None and chosen.dim() == 2
            each = list(chosen.unbind(-1)) if chosen is not None and several else [chosen]
            maps = []
            for one in each if info["class_specific"] else each[:1]:
                answer = function(model, _own(images, method), one, **arguments, **options)
                if isinstance(answer, tuple):
                    answer, settled = answer
                    options = {**options, **settled}
                maps.append(_checked_maps(answer, len(images), name))
            answered = _logits(model, images, logits)
            if pooling is not None:
                pooling.check(answered)
            probabilities = answered.softmax(-1)
    if names is not None and len(names) != probabilities.shape[-1]:
        if classes is not None or _has_names(target):
            raise UsageError(
                f"expected {probabilities.shape[-1]} class names, one for each logit, got {len(names)}: "
                "pass classes= in the order of the logits"
            )
        names = None  # the model's own, left from another head
    chosen = probabilities.argmax(-1) if chosen is None else chosen
    check_target(chosen, probabilities.shape[-1])
    return Explanation(
        maps=torch.stack(maps, 1).expand(-1, len(each), -1, -1) if several else maps[0],
        method=name,
        options={option: _hashable(value) for option, value in options.items()},
        targets=chosen,
        probabilities=probabilities.gather(-1, chosen.view(len(images), -1)).view_as(chosen),
        layout=layout if takes_layout else None,
        geometry=geometry,
        versions=_versions(),
        classes=names,
    )


def default_method(model: nn.Module) -> str:
    """Returns the name of the method that stands for all that can be said of a model at once.

    "grad_rollout" where all tokens attend to each other in every layer, as far as that is known of the model, and there
    are classes: plain rollout, the same for every class, was no better than a centred blob in
    docs/which-explanation.md. "rollout" where there is no class to ask about, and in CaiT, whose class token joins
    late. "grad_cam", which asks for nothing but a feature map, for every other one: CNNs, window and hierarchical
    models, strangers. Where no feature map is found either (CrossViT, TNT), it says so and names what works.
    """
    if not attends_globally(model):
        return "grad_cam"
    return "grad_rollout" if answers_by_class(model) else "rollout"


def captured(model: nn.Module, images: Tensor, *, keep: Any = "queries_keys") -> list[AttentionRecord]:
    """Returns the attention of one forward pass without gradients, kept as `AttentionCapture` does it for `keep`.

    Raises:
        AttentionNotFoundError: none was seen; the message names the methods that work without.
    """
    with AttentionCapture(model, keep=keep) as capture, torch.no_grad():
        model(images)
    return seen_records(capture)


def seen_records(capture: AttentionCapture) -> list[AttentionRecord]:
    """Returns the records of a capture.

    Raises:
        AttentionNotFoundError: there are none; the message names the methods that work without.
    """
    try:
        return capture.records
    except AttentionNotFoundError as error:
        raise AttentionNotFoundError(f"{error}: {', '.join(working_methods('nothing'))}") from None


def working_methods(*needs: str) -> list[str]:
    """Returns the names of the methods that ask no more of a model than `needs`; controls come last."""
    names = [name for name in METHODS.names() if METHODS.info(name)["needs"] in needs]
    return sorted(names, key=lambda name: bool(METHODS.info(name).get("control")))


def logits_of(output: Any) -> Tensor:
    """Returns the logits (B, classes) in what a model returned, with their autograd history.

    Raises:
        UsageError: there are none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise UsageError(f"expected a model that returns logits (B, classes), got {got}: wrap it so that it does")
    return logits


def target_logits(logits: Tensor, target: Tensor | None) -> Tensor:
    """Returns each image's logit of its target, (B,); of the predicted class where `target` is None.

    Raises:
        UsageError: a target is not below the number of classes.
    """
    target = logits.argmax(-1) if target is None else target
    check_target(target, logits.shape[-1])
    return logits.gather(-1, target[:, None])[:, 0]


def check_gradients(logits: Tensor, model: nn.Module, method: str) -> None:
    """Raises UsageError where logits were computed without gradients, though these were on."""
    if not logits.requires_grad:
        raise UsageError(
            f"expected logits with gradients for {method}, got logits of {type(model).__name__} without: let its "
            "forward neither detach nor run under torch.no_grad, or use rollout or raw or occlusion"
        )


def check_target(target: Tensor, num_classes: int) -> None:
    """Raises UsageError where a target is not below the number of classes."""
    if int(target.max()) >= num_classes:
        raise UsageError(
            f"expected a target below {num_classes}, the number of classes, got {int(target.max())}: "
            "classes count from 0"
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Takes `requires_grad` from the parameters, so that no gradient is computed for them; at the end it is restored.

    Raises:
        UsageError: the model was made under `torch.inference_mode`, so that nothing can be differentiated by it.
    """
    parameters = list(model.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        raise UsageError(
            "expected a model whose gradients can be had, got one that was made under torch.inference_mode: "
            "make it outside, or under torch.no_grad"
        )
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_()


def _resolve(method: Any) -> tuple[str, Method, Mapping[str, Any]]:
    """Returns a method's name, its function and what is known about it."""
    if isinstance(method, str):
        return method, METHODS.get(method), METHODS.info(method)
    if not callable(method):
        raise UsageError(
            f"expected a method's name or a callable (model, images, target) -> maps, got {type(method).__name__}: "
            f"choose one of {', '.join(METHODS.names())}"
        )
    return getattr(method, "__name__", type(method).__name__), method, {"class_specific": True}


def _parameters(function: Method) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function; of one that does not tell them, none."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def unknown_option(of: str, name: str, known: Iterable[str]) -> UsageError:
    """Returns the error for an option that `of`, a method or several, does not take; it names those that take it."""
    known = list(known)
    others = [other for other in METHODS if name in _defaults(METHODS.get(other))]
    if others and not close_names(name, known):
        return UsageError(
            f"expected an option of {of} ({', '.join(known) or 'it has none'}), got {name!r}: "
            f"leave it out or choose a method that takes it, {' or '.join(others)}"
        )
    if not known:
        return UsageError(f"expected no options for {of}, got {name!r}: leave it out")
    return unknown(f"option of {of}", name, known)


def _defaults(function: Method) -> dict[str, Any]:
    """Returns the options of a method and what each is where it is not given."""
    parameters = _parameters(function).values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "layout"}


def _all_options(method: str, function: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the method's options: its defaults, and over them what was given."""
    parameters = _parameters(function).values()
    defaults = _defaults(function)
    takes_any = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in given:
        if name not in defaults and not takes_any:
            raise unknown_option(method, name, defaults)
    for name, value in defaults.items():
        if value is inspect.Parameter.empty and name not in given:
            raise UsageError(f"expected the option {name!r}, without which {method} cannot run, got none: pass {name}=")
    # NumPy's numbers become Python's, which a file can hold.
    given = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    return {**defaults, **given}


def _original(model: nn.Module) -> nn.Module:
    """Returns the model that runs call by call in this process: a compiled one's original, without its distribution."""
    distributed = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, distributed):
            model = model.module
        else:
            return model


def _class_names(model: nn.Module, classes: Sequence[str] | None) -> tuple[str, ...] | None:
    """Returns the names of the classes, given or the model's own."""
    if isinstance(classes, str):
        raise UsageError(f"expected classes as a sequence of names, got {classes!r}: pass [{classes!r}, ...]")
    if classes is None:
        classes = getattr(model, "classes", None)
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if classes is None and isinstance(labels, Mapping):
        classes = [str(labels[index]) for index in sorted(labels)]
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        return None
    return tuple(map(str, classes))


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
    # What was made under inference_mode can be copied into autograd, but not used there.
    images = images.clone() if images.is_inference() else images.detach()
    return images if parameter is None else images.to(parameter.device, parameter.dtype)


def _own(images: Tensor, method: str | Method | None) -> Tensor:
    """Returns what a method may work on: a callable that we do not know gets a copy, as it may write into it."""
    return images.clone() if callable(method) else images


def _checked_target(target: Target, images: Tensor, names: tuple[str, ...] | None) -> Tensor:
    """Returns the targets, (B,) or (B, T), on the images' device."""
    count = len(images)
    try:
        targets = torch.as_tensor(_indices(target, names))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, UsageError):
            raise
        targets = torch.empty(0)
    whole = not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool
    several = targets.dim() == 2 and targets.shape[0] in (1, count) and targets.shape[1] > 0
    if not whole or not (several or targets.shape in {(), (count,)}):
        raise UsageError(
            f"expected a target of None, one class, {count} (one for each image), or several for each as (1, T) or "
            f"({count}, T), got {target!r}: give whole numbers or names"
        )
    if int(targets.min()) < 0:
        raise UsageError(f"expected a target of at least 0, got {int(targets.min())}: classes count from 0")
    targets = targets.clone().to(images.device, torch.long)
    return targets.expand(count, -1) if several else targets.expand(count)


def _has_names(target: Any) -> bool:
    """Returns whether a target is given by names."""
    return isinstance(target, str) or (isinstance(target, Sequence | np.ndarray) and any(map(_has_names, target)))


def _indices(target: Any, names: tuple[str, ...] | None) -> Any:
    """Returns the target with each name replaced by its index."""
    if isinstance(target, str):
        if names is None:
            raise UsageError(
                f"expected a class index, got {target!r} for a model without class names: pass classes= with them"
            )
        if target not in names:
            raise unknown("class", target, names)
        return names.index(target)
    if isinstance(target, np.ndarray):
        target = target.tolist()
    if isinstance(target, Sequence):
        return [_indices(one, names) for one in target]
    return target


def _one_each(geometry: Geometry | Sequence[Geometry] | None, count: int) -> tuple[Geometry, ...] | None:
    """Returns one geometry for each of `count` images."""
    if geometry is None:
        return None
    each = (geometry,) * count if isinstance(geometry, Geometry) else tuple(geometry)
    if len(each) != count:
        raise UsageError(f"expected {count} geometries, one for each image, got {len(each)}: give one, or one each")
    return each


def _checked_maps(maps: Any, count: int, method: str) -> Tensor:
    """Returns a method's maps (B, h, w), in float32 at least, detached."""
    if isinstance(maps, np.ndarray):
        maps = torch.from_numpy(np.ascontiguousarray(maps))
    if not isinstance(maps, Tensor):
        raise UsageError(
            f"expected maps ({count}, h, w) from {method}, got {type(maps).__name__}: return a tensor or an array"
        )
    shape = tuple(maps.shape)
    if maps.dim() == 4 and shape[1] == 1:
        maps = maps[:, 0]
    if maps.dim() != 3 or shape[0] != count or 0 in shape:
        raise UsageError(
            f"expected maps ({count}, h, w) or ({count}, 1, h, w) from {method}, got {shape}: "
            "return one map for each image, without colours"
        )
    return maps.detach().to(torch.promote_types(maps.dtype, torch.float32))


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode; at the end all is as it was, also what a method of another library changed.

    Restored are the mode and the hooks of every module, `requires_grad` and `.grad` of every parameter, and the random
    state. Gradients are put aside rather than copied: a backward pass makes new ones, and these go.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    modes = [module.training for module in modules]
    hooks = [[(table, dict(table)) for name in _HOOKS if (table := getattr(module, name))] for module in modules]
    gradients = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    # Activations that are computed again in the backward pass are not those that a capture recorded.
    checkpointing: list[Any] = [module for module in modules if getattr(module, "grad_checkpointing", False) is True]
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), ExitStack() as stack:
        stack.callback(_restore, modules, modes, hooks, parameters, gradients, checkpointing)
        model.eval()
        for module in checkpointing:
            module.grad_checkpointing = False
        for parameter in parameters:
            parameter.grad = None
        yield


def _restore(
    modules: list[nn.Module],
    modes: list[bool],
    hooks: list[list[tuple[dict[int, Any], dict[int, Any]]]],
    parameters: list[nn.Parameter],
    gradients: list[tuple[bool, Tensor | None]],
    checkpointing: list[Any],
) -> None:
    """Puts back what `_as_found` noted."""
    for module, training, tables in zip(modules, modes, hooks, strict=True):
        module.training = training
        for name in _HOOKS:
            getattr(module, name).clear()
        for table, entries in tables:
            table.update(entries)
    for parameter, (requires_grad, gradient) in zip(parameters, gradients, strict=True):
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)
        parameter.grad = gradient
    for module in checkpointing:
        module.grad_checkpointing = True


@contextmanager
def _first_logits(model: nn.Module, images: Tensor) -> Iterator[list[Tensor]]:
    """Gives a list that receives the logits when a method runs the model on `images`, so that nobody runs it twice."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not seen and args and args[0] is images:
            logits = logits_of(output).detach()
            seen.append(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    handle = model.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _one_run(model: nn.Module) -> Iterator[None]:
    """Raises UsageError where encoders run more than once for an answer (a mean over flipped images, an ensemble).

    The layers of all runs would pass for those of one, and maps of flipped images would lie flipped.
    """
    encoders = [encoder for encoder, _, _ in all_known(model) if encoder is not model]
    runs = 0

    def begin(_module: nn.Module, _args: Any) -> None:
        nonlocal runs
        runs = 0

    def count(_module: nn.Module, _args: Any) -> None:
        nonlocal runs
        runs += 1
        if runs > 1:
            raise UsageError(
                f"expected a model that runs one encoder once, got more runs for one answer of {type(model).__name__}: "
                f"explain the {type(encoders[0]).__name__} in it, or use integrated_gradients or occlusion"
            )

    handles = [model.register_forward_pre_hook(begin)]
    handles += [encoder.register_forward_pre_hook(count) for encoder in encoders]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Pooling:
    """Whether a wrapped encoder's own pooling makes the answer, as the layout that is found from it supposes."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder
        self.own = False
        self.tokens: Tensor | None = None

    def see(self, _module: nn.Module, _args: Any, output: Any) -> None:
        answer = getattr(output, "logits", output)
        self.own = self.own or (isinstance(answer, Tensor) and answer.dim() == 2)

    def keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        self.tokens = tokens.detach() if isinstance(tokens, Tensor) else None

    def check(self, logits: Tensor) -> None:
        """Raises UsageError where the encoder gave tokens and something around it made the answer of them."""
        if self.own:
            return
        encoder = find_encoder(self.encoder)
        if encoder is not None and self.tokens is not None:
            with torch.no_grad():
                answer = encoder.head(self.tokens).to(logits.dtype)
            if answer.shape == logits.shape and torch.allclose(answer, logits, rtol=1e-2, atol=1e-2):
                return
        raise UsageError(
            f"expected the pooling of {type(self.encoder).__name__} itself, got an answer that something around it "
            'makes of its tokens: pass layout=TokenLayout(prefix=..., grid=(h, w), query="class" or "mean") with what '
            "it reads"
        )


@contextmanager
def _pooling_seen(model: nn.Module) -> Iterator[_Pooling | None]:
    """Gives what watches the one encoder inside a model; None where the model is the encoder."""
    ((encoder, _, _),) = all_known(model)
    parts = find_encoder(encoder)
    if encoder is model or parts is None:
        yield None
        return
    pooling = _Pooling(encoder)
    handles = [encoder.register_forward_hook(pooling.see), parts.blocks[-1].register_forward_hook(pooling.keep)]
    try:
        yield pooling
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: nn.Module, images: Tensor, seen: list[Tensor]) -> Tensor:
    """Returns the logits for `images`, (B, classes), in float32 at least; runs the model only if nobody has."""
    if not seen:
        with torch.no_grad():
            model(images)
    return seen[0]


def _hashable(value: Any) -> Any:
    """Returns an option as it is kept, with tuples for lists: JSON turns tuples into lists."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _versions() -> dict[str, str]:
    """Returns the versions of the libraries that take part in an explanation and are loaded."""
    names = ("vision_attn", "torch", "timm", "transformers", "torchvision", "captum")
    return {name: str(sys.modules[name].__version__) for name in names if name in sys.modules}

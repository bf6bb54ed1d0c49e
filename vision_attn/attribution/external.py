"""Methods on pixels that captum computes: what the logit owes to the image itself, whatever the network is.

captum is optional (`pip install vision-attn[explain]`) and has its one door here.
"""

from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vision_attn.attribution.base import METHODS, check_gradients, frozen, logits_of
from vision_attn.errors import UsageError
from vision_attn.metrics.baselines import fill
from vision_attn.registry import unknown

Baseline = Literal["mean", "black", "blur"]


@METHODS.register("integrated_gradients", class_specific=True, needs="nothing")
def integrated_gradients(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    *,
    steps: int = 50,
    baseline: Baseline = "mean",
    batch_size: int = 16,
) -> Tensor:
    """Returns what each pixel adds to the target's logit on the way from a baseline to the image, (B, H, W), signed.

    Σ_colours (x - x') · ∫ ∂y/∂x (x' + α (x - x')) dα from 0 to 1, by Gauss-Legendre quadrature. A map sums to the
    difference of the logit between image and baseline, the better the more steps.

    Source: Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", ICML 2017; computed by captum.

    Args:
        model: Any classifier.
        images: (B, 3, H, W), as the model wants them.
        target: (B,), the class asked about; None for the predicted one.
        steps: Points on the way, each a forward and a backward pass.
        baseline: What counts as no image: "mean" (0 after normalisation, the colour that it subtracts), "black" (0
            before it, for models that carry their mean and standard deviation) or "blur" (the image under a Gaussian
            of a tenth of its longer side).
        batch_size: Points in one pass; more need more memory.

    Raises:
        UsageError: captum is missing, or an option is out of range.
    """
    captum = _captum()
    _check_positive(steps=steps, batch_size=batch_size)
    starts = _baseline(model, images, baseline)
    target = _predicted(model, images) if target is None else target
    maps = []
    with frozen(model), torch.enable_grad():
        method = captum.IntegratedGradients(_logits_function(model))
        # One image at a time: its steps fill a batch, and memory does not depend on the number of images.
        for index in range(len(images)):
            one = slice(index, index + 1)
            parts = method.attribute(
                images[one],
                baselines=starts[one],
                target=target[one],
                n_steps=steps,
                internal_batch_size=batch_size,
            )
            maps.append(parts.detach().sum(1))
    return torch.cat(maps)


@METHODS.register("occlusion", class_specific=True, needs="nothing")
def occlusion(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    *,
    window: int = 32,
    stride: int | None = None,
    baseline: Baseline = "mean",
    batch_size: int = 16,
) -> Tensor:
    """Returns how far the target's logit falls when a window over each pixel is hidden, (B, H, W), signed.

    The mean of the falls over all windows that hold the pixel. A window hides all colours at once, so that the fall is
    the pixel's, and is taken once rather than summed over colours.

    Source: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014; computed by captum.

    Args:
        model: Any classifier.
        images: (B, 3, H, W), as the model wants them.
        target: (B,), the class asked about; None for the predicted one.
        window: Side of the hidden square, in pixels.
        stride: How far the window moves at a time, in pixels, up to its side; None for half of it. The last ones are
            cut off at the border.
        baseline: What stands in the window: "mean" (0 after normalisation, the colour that it subtracts), "black" (0
            before it, for models that carry their mean and standard deviation) or "blur" (the image under a Gaussian
            of a tenth of its longer side).
        batch_size: Images in one forward pass; more need more memory.

    Raises:
        UsageError: captum is missing, or an option is out of range.
    """
    captum = _captum()
    stride = max(1, window // 2) if stride is None else stride
    _check_positive(window=window, stride=stride, batch_size=batch_size)
    if window > min(images.shape[-2:]) or stride > window:
        raise UsageError(
            f"expected a window up to the image's shorter side {min(images.shape[-2:])} and a stride up to the window, "
            f"got window {window} and stride {stride}: pixels in between would not be hidden"
        )
    starts = _baseline(model, images, baseline)
    target = _predicted(model, images) if target is None else target
    maps = []
    with torch.no_grad():
        method = captum.Occlusion(_logits_function(model))
        for first in range(0, len(images), batch_size):
            some = slice(first, first + batch_size)
            parts = method.attribute(
                images[some],
                sliding_window_shapes=(images.shape[1], window, window),
                strides=(images.shape[1], stride, stride),
                baselines=starts[some],
                target=target[some],
                perturbations_per_eval=max(1, batch_size // len(images[some])),
            )
            maps.append(parts[:, 0].to(images.dtype))
    return torch.cat(maps)


def _captum() -> Any:
    """Returns captum's methods.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("captum.attr")
    except ModuleNotFoundError as error:
        raise UsageError(
            "expected captum for this method, got no such package: pip install vision-attn[explain]"
        ) from error


def _logits_function(model: nn.Module) -> Any:
    """Returns a function of images that gives logits, whatever holds them in the model's output."""

    def logits(images: Tensor) -> Tensor:
        result = logits_of(model(images))
        if images.requires_grad:
            check_gradients(result, model, "integrated_gradients")
        return result

    return logits


def _predicted(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return logits_of(model(images)).argmax(-1)


def _check_positive(**options: int) -> None:
    """Raises UsageError for an option that is not a whole number above 0."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"expected {name} as a whole number above 0, got {value!r}: give 1 or more")


def _baseline(model: nn.Module, images: Tensor, baseline: str) -> Tensor:
    """Returns what stands for no image, (B, 3, H, W), normalised as the images are."""
    if baseline not in get_args(Baseline):
        raise unknown("baseline", str(baseline), get_args(Baseline))
    mean, std = _normalisation(model) if baseline == "black" else (None, None)
    return fill(images, baseline, mean=mean, std=std)


def _normalisation(model: nn.Module) -> tuple[Any, Any]:
    """Returns mean and standard deviation of the pixels that a model wants, from what it carries."""
    preprocessing: Any = getattr(model, "preprocessing", None)
    if hasattr(preprocessing, "mean") and hasattr(preprocessing, "std"):
        return preprocessing.mean, preprocessing.std
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("mean") and config.get("std"):
        return config["mean"], config["std"]
    raise UsageError(
        f"expected a model that carries the mean and deviation of its pixels for baseline 'black', got "
        f"{type(model).__name__}: use 'mean' or 'blur', or set model.preprocessing"
    )

"""Checkpoints: read them without running code, and put them into a model with every difference accounted for.

`load_state_dict_file` reads a file, `load_into` copies it into our ViT or any timm model. Nothing is left out in
silence: what was unwrapped, resampled, cast, skipped or missing stands in the `LoadReport`, and what does not fit
raises `CheckpointMismatchError` with the keys, before the model is touched.
"""

import pickle
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from vision_attn.errors import CheckpointMismatchError, UsageError
from vision_attn.registry import unknown

INTERPOLATIONS = ("timm", "hf")

# The usual places of a state dict inside a training checkpoint, and what wrappers put before each key.
_CONTAINERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "teacher")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "network.")
# What our ViT has in one tensor, and the names of its parts in timm's Eva, in order.
_PARTS = (
    ("attn.qkv.weight", ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight")),
    ("attn.qkv.bias", ("attn.q_proj.bias", "attn.k_proj.bias", "attn.v_proj.bias")),
    ("attn.qkv.bias", ("attn.q_bias", "attn.k_bias", "attn.v_bias")),
    ("mlp.fc1.weight", ("mlp.fc1_g.weight", "mlp.fc1_x.weight")),
    ("mlp.fc1.bias", ("mlp.fc1_g.bias", "mlp.fc1_x.bias")),
    ("ls1.gamma", ("gamma_1",)),
    ("ls2.gamma", ("gamma_2",)),
)
# What may be absent: keys without a bias.
_ZERO = ("attn.k_proj.bias", "attn.k_bias")
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")


class StateDict(dict[str, Tensor]):
    """A state dict that remembers where it came from and out of what it was unwrapped."""

    def __init__(self, tensors: Mapping[str, Tensor], *, source: str = "", unwrapped: tuple[str, ...] = ()) -> None:
        super().__init__(tensors)
        self.source = source
        self.unwrapped = unwrapped


@dataclass(frozen=True)
class LoadReport:
    """What `load_into` did, key by key.

    Attributes:
        loaded: Keys that were copied.
        missing: Keys of the model that the checkpoint lacks, and which keep the values they had.
        unexpected: Keys of the checkpoint that the model lacks (only without `strict`).
        skipped: Keys of the checkpoint that the caller asked to leave out.
        renamed: One line for each kind of key that our ViT has under another name (`to_our_names`).
        resampled: One line for each position embedding that was brought to another grid, with the interpolation.
        cast: One line for each change of dtype, with the number of tensors.
        unwrapped: What was taken off the checkpoint: containers ("state_dict") and prefixes ("module.").
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    resampled: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    unwrapped: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        for word in ("missing", "unexpected", "skipped", "renamed", "resampled", "cast", "unwrapped"):
            entries = getattr(self, word)
            if entries:
                lines.append(f"{word}: {', '.join(entries)}")
        return "\n".join(lines)


def load_state_dict_file(path: str | Path, *, key: str | None = None) -> StateDict:
    """Returns the tensors in a checkpoint file, on the CPU. No code in the file is ever run.

    Args:
        path: A `.safetensors` file, or `.pth`, `.pt`, `.bin`, `.ckpt` as written by `torch.save`.
        key: Which entry holds the state dict, where a training checkpoint holds several ("model", "model_ema").
            Without it, the only usual one is taken, and the result's `unwrapped` says so.

    Raises:
        UsageError: the file is absent, damaged, of an unknown kind, holds no state dict or several, or needs code to be
            unpickled.

    Example:
        >>> state = load_state_dict_file("weights.safetensors")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing there"
        raise UsageError(f"expected a checkpoint file at {path}, got {what}: check the path")
    if path.suffix == ".safetensors":
        return _unwrap(_read_safetensors(path), path, key)
    if path.suffix in _PICKLED:
        return _unwrap(_read_pickled(path), path, key)
    kinds = ", ".join((".safetensors", *_PICKLED))
    raise UsageError(f"expected a checkpoint ending in {kinds}, got {path}: convert it to .safetensors")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(
            f"expected a whole safetensors file, got {path}, which is truncated or damaged ({error}): fetch it again"
        ) from error


def _read_pickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # About pickle protocols: the file loads all the same, or the error below says why not.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "nsupported" in str(error):
            raise UsageError(
                f"expected plain tensors, got {path}, which needs unpickling of code (refused, it could run anything): "
                "where you trust it, save model.state_dict() from it as .safetensors and load that"
            ) from error
        raise _damaged(path) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> UsageError:
    return UsageError(f"expected a whole file written by torch.save, got {path}, which is damaged: fetch it again")


def _unwrap(content: Any, path: Path, key: str | None) -> StateDict:
    """Returns the state dict inside what the file held."""
    unwrapped: tuple[str, ...] = ()
    if not isinstance(content, Mapping):
        raise UsageError(
            f"expected a state dict in {path}, got {type(content).__name__}: save model.state_dict() instead"
        )
    found = [name for name in _CONTAINERS if isinstance(content.get(name), Mapping)] if key is None else [key]
    if len(found) > 1:
        raise UsageError(f"expected one state dict in {path}, got {', '.join(found)}: choose one with key={found[0]!r}")
    if found:
        if not isinstance(content.get(found[0]), Mapping):
            raise unknown(f"entry of {path}", found[0], [str(name) for name in content])
        content, unwrapped = content[found[0]], (found[0],)
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strange or not content:
        got = f"entries that are no tensors ({_shorten(strange)})" if strange else "an empty one"
        raise UsageError(f"expected a state dict of tensors in {path}, got {got}: save model.state_dict() instead")
    return StateDict(content, source=str(path), unwrapped=unwrapped)


def resample_positions(
    positions: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int],
    *,
    num_prefix: int,
    interpolation: str,
) -> Tensor:
    """Returns position embeddings for another grid; the prefix tokens keep theirs.

    The two interpolations give different models: with a DINOv2-shaped ViT-S/14 taken from 37 x 37 to 16 x 16, attention
    differs by up to 0.36. So use the one that the network was trained or published with.

    Args:
        positions: (1, num_prefix + h * w, C), rows of the grid one after the other.
        new_grid: (height, width) in patches.
        old_grid: (h, w) in patches.
        num_prefix: How many tokens before the patches have a position.
        interpolation: "timm" is bicubic with antialiasing (timm's `resample_abs_pos_embed`), "hf" is bicubic without
            (`interpolate_pos_encoding` of Hugging Face and DINOv2).

    Raises:
        UsageError: the interpolation is neither.
    """
    if interpolation not in INTERPOLATIONS:
        raise unknown("interpolation of positions", interpolation, INTERPOLATIONS)
    return resample_abs_pos_embed(
        positions,
        new_size=list(new_grid),
        old_size=list(old_grid),
        num_prefix_tokens=num_prefix,
        antialias=interpolation == "timm",
    )


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor] | str | Path,
    *,
    strict: bool = True,
    allow_missing: Sequence[str] = (),
    skip: Sequence[str] = (),
    interpolation: str | None = None,
    source_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Copies a checkpoint into our ViT or any timm model, and returns what was done. All or nothing.

    Tensors take the model's dtype and device. Position embeddings of ViT-like models are resampled to the model's grid.
    Our ViT takes the keys of timm's Eva (EVA-02, DINOv3) too.

    Args:
        model: The model, which is changed in place.
        state: A state dict, or the path of a file for `load_state_dict_file`.
        strict: Whether keys that are missing or unexpected are errors. Wrong shapes always are.
        allow_missing: Beginnings of keys that the checkpoint may lack, such as "head.".
        skip: Beginnings of checkpoint keys to leave out, such as "head." where the classes are others; the model may
            then lack them or keep its own.
        interpolation: "timm" or "hf", see `resample_positions`; by default the `config["pos_interpolation"]` of a model
            that has one (our ViT), else "timm".
        source_grid: (h, w) of the checkpoint's positions. By default the model's own grid where the number of
            positions is equal, else a square.

    Raises:
        CheckpointMismatchError: keys are missing or unexpected, or shapes differ; the message lists them.
        UsageError: the file cannot be read, the interpolation is unknown, or the grid of the positions is not known.

    Example:
        >>> report = load_into(model, "weights.safetensors", skip=("head.",))  # doctest: +SKIP
        >>> report.skipped  # doctest: +SKIP
        ('head.weight', 'head.bias')
    """
    if isinstance(state, (str, Path)):
        state = load_state_dict_file(state)
    target = model.state_dict()
    unwrapped = getattr(state, "unwrapped", ())
    tensors, prefixes = _strip_wrapper_prefixes(state, target)
    skipped = tuple(key for key in tensors if key.startswith(tuple(skip)))
    tensors = {key: tensor for key, tensor in tensors.items() if key not in skipped}
    tensors, renamed = to_our_names(tensors, target)
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    tensors, resampled = fit_positions(model, tensors, interpolation=interpolation, source_grid=source_grid)
    tensors, resized = fit_bias_tables(model, tensors)
    resampled = (*resampled, *resized)

    missing = tuple(key for key in target if key not in tensors)
    unexpected = tuple(key for key in tensors if key not in target)
    problems = [
        f"{key}: expected shape {tuple(target[key].shape)}, got {tuple(tensor.shape)}"
        for key, tensor in tensors.items()
        if key in target and tensor.shape != target[key].shape
    ]
    if strict:
        allowed = (*allow_missing, *skip)
        problems += [f"{key}: not in the model" for key in unexpected]
        problems += [f"{key}: missing in the checkpoint" for key in missing if not key.startswith(allowed)]
    if problems:
        raise _mismatch(model, state, problems)

    used = {key: tensor for key, tensor in tensors.items() if key in target}
    casts = Counter((dtypes[key], target[key].dtype) for key in used)
    model.load_state_dict(used, strict=False)
    return LoadReport(
        loaded=tuple(used),
        missing=missing,
        unexpected=unexpected,
        skipped=skipped,
        renamed=renamed,
        resampled=resampled,
        cast=tuple(f"{_name(a)} -> {_name(b)} ({n} tensors)" for (a, b), n in casts.items() if a != b),
        unwrapped=(*unwrapped, *prefixes),
    )


def _strip_wrapper_prefixes(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the tensors without the prefixes that DDP, torch.compile and Lightning put before every key."""
    tensors = dict(state)
    stripped = []
    for prefix in _WRAPPER_PREFIXES * 2:
        ours = any(key.startswith(prefix) for key in target)
        if tensors and not ours and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
            stripped.append(prefix)
    return tensors, tuple(stripped)


def to_our_names(tensors: Mapping[str, Tensor], target: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns tensors of timm's Eva under the names of `target`, our ViT's state dict, and a line for each renaming.

    LayerScale has other names there; queries, keys and values may be three layers, and gate and value two, which ours
    has in one; and a bias may lack the keys' third, which is zero. What `target` calls alike, or not at all, stays.
    """
    renamed: dict[str, Tensor] = {}
    lines: Counter[str] = Counter()
    for key, tensor in tensors.items():
        block, own, names = _own_name(key)
        parts = [f"{block}{part}" for part in names]
        ours, found = f"{block}{own}", [part for part in parts if part in tensors]
        absent = [part for part in parts if part not in tensors and not part.endswith(_ZERO)]
        if key in target or ours not in target or absent:
            renamed[key] = tensor
        elif ours not in renamed:
            lines[f"{', '.join(part.removeprefix(block) for part in found)} -> {own}"] += 1
            renamed[ours] = torch.cat([tensors.get(part, torch.zeros_like(tensor)) for part in parts])
    return renamed, tuple(f"{line} ({count} times)" for line, count in lines.items())


def _own_name(key: str) -> tuple[str, str, tuple[str, ...]]:
    """Returns the block of a key of timm's Eva, "blocks.3.", our name of its part, and all names that it is made of."""
    if match := re.match(r"(blocks\.\d+\.)(.+)$", key):
        for own, parts in _PARTS:
            if match[2] in parts:
                return match[1], own, parts
    return "", "", ()


def fit_positions(
    model: nn.Module,
    tensors: dict[str, Tensor],
    *,
    interpolation: str | None = None,
    source_grid: tuple[int, int] | None = None,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the tensors with `pos_embed` (1, N, C) on the model's grid, and a line on how it got there.

    Models without such positions pass unchanged, with no line. Arguments and errors are those of `load_into`.
    """
    grid: tuple[int, int] | None = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    positions, wanted = tensors.get("pos_embed"), getattr(model, "pos_embed", None)
    if grid is None or positions is None or wanted is None or positions.ndim != 3 or wanted.ndim != 3:
        return tensors, ()
    if interpolation is None:
        interpolation = getattr(model, "config", {}).get("pos_interpolation", "timm")
    num_prefix = wanted.shape[1] - grid[0] * grid[1]
    if source_grid is None:
        source_grid = _source_grid(positions.shape[1] - num_prefix, grid)
    elif source_grid[0] * source_grid[1] + num_prefix != positions.shape[1]:
        raise UsageError(
            f"expected source_grid of {positions.shape[1] - num_prefix} patches, got {source_grid}: "
            f"the checkpoint has {positions.shape[1]} positions, {num_prefix} of them for prefix tokens"
        )
    if tuple(source_grid) == tuple(grid):
        return tensors, ()
    # In the model's dtype: half precision would round what the interpolation computes.
    fitted = resample_positions(
        positions.to(wanted.dtype), grid, source_grid, num_prefix=num_prefix, interpolation=interpolation
    )
    line = f"pos_embed {source_grid[0]} x {source_grid[1]} -> {grid[0]} x {grid[1]} ({interpolation})"
    return {**tensors, "pos_embed": fitted}, (line,)


def fit_bias_tables(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the tensors with relative position biases (Swin) at the model's windows, and a line where some changed.

    At another image size windows become smaller; timm's own interpolation is used, as for its pretrained weights.
    """
    suffix, fitted = ".relative_position_bias_table", {}
    for key, tensor in tensors.items():
        if not key.endswith(suffix):
            continue
        module = dict(model.named_modules()).get(key.removesuffix(suffix))
        wanted, window = getattr(module, suffix[1:], None), getattr(module, "window_size", None)
        if wanted is None or window is None or wanted.shape == tensor.shape or wanted.shape[1:] != tensor.shape[1:]:
            continue
        with warnings.catch_warnings():
            # What torch has to say about timm's code.
            warnings.filterwarnings("ignore", ".*(searchsorted|non-tuple sequence).*")
            fitted[key] = resize_rel_pos_bias_table(tensor.to(wanted.dtype), window, wanted.shape)
    if not fitted:
        return tensors, ()
    return {**tensors, **fitted}, (f"relative position biases of {len(fitted)} windows (timm)",)


def _source_grid(num_patches: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Returns the grid of a checkpoint that does not say: the model's where the count is equal, else a square."""
    if num_patches == grid[0] * grid[1]:
        return grid
    side = isqrt(max(num_patches, 0))
    if num_patches <= 0 or side * side != num_patches:
        raise UsageError(
            f"expected positions on a square grid or on the model's {grid[0]} x {grid[1]}, got {num_patches} patch "
            "positions: pass source_grid=(height, width), or check the number of prefix tokens"
        )
    return side, side


def _mismatch(model: nn.Module, state: Mapping[str, Tensor], problems: list[str]) -> CheckpointMismatchError:
    source = getattr(state, "source", "") or "the state dict"
    error = CheckpointMismatchError(
        f"expected {source} to fit {type(model).__name__}, got {len(problems)} differences "
        f"({_shorten(problems, separator='; ')}): take the matching architecture, "
        "or name what to leave out, as in skip=('head.',)"
    )
    error.add_note("\n".join(problems))  # the line stays readable, the traceback has every key
    return error


def _shorten(entries: Sequence[str], *, separator: str = ", ", limit: int = 20) -> str:
    rest = len(entries) - limit
    return separator.join(entries[:limit]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

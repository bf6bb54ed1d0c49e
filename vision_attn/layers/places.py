"""Where in a network a block can go: found by running it once, not by what its modules are called.

A residual block is a module that adds one feature map to another of the same shape; in networks that never add
(DenseNet, Inception) it is one that joins maps channel by channel. The end of a stage is the last block at a
resolution, with whatever its container does after it. A network without either (VGG) has stages alone: its convolutions
between two poolings. So timm's, torchvision's and a person's own networks are read in one way.

Letters in shapes: B batch, C channels, H W map, N tokens.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vision_attn.errors import UsageError
from vision_attn.registry import close_names, unknown

Form = Literal["map", "channels_last_map", "tokens"]

_ADDS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__"))
_JOINS = frozenset(("cat", "concat", "concatenate"))
# Registers and class tokens in the networks that there are: five at the most.
_MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class Place:
    """A module whose output a block can change.

    Attributes:
        name: Of the module.
        form: How its output lies: a map (B, C, H, W) or (B, H, W, C), or tokens (B, N, C).
        shape: (C, H, W) of the map; for tokens that of the patches.
        dtype: Of its output.
        device: Of its output.
        prefix: Tokens before the patches.
        grid_source: Name of the module whose output has the patch grid; None for maps.
    """

    name: str
    form: Form
    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    prefix: int = 0
    grid_source: str | None = None

    @property
    def resolution(self) -> tuple[int, int]:
        """(H, W)."""
        return self.shape[1:]


@dataclass(frozen=True)
class _Output:
    """What is known of a tensor that a module returned."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Call:
    """A module that has returned.

    Attributes:
        name: Of the module.
        output: What it returned where that is a tensor; else what it is, in words.
        same: Whether that is the very tensor that the module before it in the list returned.
    """

    name: str
    output: _Output | str
    same: bool


@dataclass
class Trace:
    """What a network did with images, module by module, in the order in which they returned.

    Attributes:
        names: Of its modules, without the parts of blocks that were attached before.
    """

    images: tuple[int, ...]
    names: tuple[str, ...] = ()
    calls: list[_Call] = field(default_factory=list)
    adds: set[str] = field(default_factory=set)
    joins: set[str] = field(default_factory=set)
    prefix_tokens: int | None = None

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.positions: dict[str, int] = {}

    def enter(self, name: str, output: Any, same: bool) -> None:
        """Notes that a module has returned."""
        self.counts[name] += 1
        self.positions[name] = len(self.calls)
        is_tensor = isinstance(output, Tensor)
        kept = _Output(tuple(output.shape), output.dtype, output.device) if is_tensor else _in_words(output)
        self.calls.append(_Call(name, kept, same))

    def place(self, name: str) -> Place:
        """Returns the module called `name` as a place.

        Raises:
            UsageError: it has not run once, or its output has no places.
        """
        times = self.counts[name]
        if times != 1:
            how = "does not run" if times == 0 else f"runs {times} times for one batch"
            raise UsageError(f"expected a module that runs once, got {name}, which {how}: {_OTHER}")
        output = self.calls[self.positions[name]].output
        if isinstance(output, str):
            raise UsageError(f"expected a module that gives one tensor, got {name}, which gives {output}: {_OTHER}")
        form = _form_of(output.shape, self.images)
        if form is None:
            raise UsageError(
                f"expected a module that gives a map (B, C, H, W) or tokens (B, N, C), got {name}, which gives "
                f"{_shape(output.shape)}: {_OTHER}"
            )
        if form == "tokens":
            return self._tokens(name, output)
        first, second, third = output.shape[1:]
        shape = (first, second, third) if form == "map" else (third, first, second)
        return Place(name, form, shape, output.dtype, output.device)

    def find(self, name: str) -> Place | None:
        """Returns the module as a place, or None where it is none."""
        try:
            return self.place(name)
        except UsageError:
            return None

    def same_output(self, inner: str, outer: str) -> bool:
        """Returns whether `outer` hands on the very tensor that `inner` in it returned."""
        first, last = self.positions[inner], self.positions[outer]
        return all(call.same for call in self.calls[first + 1 : last + 1])

    def _tokens(self, name: str, output: _Output) -> Place:
        """Returns the place of a module that gives tokens: the patches are those of the last map that fits them."""
        tokens, channels = output.shape[1:]
        known = self.prefix_tokens
        allowed = range(_MOST_PREFIX_TOKENS + 1) if known is None else (0, known)
        maps = {
            call.name: call.output.shape[2:]
            for call in self.calls[: self.positions[name]]
            if isinstance(call.output, _Output) and self.counts[call.name] == 1
            if _form_of(call.output.shape, self.images) == "map"
        }
        fitting = [(tokens - h * w, source) for source, (h, w) in maps.items() if tokens - h * w in allowed]
        if not fitting:
            grids = ", ".join(f"{h} x {w}" for h, w in sorted(set(maps.values()), reverse=True)[:4]) or "none"
            raise UsageError(
                f"expected the tokens of {name} to be prefix and patches of a grid, got {tokens} tokens and the maps "
                f"{grids} before them: {_OTHER}"
            )
        prefix = min(number for number, _ in fitting)
        source = [source for number, source in fitting if number == prefix][-1]
        height, width = maps[source]
        return Place(
            name, "tokens", (channels, height, width), output.dtype, output.device, prefix=prefix, grid_source=source
        )


_OTHER = "name another module"


def image_shape(model: nn.Module, image_size: int | Sequence[int] | None) -> tuple[int, int, int]:
    """Returns (channels, height, width) of the images that a network takes; the size is its own where left out."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if not isinstance(size, Sequence) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise UsageError(
                f"expected image_size as (height, width) or one number of pixels, got {image_size}: correct it"
            )
        return channels, size[0], size[1]
    own = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "image_size", None)
    if isinstance(own, int):
        return channels, own, own
    if own is None:
        own = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    return channels, int(own[0]), int(own[1])


def trace(model: nn.Module, shape: tuple[int, int, int], *, attached: Collection[str] = ()) -> Trace:
    """Returns what a network does with two empty images (C, H, W), but for the modules `attached` and all in them.

    Mode, gradients, buffers and random state are left as they were.

    Raises:
        UsageError: the network does not take such images.
    """
    names = tuple(name for name, _ in model.named_modules() if not {name, *_above(name)} & {*attached})
    seen = Trace((2, *shape), names, prefix_tokens=getattr(model, "num_prefix_tokens", None))
    stack: list[str] = []
    last: list[Any] = [None]
    handles = []

    def entering(name: str) -> Callable[..., None]:
        return lambda module, args: stack.append(name)

    def leaving(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            stack.pop()
            seen.enter(name, output, output is last[0])
            last[0] = output

        return hook

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if stack and stack[-1]:
                word = getattr(func, "__name__", "")
                if word in _ADDS and _are_features(args[:2]):
                    seen.adds.add(stack[-1])
                elif word in _JOINS and (args[1] if len(args) > 1 else kwargs.get("dim", 0)) in (1, -3):
                    seen.joins.add(stack[-1])
            return func(*args, **kwargs)

    for name in attached:
        # What they add is not what the network adds.
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda module, args: stack.append("")))
        handles.append(module.register_forward_hook(lambda module, args, output: _none(stack.pop())))
    for name in names:
        # The first to enter and the last to leave, whatever other hooks there are.
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(entering(name), prepend=True))
        handles.append(module.register_forward_hook(leaving(name)))
    try:
        with Watch():
            dry_run(model, shape)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def dry_run(model: nn.Module, shape: tuple[int, int, int]) -> Any:
    """Returns what a network gives in evaluation mode for two empty images (C, H, W); it is left as it was.

    Raises:
        UsageError: it does not take such images.
    """
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    devices = [tensor.device] if tensor.device.type == "cuda" else []
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            return model(torch.zeros(2, *shape, dtype=tensor.dtype, device=tensor.device))
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UsageError(
                f"expected a network that takes images (2, {', '.join(map(str, shape))}), got an error: {reason}: pass "
                "image_size"
            ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts all modules into evaluation mode for a while."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def find_places(model: nn.Module, seen: Trace, where: str | Sequence[str]) -> list[Place]:
    """Returns the places that `where` stands for, in the order in which they run.

    Args:
        model: The network.
        seen: What it did.
        where: "stages", "blocks", or one or more patterns for module names; `*` and `?` stand for parts of a name
            between two dots, `**` for any number of names.

    Raises:
        UsageError: there are none, or one of them is no place for a block.
    """
    patterns = [where] if isinstance(where, str) else where
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError(f"expected where as 'stages', 'blocks' or names of modules, got {where!r}: correct it")
    if len(patterns) == 1 and patterns[0] in ("stages", "blocks"):
        return _answering(model, seen, _named_places(model, seen, patterns[0]))
    names = [name for pattern in patterns for name in matching(seen.names, pattern)]
    inner = dict.fromkeys(last_in_chain(model, name) for name in names)
    places = [seen.place(name) for name in inner]
    return sorted(places, key=lambda place: seen.positions[place.name])


def _named_places(model: nn.Module, seen: Trace, where: str) -> list[Place]:
    if where == "blocks":
        found = _blocks(model, seen)
        if not found:
            raise UsageError(
                f"expected blocks that add or join maps, got none in {type(model).__name__}: use where='stages', "
                "or name modules"
            )
        return found
    found = _stages(model, seen)
    if not found:
        raise UsageError(
            f"expected stages (resolutions with blocks or convolutions), got none in {type(model).__name__}: "
            "name modules"
        )
    return found


def _answering(model: nn.Module, seen: Trace, places: list[Place]) -> list[Place]:
    """Returns the places without those at the end whose patches the network's answer does not depend on.

    Where the class token answers, patches are read by the next block's attention alone: a block after the last one
    would never learn.
    """
    answering = [*places]
    while answering and answering[-1].prefix and _patches_are_unread(model, seen, answering[-1]):
        answering.pop()
    if not answering:
        raise UsageError(
            f"expected patches that are read again, got {type(model).__name__}, whose class token answers after "
            f"{places[0].name}: name a module"
        )
    return answering


def _patches_are_unread(model: nn.Module, seen: Trace, place: Place) -> bool:
    """Returns whether another prefix at this place changes what the network gives, and other patches do not."""
    _, *shape = seen.images
    noise = torch.randn(place.shape[0], generator=torch.Generator().manual_seed(0))

    def answer(changed: slice) -> list[Tensor]:
        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, changed] += noise.to(output)
            return output

        handle = model.get_submodule(place.name).register_forward_hook(change)
        try:
            return _tensors(dry_run(model, (shape[0], shape[1], shape[2])))
        finally:
            handle.remove()

    as_is, prefix, patches = answer(slice(0)), answer(slice(place.prefix)), answer(slice(place.prefix, None))
    same = [all(map(torch.equal, as_is, other)) for other in (prefix, patches)]
    return same == [False, True]


def matching(modules: Sequence[str], pattern: str) -> list[str]:
    """Returns the names of modules that a pattern matches.

    Raises:
        UsageError: none; close names are offered.
    """
    names = [name for name in modules if name]
    if pattern in names:
        return [pattern]
    found = [name for name in names if _matches(name.split("."), pattern.split("."))]
    if found:
        return found
    if pattern in ("stages", "blocks"):
        raise UsageError(f"expected {pattern!r} alone, got it beside names of modules: attach in two steps")
    if not set(pattern) & set("*?["):
        raise unknown("module, 'stages' or 'blocks'", pattern, [*names, "stages", "blocks"])
    close = close_names(pattern, names) or [name for name in names if "." not in name][:6]
    raise UsageError(
        f"expected a pattern that matches modules, got {pattern!r}, which matches none (* stays between two dots, ** "
        f"crosses them): there are {', '.join(close)}"
    )


def last_in_chain(model: nn.Module, name: str) -> str:
    """Returns the module at the end of a chain (`nn.Sequential`), down to one that is no chain itself."""
    module = model.get_submodule(name)
    while type(module).forward is nn.Sequential.forward and len(module._modules):
        last, child = next(reversed(list(module.named_children())))
        name, module = f"{name}.{last}", child
    return name


def _blocks(model: nn.Module, seen: Trace) -> list[Place]:
    """Returns the outermost modules that add maps, and all others of their classes; else those that join maps.

    The others: a block that halves the map has nothing to add to in many networks, and is one all the same.
    """
    modules = dict(model.named_modules())
    for active in (seen.adds, seen.joins):
        classes = {type(modules[name]) for name in active if seen.find(name) is not None}
        alike = {call.name for call in seen.calls if type(modules[call.name]) in classes}
        alike |= _beside(modules, alike)
        found = {call.name: place for call in seen.calls if call.name in alike if (place := seen.find(call.name))}
        outermost = [place for name, place in found.items() if not set(found) & set(_above(name))]
        # A stem of the same class (RepVGG, MobileOne) stands alone in the network; blocks stand in lists.
        listed = [place for place in outermost if "." in place.name]
        if outermost:
            return listed or outermost
    return []


def _beside(modules: dict[str, nn.Module], blocks: set[str]) -> set[str]:
    """Returns what stands where blocks do, in a list of lists: the first and last items of MobileNets do not add."""
    lists = {name for name, module in modules.items() if name and type(module).forward is nn.Sequential.forward}
    items = {name: _above(name)[0] for name in modules if "." in name}
    nested = {name for name, parent in items.items() if name in lists and parent in lists}
    outer = {items[parent] for block in blocks if (parent := items.get(block)) in nested}
    return {
        name
        for name, parent in items.items()
        if parent in nested and items[parent] in outer and next(modules[name].children(), None) is not None
    }


def _stages(model: nn.Module, seen: Trace) -> list[Place]:
    """Returns the last place at each resolution; all blocks where there is one resolution only."""
    blocks = _blocks(model, seen)
    if not blocks:
        return _plain_stages(model, seen)
    if len({block.resolution for block in blocks}) == 1:
        return blocks
    last = {block.resolution: block for block in blocks}
    ends = [_end_of_container(block, blocks, seen) for block in last.values()]
    return sorted(ends, key=lambda place: seen.positions[place.name])


def _end_of_container(block: Place, blocks: Sequence[Place], seen: Trace) -> Place:
    """Returns the outermost module that ends with this block and does something after it, or the block."""
    end = block
    for above in _above(block.name):
        inside = [other for other in blocks if other.name.startswith(f"{above}.")]
        if any(other.resolution != block.resolution for other in inside):
            break
        place = seen.find(above)
        if place is not None and place.resolution == block.resolution and not seen.same_output(end.name, above):
            end = place
    return end


def _plain_stages(model: nn.Module, seen: Trace) -> list[Place]:
    """Returns the last module at each resolution that has convolutions, for networks that are one chain of them."""
    modules = dict(model.named_modules())
    around = {_above(name)[0] for name in seen.names if "." in name}
    ends: dict[tuple[int, int], Place] = {}
    convolved: set[tuple[int, int]] = set()
    for call in seen.calls:
        module, place = modules[call.name], seen.find(call.name)
        if place is None or place.form != "map" or call.name in around:
            continue
        if isinstance(module, nn.Conv2d):
            convolved.add(place.resolution)
        ends[place.resolution] = place
    return [place for size, place in ends.items() if size in convolved and size != (1, 1)]


def _matches(names: list[str], patterns: list[str]) -> bool:
    """Returns whether the parts of a name fit the parts of a pattern; `**` takes any number of them."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[taken:], patterns[1:]) for taken in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _above(name: str) -> list[str]:
    """Returns the names of the modules around one, the nearest first, without the network itself."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _form_of(shape: tuple[int, ...], images: tuple[int, ...]) -> Form | None:
    """Returns how an output lies, told from the images' proportions; None where it has no places."""
    if shape[:1] != images[:1]:
        return None
    if len(shape) == 3:
        return "tokens"
    if len(shape) != 4:
        return None
    if not _is_reduced(shape[2:], images[2:]) and _is_reduced(shape[1:3], images[2:]):
        return "channels_last_map"
    return "map"


def _is_reduced(size: Sequence[int], image: Sequence[int]) -> bool:
    """Returns whether a map has the image's proportions, to a cell."""
    return abs(image[0] * size[1] - image[1] * size[0]) <= max(image)


def _are_features(operands: Sequence[Any]) -> bool:
    """Returns whether two operands are maps or tokens of one shape for both images (positions have one for all)."""
    if len(operands) != 2 or not all(isinstance(operand, Tensor) for operand in operands):
        return False
    first, second = operands
    return first.shape == second.shape and first.ndim in (3, 4) and first.shape[0] == 2


def _tensors(output: Any) -> list[Tensor]:
    """Returns the tensors in what a network gives, in order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _none(_: Any) -> None:
    """Returns nothing: a forward hook that returns something changes the output."""


def _shape(shape: Sequence[int]) -> str:
    return f"(B{''.join(f', {side}' for side in shape[1:])})"


def _in_words(output: Any) -> str:
    """Returns what an output is, with the shapes of the tensors in it."""
    if isinstance(output, (tuple, list)):
        parts = ", ".join(
            _shape(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in output[:4]
        )
        return f"a {type(output).__name__} of {parts}{', ...' if len(output) > 4 else ''}"
    return type(output).__name__

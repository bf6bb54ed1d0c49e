"""Attention blocks in a network that exists, pretrained or not: put in, told of, taken out.

A block becomes a child of the module whose output it changes, and a hook on that module calls it. So the network's own
keys stay what they are, the new ones lie below their place ("layer1.1.attached_cbam.block..."), and what goes by names
(freezing, layer decay) treats a block with its layer.

Letters in shapes: B batch, C channels, H W map, N tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layers.base import LAYERS, check_options
from vision_attn.layers.costs import count_multiply_adds
from vision_attn.layers.factory import create_layer
from vision_attn.layers.places import Place, dry_run, evaluating, find_places, image_shape, trace
from vision_attn.registry import unknown

ARGUMENTS = ("where", "attached_as", "image_size")


class Grid:
    """The patch grid (h, w) that a network had last, shared by those who see it and those who need it."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size


class _KeepGrid:
    """A forward hook on what makes the patches: keeps their grid, since images may change size from call to call."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.grid.size = (output.shape[2], output.shape[3])


class _Maps:
    """Hands maps (B, C, H, W) to a block as they are."""

    def __call__(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return block(x)


class _ChannelsLastMaps:
    """Hands maps (B, H, W, C) to a block."""

    def __call__(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _Tokens:
    """Hands the patches of tokens (B, N, C) to a block as a map; the prefix passes by."""

    def __init__(self, prefix: int, grid: Grid) -> None:
        self.prefix = prefix
        self.grid = grid

    def __call__(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        height, width = self.grid.size
        if x.shape[1] != self.prefix + height * width:
            raise UsageError(
                f"expected {self.prefix} prefix tokens and {height} x {width} patches, got {x.shape[1]} tokens: leave "
                "no patches out (patch dropout, merging) before an attached block"
            )
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        patches = block(patches.transpose(1, 2).unflatten(2, (height, width))).flatten(2).transpose(1, 2)
        return torch.cat((prefix, patches), 1) if self.prefix else patches


class Attached(nn.Module):
    """A block in a network: x + gain * (block(x) - x), with a learned gain a channel that starts at zero.

    So a network computes what it did before until it has learned better. A residual branch that starts at zero is known
    from ReZero (Bachlechner et al. 2021, https://arxiv.org/abs/2003.04887), SkipInit (De and Smith 2020,
    https://arxiv.org/abs/2002.10444) and, with a gain a channel, LayerScale (Touvron et al. 2021,
    https://arxiv.org/abs/2103.17239). With the gain at zero the gain alone learns in the first step, the block from
    then on. A block that starts as the identity by itself has no gain: of two zeros in a product neither would learn.

    Parameters: those of the block, and C.

    Args:
        block: (B, C, H, W) -> (B, C, H, W).
        layer: Its name in the register.
        place: Where it goes.
        form: How the output of that place becomes a map.
        image: (channels, H, W) of the images that the place was found with.
        starts_as_identity: Whether a new block hands its input on.

    Attributes:
        gain: (C,), or None.
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        layer: str,
        place: Place,
        form: _Maps | _ChannelsLastMaps | _Tokens,
        image: tuple[int, int, int],
        starts_as_identity: bool,
    ) -> None:
        super().__init__()
        self.block = block
        self.gain = None if starts_as_identity else nn.Parameter(torch.zeros(place.shape[0]))
        self.layer = layer
        self.place = place.name
        self.shape = place.shape
        self.image = image
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        """Returns the changed output of the place, in its own shape and dtype."""
        return self.form(self._mixed, x)

    def _mixed(self, x: Tensor) -> Tensor:
        changed = self.block(x).to(x.dtype)
        if self.gain is None:
            return changed
        return torch.lerp(x, changed, self.gain.to(x.dtype).view(-1, 1, 1))

    @torch.no_grad()
    def does_nothing(self) -> bool:
        """Whether it hands every map on as it is, as it does until it has learned."""
        like = next(tensor for tensor in self.parameters())
        with evaluating(self), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
            x = torch.randn(1, *self.shape, dtype=like.dtype, device=like.device)
            return torch.equal(self._mixed(x), x)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Keeps its own tensors where a state dict has none of them: that of the network before the block came."""
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Apply:
    """A forward hook that puts a module's output through the block at `path` below it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return module.get_submodule(self.path)(output)

    @property
    def attached_as(self) -> str:
        """The name of the child."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Attachment:
    """One block in a network.

    Attributes:
        place: The module whose output it changes.
        layer: The block's name in the register.
        attached_as: The child's name.
        shape: (C, H, W) of the map when it was attached.
        parameters: Numbers that it learns, gain included.
        multiply_adds: Of its convolutions and products of matrices, for one image.
    """

    place: str
    layer: str
    attached_as: str
    shape: tuple[int, int, int]
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Attachments:
    """What was put into a network, and what it costs. `str` gives a table.

    Multiply-adds are those of convolutions and products of matrices; what is done place by place (pooling, the product
    with a gate) is not counted, as in papers.

    Attributes:
        places: One entry a block, in the order of the network's modules.
        network_parameters: Those of the network without the blocks.
        network_multiply_adds: Of the network without the blocks, for one image.
        image_size: (H, W) of that image.
    """

    places: tuple[Attachment, ...]
    network_parameters: int
    network_multiply_adds: int
    image_size: tuple[int, int]

    @property
    def parameters(self) -> int:
        """Numbers that all blocks learn."""
        return sum(place.parameters for place in self.places)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all blocks, for one image."""
        return sum(place.multiply_adds for place in self.places)

    @property
    def line(self) -> str:
        """One line: how many, and what they add."""
        names = ", ".join(dict.fromkeys(place.layer for place in self.places))
        height, width = self.image_size
        blocks = "1 block" if len(self.places) == 1 else f"{len(self.places)} blocks"
        return (
            f"{blocks} ({names}) attached: {self.parameters:,} parameters "
            f"(+{_share(self.parameters, self.network_parameters)}), {self.multiply_adds / 1e6:,.1f} M multiply-adds "
            f"(+{_share(self.multiply_adds, self.network_multiply_adds)}) at {height} x {width}"
        )

    def __str__(self) -> str:
        rows = [("place", "block", "attached as", "map", "parameters", "multiply-adds")]
        rows += [
            (
                p.place,
                p.layer,
                p.attached_as,
                " x ".join(map(str, p.shape)),
                f"{p.parameters:,}",
                f"{p.multiply_adds:,}",
            )
            for p in self.places
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for row in rows:
            words = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
            numbers = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
            lines.append("  ".join((*words, *numbers)))
        return "\n".join((*lines, self.line))


def attach_attention(
    model: nn.Module,
    /,
    name: str,
    *,
    where: str | Sequence[str] = "stages",
    attached_as: str | None = None,
    image_size: int | Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Returns the same network, changed in place: its logits are as before until it is trained.

    The network runs twice on empty images, in evaluation mode; mode, buffers, gradients and random state stay as they
    were. The blocks themselves start from torch's global random generator. What an optimizer was made of before is not
    extended: attach first.

    Args:
        model: Any network that takes images (B, C, H, W).
        name: One of `list_layers()`.
        where: "stages" (the end of each resolution; in columnar ViTs each block), "blocks" (every residual or
            transformer block; those that join maps in networks that never add), or one or more patterns for names of
            modules: `*` stays between two dots, `**` crosses them. Both leave out the last block of a ViT whose class
            token answers: nothing reads its patches, so that nothing could be learned there.
        attached_as: The name of the new children; by default "attached_" and the block's. A second block at the same
            place needs another.
        image_size: (height, width) or one number of the images to look with; the network's own where left out. Stages
            are told apart, and blocks built, at this size.
        options: The block's own, see `create_layer`. Those that are built for one size take it from the network.

    Raises:
        UsageError: an argument is unknown, nothing matches, a module does not run once or has no places in its output,
            a block does not fit the channels, something is attached there already, or the network is compiled or
            wrapped. The network is then as it was.

    Example:
        >>> import timm
        >>> model = attach_attention(timm.create_model("resnet18"), "se", where="stages")
        >>> print(attachments(model).line)
        4 blocks (se) attached: 45,500 parameters (+0.39 %), 0.0 M multiply-adds (+0.0024 %) at 224 x 224
    """
    _check_plain(model)
    check_options(name, LAYERS.get(name), options, beside=ARGUMENTS)
    attached_as = _check_child_name(f"attached_{name}" if attached_as is None else attached_as)
    image = image_shape(model, image_size)
    seen = trace(
        model, image, attached=[name for name, module in model.named_modules() if isinstance(module, Attached)]
    )
    places = find_places(model, seen, where)
    made: list[tuple[Place, Attached]] = []
    grids: dict[str, Grid] = {}
    for place in places:
        form: _Maps | _ChannelsLastMaps | _Tokens = _Maps()
        if place.grid_source is not None:
            grid = grids.setdefault(place.grid_source, _grid_at(model, place))
            form = _Tokens(place.prefix, grid)
        elif place.form == "channels_last_map":
            form = _ChannelsLastMaps()
        attached = Attached(
            _create_block(name, place, options),
            layer=name,
            place=place,
            form=form,
            image=image,
            starts_as_identity=bool(LAYERS.info(name).get("identity")),
        )
        attached.to(device=place.device, dtype=place.dtype)
        made.append((place, attached.train(model.get_submodule(place.name).training)))
    try:
        _put_in(model, made, grids, attached_as, image)
    except BaseException:
        _take_out(model, {attached for _, attached in made})
        raise
    specs: list[dict[str, Any]] = [*getattr(model, "attached_attention", [])]
    # The places by name: who builds the network again finds them without looking.
    names = [place.name for place in places]
    specs.append({"name": name, "where": names, "attached_as": attached_as, "image_size": list(image[1:]), **options})
    model.attached_attention = specs  # type: ignore[assignment]
    return model


def attach_all(
    model: nn.Module,
    attention: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    image_size: int | Sequence[int] | None = None,
) -> nn.Module:
    """Returns the same network with blocks as a config has them: one mapping for `attach_attention`, or several.

    Args:
        model: The network, which is changed in place.
        attention: With `name`, and what else `attach_attention` takes.
        image_size: Where a mapping has none.

    Raises:
        UsageError: a mapping has no name or an unknown key; and as `attach_attention`. What the mappings before
            it attached stays.

    Example:
        >>> import timm
        >>> model = attach_all(timm.create_model("resnet18"), {"name": "cbam", "where": "blocks", "reduction": 8})
    """
    several = [attention] if isinstance(attention, Mapping) else attention
    if not isinstance(several, Sequence) or not all(isinstance(entry, Mapping) for entry in several):
        raise UsageError(f"expected attention as keys and values, or a list of such, got {attention!r}: {_AS_IN}")
    for entry in several:
        if not isinstance(entry.get("name"), str):
            raise UsageError(f"expected the name of a block in attention, got {dict(entry)}: {_AS_IN}")
        if not all(isinstance(key, str) for key in entry):
            raise UsageError(f"expected keys of text in attention, got {dict(entry)}: {_AS_IN}")
        attach_attention(model, **{"image_size": image_size, **entry})
    return model


_AS_IN = "as in {name: cbam, where: stages}"


def detach_attention(model: nn.Module, attached_as: str | None = None) -> nn.Module:
    """Returns the same network without attached blocks: its keys and logits are those it had before they came.

    Args:
        model: The network, which is changed in place.
        attached_as: Which of them; all where left out.

    Raises:
        UsageError: there are none, or none of that name.

    Example:
        >>> import timm
        >>> model = attach_attention(timm.create_model("resnet18"), "se")
        >>> len(detach_attention(model).state_dict()) == len(timm.create_model("resnet18").state_dict())
        True
    """
    there = {hook.attached_as for _, _, hook in _hooks(model)}
    if not there:
        raise UsageError(f"expected a network with attached blocks, got {type(model).__name__} without: nothing to do")
    if attached_as is not None and attached_as not in there:
        raise unknown("name of attached blocks", attached_as, there)
    _take_out(model, {block for _, hook, block in attached_blocks(model) if attached_as in (None, hook)})
    specs = [
        spec for spec in getattr(model, "attached_attention", []) if attached_as not in (None, spec["attached_as"])
    ]
    if specs:
        model.attached_attention = specs  # type: ignore[assignment]
    elif hasattr(model, "attached_attention"):
        del model.attached_attention
    return model


def attachments(model: nn.Module) -> Attachments:
    """Returns what was put into a network, and what it costs.

    Multiply-adds are counted on empty copies, so nothing is computed.

    Raises:
        UsageError: nothing was attached.
    """
    blocks = attached_blocks(model)
    if not blocks:
        raise UsageError(f"expected a network with attached blocks, got {type(model).__name__} without: attach some")
    places = tuple(
        Attachment(
            place=place,
            layer=block.layer,
            attached_as=name,
            shape=block.shape,
            parameters=_numbers(block),
            multiply_adds=_multiply_adds(block.block, block.shape),
        )
        for place, name, block in blocks
    )
    image = blocks[0][2].image
    return Attachments(
        places=places,
        network_parameters=_numbers(model) - sum(place.parameters for place in places),
        network_multiply_adds=_multiply_adds(model, image) - sum(place.multiply_adds for place in places),
        image_size=image[1:],
    )


def attached_blocks(model: nn.Module) -> list[tuple[str, str, Attached]]:
    """Returns (name of the place, name of the child, block) of each, in the order of the network's modules."""
    found = []
    for name, module, hook in _hooks(model):
        block = module.get_submodule(hook.path)
        assert isinstance(block, Attached)
        found.append((name, hook.attached_as, block))
    return found


def _put_in(
    model: nn.Module,
    made: Sequence[tuple[Place, Attached]],
    grids: dict[str, Grid],
    attached_as: str,
    image: tuple[int, int, int],
) -> None:
    """Hangs the blocks into the network, and runs it to see that each runs once."""
    for source, grid in grids.items():
        module = model.get_submodule(source)
        if grid not in _grids_kept_by(module):
            module.register_forward_hook(_KeepGrid(grid))
    holders = {attached: _holder(model, place.name) for place, attached in made}
    for place, attached in made:
        _hang(model, place.name, holders[attached], attached_as, attached)
    while astray := _not_run_once(model, [attached for _, attached in made], image):
        # Modules that run all their children, one after the other, would run the block among them (RegNet's stages).
        for place, attached in made:
            if attached not in astray:
                continue
            children = [name for name, child in holders[attached][1].named_children() if child is not attached]
            if not children:
                raise UsageError(
                    f"expected a block at {place.name} to run once, got {astray[attached]} times: name another module"
                )
            _take_out(model, {attached})
            name = ".".join(filter(None, (holders[attached][0], children[-1])))
            holders[attached] = (name, model.get_submodule(f"{place.name}.{name}"))
            _hang(model, place.name, holders[attached], attached_as, attached)


def _holder(model: nn.Module, place: str) -> tuple[str, nn.Module]:
    """Returns the module that keeps a block, and its name below the place: the place, or the last item of a list.

    Lists run all that is in them (DenseNet's dense blocks are dictionaries of layers).
    """
    name, module = "", model.get_submodule(place)
    while isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and len(module._modules):
        last, module = list(module.named_children())[-1]
        name = ".".join(filter(None, (name, last)))
    return name, module


def _hang(model: nn.Module, place: str, holder: tuple[str, nn.Module], attached_as: str, attached: Attached) -> None:
    name, module = holder
    _check_free(module, ".".join(filter(None, (place, name))), attached_as)
    module.add_module(attached_as, attached)
    model.get_submodule(place).register_forward_hook(_Apply(".".join(filter(None, (name, attached_as)))))


def _not_run_once(model: nn.Module, blocks: Sequence[Attached], image: tuple[int, int, int]) -> dict[Attached, int]:
    """Returns the blocks that do not run exactly once for a batch, and how often they do."""
    counts = dict.fromkeys(blocks, 0)

    def count(module: nn.Module, args: Any, output: Any) -> None:
        assert isinstance(module, Attached)
        counts[module] += 1

    handles = [block.register_forward_hook(count) for block in blocks]
    try:
        dry_run(model, image)
    finally:
        for handle in handles:
            handle.remove()
    return {block: times for block, times in counts.items() if times != 1}


def _take_out(model: nn.Module, blocks: set[Attached]) -> None:
    """Removes blocks, their hooks, and the hooks that keep a grid for none but them."""
    for _, module, hook in _hooks(model):
        holder = module.get_submodule(hook.path.rpartition(".")[0])
        if getattr(holder, hook.attached_as) in blocks:
            # A copied or unpickled network has no handle of its hooks any more.
            _forget(module, hook)
            delattr(holder, hook.attached_as)
    needed = {id(block.form.grid) for _, _, block in attached_blocks(model) if isinstance(block.form, _Tokens)}
    for module in model.modules():
        for other in [*module._forward_hooks.values()]:
            if isinstance(other, _KeepGrid) and id(other.grid) not in needed:
                _forget(module, other)


def _forget(module: nn.Module, hook: Any) -> None:
    for key in [key for key, other in module._forward_hooks.items() if other is hook]:
        del module._forward_hooks[key]


def _hooks(model: nn.Module) -> list[tuple[str, nn.Module, _Apply]]:
    """Returns (name of the place, the place, hook) of each attached block."""
    return [
        (name, module, hook)
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, _Apply)
    ]


def _grid_at(model: nn.Module, place: Place) -> Grid:
    """Returns the grid that is kept already at the place's source, or a new one."""
    assert place.grid_source is not None
    kept = _grids_kept_by(model.get_submodule(place.grid_source))
    return kept[0] if kept else Grid(place.resolution)


def _grids_kept_by(module: nn.Module) -> list[Grid]:
    return [hook.grid for hook in module._forward_hooks.values() if isinstance(hook, _KeepGrid)]


def _create_block(name: str, place: Place, options: dict[str, Any]) -> nn.Module:
    channels, height, width = place.shape
    if LAYERS.info(name).get("sizes") == "fixed":
        options = {"feature_size": place.resolution, **options}
    try:
        return create_layer(name, channels, **options)
    except UsageError as error:
        raise UsageError(
            f"expected a block that fits the map ({channels}, {height}, {width}) of {place.name}, got an error: {error}"
        ) from error


def _check_plain(model: Any) -> None:
    """Refuses networks whose modules a hook would not change any more, or would change for one process alone."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a network (torch.nn.Module), got {type(model).__name__}: see create_model")
    compiled = hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules())
    if compiled or isinstance(model, torch.jit.ScriptModule):
        raise UsageError("expected a network as it was made, got a compiled one: attach first, then compile")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UsageError(f"expected a bare network, got {type(model).__name__}: attach first, then wrap")
    if next(model.parameters(), None) is None:
        raise UsageError(f"expected a network with parameters, got {type(model).__name__}: give the whole network")


def _check_child_name(name: str) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise UsageError(f"expected attached_as as a name without dots, got {name!r}: such as 'gate'")
    return name


def _check_free(holder: nn.Module, where: str, attached_as: str) -> None:
    """Refuses a name that a module has for something else: timm's blocks, for one, run what they find as `se`."""
    if isinstance(getattr(holder, attached_as, None), Attached):
        raise UsageError(
            f"expected a place with nothing attached as {attached_as!r}, got {where}, which has that: detach it, or "
            "choose another name with attached_as"
        )
    if hasattr(holder, attached_as):
        raise UsageError(
            f"expected a new name in {where}, got {attached_as!r}, which it has for something of its own: choose "
            "another with attached_as"
        )


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _multiply_adds(module: nn.Module, shape: tuple[int, int, int]) -> int:
    """Returns the multiply-adds for one input of a shape."""
    tensor = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), torch.empty(0))
    return count_multiply_adds(module, torch.empty(1, *shape, device="meta", dtype=tensor.dtype))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2g} %" if whole else "all"

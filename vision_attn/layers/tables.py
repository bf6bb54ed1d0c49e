"""The tables of `vision-attn layers`."""

from collections.abc import Sequence
from typing import get_args

import torch
from rich import box
from rich.table import Table

from vision_attn.errors import UsageError
from vision_attn.layers.base import LAYERS, Group
from vision_attn.layers.costs import layer_cost, layer_speed, token_layer_cost, token_layer_speed
from vision_attn.layers.factory import list_layers
from vision_attn.layers.tokens import TOKEN_LAYERS
from vision_attn.registry import unknown

TOKENS = "tokens"


def layer_tables(
    names: Sequence[str] = (),
    *,
    group: str | None = None,
    channels: int = 256,
    size: tuple[int, int] = (14, 14),
    device: torch.device | str | None = None,
    batch_size: int = 8,
) -> list[Table]:
    """Returns a table of the blocks and one of the attention on tokens, each where it has something to show.

    Args:
        names: Some of them; all where empty.
        group: One group of blocks, or "tokens".
        channels: C of maps and tokens.
        size: (H, W) of the map, or the grid of the tokens.
        device: Where to measure time and memory; None measures nothing.
        batch_size: Images a pass, where it is measured.

    Raises:
        UsageError: a name or the group is unknown, no name is in the group, or a block does not fit the channels.
    """
    known = [*list_layers(), *TOKEN_LAYERS]
    for name in names:
        if name not in known:
            raise unknown("layer", name, known)
    if group is not None and group != TOKENS and group not in get_args(Group):
        list_layers(group)  # a user's own, or an error
    blocks = [] if group == TOKENS else [name for name in _in_order(group) if name in names or not names]
    tokens = [name for name in TOKEN_LAYERS if name in names or not names] if group in (None, TOKENS) else []
    if not blocks and not tokens:
        raise UsageError(f"expected layers in the group {group}, got {', '.join(names)}: leave the group out")
    tables = []
    if blocks:
        tables.append(_block_table(blocks, channels, size, device, batch_size))
    if tokens:
        tables.append(_token_table(tokens, channels, size, device, batch_size))
    return tables


def _block_table(
    names: Sequence[str], channels: int, size: tuple[int, int], device: torch.device | str | None, batch_size: int
) -> Table:
    table = _table(f"Blocks, ({channels}, {size[0]}, {size[1]}) maps{_measured(device, batch_size)}")
    _columns(table, ["name", "group"], ["parameters", "multiply-adds"], device)
    table.add_column("gate")
    table.add_column("paper", overflow="fold")
    for name in names:
        cost = layer_cost(name, channels, size)
        speed = [] if device is None else layer_speed(name, channels, size, batch_size=batch_size, device=device).row
        numbers = [f"{cost.parameters:,}", _millions(cost.multiply_adds), *speed]
        table.add_row(name, cost.group, *numbers, cost.gate, cost.paper)
    return table


def _token_table(
    names: Sequence[str], channels: int, size: tuple[int, int], device: torch.device | str | None, batch_size: int
) -> Table:
    table = _table(
        f"Attention on tokens, {channels} wide, {size[0]} x {size[1]} of them{_measured(device, batch_size)}"
    )
    _columns(table, ["name", "cost in tokens"], ["parameters", "multiply-adds"], device)
    table.add_column("paper", overflow="fold")
    for name in names:
        cost = token_layer_cost(name, channels, size)
        speed = (
            [] if device is None else token_layer_speed(name, channels, size, batch_size=batch_size, device=device).row
        )
        numbers = [f"{cost.parameters:,}", _millions(cost.multiply_adds), *speed]
        table.add_row(name, cost.growth, *numbers, cost.paper)
    return table


def _in_order(group: str | None) -> list[str]:
    """Returns the blocks, group by group as the reference has them, a user's own last."""
    order = [*get_args(Group)]
    names = list_layers(group)
    return sorted(names, key=lambda name: order.index(g) if (g := LAYERS.info(name).get("group")) in order else 99)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _columns(table: Table, words: Sequence[str], numbers: Sequence[str], device: torch.device | str | None) -> None:
    measured = [] if device is None else ["forward ms", "+ backward ms", "memory MiB"]
    for word in words:
        table.add_column(word, no_wrap=True)
    for number in [*numbers, *measured]:
        table.add_column(number, justify="right", no_wrap=True)


def _measured(device: torch.device | str | None, batch_size: int) -> str:
    if device is None:
        return ""
    threads = f", {_count(torch.get_num_threads(), 'thread')}" if torch.device(device).type == "cpu" else ""
    return f"; measured with {_count(batch_size, 'image')} on {device}{threads}"


def _count(number: int, things: str) -> str:
    return f"{number} {things}{'' if number == 1 else 's'}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"

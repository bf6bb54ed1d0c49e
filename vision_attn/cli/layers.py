"""`vision-attn layers`."""

import argparse
import sys
from typing import Any

from vision_attn.cli.values import device, positive, size


def add_layers(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "layers",
        help="attention blocks by name: what they gate, and what they cost",
        description="Lists the blocks that create_layer and attach_attention take, and the attention on tokens that "
        "the ViT encoder takes. Multiply-adds are those of convolutions and matrix products, for one image.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="some of them (all)")
    parser.add_argument("--group", help="one of channel, spatial, hybrid, self_attention, multi_branch, tokens")
    parser.add_argument("--channels", type=positive, default=256, metavar="C", help="of the map or of a token (256)")
    parser.add_argument("--size", type=size, default=14, metavar="N|H,W", help="of the map or of the grid (14)")
    parser.add_argument("--bench", action="store_true", help="measure time and memory on this machine, too")
    parser.add_argument("--batch-size", type=positive, default=8, help="images a pass, for --bench (8)")
    parser.add_argument("--device", default="auto", help="for --bench: auto (cuda where there is one), cpu, cuda")
    parser.set_defaults(carry_out=_layers)


def _layers(options: argparse.Namespace) -> int:
    from rich.console import Console

    from vision_attn.layers.tables import layer_tables

    height_width = options.size if isinstance(options.size, list) else [options.size] * 2
    # A pipe or a file has no width: nothing is cut off there.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for table in layer_tables(
        options.names,
        group=options.group,
        channels=options.channels,
        size=(height_width[0], height_width[-1]),
        device=device(options.device) if options.bench else None,
        batch_size=options.batch_size,
    ):
        console.print(table)
    return 0

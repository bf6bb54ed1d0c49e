"""`vision-attn data report|preview|pack`."""

import argparse
import sys
from typing import Any

from vision_attn.cli.values import positive


def add_data(commands: Any) -> None:
    """Adds the commands; what they do not know themselves is a run's config, as `fit` takes it."""
    parser = commands.add_parser(
        "data",
        help="a run's photos before the run: report, preview, pack",
        description="Looks at the photos that a run would have: give --config FILE and --data.<key>, as for fit.",
    )
    kinds = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    report = kinds.add_parser(
        "report",
        help="counts, sizes, unreadable and duplicate photos, classes that are missing",
        epilog="Takes --config FILE and --data.<key> as fit does.",
    )
    report.add_argument("--out", help="a new JSON file with all of it")
    report.set_defaults(carry_out=_report, takes_config=True)
    preview = kinds.add_parser(
        "preview",
        help="a sheet of what the model will really see",
        epilog="Takes --config FILE and --data.<key> as fit does.",
    )
    preview.add_argument("--out", default=None, help="a new PNG file; a new preview.png where left out")
    preview.add_argument("--split", default="train", help="train (default), validation or test")
    preview.add_argument("--photos", type=positive, default=24, metavar="N", help="how many (24)")
    preview.add_argument("--epochs", type=positive, default=1, metavar="N", help="each photo so many times (1)")
    preview.set_defaults(carry_out=_preview, takes_config=True)
    pack = kinds.add_parser(
        "pack",
        help="WebDataset shards of the photos",
        epilog="Takes --config FILE and --data.<key> as fit does.",
    )
    pack.add_argument("--out", required=True, help="a new folder")
    pack.add_argument("--shard-mb", type=positive, default=256, metavar="MB", help="size of a shard (256)")
    pack.set_defaults(carry_out=_pack, takes_config=True)


def _report(options: argparse.Namespace) -> int:
    from vision_attn.data.report import write_report
    from vision_attn.training.data_commands import open_data

    write_report(open_data(options.config), options.out)
    return 0


def _preview(options: argparse.Namespace) -> int:
    from vision_attn.files import free_path
    from vision_attn.training.data_commands import open_data
    from vision_attn.training.preview import preview_sheet

    path = preview_sheet(
        open_data(options.config),
        options.out or free_path("preview.png"),
        split=options.split,
        photos=options.photos,
        epochs=options.epochs,
    )
    print(f"preview: {path}")
    return 0


def _pack(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vision_attn.data.sources.packing import pack_shards
    from vision_attn.training.data_commands import open_data

    data = open_data(options.config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        tasks = {split: bar.add_task(split, total=len(images)) for split, images in data.splits.items()}
        summary = pack_shards(
            data.source,
            options.out,
            max_mb=options.shard_mb,
            check=data.check_mode,
            progress=lambda split, done, _: bar.update(tasks[split], completed=done),
        )
    for line in summary.lines():
        print(line)
    return 0

"""`vision-attn data report|preview|pack|shapes`."""

import argparse
import sys
from typing import Any

from vision_attn.cli.values import positive, size


def add_data(commands: Any) -> None:
    """Adds the commands; what they do not know themselves is a run's config, as `fit` takes it."""
    parser = commands.add_parser(
        "data",
        help="a run's photos before the run: report, preview, pack; the embedded shapes",
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
    _add_shapes(kinds)


def _add_shapes(kinds: Any) -> None:
    shapes = kinds.add_parser(
        "shapes",
        help="a folder of pictures whose true evidence is known, with masks",
        description="Writes the embedded shapes as a folder of pictures, with the mask of what decides their class.",
    )
    shapes.add_argument("out", metavar="OUT", help="a new folder")
    shapes.add_argument(
        "--planted",
        metavar="KIND",
        help="shortcut (a tag in a corner gives the class away) or pairs (two objects a picture); nothing otherwise",
    )
    shapes.add_argument("--train", type=_count, default=8000, metavar="N", help="training pictures (8000)")
    shapes.add_argument("--validation", type=_count, default=1000, metavar="N", help="validation pictures (1000)")
    shapes.add_argument("--test", type=_count, default=1000, metavar="N", help="test pictures (1000)")
    shapes.add_argument("--size", type=size, default=64, metavar="N|H,W", help="of a picture, in pixels (64)")
    shapes.add_argument("--seed", type=_count, default=0, metavar="N", help="which data set (0)")
    shapes.add_argument(
        "--tags",
        metavar="TAG|SPLIT=TAG,...",
        help="of a shortcut: true, random or none, for all splits or by split (train=true,validation=true,test=random)",
    )
    shapes.add_argument(
        "--corner", help="of a shortcut: top_left, top_right, bottom_left or bottom_right (bottom_right)"
    )
    shapes.set_defaults(carry_out=_shapes)


def _count(text: str) -> int:
    """Returns a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return int(text)


def _tags(text: str | None) -> str | dict[str, str] | None:
    """Returns one tag for all splits, or a tag by split."""
    if text is None or "=" not in text:
        return text
    parts = [part.partition("=") for part in text.split(",")]
    return {split.strip(): tag.strip() for split, _, tag in parts}


def _shapes(options: argparse.Namespace) -> int:
    from vision_attn.data.planted import write_planted_folder
    from vision_attn.data.shapes import write_image_folder
    from vision_attn.errors import UsageError

    lengths = {"train": options.train, "val": options.validation, "test": options.test}
    sides = options.size if isinstance(options.size, int) else tuple(options.size)
    if options.planted != "shortcut" and (options.tags or options.corner):
        raise UsageError("expected --tags and --corner with --planted shortcut: plant that, or leave them out")
    if options.planted is None:
        path = write_image_folder(options.out, **lengths, size=sides, seed=options.seed)
    else:
        path = write_planted_folder(
            options.out,
            options.planted,
            **lengths,
            size=sides,
            seed=options.seed,
            tags=_tags(options.tags),
            corner=options.corner or "bottom_right",
        )
    print(f"shapes: {path} (" + ", ".join(f"{split} {length}" for split, length in lengths.items() if length) + ")")
    return 0


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

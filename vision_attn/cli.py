"""`vision-attn COMMAND ...`: the words of the house on the command line.

Heavy libraries load once a command is known, so that `vision-attn --help` answers at once. What a person got wrong ends
in one line and exit code 2; anything else is a bug of ours and keeps its traceback.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from vision_attn import __version__
from vision_attn.errors import UsageError

TRAINING = {
    "fit": "train a network; leaves runs/<name>/ with its export",
    "validate": "validation metrics of a run",
    "test": "test metrics of a run, with intervals and the confusion matrix",
    "predict": "a CSV of predictions for the photos of a config",
}

# Flags of their own, which are easily taken for options of a method.
_FLAGS = ("method", "target", "style", "colormap", "scale", "format", "batch_size", "device", "out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Carries out one command and returns the exit code: 0, or 2 where the user's input was at fault."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    try:
        if arguments and arguments[0] in TRAINING:
            return _train(arguments[0], arguments[1:])
        options = parser.parse_args(arguments)
        return options.carry_out(options)
    except UsageError as error:
        if os.environ.get("VISION_ATTN_TRACEBACK"):
            raise
        print(f"vision-attn: {_last_words(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who reads our output has read enough (`| head`); Python would complain once more as it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _last_words(error: UsageError) -> str:
    """Returns an error's message in one line, without the traceback that a loader's worker puts before it."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Caught ") and "worker process" in lines[0]:
        return re.sub(r"^[\w.]*Error: ", "", lines[-1])
    return " ".join(line.strip() for line in lines)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="vision-attn", description="Train image classifiers and look at what they look at.")
    parser.add_argument("--version", action="version", version=f"vision-attn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)
    _add_explain(commands)
    _add_layers(commands)
    return parser


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="overlays of where a model looks in photos",
        description="Draws where a model looks, on the original photos. The same command goes on where it was stopped. "
        "Exit code 3: some photos could not be read.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an artefact (runs/<name>/export), a run's checkpoint (runs/<name>/checkpoints/best.ckpt), or a timm name",
    )
    parser.add_argument("photos", metavar="PHOTOS", nargs="+", help="photos, folders of photos, quoted patterns")
    parser.add_argument(
        "--method",
        help="one or several, with commas between them (rollout where all tokens attend to each other, else grad_cam); "
        "see --list-methods",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the methods that have it, such as head_fusion=max, or of one, such as raw.layer=3; can be "
        "given again",
    )
    parser.add_argument("--list-methods", action=_ListMethods, nargs=0, help="all methods with their options, and exit")
    parser.add_argument(
        "--target", help="classes to explain, names or indices with commas between them (predicted: of each photo)"
    )
    parser.add_argument("--out", help="folder for overlays, raw maps and index.csv; a new explanations/ where left out")
    parser.add_argument("--style", default="heat", help="heat (default), dim or contour")
    parser.add_argument("--colormap", help="one of matplotlib's (inferno; RdBu_r for maps of both signs)")
    parser.add_argument(
        "--scale",
        type=_scale,
        default="image",
        help="image (default), set (one for all photos), a percentile such as 99, or LOW,HIGH",
    )
    parser.add_argument("--format", default="png", help="png (default) or jpg (faster, smaller)")
    parser.add_argument("--no-raw", action="store_true", help="write no raw maps")
    parser.add_argument(
        "--sheet",
        default="",
        metavar="KINDS",
        help="sheets of the first photos: methods (photos by methods), heads (layers by heads), patch (what one patch "
        "attends to), gates (what each block lets through, with the gates of channels); several with commas",
    )
    parser.add_argument("--sheet-photos", type=_positive, default=8, metavar="N", help="how many photos they show (8)")
    parser.add_argument("--query-patch", type=_patch, metavar="ROW,COL", help="for --sheet patch (the middle), gates")
    parser.add_argument("--batch-size", type=_positive, default=16, help="photos a forward pass (16)")
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, mps")
    named = parser.add_argument_group("where MODEL is a name")
    named.add_argument("--checkpoint", metavar="FILE", help="its weights, from a file")
    named.add_argument(
        "--pretrained", type=_boolean, metavar="true|false", help="its weights from the hub (true without --checkpoint)"
    )
    named.add_argument("--classes", metavar="FILE", help="names of its classes, one a line (ImageNet's for 1,000)")
    named.add_argument("--image-size", type=_size, metavar="N|H,W", help="of its input (its own)")
    parser.set_defaults(carry_out=_explain)


def _add_layers(commands: Any) -> None:
    parser = commands.add_parser(
        "layers",
        help="attention blocks by name: what they gate, and what they cost",
        description="Lists the blocks that create_layer and attach_attention take, and the attention on tokens that "
        "the ViT encoder takes. Multiply-adds are those of convolutions and matrix products, for one image.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="some of them (all)")
    parser.add_argument("--group", help="one of channel, spatial, hybrid, self_attention, multi_branch, tokens")
    parser.add_argument("--channels", type=_positive, default=256, metavar="C", help="of the map or of a token (256)")
    parser.add_argument("--size", type=_size, default=14, metavar="N|H,W", help="of the map or of the grid (14)")
    parser.add_argument("--bench", action="store_true", help="measure time and memory on this machine, too")
    parser.add_argument("--batch-size", type=_positive, default=8, help="images a pass, for --bench (8)")
    parser.add_argument("--device", default="auto", help="for --bench: auto (cuda where there is one), cpu, cuda")
    parser.set_defaults(carry_out=_layers)


class _ListMethods(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from vision_attn.look import describe_methods

        print(describe_methods(), flush=True)
        parser.exit()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text == "true"


def _numbers(text: str, kind: Any) -> tuple[Any, ...]:
    return tuple(kind(part) for part in text.split(","))


def _scale(text: str) -> Any:
    if text in ("image", "set"):
        return text
    try:
        values = _numbers(text, float)
    except ValueError:
        values = ()
    if len(values) not in (1, 2):
        raise argparse.ArgumentTypeError(f"expected image, set, a percentile or LOW,HIGH, got {text!r}")
    return values[0] if len(values) == 1 else values


def _patch(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected ROW,COL of a patch, such as 7,5, got {text!r}")
    return int(parts[0]), int(parts[1])


def _size(text: str) -> int | list[int]:
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected a size such as 224 or HEIGHT,WIDTH, got {text!r}")
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


def _explain(options: argparse.Namespace) -> int:
    from vision_attn.files import free_path
    from vision_attn.look import explain_photos
    from vision_attn.models.factory import open_model

    given = dict(_option(text) for text in options.option)
    model = open_model(
        options.model,
        checkpoint=options.checkpoint,
        pretrained=options.pretrained,
        classes=_class_names(options.classes),
        image_size=options.image_size,
    )
    out = options.out or str(free_path("explanations"))
    try:
        looked = explain_photos(
            model.to(_device(options.device)),
            options.photos,
            out,
            method=options.method,
            target=options.target,
            options=given,
            style=options.style,
            colormap=options.colormap,
            scale=options.scale,
            format=options.format,
            raw=not options.no_raw,
            sheets=[name.strip() for name in options.sheet.split(",") if name.strip()],
            sheet_photos=options.sheet_photos,
            query_patch=options.query_patch,
            batch_size=options.batch_size,
        )
    except KeyboardInterrupt:
        again = "the same command" if options.out else f"the same command with --out {out}"
        print(f"vision-attn: stopped; {again} goes on from here", file=sys.stderr)
        return 130
    for line in _told(looked):
        print(line)
    for reason in looked.damaged.values():
        print(f"vision-attn: {reason}", file=sys.stderr)
    return 3 if looked.damaged else 0


def _layers(options: argparse.Namespace) -> int:
    from rich.console import Console

    from vision_attn.layers.tables import layer_tables

    size = options.size if isinstance(options.size, list) else [options.size] * 2
    # A pipe or a file has no width: nothing is cut off there.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for table in layer_tables(
        options.names,
        group=options.group,
        channels=options.channels,
        size=(size[0], size[-1]),
        device=_device(options.device) if options.bench else None,
        batch_size=options.batch_size,
    ):
        console.print(table)
    return 0


def _told(looked: Any) -> list[str]:
    """Returns what came of it, in lines."""
    lines = []
    if looked.explained:
        speed = f"{looked.explained / looked.seconds:.1f} photos/s"
        before = f", {looked.done_before} were done before" if looked.done_before else ""
        lines.append(f"{looked.explained} photos in {looked.seconds:.1f} s ({speed}){before}")
    elif looked.done_before:
        lines.append(f"nothing left to do: {looked.done_before} photos were explained before")
    if looked.overlays:
        listed = looked.out / "index.csv"
        lines.append(f"{len(looked.overlays)} overlays: {looked.out} (first: {looked.overlays[0]}; list: {listed})")
    if looked.sheets:
        more = f" and {len(looked.sheets) - 1} more in {looked.out / 'sheets'}" if len(looked.sheets) > 1 else ""
        lines.append(f"sheets: {looked.sheets[0]}{more}")
    return lines


def _class_names(path: str | None) -> list[str] | None:
    """Returns the lines of a file that are not empty."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"expected a text file with a class name a line at {path}, got an error ({reason})") from error


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"expected a device that is there, got --device {name} ({reason}): use auto or cpu") from error
    return device


def _option(text: str) -> tuple[str, Any]:
    """Returns the name and the value of NAME=VALUE; the value as YAML would read it."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not all(part.isidentifier() for part in name.split(".", 1)):
        raise UsageError(f"expected --option NAME=VALUE, got {text!r}: for example --option head_fusion=max")
    if name in _FLAGS:
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(f"expected {flag} {value}, got --option {text}: {name} has a flag of its own")
    try:
        return name, _as_option(yaml.safe_load(value))
    # PyYAML answers a date that there is not, such as 2026-02-30, with a ValueError of datetime.
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        raise UsageError(f"expected a value in YAML for --option {name}, got {value!r} ({reason}): quote it") from error


def _as_option(value: Any) -> Any:
    """Returns lists as tuples, as methods take them; and `3,5` for the tuple that it looks like."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)+\s*", value):
        return tuple(int(part) for part in value.split(","))
    return tuple(_as_option(part) for part in value) if isinstance(value, list) else value


def _train(command: str, arguments: Sequence[str]) -> int:
    from vision_attn.training.run import run

    finished = run(command, arguments)
    if command == "fit":
        from vision_attn.export import export_run

        export_run(finished)
    return 0


if __name__ == "__main__":
    sys.exit(main())

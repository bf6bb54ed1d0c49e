"""`vision-attn explain`."""

import argparse
import os
import re
import sys
from typing import Any

from vision_attn.cli.values import add_named_model, device, open_named_model, patch, positive, scale
from vision_attn.errors import UsageError

# Flags of their own, which are easily taken for options of a method.
_FLAGS = ("method", "target", "style", "colormap", "scale", "format", "batch_size", "device", "out")


def add_explain(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "explain",
        help="overlays of where a model looks in photos",
        description="Draws where a model looks, on the original photos. The same command goes on where it was stopped. "
        "Exit code 3: some photos could not be read. Under torchrun or SLURM each process takes its share of them.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an artefact (runs/<name>/export), a run's checkpoint (runs/<name>/checkpoints/best.ckpt), or a timm name",
    )
    parser.add_argument("photos", metavar="PHOTOS", nargs="+", help="photos, folders of photos, quoted patterns")
    parser.add_argument(
        "--method",
        help="one or several, with commas between them (grad_rollout where all tokens attend to each other, else "
        "grad_cam); see --list-methods",
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
        type=scale,
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
    parser.add_argument("--sheet-photos", type=positive, default=8, metavar="N", help="how many photos they show (8)")
    parser.add_argument("--query-patch", type=patch, metavar="ROW,COL", help="for --sheet patch (the middle), gates")
    parser.add_argument("--batch-size", type=positive, default=16, help="photos a forward pass (16)")
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, mps")
    add_named_model(parser)
    parser.set_defaults(carry_out=_explain)


class _ListMethods(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from vision_attn.look import describe_methods

        print(describe_methods(), flush=True)
        parser.exit()


def _explain(options: argparse.Namespace) -> int:
    from vision_attn.files import free_path
    from vision_attn.look import explain_photos
    from vision_attn.look.sharing import Share

    given = dict(method_option(text) for text in options.option)
    rank, world, local_rank = _place()
    if world > 1 and not options.out:
        raise UsageError(
            f"expected --out, a folder that all {world} processes see, got none: a new one would be another for each"
        )
    share = Share(rank, world)
    model = open_named_model(options)
    out = options.out or str(free_path("explanations"))
    try:
        looked = explain_photos(
            model.to(device(options.device, local_rank)),
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
            progress=rank == 0,
            share=share,
        )
    except KeyboardInterrupt:
        again = "the same command" if options.out else f"the same command with --out {out}"
        print(f"vision-attn: stopped; {again} goes on from here", file=sys.stderr)
        return 130
    for line in _told(looked):
        print(line if share.is_all else f"{share}: {line}")
    for other, photos in looked.lost.items():
        missing = f"{len(photos)} of its photos are missing, such as {photos[0]}"
        again = "the same command, with any number of processes, goes on with them"
        print(f"vision-attn: rank {other} of {world} ended early: {missing}; {again}", file=sys.stderr)
    # Who ends last answers for all damaged photos: torchrun ends all processes when one ends with an error.
    last = looked.joined or bool(looked.lost)
    for reason in looked.damaged.values() if last else ():
        print(f"vision-attn: {reason}", file=sys.stderr)
    return 3 if last and (looked.damaged or looked.lost) else 0


def _place() -> tuple[int, int, int]:
    """Returns this process's rank, how many there are, and its rank on its machine."""
    # Lightning, which knows the launchers, takes seconds to load.
    if not any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "LSB_JOBID")):
        return 0, 1, 0
    from vision_attn.training.distributed import find_place

    place = find_place()
    return place.rank, place.world, place.local_rank


def _told(looked: Any) -> list[str]:
    """Returns what came of it, in lines."""
    lines = []
    if looked.explained:
        speed = f"{looked.explained / looked.seconds:.1f} photos/s"
        before = f", {looked.done_before} were done before" if looked.done_before else ""
        lines.append(f"{looked.explained} photos in {looked.seconds:.1f} s ({speed}){before}")
    elif looked.done_before:
        lines.append(f"nothing left to do: {looked.done_before} photos were explained before")
    if not looked.joined:
        lines.append(f"{looked.out / 'index.csv'} follows when all processes have ended")
    elif looked.overlays:
        listed = looked.out / "index.csv"
        lines.append(f"{len(looked.overlays)} overlays: {looked.out} (first: {looked.overlays[0]}; list: {listed})")
    if looked.sheets:
        more = f" and {len(looked.sheets) - 1} more in {looked.out / 'sheets'}" if len(looked.sheets) > 1 else ""
        lines.append(f"sheets: {looked.sheets[0]}{more}")
    return lines


def method_option(text: str) -> tuple[str, Any]:
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

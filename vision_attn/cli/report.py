"""`vision-attn report`."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from vision_attn.cli.explain import method_option
from vision_attn.cli.values import add_named_model, device, open_named_model, positive
from vision_attn.errors import UsageError


def add_report(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "report",
        help="one HTML file to play with what a model attends to",
        description="Writes one HTML file that opens in any browser, without a server or the internet: photos with "
        "predictions and overlays, the attention of every head, gates of blocks, and, where they are there, the "
        "evaluation and the training run. Exit code 3: some photos could not be read.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an artefact (runs/<name>/export), a run's checkpoint (runs/<name>/checkpoints/best.ckpt), or a timm name",
    )
    parser.add_argument("photos", metavar="PHOTOS", nargs="+", help="photos, folders of photos, quoted patterns")
    parser.add_argument("--out", help="the page; a new report.html where left out")
    parser.add_argument("--title", help="of the page")
    parser.add_argument(
        "--method",
        help="one or several, with commas between them, to switch between (grad_rollout where all tokens attend to "
        "each other, else grad_cam)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the methods, as for explain; can be given again",
    )
    parser.add_argument(
        "--attention",
        default="last",
        help="of every photo: last (its last layer, the default), full (all layers: megabytes a photo), none",
    )
    parser.add_argument(
        "--explored",
        type=_count,
        default=3,
        metavar="N",
        help="photos with all layers, heads, gates and class maps: confident mistakes first (3)",
    )
    parser.add_argument("--evaluation", metavar="DIR", help="what vision-attn evaluate wrote, for the part on trust")
    parser.add_argument("--run", metavar="DIR", help="the training run (found beside an artefact of a run)")
    parser.add_argument("--photo-size", type=positive, default=640, help="longer side of photos on the page (640)")
    parser.add_argument("--batch-size", type=positive, default=16, help="photos a forward pass (16)")
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, mps")
    add_named_model(parser)
    parser.set_defaults(carry_out=_report)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return int(text)


def _report(options: argparse.Namespace) -> int:
    from vision_attn.files import free_path
    from vision_attn.report import report_photos

    given = dict(method_option(text) for text in options.option)
    found = None if options.run else _run_of(options.model)
    model = open_named_model(options)
    done = report_photos(
        model.to(device(options.device)),
        options.photos,
        options.out or free_path("report.html"),
        method=options.method,
        options=given,
        attention=options.attention,
        explored=options.explored,
        evaluation=options.evaluation,
        run=options.run or found,
        title=options.title,
        photo_size=options.photo_size,
        batch_size=options.batch_size,
        command=shlex.join(["vision-attn", *sys.argv[1:]]),
    )
    size = done.path.stat().st_size / 1e6
    print(f"{done.photos} photos in {done.seconds:.1f} s: {done.path} ({size:.1f} MB)")
    for note in done.notes:
        print(f"  {note}")
    for reason in done.damaged.values():
        print(f"vision-attn: {reason}", file=sys.stderr)
    return 3 if done.damaged else 0


def _run_of(model: str) -> Path | None:
    """Returns the run that an artefact or a checkpoint lies in; one that cannot be read is left out, and said."""
    from vision_attn.report.facts import run_facts

    path = Path(model)
    for folder in (path.parent, path.parent.parent):
        if path.exists() and (folder / "config.yaml").is_file():
            try:
                run_facts(folder)
            except UsageError as error:
                print(f"vision-attn: the run beside the model is left out: {error}", file=sys.stderr)
                return None
            return folder
    return None

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

# What `explain_photos`, and what it calls, take under these names is no option of a method.
_FLAGS = ("method", "target", "style", "batch_size", "out")
_ARGUMENTS = ("model", "photos", "paths", "damaged", "progress", "images", "layout", "geometry")


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
    return parser


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="overlays of where an exported model looks in photos",
        description="Draws where a model looks, on the original photos. Exit code 3: some photos could not be read.",
    )
    parser.add_argument("model", metavar="MODEL", help="an artefact: runs/<name>/export")
    parser.add_argument("photos", metavar="PHOTOS", nargs="+", help="photos and folders of photos")
    parser.add_argument(
        "--method", default="rollout", help="rollout (default), raw, or a control: random, center, edges"
    )
    parser.add_argument("--target", help="class name or index to explain; the predicted class where left out")
    parser.add_argument("--out", help="a new folder for the overlays and index.csv; a new explanations/ where left out")
    parser.add_argument("--style", default="heat", help="heat (default), dim or contour")
    parser.add_argument("--batch-size", type=_positive, default=16, help="photos a forward pass (16)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method, such as head_fusion=max or discard_ratio=0.9; can be given again",
    )
    parser.set_defaults(carry_out=_explain)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _explain(options: argparse.Namespace) -> int:
    from vision_attn.files import free_path
    from vision_attn.look import explain_photos
    from vision_attn.models.factory import load_model

    looked = explain_photos(
        load_model(options.model),
        options.photos,
        options.out or free_path("explanations"),
        method=options.method,
        target=options.target,
        style=options.style,
        batch_size=options.batch_size,
        **dict(_option(text) for text in options.option),
    )
    if looked.overlays:
        listed = looked.out / "index.csv"
        print(f"{len(looked.overlays)} overlays: {looked.out} (first: {looked.overlays[0]}; list: {listed})")
    for reason in looked.damaged.values():
        print(f"vision-attn: {reason}", file=sys.stderr)
    return 3 if looked.damaged else 0


def _option(text: str) -> tuple[str, Any]:
    """Returns the name and the value of NAME=VALUE; the value as YAML would read it."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"expected --option NAME=VALUE, got {text!r}: for example --option head_fusion=max")
    if name in _FLAGS:
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(f"expected {flag} {value}, got --option {text}: {name} has a flag of its own")
    if name in _ARGUMENTS:
        raise UsageError(f"expected an option of the method, got --option {text}: {name} is none")
    try:
        return name, yaml.safe_load(value)
    # PyYAML answers a date that there is not, such as 2026-02-30, with a ValueError of datetime.
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        raise UsageError(f"expected a value in YAML for --option {name}, got {value!r} ({reason}): quote it") from error


def _train(command: str, arguments: Sequence[str]) -> int:
    from vision_attn.training.run import run

    finished = run(command, arguments)
    if command == "fit":
        from vision_attn.export import export_run

        export_run(finished)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`vision-attn COMMAND ...`: the words of the house on the command line.

Heavy libraries load once a command is known, so that `vision-attn --help` answers at once. What a person got wrong ends
in one line and exit code 2; anything else is a bug of ours and keeps its traceback.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence

from vision_attn import __version__
from vision_attn.errors import UsageError

TRAINING = {
    "fit": "train a network; leaves runs/<name>/ with its export",
    "validate": "validation metrics of a run",
    "test": "test metrics of a run, with intervals and the confusion matrix",
    "predict": "a CSV of predictions for the photos of a config",
}


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
    """Returns an error's message in one line, without the traceback that PyTorch puts before it in a loader's worker."""
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
    return parser


def _train(command: str, arguments: Sequence[str]) -> int:
    from vision_attn.training.run import run

    finished = run(command, arguments)
    if command == "fit":
        from vision_attn.export import export_run

        export_run(finished)
    return 0


if __name__ == "__main__":
    sys.exit(main())

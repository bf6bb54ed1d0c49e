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
from vision_attn.cli.compare import add_compare
from vision_attn.cli.data import add_data
from vision_attn.cli.evaluate import add_evaluate
from vision_attn.cli.explain import add_explain
from vision_attn.cli.export import add_export
from vision_attn.cli.layers import add_layers
from vision_attn.cli.predict import add_predict, is_of_a_run
from vision_attn.cli.report import add_report
from vision_attn.errors import StoppedError, UsageError
from vision_attn.files import is_taken

TRAINING = {
    "fit": "train a network; leaves runs/<name>/ with its export",
    "validate": "validation metrics of a run",
    "test": "test metrics of a run, with intervals and the confusion matrix",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Carries out one command and returns the exit code.

    0; 2 where the user's input was at fault; 128 and the signal's number where a signal ended it (130 for Ctrl-C).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    try:
        command, rest = (arguments or [""])[0], arguments[1:]
        if command in TRAINING or (command == "predict" and is_of_a_run(rest)):
            return _train(command, rest)
        options, config = parser.parse_known_args(arguments)
        if getattr(options, "takes_config", False):
            options.config = config
        elif config:
            parser.error(f"unrecognized arguments: {' '.join(config)}")
        return options.carry_out(options)
    except UsageError as error:
        if os.environ.get("VISION_ATTN_TRACEBACK"):
            raise
        print(f"vision-attn: {_last_words(error)}", file=sys.stderr)
        return 2
    except StoppedError as stop:
        print(f"vision-attn: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("vision-attn: stopped", file=sys.stderr)
        return 130
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
    add_predict(commands)
    add_explain(commands)
    add_evaluate(commands)
    add_report(commands)
    add_export(commands)
    add_compare(commands)
    add_data(commands)
    add_layers(commands)
    return parser


def _train(command: str, arguments: Sequence[str]) -> int:
    from vision_attn.training.run import run

    finished = run(command, arguments)
    # A run that has its export already was asked to go on after its end.
    if command == "fit" and finished.rank == 0 and not is_taken(finished.run_dir / "export"):
        from vision_attn.export import export_run

        export_run(finished)
    return 0

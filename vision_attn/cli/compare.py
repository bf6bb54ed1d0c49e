"""`vision-attn compare RUN...`."""

import argparse
import sys
from typing import Any


def add_compare(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "compare",
        help="runs side by side, and a summary over folds",
        description="Shows what sets runs apart and what each reached, with 95 % intervals; whether two that saw the "
        "same photos differ (McNemar's exact test); and, for runs that differ in data.fold alone, all folds together.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs")
    parser.add_argument("--split", help="validation or test (test where all runs were tested)")
    parser.add_argument("--out", help="a new CSV file with the table")
    parser.set_defaults(carry_out=_compare)


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from vision_attn.errors import UsageError
    from vision_attn.files import is_taken
    from vision_attn.training.comparison import compare_runs

    if options.out and is_taken(options.out):
        raise UsageError(f"expected a new file for the table, got {options.out}, which exists: choose another")
    compared = compare_runs(options.runs, split=options.split)
    # A pipe or a file has no width: nothing is cut off there.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for table in compared.tables():
        console.print(table)
    for line in compared.lines():
        console.print(line, soft_wrap=True)
    if options.out:
        print(f"table: {compared.write_csv(options.out)}")
    return 0

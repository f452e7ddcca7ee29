"""What differs between runs, in their flags and in their results (docs/monitoring.md):

python compare_runs.py out/* --html runs.html

Only the files in the runs' folders are read, so it can be typed while they train.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import arguments
from errors import UserError, count, report_user_errors
from monitoring.comparison import by_stage, compare, format_csv, group_seeds, name_runs
from monitoring.run_folder import find_runs, read_run
from monitoring.text_table import format_table
from runtime.terminal import WIDEST, log, set_up_logging, status


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Runs beside each other", "out/* --html runs.html")
    parser.add_argument(
        "runs",
        nargs="+",
        type=arguments.expand_home,
        metavar="RUN",
        help="output folders of training runs, or folders of them",
    )
    parser.add_argument(
        "--by_seed",
        action="store_true",
        help="runs that differ in nothing but --seed and their folder are one row: mean and standard "
        "deviation; not in the CSV file",
    )
    parser.add_argument(
        "--csv", type=arguments.expand_home, default="", help="file for all figures and flags, a line a run"
    )
    parser.add_argument(
        "--html",
        type=arguments.expand_home,
        default="",
        help="file for a page with the tables and the curves of the runs on common axes",
    )
    return parser


def write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}): name another file") from None
    log.info(f"written    {path}")


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    set_up_logging(0)
    folders, skipped = find_runs(args.runs)
    runs = [read_run(folder) for folder in folders]
    notes = [*skipped, *(f"warning: {text}" for run in runs for text in run.unread)]
    singles = name_runs(runs)
    rows = group_seeds(singles) if args.by_seed else singles
    if args.by_seed and len(rows) == len(singles):
        notes.append("--by_seed does nothing here: no two runs differ in nothing but --seed")

    width = min(shutil.get_terminal_size((WIDEST, 24)).columns, status.width)
    for number, (stage, theirs) in enumerate(by_stage(rows).items()):
        if number:
            log.info("")
        log.info(f"── {stage}: {count(sum(len(row.runs) for row in theirs), 'run')} ──")
        for line in format_table([row.name for row in theirs], compare(theirs), width):
            log.info(line)
    for note in notes:
        log.info(note)

    if args.csv:
        write(args.csv, format_csv(singles))
    if args.html:
        from monitoring.comparison_page import format_page  # the only part that needs NumPy

        write(args.html, format_page(rows, notes))


if __name__ == "__main__":
    main()

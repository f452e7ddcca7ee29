"""Runs beside each other: what differs in their flags and in their results."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import count, printable
from monitoring.run_folder import NO_SCORES, RunFolder, finite
from monitoring.text_table import Column, common_start
from runtime.terminal import format_clock

PLACES = ("output_dir", "log_dir")  # differ in any two runs, as their names do
SHOWN = (*PLACES, "epochs")  # in columns of their own
NO_DIFFERENCE = (*PLACES, "seed", "host")  # between runs of several seeds
# for the CSV file and the curves
BY_THE_WAY = re.compile(r"(train_(lr|grad_norm)|(train|test)_loss.+|_(layer|block_?)\d+)$")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over runs."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Row:
    """A run, or several that differ in their seed alone."""

    name: str
    runs: list[RunFolder]

    def figure(self, read: Callable[[RunFolder, str], float | None], name: str) -> float | Spread | None:
        """What `read`, such as RunFolder.best, gives for a figure: of one run, or over
        all; NaN if one of them has no finite one.
        """
        values = [value for run in self.runs if (value := read(run, name)) is not None]
        if len(set(values)) <= 1:
            return values[0] if values else None
        if len(finite(values)) < len(self.runs):
            return math.nan
        return Spread(statistics.fmean(values), statistics.stdev(values))

    def setting(self, name: str) -> str | None:
        """As text; the values of several runs one after the other; None: of no run."""
        texts = dict.fromkeys(as_text(run.settings[name]) for run in self.runs if name in run.settings)
        return " ".join(texts) if texts else None


def as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(map(as_text, value))
    return "-" if value is None else printable(str(value))


def name_runs(runs: Sequence[RunFolder]) -> list[Row]:
    """Their folders, from where they part."""
    paths = [Path(os.path.abspath(run.folder)) for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [
        Row(printable(str(path.relative_to(common))), [run]) for path, run in zip(paths, runs, strict=True)
    ]


def group_seeds(rows: Sequence[Row]) -> list[Row]:
    """Runs that came equally far and differ in nothing but their seed, in one row."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        (run,) = row.runs
        settings = {name: as_text(value) for name, value in run.settings.items() if name not in NO_DIFFERENCE}
        groups.setdefault((run.epochs_done, run.state, tuple(sorted(settings.items()))), []).append(row)
    return [group[0] if len(group) == 1 else join(group) for group in groups.values()]


def join(rows: Sequence[Row]) -> Row:
    names = [row.name for row in rows]
    shared = names[0][: common_start(names)] or f"{rows[0].name}, "
    return Row(f"{shared}* ({count(len(rows), 'run')})", [run for row in rows for run in row.runs])


def by_stage(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Figures of two stages cannot be compared: each has a table."""
    stages: dict[str, list[Row]] = {}
    for row in rows:
        stages.setdefault(row.runs[0].stage, []).append(row)
    return stages


# ── Columns ──


def compare(rows: Sequence[Row]) -> list[Column]:
    """Columns of runs of one stage: how far they came, what came out, and which flags
    differ.
    """
    columns = []
    states = [row.runs[0].state for row in rows]
    if set(states) != {"done"}:
        columns.append(Column("state", states, is_figure=False))
    columns.append(Column("epochs", [format_epochs(row.runs[0]) for row in rows]))
    seconds = [statistics.fmean(run.seconds for run in row.runs) for row in rows]
    columns.append(Column("time", list(map(format_clock, seconds))))
    return columns + compare_figures(rows) + compare_settings(rows)


def format_epochs(run: RunFolder) -> str:
    return f"{run.epochs_done}/{'?' if run.epochs_planned is None else run.epochs_planned}"


def figures_of(rows: Sequence[Row]) -> list[str]:
    """train_loss, then in the runs' own order the figures of evaluations; without any,
    those of training.
    """
    names = list(dict.fromkeys(name for row in rows for run in row.runs for name in run.figures))
    chosen = [name for name in names if not BY_THE_WAY.search(name)]
    tests = [name for name in chosen if name.startswith("test_")]
    others = tests or [name for name in chosen if name != "train_loss"]
    return [name for name in names if name == "train_loss"] + others


def compare_figures(rows: Sequence[Row]) -> list[Column]:
    columns = []
    for name in figures_of(rows):
        last = [row.figure(RunFolder.last, name) for row in rows]
        best = [row.figure(RunFolder.best, name) for row in rows]
        cells = format_figures(last + best)
        last_cells, best_cells = cells[: len(rows)], cells[len(rows) :]
        if len(rows) == 1 or name == "train_loss" or len({*zip(last_cells, best_cells, strict=True)}) > 1:
            columns.append(Column(name, last_cells))
            if name.startswith("test_") and not NO_SCORES.match(name) and best_cells != last_cells:
                columns.append(Column(f"best {name}", best_cells))
    return columns


def compare_settings(rows: Sequence[Row]) -> list[Column]:
    """The flags of which two rows have different values. One that older runs lack and
    the others agree on is none.
    """
    names = dict.fromkeys(name for row in rows for run in row.runs for name in run.settings)
    columns = []
    for name in names:
        texts = [row.setting(name) for row in rows]
        if name not in SHOWN and len({text for text in texts if text is not None}) > 1:
            cells = ["" if text is None else text for text in texts]
            columns.append(Column(name, cells, all(re.fullmatch(r"[-+.\deE]*", cell) for cell in cells)))
    return columns


def format_figures(values: Sequence[float | Spread | None]) -> list[str]:
    """With as many decimals each, so that they align: about four digits of the largest
    one.
    """
    means = [value.mean if isinstance(value, Spread) else value for value in values]
    largest = max(map(abs, finite(means)), default=0.0)
    if all(isinstance(mean, int) or mean is None for mean in means):
        form = "d"
    elif 1e-3 <= largest < 1e6 or largest == 0:
        form = f".{min(max(3 - math.floor(math.log10(largest or 1)), 2), 5)}f"
    else:
        form = ".3e"

    def text(value: float | Spread | None) -> str:
        if isinstance(value, Spread):
            return f"{value.mean:{form}} ± {value.deviation:{form}}"
        return "" if value is None else f"{value:{form}}"

    return list(map(text, values))


# ── CSV ──


def format_csv(rows: Sequence[Row]) -> str:
    """A line a run, with all figures and flags, and every digit."""
    runs = [(row.name, run) for row in rows for run in row.runs]
    figures = list(dict.fromkeys(name for _, run in runs for name in run.figures))
    settings = list(dict.fromkeys(name for _, run in runs for name in run.settings))
    scores = [name for name in figures if name.startswith("test_") and not NO_SCORES.match(name)]
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    own = ["run", "folder", "stage", "state", "epochs_done", "epochs_planned", "seconds"]
    table.writerow([*own, *figures, *(f"best {name}" for name in scores), *settings])
    for name, run in runs:
        first = [
            name,
            printable(str(run.folder)),
            run.stage,
            run.state,
            run.epochs_done,
            run.epochs_planned,
            run.seconds,
        ]
        values = [*map(run.last, figures), *map(run.best, scores)]
        theirs = [as_text(run.settings[key]) if key in run.settings else "" for key in settings]
        table.writerow([*first, *values, *theirs])
    return file.getvalue()

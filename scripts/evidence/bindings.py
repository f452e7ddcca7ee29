"""Figures in the pages that name the JSON file they come from, in a comment behind them:

    81.3%<!-- = tiles-finetune-base-100-s0 results.test_acc1 -->
    80.9%<!-- = tiles-finetune-base-100-s* results.test_acc1 -->   the mean over the seeds

The name is that of a file below docs/evidence/, without .json; the key goes through nested
objects, dot by dot. scripts/evidence.sh --unbound lists the figures that name none.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from errors import UserError

FIGURE = r"(?<![\w.])[+-−]?\d[\d,]*(?:\.\d+)?"
BOUND = re.compile(rf"({FIGURE})[ *%]*<!-- = (\S+) (\S+) -->")
# what looks measured: a number with decimals, or a share
MEASURED = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+%?|%)(?![\w.])")
NOT_PROSE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<!-- made by .*?<!-- end -->", re.DOTALL)


class Binding(NamedTuple):
    figure: str  # as the page has it
    file: str
    key: str


def find_bindings(text: str) -> list[Binding]:
    return [Binding(*found) for found in BOUND.findall(text)]


def look_up(folder: Path, file: str, key: str) -> float:
    """UserError where there is no such file or no number of that name."""
    paths = sorted(folder.glob(f"{file}.json"))
    if not paths:
        raise UserError(f"no {file}.json in {folder}")
    values = []
    for path in paths:
        value = json.loads(path.read_text(encoding="utf-8"))
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, int | float):
            raise UserError(f"{path.name} has no number {key}")
        values.append(float(value))
    return statistics.mean(values)


def says(figure: str, value: float) -> bool:
    """Whether the value, rounded to as many decimals, is this figure."""
    plain = figure.replace(",", "").replace("−", "-").lstrip("+")
    decimals = len(plain.partition(".")[2])
    return f"{value:.{decimals}f}" == plain


def wrong_figures(text: str, folder: Path) -> list[str]:
    """Those that their file does not say."""
    wrong = []
    for figure, file, key in find_bindings(text):
        value = look_up(folder, file, key)
        if not says(figure, value):
            wrong.append(f"{figure}, but {file} {key} is {value:g}")
    return wrong


def unbound_figures(text: str) -> Iterator[tuple[int, str]]:
    """Line number and figure, for each that looks measured and names no file. Code, links
    and what scripts/evidence.sh made are left out.
    """

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    prose = BOUND.sub(blank, NOT_PROSE.sub(blank, text))
    for number, line in enumerate(prose.splitlines(), start=1):
        for figure in MEASURED.findall(line):
            yield number, figure

"""A table at the terminal: as wide as it is, figures aligned, texts shortened so that
they stay apart.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LONGEST_TEXT = 28  # characters of a cell


@dataclass(frozen=True)
class Column:
    """`cells`: of one row each, formatted. `is_figure`: flush right."""

    title: str
    cells: list[str]
    is_figure: bool = field(default=True)


def format_table(names: Sequence[str], columns: Sequence[Column], width: int) -> list[str]:
    """Lines of at most `width` characters: columns that do not fit beside the others
    follow under them, with the rows' names again.
    """
    names = shorten(names, max(16, width // 3))
    first = max(map(len, [*names, "run"]))
    longest = max(8, min(LONGEST_TEXT, width - first - 2))
    columns = [
        column if column.is_figure else Column(column.title, shorten(column.cells, longest), False)
        for column in columns
    ]
    lines: list[str] = []
    block: list[Column] = []
    used = first
    for column in columns:
        needed = 2 + width_of(column)
        if block and used + needed > width:
            lines += [*format_block(names, block, first), ""]
            block, used = [], first
        block.append(column)
        used += needed
    return lines + format_block(names, block, first)


def format_block(names: Sequence[str], columns: Sequence[Column], first: int) -> list[str]:
    headers = [wrap_title(column.title, width_of(column)) for column in columns]
    height = max(map(len, headers))
    table = [["run" if line == height - 1 else "" for line in range(height)] + list(names)]
    for column, header in zip(columns, headers, strict=True):
        table.append([""] * (height - len(header)) + header + column.cells)
    widths = [first, *map(width_of, columns)]
    left = [True, *(not column.is_figure for column in columns)]
    return [
        "  ".join(
            cell.ljust(size) if flush else cell.rjust(size)
            for cell, size, flush in zip(cells, widths, left, strict=True)
        ).rstrip()
        for cells in zip(*table, strict=True)
    ]


def width_of(column: Column) -> int:
    return max(map(len, [*column.cells, *wrap_title(column.title, max(map(len, column.cells)))]))


def wrap_title(title: str, width: int) -> list[str]:
    """The name of a flag in lines of about `width`, broken behind underscores."""
    lines = [""]
    for part in re.findall(r"[^_ ]+[_ ]?|[_ ]", title):
        if lines[-1] and len((lines[-1] + part).rstrip()) > max(width, 10):
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]


def shorten(texts: Sequence[str], longest: int) -> list[str]:
    """At most `longest` characters of each, those that tell the texts apart: their
    ends, their beginnings, or what stands between what all long ones share. As they
    are where none of these does.
    """
    long = [text for text in set(texts) if len(text) > longest]
    before = common_start(long)
    ways: list[Callable[[str], str]] = [
        lambda text: f"…{text[1 - longest :]}",
        lambda text: f"{text[: longest - 1]}…",
        lambda text: f"…{text[before : before + longest - 2]}…",
    ]
    for way in ways:
        short = {text: way(text) if text in long else text for text in texts}
        if len(set(short.values())) == len(short):
            return [short[text] for text in texts]
    return list(texts)


def common_start(texts: Sequence[str]) -> int:
    """How many characters they all begin with."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return sum(1 for _ in alike)

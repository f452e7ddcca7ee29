"""The page of compare_runs.py: tables of runs, and their curves on common axes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import count
from monitoring.comparison import Row, by_stage, compare, figures_of
from monitoring.run_folder import NO_SCORES, RunFolder, is_number
from monitoring.text_table import LONGEST_TEXT, Column, shorten
from visualization import html

SCRIPT = Path(__file__).with_name("comparison_page.js")
MOST_POINTS = 1000  # of a curve
LONGEST_NAME = 40  # characters of a run's name
AXES = ("epochs", "steps", "images")
# neighbors differ in lightness too; all can be seen on white and on black
COLORS = [
    f"oklch({lightness} 0.15 {hue})"
    for lightness, hue in zip([0.55, 0.7] * 4, [255, 50, 150, 330, 25, 200, 300, 110], strict=True)
]
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # where the colors begin again
STYLE = """
body { max-width: 100rem; }
.controls { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 1rem 0; }
.wide { overflow-x: auto; }
.runs th, .runs td { padding: .15rem .6rem; white-space: nowrap; text-align: left; }
.runs .figure { text-align: right; font-variant-numeric: tabular-nums; }
.runs thead th { vertical-align: bottom; }
.runs tbody th { opacity: 1; position: sticky; left: 0; background: Canvas; }
.runs tbody tr:hover > *, .runs .near > * { background: color-mix(in srgb, Canvas 85%, CanvasText); }
.runs .unfinished td { font-style: italic; }
.key { width: 28px; height: 8px; margin: 0 .5rem; vertical-align: middle; }
.panels { display: grid; gap: 1rem; margin: 1rem 0; }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .9rem; min-height: 3em; }
figcaption span { opacity: .75; overflow-wrap: anywhere; }
figure svg { display: block; width: 100%; height: 230px; }
.line { fill: none; stroke-width: 1.7; }
.faded { opacity: .15; }
.axis { stroke: #8886; }
svg text { font: 11px system-ui, sans-serif; fill: CanvasText; }
"""


def format_page(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """HTML of one file. `notes`: sentences to put before the tables."""
    sections, data = [], []
    for stage, theirs in by_stage(rows).items():
        runs = count(sum(len(row.runs) for row in theirs), "run")
        panels = collect_panels(theirs)
        shown = {"lr", "images_per_second", *figures_of(theirs)}
        main = [panel for panel in panels if panel["title"] in shown and not NO_SCORES.match(panel["title"])]
        more = [panel for panel in panels if panel not in main]
        styles = [
            (COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]) for i in range(len(theirs))
        ]
        parts = [format_table(theirs, compare(theirs), styles), '<div class="panels"></div>']
        if more:
            parts.append('<details><summary>More curves</summary><div class="panels"></div></details>')
        sections.append(html.section(f"{stage}: {runs}", *parts, anchor=stage.replace(" ", "-")))
        data.append({"styles": styles, "names": [row.name for row in theirs], "grids": [main, more]})
    content = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return html.document(
        "Runs compared",
        *map(html.paragraph, notes),
        format_controls(),
        *sections,
        f'<script type="application/json" id="data">{content}</script>',
        f"<script>\n{SCRIPT.read_text(encoding='utf-8')}</script>",
        style=STYLE,
    )


def format_controls() -> str:
    checked = {AXES[0]: " checked"}
    choices = [
        f'<label><input type="radio" name="axis" value="{axis}"{checked.get(axis, "")}> {axis}</label>'
        for axis in AXES
    ]
    log = '<label><input type="checkbox" id="log"> logarithmic height</label>'
    return f'<div class="controls"><span>Curves against</span>{"".join(choices)}{log}</div>'


def format_table(rows: Sequence[Row], columns: Sequence[Column], styles: Sequence[tuple[str, str]]) -> str:
    """Each row begins with the box that shows or hides its curves."""
    kinds = [' class="figure"' if column.is_figure else "" for column in columns]
    titles = [
        f'<th scope="col"{kind}>{html.escape(column.title).replace("_", "_<wbr>")}</th>'
        for column, kind in zip(columns, kinds, strict=True)
    ]
    names = shorten([row.name for row in rows], LONGEST_NAME)
    texts = [shorten(column.cells, LONGEST_TEXT) for column in columns]
    lines = []
    for number, (row, (color, dash)) in enumerate(zip(rows, styles, strict=True)):
        key = (
            f'<svg class="key" viewBox="0 0 28 8"><path class="line" d="M0 4H28" '
            f'style="stroke:{color};stroke-width:3" stroke-dasharray="{dash}"/></svg>'
        )
        cells = [
            f'<td{kind} title="{html.escape(column.cells[number])}">{html.escape(short[number])}</td>'
            for column, short, kind in zip(columns, texts, kinds, strict=True)
        ]
        kind = "finished" if row.runs[0].state == "done" else "unfinished"
        lines.append(
            f'<tr class="{kind}"><th scope="row"><label title="{html.escape(row.name)}">'
            f'<input type="checkbox" checked>{key}{html.escape(names[number])}</label></th>'
            f"{''.join(cells)}</tr>"
        )
    head = '<th scope="col"><label><input type="checkbox" class="all" checked> all runs</label></th>'
    return (
        f'<div class="wide"><table class="runs"><thead><tr>{head}{"".join(titles)}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


# ── Curves ──


def collect_panels(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One for each figure of an epoch, and for each of a report: {title, lines}."""
    panels: dict[str, list[dict[str, Any]]] = {"train_loss": []}
    for number, row in enumerate(rows):
        for run in row.runs:
            for title, line in curves_of(run).items():
                panels.setdefault(title, []).append(line | {"row": number})
    return [{"title": title, "lines": lines} for title, lines in panels.items() if lines]


def curves_of(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Title -> {y, epochs, steps, images}: a list each, None for an axis on which the
    run's files place no point.
    """
    curves: dict[str, dict[str, Any]] = {}
    for name in run.figures:
        lines = thin([line for line in run.epochs if is_number(line.get(name))])
        ends = [run.epoch_ends.get(line["epoch"], {}) for line in lines]
        curves[name] = {
            "y": values(lines, name),
            "epochs": [line["epoch"] + 1 for line in lines],
            "steps": values(ends, "step"),
            "images": values(ends, "images"),
        }
    names = dict.fromkeys(name for line in run.reports for name in line if is_number(line[name]))
    for name in [name for name in names if name not in ("step", "images", "epoch")]:
        lines = thin([line for line in run.reports if name in line])
        places = [{"epochs": run.epoch_at(line)} for line in lines]
        curves[name if name in ("lr", "images_per_second") else f"{name}, each report"] = {
            "y": values(lines, name),
            "epochs": values(places, "epochs"),
            "steps": values(lines, "step"),
            "images": values(lines, "images"),
        }
    for curve in curves.values():
        curve.update({axis: None for axis in AXES if all(place is None for place in curve[axis])})
    if "train_lr" in curves:  # of an epoch's end
        theirs = curves.pop("train_lr")
        curves.setdefault("lr", theirs)
    return curves


def thin(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_POINTS of them, evenly spaced, the last one included."""
    every = math.ceil(len(lines) / MOST_POINTS) or 1
    return lines[::-1][::every][::-1]


def values(lines: Sequence[dict[str, Any]], name: str) -> list[float | None]:
    """None, which is a gap in the curve, for what is not finite."""
    found = [line.get(name) for line in lines]
    return [float(f"{value:.6g}") if is_number(value) and math.isfinite(value) else None for value in found]

"""docs/evidence.md, docs/lab/evidence.md and the plot, from the JSON files of the runs alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evidence.intervals import Interval, bootstrap, compare, spearman, student_interval
from evidence.photos import CLASSIFIED
from evidence.questions import QUESTIONS, SEEDS, Question, Row
from evidence.recipes import Recipes
from evidence.runs import Run

Results = Mapping[str, Mapping[str, Any]]  # name of a run -> its JSON
BEGIN, END = "<!-- made by scripts/evidence.sh: {} -->", "<!-- end -->"
HEALTH = {
    "health_rank_cls": "rank of the CLS tokens",
    "health_mlm_margin": "masked accuracy above that of guessing",
    "health_perplexity_predicted": "perplexity of the predicted codes",
}


class Judgment(NamedTuple):
    first: float
    second: float
    difference: Interval
    verdict: str


def value_of(results: Results, run: Run, measure: str) -> float | None:
    """None where the run is missing, or was one of other flags."""
    found = results.get(run.name)
    if found is None or found["id"] != run.id:
        return None
    value = found["results"].get(measure)
    return None if value is None else float(value)


def samples(results: Results, row: Row, photos: str, seeds: Sequence[int]) -> list[dict[int, float]]:
    """Seed -> figure, of both kinds of run."""
    sides: list[dict[int, float]] = [{}, {}]
    for seed in seeds:
        for side, run in zip(sides, row.runs(Recipes(photos, seed)), strict=True):
            value = value_of(results, run, row.measure)
            if value is not None:
                side[seed] = value
    return sides


def judge(first: Mapping[int, float], second: Mapping[int, float], should_be_high: bool = True) -> Judgment:
    """Seed -> figure, of two kinds of run. Both means are over the seeds they share."""
    shared = sorted(first.keys() & second.keys())
    comparison = compare(first, second)
    verdict = "too close" if comparison.verdict == "not separated" else comparison.verdict
    if not should_be_high:
        verdict = {"better": "higher", "worse": "lower"}.get(verdict, verdict)
    mean, other = (student_interval([side[seed] for seed in shared]).mean for side in (first, second))
    return Judgment(mean, other, comparison.difference, verdict)


def judge_row(results: Results, row: Row, photos: str, seeds: Sequence[int]) -> Judgment:
    first, second = samples(results, row, photos, seeds)
    return judge(first, second, row.should_be_high)


def short_cell(results: Results, row: Row, photos: str) -> str:
    found = judge_row(results, row, photos, SEEDS)
    count = found.difference.samples
    if count < 2:
        return found.verdict if not count else f"{found.difference.mean:+.1f}, one seed"
    verdict = f"**{found.verdict}**" if found.verdict in ("better", "worse") else found.verdict
    seeds = "" if count == len(SEEDS) else f" ({count})"
    return f"{found.difference.mean:+.1f} ± {found.difference.half:.1f} {verdict}{seeds}"


def summary_table(results: Results) -> list[str]:
    """The figures that a question is decided by, of all sets of photos."""
    lines = [f"| | {' | '.join(CLASSIFIED)} |", "| --- |" + " --- |" * len(CLASSIFIED)]
    for question in QUESTIONS.values():
        lines.append(f"| **{question.title}** |" + " |" * len(CLASSIFIED))
        for row in question.rows:
            if row.decides:
                cells = [short_cell(results, row, photos) for photos in question.photos]
                cells += [""] * (len(CLASSIFIED) - len(cells))
                lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return lines


def detail_table(
    results: Results, question: Question, photos: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """All of its figures that there are."""
    found = [
        (row.label, name, judge_row(results, row, name, seeds)) for row in question.rows for name in photos
    ]
    return list_judgments(found)


def list_judgments(found: Sequence[tuple[str, str, Judgment]]) -> list[str]:
    """A table of those that there are: what is compared, photos, judgment."""
    lines = ["| first − second | photos | first | second | difference | | seeds |", "| --- " * 7 + "|"]
    for label, photos, (first, second, difference, verdict) in found:
        if difference.samples:
            half = "" if difference.samples < 2 else f" ± {difference.half:.1f}"
            numbers = f"{first:.1f} | {second:.1f} | {difference.mean:+.1f}{half}"
            lines.append(f"| {label} | {photos} | {numbers} | {verdict} | {difference.samples} |")
    return lines if len(lines) > 2 else ["Not run yet."]


def detail_tables(results: Results) -> list[str]:
    lines: list[str] = []
    for question in QUESTIONS.values():
        lines += ["", f"## {question.title}", *detail_table(results, question, question.photos, SEEDS)]
    return lines[1:]


def papers_table(results: Results) -> list[str]:
    """The orderings of the papers beside ours."""
    lines = [
        f"| first − second | paper | {' | '.join(CLASSIFIED)} |",
        "| --- | --- |" + " --- |" * len(CLASSIFIED),
    ]
    words = {"better": "agrees", "worse": "disagrees", "not run": "not run"}
    for question in QUESTIONS.values():
        for row in question.rows:
            if row.paper:
                verdicts = (compare(*samples(results, row, name, SEEDS)).verdict for name in CLASSIFIED)
                cells = " | ".join(words.get(verdict, "too close to tell") for verdict in verdicts)
                lines.append(f"| {row.label} | {row.paper} | {cells} |")
    return lines


# ── Does health predict accuracy? ──


def health_pairs(results: Results, figure: str, photos: str) -> list[tuple[float, float]]:
    """The figure at 25 % of a pretraining and its k-NN accuracy at the end."""
    found = []
    for result in results.values():
        if result["stage"] == "pretrain" and result["photos"] == photos:
            health = result["results"]["health_at_25_percent"].get(figure)
            accuracy = result["results"].get("test_knn_acc1")
            if health is not None and accuracy is not None:
                found.append((float(health), float(accuracy)))
    return found


def health_table(results: Results) -> list[str]:
    lines = [f"| at 25% of pretraining | {' | '.join(CLASSIFIED)} |", "| --- |" + " --- |" * len(CLASSIFIED)]
    for figure, title in HEALTH.items():
        cells = []
        for photos in CLASSIFIED:
            pairs = health_pairs(results, figure, photos)
            low, high = bootstrap(pairs)
            if math.isnan(low):
                cells.append(f"{len(pairs)} runs: too few")
            else:
                cells.append(f"{spearman(pairs):+.2f} ({low:+.2f} to {high:+.2f}), {len(pairs)} runs")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


# ── What was run, on what ──


def provenance(results: Results, grid: Iterable[Run]) -> list[str]:
    names = {run.name: run.id for run in grid}
    current = [result for name, result in results.items() if names.get(name) == result["id"]]
    hours = sum(result["seconds"] for result in current) / 3600
    kinds = Counter(describe_machine(result) for result in current)
    commits = Counter(str(result["commit"])[:12] for result in current)
    lines = [f"- {len(current)} of the grid's {len(names)} runs, {hours:.1f} hours of one core."]
    lines += [f"- {count} runs on {kind}." for kind, count in kinds.most_common()]
    lines.append(
        "- Commits: " + ", ".join(f"{name} ({count} runs)" for name, count in commits.most_common()) + "."
    )
    return lines


def describe_machine(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    threads = "one thread" if result["threads"] == 1 else f"{result['threads']} threads"
    return f"{machine['cpu']} ({machine['instructions']}), {threads}, torch {machine['torch']}"


# ── The page ──


def sections(results: Results, grid: Sequence[Run], quick: list[str]) -> dict[str, list[str]]:
    """Of both pages; a page has some of them."""
    return {
        "summary": summary_table(results),
        "papers": papers_table(results),
        "health": health_table(results),
        "runs": provenance(results, grid),
        "quick": quick,
        "details": detail_tables(results),
    }


def fill_in(page: str, parts: Mapping[str, list[str]]) -> str:
    """A page with each of its parts, between two comments, renewed."""
    for name, lines in parts.items():
        begin = BEGIN.format(name)
        if begin not in page:
            continue
        before, rest = page.split(begin + "\n", 1)
        after = rest.split(END, 1)[1]
        page = f"{before}{begin}\n" + "\n".join(lines) + f"\n{END}{after}"
    return page


def draw(results: Results, path: Path) -> None:
    """Accuracy by the share of labels: pretrained, scratch, scratch for longer; each
    seed a dot.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CLASSIFIED), figsize=(4.6 * len(CLASSIFIED), 3.4), squeeze=False)
    kinds = {"pretrained": ("base", 1), "scratch": (None, 1), "scratch, 3 x the steps": (None, 3)}
    for axis, photos in zip(axes[0], CLASSIFIED, strict=True):
        for number, (label, (variant, times)) in enumerate(kinds.items()):
            places, values = [], []
            for place, percent in enumerate((100, 10, 5)):
                for seed in SEEDS:
                    run = Recipes(photos, seed).finetuning(variant, percent, times)
                    value = value_of(results, run, "test_acc1")
                    if value is not None:
                        places.append(place + 0.15 * (number - 1))
                        values.append(value)
            axis.plot(places, values, "osD"[number], markersize=4, alpha=0.8, label=label)
        axis.set_xticks(range(3), ("100%", "10%", "5%"))
        axis.set_xlim(-0.5, 2.5)
        axis.set_title(photos, fontsize=10)
        axis.set_xlabel("labels")
        axis.set_ylabel("accuracy, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)

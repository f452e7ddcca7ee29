"""The evidence: runs a grid of small real trainings, and makes docs/evidence.md and
docs/lab/evidence.md of their JSON files (scripts/evidence.sh calls this).

    bash scripts/evidence.sh              what is missing of the whole grid, then the page
    bash scripts/evidence.sh --plan       how many runs, how many minutes; runs nothing
    bash scripts/evidence.sh --quick      part of the grid again: is it reproduced exactly?
    bash scripts/evidence.sh --unbound    figures of the pages that name no file
    bash scripts/evidence.sh --tables     the page from the files that are there; runs nothing

Each run writes one JSON file below docs/evidence/. A killed grid goes on where it was.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import openmp_spin  # noqa: E402, F401, I001
import arguments  # noqa: E402
from errors import UserError, report_user_errors  # noqa: E402
from evidence import bindings, tables  # noqa: E402
from evidence.execute import Workplace, execute, list_missing  # noqa: E402
from evidence.photos import ALL  # noqa: E402
from evidence.questions import QUESTIONS, QUICK, QUICK_SEEDS, SEEDS, list_runs  # noqa: E402
from evidence.recipes import Recipes  # noqa: E402
from evidence.runs import Run, read_result, read_results, with_inputs  # noqa: E402
from monitoring import environment  # noqa: E402

RESULTS, PLOT = ROOT / "docs/evidence", ROOT / "docs/evidence.png"
PAGES = (ROOT / "docs/evidence.md", ROOT / "docs/lab/evidence.md")
# minutes of a core where none has been measured
GUESSED = {"vqkd": 1.5, "pretrain": 2.0, "finetune": 1.1, "linear": 0.3, "segment": 1.0}


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("The evidence: small real runs, tables, plot", "--questions labels targets")
    add = parser.add_argument
    add("--plan", action="store_true", help="say how many runs and minutes; run nothing")
    add("--quick", action="store_true", help="run a part again, apart from the files, and compare")
    add("--tables", action="store_true", help="make the pages of the files; run nothing")
    add("--unbound", action="store_true", help="list the figures of the pages that name no file")
    add("--questions", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS), help="only these")
    add("--photos", nargs="+", default=list(ALL), choices=list(ALL), help="only these")
    add("--seeds", type=arguments.seed, nargs="+", default=list(SEEDS), help="only these")
    add("--jobs", type=arguments.positive, default=2, help="runs at a time, each on one thread")
    add("--minutes", type=arguments.positive, default=10**6, help="start no run after so many")
    add("--folder", type=arguments.expand_home, default="out/evidence", help="photos, checkpoints, logs")
    return parser


def list_chosen(questions: Sequence[str], photos: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    return with_inputs(list_runs(questions, photos, seeds))


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    return {result["name"]: result for result in read_results(folder)}


# ── The plan ──


def print_plan(work: Workplace, runs: Sequence[Run]) -> None:
    """By stage: runs, those that are done, minutes of a core each and in all."""
    measured: dict[str, list[float]] = defaultdict(list)
    for result in read_results(work.results):
        measured[result["stage"]].append(result["seconds"] / 60)
    missing = {run.name for run in list_missing(work, runs)}
    print(f"{'stage':<10}{'runs':>6}{'left':>6}{'minutes each':>14}{'left, hours of a core':>23}")
    total = 0.0
    for stage, guess in GUESSED.items():
        mine = [run for run in runs if run.stage == stage]
        left = sum(run.name in missing for run in mine)
        each = statistics.mean(measured[stage]) if measured[stage] else guess
        total += left * each / 60
        note = "" if measured[stage] else "  (guessed)"
        print(f"{stage:<10}{len(mine):>6}{left:>6}{each:>14.1f}{left * each / 60:>23.1f}{note}")
    print(f"{'in all':<10}{len(runs):>6}{len(missing):>6}{'':>14}{total:>23.1f}")


# ── --quick ──


def run_quick(folder: Path, jobs: int) -> None:
    """Below `folder`, apart from what the grid left; UserError where results differ."""
    commit = str(environment.describe_code()["commit"])[:12]
    work = Workplace(folder / f"quick-{commit}", folder / f"quick-{commit}/results")
    recipes = [Recipes(name, seed) for seed in QUICK_SEEDS for name in QUICK.photos]
    runs = with_inputs(run for each in recipes for run in QUICK.runs(each))
    execute(work, runs, jobs, time.monotonic() + 10**9, print)
    again, before = read_all(work.results), read_all(RESULTS)
    print("\n" + "\n".join(quick_table(again)))
    known = [run for run in runs if read_result(RESULTS, run)]
    differing = [run.name for run in known if again[run.name]["results"] != before[run.name]["results"]]
    for name in differing:
        print(f"{name}: {again[name]['results']}\n  in the file: {before[name]['results']}")
    print(f"\nreproduced exactly: {len(known) - len(differing)} of {len(known)} runs")
    kinds = {tables.describe_machine(found[run.name]) for run in known for found in (again, before)}
    if differing and len(kinds) > 1:
        print("the machines differ, which can explain it: " + "; ".join(sorted(kinds)))
    if differing:
        raise UserError(f"{len(differing)} runs gave other results than their files in docs/evidence")


def quick_table(results: tables.Results) -> list[str]:
    return tables.detail_table(results, QUICK, QUICK.photos, QUICK_SEEDS)


# ── The pages ──


def write_pages() -> None:
    results = read_all(RESULTS)
    grid = list_chosen(list(QUESTIONS), list(ALL), SEEDS)
    parts = tables.sections(results, grid, quick_table(results))
    for page in PAGES:
        page.write_text(tables.fill_in(page.read_text(encoding="utf-8"), parts), encoding="utf-8")
    tables.draw(results, PLOT)


def print_unbound() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        found = list(bindings.unbound_figures(path.read_text(encoding="utf-8")))
        for number, figure in found:
            print(f"{path.relative_to(ROOT)}:{number}: {figure}")


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs are stopped, not left behind
    folder = ROOT / args.folder
    work = Workplace(folder, RESULTS)
    runs = list_chosen(args.questions, args.photos, args.seeds)
    if args.unbound:
        print_unbound()
    elif args.plan:
        print_plan(work, runs)
    elif args.quick:
        run_quick(folder, args.jobs)
    elif args.tables:
        write_pages()
    else:
        left = execute(work, runs, args.jobs, time.monotonic() + 60 * args.minutes, print)
        write_pages()
        print(f"{left} runs are left; the same command goes on" if left else "docs/evidence.md is up to date")


if __name__ == "__main__":
    main()

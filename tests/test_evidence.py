"""The evidence: its grid, runs that go on after a kill, intervals, tables."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from source_files import ROOT, load_script
from tiny_runs import photos as tiny_photos

sys.path.append(str(ROOT / "scripts"))

from errors import UserError
from evidence import bindings, execute, imagenet, intervals, photos, tables
from evidence.photos import ALL, CLASSIFIED
from evidence.questions import QUESTIONS, SEEDS, list_runs
from evidence.recipes import PRETRAININGS, Recipes, flags_of
from evidence.runs import SCRIPTS, Run, read_results, with_inputs

GRID = with_inputs(list_runs(QUESTIONS, list(ALL), SEEDS))
FILES = list(read_results(ROOT / "docs/evidence"))


# ── Intervals ──


def test_students_interval_of_known_samples():
    mean, half, count = intervals.student_interval([1.0, 2.0, 3.0])
    assert (mean, count) == (2.0, 3)
    assert half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert intervals.student_interval([1.0, 2.0]).half == pytest.approx(12.706 / 2, abs=1e-3)
    assert math.isnan(intervals.student_interval([1.0]).half)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ({0: 70.0, 1: 71.0, 2: 72.5}, {0: 60.0, 1: 61.2, 2: 62.0}, "better"),
        ({0: 60.0, 1: 61.2, 2: 62.0}, {0: 70.0, 1: 71.0, 2: 72.5}, "worse"),
        ({0: 70.0, 1: 60.0, 2: 65.0}, {0: 61.0, 1: 62.0, 2: 63.0}, "not separated"),
        # paired: seeds differ more than the kinds do
        ({0: 50.0, 1: 70.0, 2: 90.0}, {0: 49.0, 1: 69.1, 2: 88.9}, "better"),
        ({0: 50.0, 1: 60.0}, {1: 40.0, 2: 30.0}, "one seed"),
        ({0: 50.0}, {1: 40.0}, "not run"),
        ({0: 50.0, 1: 50.0}, {0: 50.0, 1: 50.0}, "not separated"),
    ],
)
def test_better_is_what_the_interval_separates(first, second, verdict):
    assert intervals.compare(first, second).verdict == verdict


def test_rank_correlation_and_its_interval():
    pairs = [(float(x), float(x) ** 3) for x in range(12)]
    assert intervals.spearman(pairs) == pytest.approx(1.0)
    assert intervals.spearman([(x, -y) for x, y in pairs]) == pytest.approx(-1.0)
    assert intervals.spearman([(1, 1), (1, 2), (2, 2), (3, 4)]) == pytest.approx(
        0.8333, abs=1e-3
    )  # with ties
    mixed = [(x, (7 * x) % 12) for x in range(12)]
    low, high = intervals.bootstrap(mixed)
    assert -1 <= low < intervals.spearman(mixed) < high <= 1
    assert math.isnan(intervals.bootstrap(pairs[:4])[0])


# ── The grid ──


def test_each_run_of_the_grid_is_one_the_entries_take():
    ids = {run.id for run in GRID}
    assert len(ids) == len({run.name for run in GRID}) == len(GRID)
    for run in [run for run in GRID if run.seed == 0]:
        module = importlib.import_module(SCRIPTS[run.stage][:-3])
        files = {each.id: Path("checkpoint.pth") for _, each in run.inputs}
        words = run.words(Path("photos"), files)
        assert "PHOTOS" not in " ".join(words)
        module.parse_flags(words)


def test_stages_are_shared_and_a_row_varies_one_thing():
    base = Recipes("cells", 3).pretraining("base")
    assert dict(base.inputs)["tokenizer_weight"] == Recipes("cells", 3).tokenizer("base")
    assert dict(Recipes("cells", 3).pretraining("random-masks").inputs) == dict(base.inputs)
    continued = dict(Recipes("cells", 3).pretraining("continued").inputs)
    assert continued["init_from"] == Recipes("tiles", 3).pretraining("base")
    steps = [run.value("epochs") for run in (Recipes("tiles", 0).pretraining(name) for name in PRETRAININGS)]
    assert len(set(steps)) == 1
    few = Recipes("tiles", 0).finetuning("base", 5)
    scratch = Recipes("tiles", 0).finetuning(None, 5, 3)
    assert int(scratch.value("epochs")) == 3 * int(few.value("epochs"))
    assert set(few.flags) - set(scratch.flags) == {"0.8", few.value("epochs")}


def test_what_matters_most_comes_first():
    names = [run.name for run in GRID]
    first = names.index("cells-pretrain-pixels-s0")
    assert first < names.index("cells-pretrain-pixels-s1") < names.index("cells-pretrain-random-masks-s0")
    for place, run in enumerate(GRID):
        assert all(names.index(each.name) < place for _, each in run.inputs)


def test_segmentation_is_of_the_assay_alone():
    runs = [run for run in GRID if run.photos == "assay"]
    assert {run.stage for run in runs} == {"vqkd", "pretrain", "segment"}
    assert {run.photos for run in GRID if run.stage == "segment"} == {"assay"}
    run = Recipes("assay", 0).segmentation("base")
    assert run.log_lines == 1 and Recipes("cells", 0).tokenizer("base").log_lines == 3
    assert dict(run.inputs) == {"finetune": Recipes("assay", 0).pretraining("base")}


def test_another_flag_is_another_run():
    run = Recipes("cells", 0).tokenizer("base")
    assert run.id != Run("vqkd", "cells", "base", 0, (*run.flags, "--x")).id
    assert run.id != Run("vqkd", "cells", "base", 1, run.flags).id
    changed = flags_of("--a 1 --b --c 2 3", (("a", None), ("b", "4"), ("d", "")))
    assert changed == ("--c", "2", "3", "--b", "4", "--d")


# ── Running ──


class Stage:
    """In place of an entry: one line of the log; it fails while `fails` exists."""

    def __init__(self, fails: Path) -> None:
        self.fails = fails

    def main(self, words: list[str]) -> None:
        values = dict(zip(words[::2], words[1::2], strict=True))
        if values["--name"] == "fails" and self.fails.exists():
            raise SystemExit(3)
        if values["--name"] == "waits":
            time.sleep(60)
        out = Path(values["--output_dir"])
        (out / "log.txt").write_text(json.dumps({"train_loss": 1.0, "seed": values["--seed"]}) + "\n")
        (out / "checkpoint.pth").write_text("weights")


@pytest.fixture
def work(tmp_path, monkeypatch):
    stage = Stage(tmp_path / "fails")
    monkeypatch.setattr(execute.importlib, "import_module", lambda name: stage)
    monkeypatch.setattr(photos, "prepare", lambda name, folder: "digest")
    return execute.Workplace(tmp_path, tmp_path / "results")


def chain() -> list[Run]:
    first = Run("vqkd", "cells", "a", 0, ("--name", "first", "--epochs", "1"))
    second = Run("vqkd", "cells", "b", 0, ("--name", "fails", "--epochs", "1"), (("weight", first),))
    return [first, second, Run("vqkd", "cells", "c", 0, ("--name", "last", "--epochs", "1"))]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_grid_goes_on_where_it_was(work, tmp_path, jobs):
    said: list[str] = []
    (tmp_path / "fails").touch()
    with pytest.raises(UserError, match="cells-vqkd-b-s0"):
        execute.execute(work, chain(), jobs, time.monotonic() + 99, said.append)
    assert work.is_done(chain()[0]) and not work.is_done(chain()[1])
    (tmp_path / "fails").unlink()
    missing = [run.variant for run in execute.list_missing(work, chain())]
    assert "a" not in missing and "b" in missing
    assert execute.execute(work, chain(), jobs, time.monotonic() + 99, said.append) == 0
    assert all(work.is_done(run) for run in chain())
    result = json.loads((work.results / "cells-vqkd-b-s0.json").read_text())
    assert result["inputs"] == {"weight": "cells-vqkd-a-s0"} and result["results"] == {"train_loss": 1.0}
    assert result["commit"] and result["machine"]["cpu"] and result["threads"] == 1
    assert execute.list_missing(work, chain()) == []


def test_checkpoints_that_are_needed_are_made_again(work):
    execute.execute(work, chain()[:1], 1, time.monotonic() + 99, print)
    work.checkpoint(chain()[0]).unlink()  # as in a fresh clone, which has the results alone
    assert execute.list_missing(work, chain()[:1]) == []
    assert [run.variant for run in execute.list_missing(work, chain())] == ["a", "b", "c"]


def test_no_run_is_started_when_the_time_is_up(work):
    assert execute.execute(work, chain(), 1, time.monotonic() - 1, print) == 3


def test_a_run_that_was_stopped_early_is_no_result(work):
    run = Run("vqkd", "cells", "a", 0, ("--name", "first", "--epochs", "2"))
    with pytest.raises(UserError, match="1 of 2 epochs"):
        execute.execute(work, [run], 1, time.monotonic() + 99, print)
    assert not work.is_done(run)


def test_the_runs_beside_one_that_fails_are_stopped(work, tmp_path):
    waits = Run("vqkd", "cells", "w", 0, ("--name", "waits", "--epochs", "1"))
    (tmp_path / "fails").touch()
    fails = Run("vqkd", "cells", "b", 0, ("--name", "fails", "--epochs", "1"))
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()  # earlier tests may have left some
    with pytest.raises(UserError, match="cells-vqkd-b-s0"):
        execute.execute(work, [waits, fails], 2, time.monotonic() + 99, print)
    assert not (work.folder_of(waits) / "log.txt").exists()
    assert children.read_text() == before


@pytest.mark.slow
def test_a_real_run_gives_the_same_figures_again(tmp_path, monkeypatch):
    def make(folder: Path) -> None:
        for split in ("train", "val"):
            tiny_photos(folder / split, per_class=8)

    monkeypatch.setitem(photos.ALL, "tiny", photos.Photos("tiny", "", "", False, make))
    model = "--model beit_mini_patch16_96 --input_size 32 --data_set image_folder --no_save_ckpt"
    data = "--data_path PHOTOS/train --eval_data_path PHOTOS/val --device cpu --num_workers 0 --track none"
    run = Run("finetune", "tiny", "x", 0, flags_of(f"{model} {data} --batch_size 8 --epochs 1 --aa none"))
    found = []
    for name in "ab":
        work = execute.Workplace(tmp_path / name, tmp_path / name / "results")
        assert execute.execute(work, [run], 1, time.monotonic() + 999, print) == 0
        found.append(json.loads((work.results / "tiny-finetune-x-s0.json").read_text()))
    assert found[0]["results"] == found[1]["results"] and "test_acc1" in found[0]["results"]
    assert found[0]["photos_digest"] == found[1]["photos_digest"] and found[0]["seconds"] > 0


# ── Tables ──


def made_up(values: dict[tuple[str | None, int], float]) -> dict:
    """(variant, seed) -> accuracy with all labels, on the tiles."""
    runs = {Recipes("tiles", seed).finetuning(variant): value for (variant, seed), value in values.items()}
    return {run.name: {"id": run.id, "results": {"test_acc1": value}} for run, value in runs.items()}


def test_a_cell_says_no_more_than_the_interval():
    row = QUESTIONS["labels"].rows[0]
    apart = made_up({("base", 0): 80.0, ("base", 1): 81.0, (None, 0): 70.0, (None, 1): 70.9, (None, 2): 1.0})
    assert tables.short_cell(apart, row, "tiles") == "+10.0 ± 0.6 **better** (2)"
    assert (
        "| tiles | 80.5 | 70.5 | +10.0 ± 0.6 | better | 2 |"
        in tables.detail_table(apart, QUESTIONS["labels"], CLASSIFIED, SEEDS)[2]
    )
    near = made_up({("base", 0): 80.0, ("base", 1): 70.0, (None, 0): 70.0, (None, 1): 79.0})
    assert tables.short_cell(near, row, "tiles") == "+0.5 ± 120.7 too close (2)"
    assert tables.short_cell(apart, row, "cells") == "not run"
    one = {name: result for name, result in apart.items() if name.endswith("s0")}
    assert tables.short_cell(one, row, "tiles") == "+10.0, one seed"
    stale = {name: {**result, "id": "of other flags"} for name, result in apart.items()}
    assert tables.short_cell(stale, row, "tiles") == "not run"


def test_the_page_is_made_of_the_files_alone():
    script = load_script("run_evidence")
    results = script.read_all(script.RESULTS)
    parts = tables.sections(results, GRID, script.quick_table(results))
    for path in script.PAGES:
        page = path.read_text(encoding="utf-8")
        assert tables.fill_in(page, parts) == page, "bash scripts/evidence.sh --tables makes it again"
        assert tables.fill_in(page, {name: ["other"] for name in parts}) != page


def test_the_files_are_small_and_of_the_grid():
    ids = {run.name: run.id for run in GRID}
    for result in FILES:
        path = ROOT / "docs/evidence" / f"{result['name']}.json"
        assert path.stat().st_size < 4096
        assert ids.get(result["name"]) == result["id"], f"{path.name} is of other flags: run it again"
        assert re.fullmatch("[0-9a-f]{40}", result["commit"]) and not result["changed"]


# ── The published size ──


def test_recipes_of_the_published_size_are_what_entries_take():
    for name, variant in imagenet.VARIANTS.items():
        for stage in variant.stages:
            command, variables = imagenet.words_of(name, stage, 3, "/data", Path("/runs"))
            environ = {**os.environ, **variables, "DRY_RUN": "1"}
            said = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
            words = said.stdout.split()
            script = next(word for word in words if word.endswith(".py"))
            args = importlib.import_module(script[:-3]).parse_flags(words[words.index(script) + 1 :])
            assert args.seed == 3 and args.output_dir == f"/runs/{name}-s3/{stage}"
            if stage == "finetune":
                assert args.finetune == f"/runs/{name}-s3/pretrain/checkpoint.pth"
            if stage == "pretrain" and variant.tokenizer:
                assert args.tokenizer_weight == f"/runs/{name}-s3/vqkd/checkpoint.pth"


def test_the_published_size_has_the_same_tables():
    assert {name for row in imagenet.ROWS for name in row[:2]} == imagenet.VARIANTS.keys()
    found: dict[str, dict[int, float]] = {name: {} for name in imagenet.VARIANTS}
    assert tables.list_judgments(imagenet.list_rows(found)) == ["Not run yet."]
    found |= {"v1-300e": {0: 82.8, 1: 82.9}, "v1-pixels": {0: 81.0, 1: 81.1}}
    table = tables.list_judgments(imagenet.list_rows(found))
    assert table[2:] == [
        "| v1-300e − v1-pixels (paper: 82.9, 81.0) | ImageNet-1k | 82.8 | 81.0 | +1.8 ± 0.0 | better | 2 |"
    ]


# ── Figures of the pages ──

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_figures_that_name_a_file_are_what_it_says():
    """And lists how many name none, page by page."""
    text = {path: path.read_text(encoding="utf-8") for path in PAGES}
    assert {
        path.name: wrong
        for path in PAGES
        if (wrong := bindings.wrong_figures(text[path], ROOT / "docs/evidence"))
    } == {}
    counts = {path.relative_to(ROOT): len(list(bindings.unbound_figures(text[path]))) for path in PAGES}
    listed = ", ".join(f"{path} {count}" for path, count in counts.items() if count)
    warnings.warn(f"figures that name no file (scripts/evidence.sh --unbound): {listed}", stacklevel=1)


def test_a_figure_is_compared_at_its_own_precision(tmp_path):
    for seed, value in enumerate((81.26, 79.0)):
        (tmp_path / f"a-s{seed}.json").write_text(json.dumps({"results": {"acc": value, "loss": -0.5}}))
    right = (
        "81.3%<!-- = a-s0 results.acc --> and **81**<!-- = a-s0 results.acc -->, "
        "80.13<!-- = a-s* results.acc -->, −0.50<!-- = a-s0 results.loss -->"
    )
    assert len(bindings.find_bindings(right)) == 4
    assert bindings.wrong_figures(right, tmp_path) == []
    assert bindings.wrong_figures("81.2<!-- = a-s0 results.acc -->", tmp_path) == [
        "81.2, but a-s0 results.acc is 81.26"
    ]
    for missing in ("b-s0 results.acc", "a-s0 results.other", "a-s0 results"):
        with pytest.raises(UserError):
            bindings.wrong_figures(f"81.2<!-- = {missing} -->", tmp_path)


def test_figures_without_a_file_are_listed():
    made = "<!-- made by scripts/evidence.sh: x -->\n7.5\n<!-- end -->"
    text = f"`1.5` is code, 1.2.3 a version, 12 a count\n82.1% and 57.6<!-- = a b -->, 30%\n{made}\n4.25"
    assert list(bindings.unbound_figures(text)) == [(2, "82.1%"), (2, "30%"), (6, "4.25")]


# ── --quick ──


@pytest.fixture
def quick(work, tmp_path, monkeypatch):
    """The script, whose part to run again is one run in place of an entry."""
    script = load_script("run_evidence")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "files")
    monkeypatch.setattr(
        script, "QUICK", type("", (), {"photos": ("tiles",), "runs": lambda self, _: chain()[:1]})()
    )
    monkeypatch.setattr(script, "quick_table", lambda results: [])
    return script


def test_quick_compares_with_the_files(quick, tmp_path, capsys):
    run = chain()[0]
    other = execute.Workplace(tmp_path / "before", quick.RESULTS)
    execute.execute(other, [run], 1, time.monotonic() + 99, print)
    quick.run_quick(tmp_path / "again", 1)
    assert "reproduced exactly: 1 of 1 runs" in capsys.readouterr().out
    path = quick.RESULTS / f"{run.name}.json"
    path.write_text(path.read_text().replace('"train_loss": 1.0', '"train_loss": 1.1'))
    with pytest.raises(UserError, match="1 runs gave other results"):
        quick.run_quick(tmp_path / "again", 1)
    assert "reproduced exactly: 0 of 1 runs" in capsys.readouterr().out

"""compare_runs.py: which folders are runs, what its tables say, and that nothing in a
run's files ends it.
"""

import csv
import html
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
from refusals import refused
from source_files import ROOT
from tiny_runs import as_flags, finetuning_flags, photos, pretraining_flags, tokenizer

import compare_runs
import run_beitv2_pretraining
import run_class_finetuning
from flags import finetuning, linear_eval, pretraining, segmentation, vqkd
from monitoring import comparison, run_folder
from monitoring.comparison import Row, Spread, format_figures
from monitoring.comparison_page import MOST_POINTS, curves_of
from monitoring.run_folder import RunFolder, read_run
from monitoring.text_table import Column, format_table, shorten
from runtime import run_lock

FLAGS = {"mixup": 0.0, "epochs": 3, "lr": 0.001, "seed": 0, "batch_size": 16}


def make_run(folder, losses=(3.0, 2.0, 1.0), scores=(10.0, 30.0, 20.0), reports=False, **flags):
    """A run of fine-tuning as its files tell it; `scores`: None where an epoch has
    none.
    """
    folder.mkdir(parents=True)
    (folder / "flags.json").write_text(json.dumps(FLAGS | {"output_dir": str(folder)} | flags))
    lines = []
    for epoch, loss in enumerate(losses):
        line = {"epoch": epoch, "train_loss": loss, "train_lr": 0.001, "seconds": 60.5}
        line["train_class_acc"] = 1 / (1 + loss)
        if scores and scores[epoch] is not None:
            line |= {"test_acc1": scores[epoch], "test_loss": loss + 1, "test_images": 80}
            line |= {"test_acc1_layer2": loss, "test_loss_1": loss}
        lines.append(json.dumps(line))
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines))
    if reports:
        steps = [
            {"step": s, "epoch": (s - 1) // 4, "images": 16 * s, "loss": 9.0 - s, "images_per_second": 50.0}
            for s in (2, 4, 6, 8, 10, 12)
            if s <= 4 * len(losses)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    return folder


def printed(capsys, *words, width=200):
    """What compare_runs.py prints, as lines."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", str(width))
        compare_runs.main([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


def cells(lines, name):
    """Those of the rows that begin with `name`."""
    return [word for line in lines if line.startswith(name) for word in line.split()[1:]]


# ── Which folders are runs ──


def test_folders_of_runs_and_runs_among_others(tmp_path, capsys):
    make_run(tmp_path / "out/run10")
    make_run(tmp_path / "out/run2")
    (tmp_path / "out/data").mkdir()
    (tmp_path / "out/summary.json").write_text("{}")
    lines = printed(capsys, tmp_path / "out")
    assert [line.split()[0] for line in lines if line.startswith("run")] == ["run", "run2", "run10"]
    assert not [line for line in lines if "skipped" in line]
    lines = printed(capsys, *sorted((tmp_path / "out").iterdir()), tmp_path / "out/../out/run2")
    skipped = [line.split(":")[0].split()[1] for line in lines if line.startswith("skipped")]
    assert skipped == [str(tmp_path / "out/data"), str(tmp_path / "out/summary.json")]
    assert len([line for line in lines if line.startswith("run2")]) == 1  # though named twice


def test_a_folder_with_nothing_but_an_evaluation_is_skipped(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/flags.json").write_text('{"eval": true, "resume": "a/checkpoint.pth"}')
    found, skipped = run_folder.find_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert found == [tmp_path / "a"]
    assert "no run is in it" in skipped[0]


def test_paths_without_runs_are_refused(tmp_path, capsys):
    assert "no such folder" in refused(compare_runs.main, [str(tmp_path / "nowhere")], capsys)
    assert "--output_dir" in refused(compare_runs.main, [str(tmp_path)], capsys)
    run = make_run(tmp_path / "a")
    for flag in ("--csv", "--html"):
        said = refused(compare_runs.main, [str(run), flag, str(tmp_path / "no/file")], capsys)
        assert "could not be written" in said


def test_stages_are_told_by_a_flag_that_no_other_has():
    parsers = {
        "tokenizer": vqkd.get_parser(),
        "pretraining": pretraining.get_parser(),
        "fine-tuning": finetuning.get_parser(),
        "segmentation": segmentation.get_parser(),
        "linear probe": linear_eval.get_parser(),
    }
    for stage, parser in parsers.items():
        flags = {action.dest: False for action in parser._actions}
        assert RunFolder(ROOT, flags=flags).stage == stage
        assert [name for name, flag in run_folder.STAGES.items() if flag in flags] == [stage]
    assert RunFolder(ROOT, flags={"train_pixel_decoder": True, "codebook_n_emd": 8}).stage == "pixel decoder"
    assert RunFolder(ROOT, flags={"max_steps": 7, "steps_per_epoch": 3}).epochs_planned == 3


# ── How far they came ──


def test_unfinished_runs_are_marked(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", losses=(3.0,))
    make_run(tmp_path / "c", losses=(), scores=())
    make_run(tmp_path / "d", losses=(3.0, 2.0))
    (tmp_path / "d/flags.json").unlink()
    lines = printed(capsys, tmp_path)
    assert {name: cells(lines, name)[:2] for name in "abc"} == {
        "a": ["done", "3/3"],
        "b": ["stopped", "1/3"],
        "c": ["stopped", "0/3"],
    }
    assert cells(lines, "d")[:2] == ["unknown", "2/?"]
    assert "state" not in "".join(printed(capsys, tmp_path / "a"))


def test_a_run_that_holds_its_lock_is_running(tmp_path):
    run = make_run(tmp_path / "a", losses=(3.0,))
    code = "import pathlib, sys, time; from runtime import run_lock\n"
    code += "lock = run_lock.RunLock(pathlib.Path(sys.argv[1])); lock.sign(); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    assert read_run(run).state == "running"
    signed = json.loads((run / run_lock.NAME).read_text())
    holder.kill()
    holder.communicate()
    assert (run / run_lock.NAME).exists()
    assert read_run(run).state == "stopped"
    (run / run_lock.NAME).write_text(json.dumps(signed | {"host": "node7"}))
    assert read_run(run).state == "running on node7"
    (run / run_lock.NAME).write_text("")
    assert read_run(run).state == "stopped"


# ── What came out, and what differs ──


def test_last_and_best_figures(tmp_path, capsys):
    run = read_run(make_run(tmp_path / "a", losses=(math.nan, 1.0, math.nan), scores=(10.0, 30.0, None)))
    assert (run.last("test_acc1"), run.best("test_acc1")) == (30.0, 30.0)
    assert math.isnan(run.last("train_loss"))
    assert run.best("train_loss") == 1.0
    assert run.best("test_loss") == 2.0  # the least
    assert run.last("test_f1") is None
    run = read_run(make_run(tmp_path / "b", losses=[math.nan] * 3, scores=None))
    assert math.isnan(run.best("train_loss"))
    assert "nan" in cells(printed(capsys, tmp_path), "b")


def test_columns_are_what_differs(tmp_path):
    make_run(tmp_path / "a", lr=0.001, augment=["x", 1])
    make_run(tmp_path / "b", lr=0.0003, augment=["x", 2])
    (tmp_path / "b/environment.json").write_text('{"commit": "abc", "packages": ["torch"]}')
    rows = comparison.name_runs([read_run(tmp_path / name) for name in "ab"])
    columns = {column.title: column.cells for column in comparison.compare(rows)}
    assert list(columns) == ["epochs", "time", "train_loss", "lr", "augment"]
    assert columns["lr"] == ["0.001", "0.0003"]
    assert columns["augment"] == ["x 1", "x 2"]
    make_run(tmp_path / "c", scores=(10.0, 30.0, 25.0), losses=(3.0, 2.0, 1.5), mixup=None, vflip=True)
    (tmp_path / "c/environment.json").write_text('{"commit": "def"}')
    rows = comparison.name_runs([read_run(tmp_path / name) for name in "bc"])
    columns = {column.title: column.cells for column in comparison.compare(rows)}
    assert columns["test_acc1"] == ["20.00", "25.00"]
    assert columns["best test_acc1"] == ["30.00", "30.00"]
    assert columns["mixup"] == ["0.0", "-"]
    assert columns["commit"] == ["abc", "def"]
    not_shown = {"test_images", "output_dir", "packages", "vflip", "best test_images", "train_class_acc"}
    assert not (not_shown | {"test_acc1_layer2", "test_loss_1"}) & columns.keys()


def test_without_evaluation_figures_of_training_are_shown(tmp_path):
    run = make_run(tmp_path / "a", scores=None)
    with open(run / "log.txt", "a") as log:
        log.write('{"epoch": 2, "train_loss": 1.0, "train_loss_1": 0.5, "train_mlm_acc_1": 0.25}\n')
    titles = [column.title for column in comparison.compare([Row("a", [read_run(run)])])]
    assert titles == ["epochs", "time", "train_loss", "train_class_acc", "train_mlm_acc_1"]


def test_stages_have_tables_of_their_own(tmp_path, capsys):
    make_run(tmp_path / "a")
    folder = make_run(tmp_path / "b")
    (folder / "flags.json").write_text('{"num_mask_patches": 75, "epochs": 3}')
    lines = printed(capsys, tmp_path)
    assert [line for line in lines if line.startswith("──")] == [
        "── fine-tuning: 1 run ──",
        "── pretraining: 1 run ──",
    ]


def test_seeds_in_one_row(tmp_path, capsys):
    for seed, score in enumerate((20.0, 21.0, 25.0)):
        make_run(tmp_path / f"big_seed{seed}", seed=seed, scores=(None, None, score))
    make_run(tmp_path / "other", lr=0.1)
    make_run(tmp_path / "short", losses=(3.0,), seed=9)
    lines = printed(capsys, tmp_path, "--by_seed", *as_flags(csv=tmp_path / "runs.csv"))
    row = next(line for line in lines if line.startswith("big_seed* (3 runs)"))
    assert "22.00 ± 2.65" in row  # the sample's deviation, sqrt(7)
    assert " 0 1 2" in row
    assert len([line for line in lines if "/3" in line]) == 3
    with open(tmp_path / "runs.csv", encoding="utf-8") as file:
        assert [row["run"] for row in csv.DictReader(file)] == [
            *(f"big_seed{seed}" for seed in range(3)),
            "other",
            "short",
        ]
    lines = printed(capsys, tmp_path / "other", "--by_seed")
    assert "--by_seed does nothing here" in lines[-1]


def test_a_csv_file_has_everything(tmp_path, capsys):
    make_run(tmp_path / "a, b", lr=0.1)
    make_run(tmp_path / "c", losses=(1 / 3,))
    printed(capsys, tmp_path, *as_flags(csv=tmp_path / "runs.csv"))
    with open(tmp_path / "runs.csv", encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["run"], first["best test_acc1"], first["lr"], first["seed"]) == ("a, b", "30.0", "0.1", "0")
    assert (second["state"], second["epochs_done"], second["epochs_planned"]) == ("stopped", "1", "3")
    assert float(second["train_loss"]) == 1 / 3
    assert second["folder"] == str(tmp_path / "c")


# ── The table fits ──


def test_figures_of_a_column_align():
    assert format_figures([100.0, 5.678, None, math.nan]) == ["100.00", "5.68", "", "nan"]
    assert format_figures([12, 3]) == ["12", "3"]
    assert format_figures([1.23456e-7, 0.0]) == ["1.235e-07", "0.000e+00"]
    assert format_figures([1e30, math.inf]) == ["1.000e+30", "inf"]
    assert format_figures([Spread(2.0, 0.5), 1.0]) == ["2.000 ± 0.500", "1.000"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_are_no_wider_than_the_terminal(width, tmp_path):
    names = [f"experiment_with_a_long_name_{'x' * 60}_{number:02d}" for number in range(30)]
    flags = [
        Column(f"some_flag_{n}", [f"/data/{'y' * 90}/{row}" for row in range(30)], False) for n in range(9)
    ]
    figures = [Column(f"best test_figure_{n}", ["12.34"] * 30) for n in range(9)]
    lines = format_table(names, figures + flags, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert all(text.count(f"_{number:02d} ") + text.count(f"_{number:02d}\n") for number in range(30))
    assert text.count("12.34") == 9 * 30


def test_shortened_texts_stay_apart():
    assert shorten(["abcdefgh", "x"], 5) == ["…efgh", "x"]
    assert shorten(["1bcdefgh", "2bcdefgh"], 5) == ["1bcd…", "2bcd…"]
    assert shorten(["abcd1fghi", "abcd2fghi"], 5) == ["…1fg…", "…2fg…"]
    assert shorten(["a1cdefgh2", "a1cdefgh2"], 5) == ["…fgh2"] * 2
    apart = ["a1" + "x" * 20 + "1b", "a2" + "x" * 20 + "1b", "a2" + "x" * 20 + "2b"]
    assert len(set(shorten(apart, 5))) == 3


# ── Files as they are found ──


def test_broken_lines_are_left_out_and_told(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    good = (run / "log.txt").read_text()
    strange = [
        '{"epo',
        "[" * 100_000,
        "[]",
        "{}",
        '{"epoch": "x"}',
        '{"epoch": -1}',
        '{"epoch": true}',
        "\x00",
    ]
    (run / "log.txt").write_text("\n".join([*strange, good, '{"epoch": 1, "train_loss": 1.5}']))
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": [0], "images": "x", "loss": 1}\nhello\n')
    (run / "environment.json").write_text("[")
    lines = printed(capsys, run, *as_flags(html=tmp_path / "page.html"))
    assert f"warning: {run / 'log.txt'}: 8 lines cannot be read, and left out" in lines
    assert f"warning: {run / 'metrics.jsonl'}: 1 line cannot be read, and left out" in lines
    assert f"warning: {run / 'environment.json'} cannot be read" in lines
    assert read_run(run).values("train_loss") == [3.0, 1.5, 1.0]  # the last line of an epoch


STRANGE = ["[]", "{", '{"epochs": null}', '{"epochs": "many", "lr": {"a": NaN}}', '{"epochs": Infinity}']


@pytest.mark.parametrize("flags", [*STRANGE, f'{{"epochs": {"9" * 5000}}}'])
def test_flags_of_any_kind(flags, tmp_path, capsys):
    run = make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    (run / "flags.json").write_text(flags)
    with open(run / "log.txt", "a") as log:
        log.write(f'{{"epoch": 2, "train_loss": {"9" * 400}, "seconds": -Infinity, "test_acc1": [1]}}\n')
    assert "3/?" in cells(printed(capsys, tmp_path, *as_flags(html=tmp_path / "x")), "a")


def test_names_and_secrets_do_no_harm(tmp_path, capsys):
    name = "</script><b>&\x1b[31m"
    make_run(tmp_path / name.replace("/", "∕"), finetune="https://me:passw0rd@host/w.pth?sig=s1gned")
    (tmp_path / "x").mkdir()
    make_run(tmp_path / "x/</script><b>\x1b[31m", finetune="a")
    page = tmp_path / "page.html"
    out = "\n".join(printed(capsys, tmp_path, tmp_path / "x/<", *as_flags(html=page, csv=tmp_path / "t.csv")))
    for text in (out, page.read_text(), (tmp_path / "t.csv").read_text()):
        assert "passw0rd" not in text
        assert "s1gned" not in text
    assert "\x1b" not in out
    assert "\x1b" not in page.read_text()
    assert page.read_text().count("</script>") == 2


# ── The page ──


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])


def test_curves_stand_where_the_run_was(tmp_path):
    curves = curves_of(read_run(make_run(tmp_path / "a", losses=(3.0, 2.0), reports=True)))  # of 3
    assert curves["train_loss"] == {"y": [3, 2], "epochs": [1, 2], "steps": [4, 8], "images": [64, 128]}
    assert curves["loss, each report"]["epochs"] == [0.5, 1.0, 1.5, 2.0]
    assert curves["loss, each report"]["images"] == [32, 64, 96, 128]
    assert curves["images_per_second"]["y"] == [50.0] * 4
    assert curves["lr"]["y"] == [0.001] * 2
    assert curves["loss, each report"]["y"] == [7, 5, 3, 1]
    began = read_run(make_run(tmp_path / "began", losses=(), scores=(), reports=True))
    assert curves_of(began) == {}
    began.reports = [{"step": 2, "epoch": 0, "images": 8, "loss": 1.0}, {"step": 3, "epoch": 0, "loss": None}]
    loss = {"y": [1, None], "epochs": None, "steps": [2, 3], "images": [8, None]}
    assert curves_of(began) == {"loss, each report": loss}
    old = curves_of(read_run(make_run(tmp_path / "b", losses=(3.0, math.nan, math.inf))))
    later = RunFolder(tmp_path, epochs=[{"epoch": 3, "train_loss": 1.0}], reports=[])  # a cool-down
    later.reports = [{"step": step, "epoch": epoch, "lr": 1.0} for step, epoch in ((35, 3), (40, 3), (45, 4))]
    assert curves_of(later)["lr"]["epochs"] == [3.5, 4.0, 4.5]
    assert old["train_loss"] == {"y": [3, None, None], "epochs": [1, 2, 3], "steps": None, "images": None}


def test_long_curves_are_thinned(tmp_path):
    curves = curves_of(read_run(make_run(tmp_path / "a", losses=[1.0] * 2501, scores=None)))
    epochs = curves["train_loss"]["epochs"]
    assert len(epochs) <= MOST_POINTS
    assert epochs[-1] == 2501


def test_a_page_loads_nothing_and_has_each_run(tmp_path, capsys):
    for number in range(30):
        make_run(tmp_path / f"run{number}", reports=number % 2 == 0, lr=number)
    page = tmp_path / "page.html"
    printed(capsys, tmp_path, *as_flags(html=page))
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|@import|url\(", text)
    assert text.count('type="checkbox" checked>') == 30
    (section,) = data_of(page)
    assert len({tuple(style) for style in section["styles"]}) == 30
    titles = [panel["title"] for panel in section["grids"][0]]
    assert titles == ["train_loss", "test_acc1", "test_loss", "images_per_second", "lr"]
    assert [len(panel["lines"]) for panel in section["grids"][0]] == [30, 30, 30, 15, 30]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_draws_the_curves(tmp_path, capsys):
    make_run(tmp_path / "a", reports=True)
    make_run(tmp_path / "b", losses=(3.0,), reports=True)
    make_run(tmp_path / "c", losses=[math.nan] * 3)
    page = tmp_path / "page.html"
    printed(capsys, tmp_path, *as_flags(html=page))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    figures = re.findall(r"<figure>.*?</figure>", done.stdout, re.S)
    titles = [html.unescape(re.search(r"<figcaption>(.*?)<br>", figure)[1]) for figure in figures]
    assert titles[:3] == ["train_loss", "test_acc1", "test_loss"]
    lines = re.findall(r'class="line" d="([^"]*)"', figures[0])
    assert [line.count("L") for line in lines] == [2, 0, 0]
    assert figures[0].count('r="3.5"') == 1  # the run of one epoch is a dot


@pytest.mark.slow
def test_real_runs(tmp_path, capsys):
    data = photos(tmp_path / "photos")
    run_class_finetuning.main(finetuning_flags(data, tmp_path / "out/ft_a"))
    run_class_finetuning.main(finetuning_flags(data, tmp_path / "out/ft_b", *as_flags(lr=5e-4)))
    codes = tokenizer(tmp_path / "vqkd.pth")
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path / "out/pt", codes))
    lines = printed(capsys, tmp_path / "out", *as_flags(html=tmp_path / "page.html"))
    assert [line for line in lines if line.startswith("──")] == [
        "── fine-tuning: 2 runs ──",
        "── pretraining: 1 run ──",
    ]
    assert cells(lines, "ft_a")[0] == "2/2"
    assert "0.0005" in cells(lines, "ft_b")
    assert not [line for line in lines if "warning" in line]
    first, second = data_of(tmp_path / "page.html")
    panels = {panel["title"]: panel["lines"] for panel in [*first["grids"][0], *second["grids"][0]]}
    assert {"train_loss", "test_acc1", "lr", "images_per_second", "train_mlm_acc_1"} <= panels.keys()
    assert all(line["steps"] and line["images"] for lines in panels.values() for line in lines)

"""The demo's own parts: splits, class folders, and one run on a small unlabeled
folder.
"""

import itertools
import json
import sys
from pathlib import Path

import pytest
from source_files import load_script
from tiny_runs import photos

import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
from advice.command import Command, Flag

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
from demo_photos import plan_solar_cells

ENTRIES = (run_vqkd_training, run_beitv2_pretraining, run_class_finetuning)
KEYS = {"data", "vqkd", "pretrain", "finetune", "pictures", "seconds"}


@pytest.fixture
def demo(tmp_path, monkeypatch):
    module = load_script("demo")
    monkeypatch.setattr(module, "OUT", tmp_path / "demo_output")
    return module


def test_the_solar_cells_are_split_in_blocks(demo):
    pytest.importorskip("elpv_dataset")
    cells = demo.solar_cells()
    assert len(cells) == 2624
    assert {label for _, label, _ in cells} == {"mono_ok", "mono_defect", "poly_ok", "poly_defect"}
    changes = sum(first[2] != second[2] for first, second in itertools.pairwise(cells))
    assert changes == 7  # four blocks of twenty validate, the last one at the end
    assert 0.19 < sum(validate for *_, validate in cells) / len(cells) < 0.21


def test_a_command_is_rescheduled():
    flags = (
        Flag("epochs", "10", "ten"),
        Flag("warmup_steps", "50"),
        Flag("batch_size", "64"),
        Flag("vflip", "1"),
    )
    command = Command("finetune", "run.py", flags, steps=320).reschedule(
        2100, epochs="4", batch_size="16", ema=""
    )
    assert command.steps == 4 * 131
    assert [command.value(name) for name in ("epochs", "batch_size", "vflip")] == ["4", "16", "1"]
    assert command.value("warmup_steps") == "82"  # 50 of 320 steps
    assert command.flags[0].why == "" and command.words()[-1] == "--ema"
    assert command.reschedule(2100, warmup_steps="7").value("warmup_steps") == "7"


def test_the_entries_accept_each_attempt(tmp_path):
    photos(tmp_path / "data" / "train", per_class=40)
    photos(tmp_path / "data" / "val", per_class=2)
    plan = plan_solar_cells(tmp_path)
    for changes in load_script("speedrun").ATTEMPTS.values():
        for entry, command in zip(ENTRIES, plan, strict=True):
            entry.parse_flags(command.reschedule(2100, **changes.get(command.stage, {})).words())
            assert command.value("vflip") == "0.5"


def test_a_speedrun_goes_on_and_shares_stages(tmp_path, monkeypatch, capsys):
    speedrun, runs = load_script("speedrun"), []
    photos(tmp_path / "data" / "train", per_class=40)
    photos(tmp_path / "data" / "val", per_class=2)

    def run(command, out, seed, **changes):
        runs.append((command.stage, seed))
        out.mkdir(parents=True)
        (out / "log.txt").write_text(json.dumps({"test_acc1": 80.0 + seed, "test_mlm_acc_1": 0.2}) + "\n")

    monkeypatch.setattr(speedrun, "run", run)
    monkeypatch.setattr(speedrun, "prepare", plan_solar_cells)
    longer = {"longer": {"finetune": {"epochs": "30"}}}
    monkeypatch.setattr(speedrun, "ATTEMPTS", {"short": {}} | longer)
    flags = [str(tmp_path), "--seeds", "0", "2", "--attempts", "short"]
    speedrun.main(flags)
    assert runs == [(stage, seed) for seed in (0, 2) for stage in speedrun.STAGES]
    assert "81.00 ± 12.71" in capsys.readouterr().out  # Student's t of one degree of freedom
    speedrun.measure(tmp_path, plan_solar_cells(tmp_path), "longer", 0, 1)
    assert runs[6:] == [("finetune", 0)]
    monkeypatch.setattr(speedrun, "ATTEMPTS", {"short": {}})
    speedrun.main(flags)
    assert len(runs) == 7


def test_own_images_with_and_without_class_folders(demo, tmp_path, monkeypatch):
    labeled = photos(tmp_path / "labeled", per_class=10)
    assert {label for _, label, _ in demo.own_images(str(labeled))} == {"a", "b"}
    assert sum(validate for *_, validate in demo.own_images(str(labeled))) == 4
    flat = labeled / "a"
    assert {label for _, label, _ in demo.own_images(str(flat))} == {"images"}
    monkeypatch.setattr("demo_photos.MOST_IMAGES", 8)
    assert len(demo.own_images(str(labeled))) == 8


def test_train_and_val_of_a_folder_are_its_splits(demo, tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        photos(tmp_path / split, per_class=count)
    found = {
        (path.parent.parent.name, label, validate) for path, label, validate in demo.own_images(str(tmp_path))
    }
    assert found == {("train", "a", False), ("train", "b", False), ("val", "a", True), ("val", "b", True)}


def test_the_folder_of_an_earlier_demo_is_kept(demo):
    for run in range(3):
        demo.make_empty(demo.OUT)
        (demo.OUT / "summary.json").write_text(str(run))
    folders = (demo.OUT.with_name(f"demo_output{end}") for end in ("-1", "-2", ""))
    assert [(folder / "summary.json").read_text() for folder in folders] == ["0", "1", "2"]


@pytest.mark.slow
def test_a_small_unlabeled_folder_goes_through(demo, tmp_path, monkeypatch, capfd):
    pytest.importorskip("efficientnet_lite_pytorch")
    folder = photos(tmp_path / "mine", per_class=20, classes="a") / "a"
    (folder / "broken.jpg").write_bytes(b"no image")
    monkeypatch.setattr(
        "advice.plan.LENGTHS", {"vqkd": (140, 0, 0), "pretrain": (8, 0, 0), "finetune": (4, 0, 0)}
    )
    demo.main([str(folder)])
    out = capfd.readouterr().out
    assert "broken.jpg" in out
    summary = json.loads((demo.OUT / "summary.json").read_text())
    assert summary.keys() == KEYS
    assert summary["data"] == {"train": 16, "val": 4}
    assert summary["finetune"]["acc1"] is None
    assert all((demo.OUT / "pictures" / Path(path).name).stat().st_size > 500 for path in summary["pictures"])
    assert "masked-token accuracy" in out


@pytest.mark.slow
def test_labeled_summary_and_curves_from_logs(demo, monkeypatch):
    logs = {
        "vqkd": [
            {"train_loss": 1.0, "train_codes_used": 9},
            {"train_loss": 0.5, "train_codes_used": 250, "train_perplexity": 200.0, "test_loss": 0.6},
        ],
        "pretrain": [{"train_mlm_acc_1": 0.1, "train_mlm_acc_2": 0.1, "train_majority_code_share": 0.02}] * 2,
    }
    for name in ("acc1", "acc1_from_scratch", "acc1_10pct", "acc1_10pct_from_scratch"):
        logs[f"finetune_{name}"] = [{"train_loss": 1.0}, {"train_loss": 0.9, "test_acc1": 70.0}]
    for name, lines in logs.items():
        (demo.OUT / name).mkdir(parents=True)
        (demo.OUT / name / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    demo.draw_curves(demo.OUT / "curves.png", labeled=True, codes=256)
    assert (demo.OUT / "curves.png").stat().st_size > 5000
    monkeypatch.setattr(demo, "draw", lambda labeled, codes: [])
    summary = demo.summarize({"train": {"a": 6, "b": 2}, "val": {"a": 3, "b": 1}}, True, {"vqkd": 1.0}, 256)
    assert summary["finetune"]["majority_class"] == 75.0
    assert summary["vqkd"]["codes_used"] == 250
    demo.show(summary)

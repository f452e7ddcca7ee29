"""The demo's own parts: splits, class folders, and one run on a small unlabeled
folder.
"""

import itertools
import json
from pathlib import Path

import pytest
from source_files import load_script
from tiny_runs import photos

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

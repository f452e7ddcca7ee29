"""advise.py: what it finds in a folder, the command lines that it advises, and that
these run.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny_runs
from PIL import Image
from refusals import refused, user_reads

import advise
import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
from advice import plan as rules
from advice.command import Machine
from advice.inspection import FolderReport, flip_probability, inspect_folder, list_folder, make_split
from advice.plan import make_plan

ENTRIES = (run_vqkd_training, run_beitv2_pretraining, run_class_finetuning)
CPU, ONE_GPU, EIGHT_GPUS = Machine(0, 2, True), Machine(1, 16, False), Machine(8, 64, False)
SOLAR_CELLS = FolderReport(
    root="photos",
    images=2100,
    held_out=524,
    classes={"a": 340, "b": 809},
    has_splits=True,
    unreadable=(),
    looked_at=512,
    short_side=144,
    smallest=144,
    largest=144,
    in_chans=3,
    dtype="uint8",
    is_rgb8=True,
    is_gray=True,
    copies=0,
    copies_across=0,
    near_constant=0,
    has_up=False,
)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array) if path.suffix == ".npy" else Image.fromarray(array).save(path)


def test_what_is_in_a_folder_is_found(tmp_path):
    folder = tiny_runs.photos(tmp_path / "photos", per_class=6)
    (folder / "b" / "broken.jpg").write_bytes(b"no image")
    shutil.copy(folder / "a" / "0.jpg", folder / "a" / "copy.jpg")
    write(folder / "a" / "blank.png", np.full((90, 70, 3), 7, np.uint8))
    report = inspect_folder(str(folder))
    assert (report.images, report.classes) == (15, {"a": 8, "b": 7})
    assert (report.copies, report.near_constant, len(report.unreadable)) == (1, 1, 1)
    assert (report.smallest, report.short_side, report.largest) == (40, 40, 70)
    assert report.is_rgb8 and not report.has_splits


def test_splits_and_what_is_in_both(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        tiny_runs.photos(tmp_path / split, per_class=count)
    shutil.copy(tmp_path / "train/a/3.jpg", tmp_path / "val/a/same.jpg")
    report = inspect_folder(str(tmp_path))
    assert (report.images, report.held_out) == (8, 5)
    assert report.copies_across == 5  # the photos of val/ are the first of train/


@pytest.mark.parametrize(
    ("ending", "array", "expected"),
    [
        ("png", np.random.RandomState(0).randint(0, 4096, (40, 40)).astype(np.uint16), (1, "uint16")),
        ("npy", np.random.RandomState(0).rand(40, 40, 4).astype(np.float32), (4, "float32")),
        ("npy", np.random.RandomState(0).randint(0, 9000, (40, 40, 4)).astype(np.uint16), (4, "uint16")),
    ],
)
def test_own_pixels_get_their_flags(tmp_path, ending, array, expected):
    for number in range(4):
        write(tmp_path / f"{number}.{ending}", np.roll(array, number, axis=0))
    report = inspect_folder(str(tmp_path))
    assert (report.in_chans, report.dtype, report.is_rgb8) == (*expected, False)
    for command in make_plan(report, CPU):
        words = command.words()
        assert words[words.index("--in_chans") + 1] == str(expected[0])
        assert words[words.index("--image_range") + 1] == "auto"
    assert make_plan(report, CPU)[0].value("teacher_model_type") == "hog"


def test_arrays_beside_photos_are_not_images(tmp_path):
    folder = tiny_runs.photos(tmp_path, per_class=4)
    np.save(folder / "a" / "features.npy", np.zeros((3, 3)))
    assert len(list_folder(str(folder))) == 8


def test_an_up_is_found_where_there_is_one():
    rng = np.random.RandomState(0)
    without = [rng.randn(16, 16) for _ in range(200)]
    slope = np.linspace(-0.5, 0.5, 16)[:, None]
    assert flip_probability(without) > 0.01
    assert flip_probability([image + slope for image in without]) < 0.01


def test_few_images_are_not_turned(tmp_path):
    assert inspect_folder(str(tiny_runs.photos(tmp_path, per_class=4))).has_up


def test_the_demo_trains_as_its_measurements_say():
    """docs/lab/demo.md: the flags that were measured on the solar cells."""
    vqkd, pretrain, finetune = make_plan(SOLAR_CELLS, CPU)
    flags = {"batch_size": "64", "input_size": "128", "vflip": "0.5", "clip_grad": "3.0"}
    flags |= {"min_crop_scale": "0.35"}
    for command in (vqkd, pretrain):
        assert {name: command.value(name) for name in flags} == flags
    assert [vqkd.value(name) for name in ("codebook_n_emd", "codebook_emd_dim", "lr")] == [
        "256",
        "16",
        "0.002",
    ]
    assert [command.value("epochs") for command in (vqkd, pretrain, finetune)] == ["9", "20", "9"]
    assert [pretrain.value(name) for name in ("lr", "num_mask_patches", "early_layers")] == [
        "0.0015",
        "26",
        "4",
    ]
    assert [finetune.value(name) for name in ("lr", "layer_decay", "aa")] == ["0.001", "0.8", "none"]


@pytest.mark.parametrize("machine", [CPU, ONE_GPU, EIGHT_GPUS], ids=["cpu", "gpu", "8gpus"])
@pytest.mark.parametrize("images", [12, 90, 3_000, 80_000, 1_300_000])
@pytest.mark.parametrize("side", [20, 100, 300, 2000])
def test_the_entries_accept_what_is_advised(machine, images, side):
    for classes in ({}, {"a": images - 2, "b": 2}):
        report = dataclasses.replace(SOLAR_CELLS, images=images, short_side=side, classes=classes)
        for entry, command in zip(ENTRIES, make_plan(report, machine), strict=True):
            args = entry.parse_flags(command.words())
            assert args.batch_size * max(1, machine.gpus) <= max(8, images * 8)
            assert args.input_size <= (224 if machine.gpus else 128)


def test_the_rules_follow_size_and_batch():
    def advised(machine, **changes):
        return make_plan(dataclasses.replace(SOLAR_CELLS, **changes), machine)

    published = advised(Machine(32, 64, False), images=1_281_167, short_side=375)
    assert published[1].value("model") == "beit_base_patch16_224_8k_vocab_cls_pt"
    assert published[1].value("lr") == "0.0015"  # a batch of 2048
    assert [command.value("epochs") for command in published] == ["100", "300", "100"]
    assert published[0].value("codebook_n_emd") == "8192"
    few = advised(EIGHT_GPUS, images=2_000, short_side=375)
    assert few[1].value("epochs") == "1600"
    assert few[1].value("num_mask_patches") == "75"
    imbalanced = advised(CPU, classes={"a": 1000, "b": 20})
    assert imbalanced[2].value("class_weights") == "balanced"
    assert "--data_pipeline" in advised(CPU, short_side=400)[0].words()
    assert "--data_pipeline" not in advised(CPU, short_side=200)[0].words()


def test_a_split_of_links(tmp_path):
    folder = tiny_runs.photos(tmp_path / "photos", per_class=10)
    shutil.copy(folder / "a" / "0.jpg", folder / "b" / "copy of a.jpg")
    make_split(str(folder), tmp_path / "split")
    report = inspect_folder(str(tmp_path / "split"))
    assert (report.images, report.held_out, report.copies) == (16, 4, 0)
    with user_reads("is there already"):
        make_split(str(folder), tmp_path / "split")
    with user_reads("one folder per class"):
        make_split(str(folder / "a"), tmp_path / "other")


def test_refusals_are_sentences(tmp_path, capsys):
    assert "no such folder" in refused(advise.main, [str(tmp_path / "missing")], capsys)
    assert "no images" in refused(advise.main, [str(tmp_path)], capsys)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    assert "could be read" in refused(advise.main, [str(tmp_path)], capsys)


@pytest.mark.slow
def test_what_is_advised_runs_as_it_is_typed(tmp_path, capsys, monkeypatch):
    folder = tiny_runs.photos(tmp_path / "my photos", per_class=20)
    monkeypatch.setattr(advise, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(rules, "LENGTHS", {"vqkd": (140, 0, 0), "pretrain": (4, 0, 0), "finetune": (4, 0, 0)})
    out, file = tmp_path / "out", tmp_path / "plan.json"
    flags = [f"{folder}/", "--output_dir", str(out), "--device", "cpu", "--num_workers", "0"]
    advise.main(flags)
    text = capsys.readouterr().out
    assert text.count("on this machine ──") == 3 and "--make_split links every fifth image" in text
    advise.main([*flags, "--make_split", "--output", str(file)])
    text = capsys.readouterr().out
    assert "2 classes of 16 images" in text and "--make_split" not in text
    content = json.loads(file.read_text())
    assert [command["stage"] for command in content["commands"]] == ["vqkd", "pretrain", "finetune"]
    for entry, command in zip(ENTRIES, content["commands"], strict=True):
        assert command["seconds"] >= 0
        assert command["line"][:2] == ["python", command["line"][1]]
        entry.main([*command["line"][2:], "--device", "cpu", "--num_workers", "0"])
        assert (out / command["stage"] / "checkpoint.pth").exists()

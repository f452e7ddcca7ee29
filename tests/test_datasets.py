"""Finding images, reading them, broken files, samplers, and what a resumed run reads."""

import json
import logging
import os
import pickle
import random
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from refusals import user_reads

from data_pipeline import samplers
from data_pipeline.files import BadFiles, collate
from data_pipeline.image_lists import (
    find_classes_folder,
    find_images,
    read_class_index,
    take_class_balanced_share,
)
from data_pipeline.samplers import (
    EvalSampler,
    LoaderSettings,
    ResumableSampler,
    build_eval_loader,
    build_loader,
)
from datasets import ImageFiles
from run_beitv2_pretraining import build_data
from run_class_finetuning import build_dataset as build_finetuning_dataset
from run_vqkd_training import build_dataset as build_vqkd_dataset
from run_vqkd_training import build_held_out_dataset
from runtime.distributed import Launch
from transforms import TokenizerViews, eval_view


def write_image(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(seed)
    Image.fromarray(rng.randint(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    ).save(path)
    return str(path)


def write_classes(root, counts):
    for name, count in counts.items():
        for i in range(count):
            write_image(root / name / f"{i:02}.jpg", seed=i)
    return str(root)


def arguments(root, **changed):
    flags: dict[str, Any] = {
        "data_path": str(root),
        "eval_data_path": "",
        "data_set": "image_folder",
        "image_folder_class_index_file": None,
        "nb_classes": 0,
        "label_fraction": 1.0,
        "download": False,
        "seed": 0,
        "input_size": 64,
        "second_input_size": 32,
        "min_crop_scale": 0.2,
        "color_jitter": 0.4,
        "train_interpolation": "bicubic",
        "second_interpolation": "bicubic",
        "imagenet_default_mean_and_std": False,
        "num_mask_patches": None,
        "min_mask_patches_per_block": None,
        "max_mask_patches_per_block": None,
        "mask_type": "block",
        "no_mask": False,
        "aa": "rand-m9-mstd0.5-inc1",
        "reprob": 0.25,
        "remode": "pixel",
        "recount": 1,
        "crop_pct": None,
        "vflip": 0.0,
        "data_pipeline": "exact",
        "augment_on_device": False,
        "target": "tokens",
        "tokenizer_model": "vqkd_encoder_base_decoder_3x768x12_clip",
    }
    return Namespace(**{**flags, **changed})


def build_pretraining_dataset(args, grid, held_out=""):
    train, evaluation = build_data(Namespace(**{**vars(args), "eval_data_path": held_out}), grid)
    return evaluation if held_out else train


def vqkd_dataset(args, train):
    dataset = build_vqkd_dataset(args) if train else build_held_out_dataset(args)
    assert dataset is not None
    return dataset


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Twelve different images in nested folders."""
    root = tmp_path_factory.mktemp("flat")
    for i in range(12):
        write_image(root / f"part{i % 2}" / f"{i:02}.jpg", seed=i)
    return root


# -------------------------------------------------------------------------------------------------------
#   finders
def test_find_images(tmp_path):
    for name in (
        "b.JPG",
        "a.png",
        "deep/er/c.webp",
        "deep/d.tiff",
        ".hidden.jpg",
        ".thumbs/e.jpg",
        "._a.png",
    ):
        write_image(tmp_path / "root" / name.replace(".JPG", ".jpg"))
    (tmp_path / "root" / "b.jpg").rename(tmp_path / "root" / "b.JPG")
    (tmp_path / "root" / "notes.txt").write_text("no image")
    write_image(tmp_path / "elsewhere" / "linked.bmp")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "deep" / "circle").symlink_to(tmp_path / "root")
    samples, classes = find_images(str(tmp_path / "root"))
    assert classes is None
    names = [os.path.relpath(str(path), tmp_path / "root") for path, _ in samples]
    assert names == ["a.png", "b.JPG", "deep/d.tiff", "deep/er/c.webp", "link/linked.bmp"]
    assert {label for _, label in samples} == {None}


def test_folders_that_hold_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with user_reads(r"--data_path .*no images in this folder.*\.jpg .*\.webp"):
        find_images(str(tmp_path))
    with user_reads(r"--eval_data_path .*missing: no such folder"):
        find_images(str(tmp_path / "missing"), "--eval_data_path")
    with user_reads("is not a folder"):
        find_images(str(tmp_path / "notes.txt"))
    with user_reads("no class folders"):
        find_classes_folder(str(tmp_path))
    write_image(tmp_path / "cats" / "1.jpg")
    (tmp_path / "dogs").mkdir()
    with user_reads("class folder 'dogs' has no images"):
        find_classes_folder(str(tmp_path))


def test_find_classes_folder(tmp_path):
    root = write_classes(tmp_path, {"dog": 2, "cat": 3, ".cache": 1})
    write_image(tmp_path / "cat" / "nested" / "x.png")
    samples, classes = find_classes_folder(root)
    assert classes == ["cat", "dog"]
    assert [label for _, label in samples] == [0, 0, 0, 0, 1, 1]
    assert all(f"/{classes[label or 0]}/" in str(path) for path, label in samples)


def test_what_is_left_out_is_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(samplers.log, "propagate", True)
    caplog.set_level("INFO", "beit")
    write_classes(tmp_path, {"a": 2, "b": 2, "b/@eaDir/00.jpg": 3, "__MACOSX": 1, "a/.thumbs": 1})
    for name in ("b/x.jfif", "b/x.jpe", "b/x.gif"):
        Image.new("RGB", (9, 9)).save(tmp_path / name, "GIF" if name.endswith("gif") else "JPEG")
    for name in ("a/x.xcf", "a/y.XCF", "a/z", "b/._x.jpg", "b/Thumbs.db", "loose.png"):
        (tmp_path / name).write_bytes(b"")
    samples, classes = find_classes_folder(str(tmp_path))
    assert classes == ["a", "b"]
    assert [label for _, label in samples] == [0, 0, 1, 1, 1, 1, 1]
    kinds = [
        "2 .xcf",
        "3 in @eaDir",
        "1 in hidden folders",
        "1 hidden",
        "1 without ending",
        "1 .db",
        "1 beside the class folders",
    ]
    assert [kind for kind in kinds if kind not in caplog.text] == []


def test_links_do_not_label_images_of_other_classes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(samplers.log, "propagate", True)
    caplog.set_level("INFO", "beit")
    root = tmp_path / "data"
    write_classes(root, {"a": 2, "b": 2, "b/deep": 1, "c": 1})
    write_image(tmp_path / "elsewhere" / "x.jpg")
    for link, target in (("a/up", ".."), ("a/higher", "../.."), ("a/other", "../b"), ("a/inside", "../b/deep"), ("a/me", "."),
                         ("a/more", "../../elsewhere"), ("me", "."), ("up", "..")):  # fmt: skip
        (root / link).symlink_to(target)
    samples, classes = find_classes_folder(str(root))
    assert classes == ["a", "b", "c"]
    assert [label for _, label in samples] == [0, 0, 0, 1, 1, 1, 2]
    assert "data/a/up: a link to a folder above or of another class" in caplog.text
    assert len(find_images(str(root))[0]) == 7
    (root / "d").symlink_to("a")
    with user_reads("class folders 'a' and 'd' are the same folder"):
        find_classes_folder(str(root))


def test_splits_and_single_classes_are_no_classes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(samplers.log, "propagate", True)
    caplog.set_level("INFO", "beit")
    write_classes(tmp_path / "photos" / "train", {"a": 1, "b": 1})
    write_classes(tmp_path / "photos" / "val", {"a": 1, "b": 1})
    root = tmp_path / "photos"
    with user_reads(
        (
            f"its folders are train, val: splits, not classes; give .*--data_path {root}/train "
            f"--eval_data_path {root}/val"
        ),
    ):
        build_finetuning_dataset(arguments(root), train=True)
    with user_reads("has one class folder, 'photos'; two classes at least"):
        build_finetuning_dataset(arguments(tmp_path), train=True)
    (tmp_path / "index.jsonl").write_text('{"class": "a", "files": ["a/00.jpg"]}')
    with user_reads("--data_path: has one class, 'a'"):
        build_finetuning_dataset(
            arguments(root / "train", image_folder_class_index_file=str(tmp_path / "index.jsonl")), train=True
        )
    build_finetuning_dataset(arguments(root / "train"), train=True)
    assert "classes    2: a, b" in caplog.text


def test_class_index_as_published(tmp_path):
    """root/class/file; paths relative to root stay right."""
    write_classes(tmp_path / "data", {"ape": 2, "bee": 1})
    index = tmp_path / "index.jsonl"
    lines = [{"class": "bee", "files": ["00.jpg"]}, {"class": "ape", "files": ["01.jpg", "00.jpg"]}]
    index.write_text("\n".join(map(json.dumps, lines)))
    samples, _ = read_class_index(str(index), str(tmp_path / "data"))
    names = [os.path.relpath(str(path), tmp_path / "data") for path, _ in samples]
    assert names == ["ape/01.jpg", "ape/00.jpg", "bee/00.jpg"]
    write_classes(tmp_path / "data", {".": 1})  # now 00.jpg is there as well
    index.write_text(json.dumps(lines[0]))
    with user_reads(r"00\.jpg is there, and the same path in the class's folder"):
        read_class_index(str(index), str(tmp_path / "data"))


def test_class_index(tmp_path):
    write_classes(tmp_path / "data", {"one": 2, "two": 1})
    index = tmp_path / "index.jsonl"
    lines = [
        {"class": "zebra", "files": ["two/00.jpg"]},
        {"class": "ape", "files": ["one/00.jpg", "one/01.jpg"]},
    ]
    index.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    samples, classes = read_class_index(str(index), str(tmp_path / "data"))
    assert classes == ["ape", "zebra"]
    assert [(os.path.relpath(str(path), tmp_path / "data"), label) for path, label in samples] == [
        ("one/00.jpg", 0),
        ("one/01.jpg", 0),
        ("two/00.jpg", 1),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"class": "a", "files": ["a/00.jpg"]}\n{"class": "b", ', "index.jsonl, line 2: not valid JSON"),
        ('{"class": "a"}', 'line 1: expected {"class"'),
        ("[1, 2]", "line 1: expected"),
        ('{"class": "a", "files": [1]}', "line 1: expected"),
        ('{"class": "a", "files": []}', "class 'a' has no files"),
        (
            '{"class": "a", "files": ["x"]}\n{"class": "a", "files": ["y"]}',
            "line 2: class 'a' was listed before",
        ),
        ('{"class": "a", "files": ["../secret.jpg"]}', "'../secret.jpg' of class 'a' lies outside"),
        ('{"class": "a", "files": ["a/../../data_too/x.jpg"]}', "lies outside"),
        ('{"class": "a", "files": ["/etc/x.jpg"]}', "'/etc/x.jpg' of class 'a' lies outside"),
        ('{"class": "a", "files": ["a/99.jpg"]}', "there is no .*data/a/99.jpg"),
        ("\n", "is empty"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ('{"class": "a", "files": ["' + "\\ud800" + '.jpg"]}', "has a name that is no text"),
        ('{"class": ' + "1" * 5000 + "}", "line 1: not valid JSON"),
        (None, "cannot be read"),
    ],
)
def test_broken_class_index(tmp_path, text, sentence):
    write_classes(tmp_path / "data", {"a": 1})
    if text is not None:
        (tmp_path / "index.jsonl").write_text(text)
    with user_reads(sentence):
        read_class_index(str(tmp_path / "index.jsonl"), str(tmp_path / "data"))


def test_class_balanced_share():
    samples = [(f"{i}.jpg", label) for i, label in enumerate([0] * 40 + [1] * 20 + [2] * 3)]
    kept = take_class_balanced_share(samples, 0.1)
    assert [label for _, label in kept] == [0] * 4 + [1] * 2 + [2]
    random.seed(5)
    assert take_class_balanced_share(samples, 0.1) == kept
    assert set(kept) < set(take_class_balanced_share(samples, 0.5))
    assert take_class_balanced_share(samples, 0.1, seed=1) != kept
    assert take_class_balanced_share(samples, 1.0) == samples
    for fraction in (0, -1, 1.5):
        with user_reads("--label_fraction"):
            take_class_balanced_share(samples, fraction)


# --------------------------------------------------------------------------------------------------------
#   samples
def epoch_of(dataset, sampler, workers=0):
    return list(build_loader(dataset, sampler, workers, pin_memory=False))


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch if name != "failed")


def test_samples_depend_on_seed_epoch_and_index_alone(flat):
    dataset = build_pretraining_dataset(arguments(flat), grid=4)
    sampler = ResumableSampler(len(dataset), 2, 2, 0, 1, seed=0)
    sampler.set_position(3)
    whole = epoch_of(dataset, sampler)
    assert len(whole) == 6
    assert set(whole[0]) == {"image", "tokenizer_image", "mask", "index", "failed"}
    torch.manual_seed(123)
    random.seed(123)
    np.random.seed(123)
    assert_same(epoch_of(dataset, sampler, workers=2), whole)
    sampler.set_position(3, 4)
    assert len(sampler) == 4
    assert_same(epoch_of(dataset, sampler, workers=2), whole[2:])

    key = (3, 7)
    assert torch.equal(dataset[key]["image"], dataset[key]["image"])
    assert not torch.equal(dataset[key]["image"], dataset[4, 7]["image"])
    assert not torch.equal(dataset[key]["mask"], dataset[4, 7]["mask"])
    other_seed = build_pretraining_dataset(arguments(flat, seed=1), grid=4)
    assert not torch.equal(dataset[key]["image"], other_seed[key]["image"])


def test_augmentations_of_timm_are_seeded_too(tmp_path):
    dataset, _ = build_finetuning_dataset(arguments(write_classes(tmp_path, {"a": 3, "b": 3})), train=True)
    views = [torch.stack([dataset[epoch, 1]["image"] for epoch in range(10)]) for _ in range(2)]
    assert torch.equal(*views)
    assert views[0].std(dim=0).min() > 0


def test_reading_leaves_the_global_generators_alone(flat):
    dataset = build_pretraining_dataset(arguments(flat), grid=4)
    sampler = ResumableSampler(len(dataset), 4, 1, 0, 1, seed=0)
    states = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
    epoch_of(dataset, sampler)
    epoch_of(dataset, sampler, workers=1)
    assert random.getstate() == states[0]
    assert pickle.dumps(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_data_sets_travel_to_spawned_workers(tmp_path):
    """Not every platform forks: what a loader sends to its workers must pickle."""
    args = arguments(write_classes(tmp_path, {"a": 2, "b": 2}))
    for dataset in (
        build_pretraining_dataset(args, 4),
        vqkd_dataset(args, True),
        build_finetuning_dataset(args, True)[0],
    ):
        assert torch.equal(pickle.loads(pickle.dumps(dataset))[1, 2]["image"], dataset[1, 2]["image"])


def test_eval_loader_reads_this_ranks_share(flat):
    dataset = ImageFiles([(path, i) for i, (path, _) in enumerate(find_images(str(flat))[0])], eval_view(32))
    settings = LoaderSettings(batch_size=4, num_workers=0, pin_mem=True)
    loaders = [build_eval_loader(dataset, settings, Launch(rank, 2), torch.device("cpu")) for rank in (0, 1)]
    labels = [[batch["label"].tolist() for batch in loader] for loader in loaders]
    assert labels == [[[0, 2, 4, 6], [8, 10]], [[1, 3, 5, 7], [9, 11]]]


def test_evaluation_pins_memory_for_a_run_on_a_gpu_alone(flat, monkeypatch):
    """By the run's device: --device cpu on a machine with a GPU pins nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dataset = ImageFiles(find_images(str(flat))[0], eval_view(32))
    for device, asked, pins in (("cpu", True, False), ("cuda", True, True), ("cuda", False, False)):
        settings = LoaderSettings(batch_size=4, num_workers=0, pin_mem=asked)
        assert build_eval_loader(dataset, settings, Launch(), torch.device(device)).pin_memory is pins


def test_workers_are_capped_at_the_cores(flat, caplog, monkeypatch):
    monkeypatch.setattr(samplers.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(samplers.log, "propagate", True)
    caplog.set_level(logging.INFO, "beit")
    samplers.cap_at_cores.cache_clear()
    dataset = ImageFiles(find_images(str(flat))[0], eval_view(32))
    for _ in range(2):
        assert build_loader(dataset, EvalSampler(12, 4, 0, 1), 10, True).num_workers == 3
    assert build_loader(dataset, EvalSampler(12, 4, 0, 1), 2, True).num_workers == 2
    assert caplog.text.count("--num_workers 10: this machine has 3 cores") == 1
    samplers.cap_at_cores.cache_clear()


# ---------------------------------------------------------------------------------------------------
#   broken files
@pytest.fixture
def broken(tmp_path):
    """Good 0, then a truncated JPEG, an empty file and a text, then good 4 and 5."""
    for i in range(6):
        write_image(tmp_path / f"{i}.jpg", seed=i)
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "2.jpg").write_bytes(b"")
    (tmp_path / "3.jpg").write_text("<html>404 not found</html>")
    return [(str(tmp_path / f"{i}.jpg"), i) for i in range(6)]


def test_broken_files_are_named_and_replaced_by_the_next(broken):
    dataset = ImageFiles(broken, eval_view(32))
    good = dataset[4]
    assert good["failed"] == []
    for index in (1, 2, 3):
        sample = dataset[index]
        assert torch.equal(sample["image"], good["image"])
        assert sample["label"] == 4
        assert [text.split(" (")[0] for text in sample["failed"]] == [broken[i][0] for i in range(index, 4)]
    assert "truncated" in dataset[1]["failed"][0].lower()
    assert "(not an image)" in dataset[3]["failed"][0]
    batch = next(iter(build_loader(dataset, EvalSampler(6, 6, 0, 1), 1, pin_memory=False)))
    assert batch["label"].tolist() == [0, 4, 4, 4, 4, 5]
    assert len(batch["failed"]) == 6


def test_replacement_wraps_around(broken):
    dataset = ImageFiles([*broken[4:], *broken[1:4]], eval_view(32))
    assert dataset[4]["label"] == 4


def test_decompression_bomb_is_a_broken_file(broken, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    sample = ImageFiles(broken, eval_view(32))[0]
    assert set(sample) == {"failed"}
    assert "decompression bomb" in sample["failed"][0]


def test_missing_file_is_a_broken_file(broken):
    sample = ImageFiles([("/nowhere/x.jpg", 0), broken[0]], eval_view(32))[0]
    assert sample["label"] == 0
    assert sample["failed"] == ["/nowhere/x.jpg (No such file or directory)"]


def test_giving_up_when_everything_is_broken(tmp_path):
    paths = [str(tmp_path / f"{i:04}.jpg") for i in range(1500)]
    for path in paths[:40]:
        (tmp_path / path).write_text("no image")
    few = ImageFiles([(path, 0) for path in paths[:5]], eval_view(32))[3]
    assert set(few) == {"failed"}
    assert len(few["failed"]) == 5
    assert len(ImageFiles([(path, 0) for path in paths[:40]], eval_view(32))[0]["failed"]) == 10
    assert len(ImageFiles([(path, 0) for path in paths], eval_view(32))[0]["failed"]) == 15
    assert collate([few, {"image": torch.zeros(1), "failed": ["x"]}]) == {"failed": [*few["failed"], "x"]}
    with user_reads(r"no image could be read, 5 files.*0003.jpg.*check --data_path"):
        BadFiles().add(few["failed"], found_image=False)


def test_bad_files_are_logged_once_and_end_the_run_beyond_1_pct(caplog, monkeypatch):
    monkeypatch.setattr(samplers.log, "propagate", True)
    bad = BadFiles(flag="--my_data")
    bad.start_epoch(reads=950)
    for i in range(9):
        bad.add([f"{i}.jpg (broken)"])
    bad.add(["0.jpg (broken)", "1.jpg (broken)"] * 20)  # again, as a neighbor's replacement: no new bad file
    assert caplog.text.count("cannot read 0.jpg (broken)") == 1
    with user_reads(r"10 of this epoch's 950 images .*0.jpg.*check --my_data"):
        bad.add(["9.jpg (broken)"])

    bad.start_epoch(reads=1000)
    for i in range(10):
        bad.add([f"{i}.jpg (broken)"])  # exactly one percent
    assert caplog.text.count("cannot read 0.jpg (broken)") == 1
    with user_reads("11 of this epoch's 1000"):
        bad.add(["10.jpg (broken)"])

    bad.start_epoch(reads=20)
    for i in range(9):
        bad.add([f"{i}.jpg (broken)"])  # far over one percent, but under ten


# --------------------------------------------------------------------------------------------------------
#   builders
def test_pretraining_dataset(flat):
    dataset = build_pretraining_dataset(arguments(flat, input_size=128), grid=8)
    sample = dataset[0]
    assert sample["mask"].shape == (64,)
    assert sample["mask"].sum() == 24
    assert "label" not in sample
    assert build_pretraining_dataset(arguments(flat, num_mask_patches=5), 4)[0]["mask"].sum() == 5
    assert len(build_pretraining_dataset(arguments(flat), 4, held_out=str(flat / "part1"))) == 6
    with user_reads("--eval_data_path /nowhere: no such folder"):
        build_pretraining_dataset(arguments(flat), 4, held_out="/nowhere")
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"max_mask_patches_per_block": -1}, "--max_mask_patches_per_block"),
        ({"data_set": "imagefolder"}, "unknown --data_set 'imagefolder'; did you mean image_folder"),
    ]
    for changed, sentence in mistakes:
        with user_reads(sentence):
            build_pretraining_dataset(arguments(flat, **changed), 4)


def test_where_each_data_set_is_read_from(tmp_path, flat):
    write_classes(tmp_path / "train", {"a": 3, "b": 2})
    write_classes(tmp_path / "val", {"a": 1, "b": 1})
    imnet = arguments(tmp_path, data_set="IMNET")
    assert len(build_pretraining_dataset(imnet, 4)) == 5
    assert len(vqkd_dataset(imnet, True)) == 5
    assert len(vqkd_dataset(imnet, False)) == 2
    assert isinstance(vqkd_dataset(imnet, True).view, TokenizerViews)
    sample = vqkd_dataset(imnet, False)[0]
    assert sample["image"].shape == (3, 64, 64)
    assert 0 <= sample["image"].min() < sample["image"].max() <= 1
    assert build_held_out_dataset(arguments(flat)) is None
    assert len(vqkd_dataset(arguments(tmp_path, eval_data_path=str(flat)), False)) == 12
    train, classes = build_finetuning_dataset(imnet, True)
    evaluation, _ = build_finetuning_dataset(imnet, False)
    assert (len(train), len(evaluation), classes) == (5, 2, 2)
    assert [evaluation[i]["label"] for i in range(2)] == [0, 1]
    (tmp_path / "index").write_text('{"class": "b", "files": ["b/00.jpg"]}')
    index = arguments(tmp_path / "train", image_folder_class_index_file=str(tmp_path / "index"))
    assert len(build_pretraining_dataset(index, 4)) == 1


def test_validation_labels_are_those_of_training(tmp_path):
    write_classes(tmp_path / "train", {"ant": 2, "bee": 2, "cow": 2})
    write_classes(tmp_path / "val", {"cow": 1, "bee": 1})
    args = arguments(tmp_path / "train", eval_data_path=str(tmp_path / "val"), nb_classes=3)
    evaluation, classes = build_finetuning_dataset(args, train=False)
    assert classes == 3
    assert [evaluation[i]["label"] for i in range(2)] == [1, 2]
    own, classes = build_finetuning_dataset(args, train=False, own_classes=True)
    assert classes == 2
    assert [own[i]["label"] for i in range(2)] == [0, 1]

    lines = [{"class": "cow", "files": ["cow/00.jpg"]}, {"class": "bee", "files": ["bee/00.jpg"]}]
    (tmp_path / "index").write_text("\n".join(map(json.dumps, lines)))
    args = arguments(
        tmp_path / "train",
        eval_data_path=str(tmp_path / "val"),
        image_folder_class_index_file=str(tmp_path / "index"),
    )
    assert build_finetuning_dataset(args, train=True)[1] == 2
    assert build_finetuning_dataset(args, train=False)[0].labels.tolist() == [0, 1]

    write_image(tmp_path / "val" / "dodo" / "1.jpg")
    with user_reads(r"--eval_data_path .*class folder 'dodo' is no class of the " r"training data"):
        build_finetuning_dataset(args, train=False)


def test_finetuning_mistakes(tmp_path):
    root = write_classes(tmp_path / "train", {"ant": 2, "bee": 2, "cow": 2})
    with user_reads("--nb_classes 10: the data has 3 classes"):
        build_finetuning_dataset(arguments(root, nb_classes=10), train=True)
    with user_reads("--eval_data_path is missing"):
        build_finetuning_dataset(arguments(root), train=False)
    with user_reads(r"--data_path .*val: no such folder"):
        build_finetuning_dataset(arguments(tmp_path, data_set="IMNET"), train=False)


def test_label_fraction_keeps_the_same_share_whatever_the_seed(tmp_path):
    root = write_classes(tmp_path, {"a": 10, "b": 4})
    shares = [
        build_finetuning_dataset(arguments(root, label_fraction=0.5, seed=s), train=True)[0] for s in (0, 1)
    ]
    assert shares[0].labels.tolist() == [0] * 5 + [1] * 2
    assert (shares[0].sources == shares[1].sources).all()


def test_cifar(tmp_path, monkeypatch):
    with user_reads(r"no CIFAR-100 below --data_path .*--download fetches it"):
        build_finetuning_dataset(arguments(tmp_path, data_set="CIFAR"), train=True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.RandomState(0)
    for split, count in (("train", 200), ("test", 100)):
        pixels = rng.randint(0, 256, (count, 3072), dtype=np.uint8)
        content = {"data": pixels, "fine_labels": [i % 100 for i in range(count)]}
        (folder / split).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{i}" for i in range(100)]}))
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    args = arguments(tmp_path, data_set="CIFAR", input_size=32, label_fraction=0.5, nb_classes=100)
    train, classes = build_finetuning_dataset(args, train=True)
    assert (len(train), classes) == (100, 100)
    assert torch.equal(train[2, 17]["image"], train[2, 17]["image"])
    assert not torch.equal(train[2, 17]["image"], train[3, 17]["image"])
    evaluation, _ = build_finetuning_dataset(args, train=False)
    assert len(evaluation) == 100
    assert evaluation[7]["label"] == 7
    expected = torch.from_numpy(pixels[7].reshape(3, 32, 32)).float() / 127.5 - 1
    torch.testing.assert_close(evaluation[7]["image"], expected)
    assert "label" not in vqkd_dataset(args, True)[0]


# --------------------------------------------------------------------------------------------------------
#   samplers
def global_order(length, batch, freq, world, epoch, done, seed=0):
    """What all ranks read together, micro-batch by micro-batch."""
    ranks = []
    for rank in range(world):
        sampler = ResumableSampler(length, batch, freq, rank, world, seed)
        sampler.set_position(epoch, done)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
        assert all(len(keys) == sampler.batch_size for keys in ranks[-1])
    return [key for micro in zip(*ranks, strict=True) for keys in micro for key in keys]


def test_ranks_share_an_epoch_without_repeats():
    keys = global_order(103, batch=4, freq=2, world=3, epoch=5, done=0)
    assert len(keys) == 96  # four steps of 24
    assert len(set(keys)) == 96
    assert {epoch for epoch, _ in keys} == {5}
    sampler = ResumableSampler(103, 4, 2, 0, 3, seed=0)
    assert (sampler.global_batch, sampler.steps_per_epoch, sampler.shrunk) == (24, 4, False)
    assert sorted(index for _, index in global_order(96, 4, 2, 3, 0, 0)) == list(range(96))
    assert global_order(96, 4, 2, 3, 0, 0) == global_order(96, 4, 2, 3, 0, 0)
    assert [i for _, i in global_order(96, 4, 2, 3, 0, 0)] != [i for _, i in global_order(96, 4, 2, 3, 1, 0)]
    assert global_order(96, 4, 2, 3, 0, 0) != global_order(96, 4, 2, 3, 0, 0, seed=1)


def test_the_order_goes_on_with_other_ranks_and_batch_sizes():
    whole = global_order(100, batch=2, freq=1, world=1, epoch=2, done=0)
    assert len(whole) == 100
    for batch, freq, world in [(2, 1, 1), (4, 2, 3), (5, 1, 2), (1, 4, 4)]:
        rest = global_order(100, batch, freq, world, epoch=2, done=24)
        assert rest == whole[24 : 24 + len(rest)]
        assert 0 <= 76 - len(rest) < batch * freq * world
    assert global_order(100, 2, 1, 1, 2, done=100) == []


def test_an_iteration_under_way_keeps_its_position():
    sampler = ResumableSampler(8, 2, 1, 0, 1, seed=0)
    keys = list(sampler)
    iterator = iter(sampler)
    first = next(iterator)
    sampler.set_position(1, 4)
    assert [first, *iterator] == keys


def test_unshuffled_order():
    sampler = ResumableSampler(6, 2, 1, 0, 1, seed=0, shuffle=False)
    assert list(sampler) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4), (0, 5)]]


@pytest.mark.parametrize("length", [1, 3, 7, 23])
def test_tiny_data_sets_give_one_step_of_every_image(length):
    sampler = ResumableSampler(length, 4, 2, 0, 3, seed=0)
    assert sampler.shrunk
    assert sampler.steps_per_epoch == 1
    assert sampler.batch_size == -(-length // 6)
    keys = global_order(length, 4, 2, 3, epoch=1, done=0)
    assert len(keys) == sampler.global_batch == 6 * sampler.batch_size
    assert {index for _, index in keys} == set(range(length))
    sampler.set_position(1, sampler.global_batch)
    assert list(sampler) == []


def test_a_whole_number_of_steps_is_not_shrunk():
    assert not ResumableSampler(24, 4, 2, 0, 3, seed=0).shrunk
    assert ResumableSampler(24, 4, 2, 0, 3, seed=0).steps_per_epoch == 1


@pytest.mark.parametrize(
    ("length", "batch", "world"), [(10, 3, 1), (10, 3, 4), (3, 2, 4), (16, 4, 2), (17, 4, 2)]
)
def test_evaluation_reads_everything_once(length, batch, world):
    samplers = [EvalSampler(length, batch, rank, world) for rank in range(world)]
    batches = [keys for sampler in samplers for keys in sampler]
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers]
    assert sorted(key for keys in batches for key in keys) == [(0, index) for index in range(length)]
    assert all(1 <= len(keys) <= batch for keys in batches)


def test_odd_names_broken_links_and_animations(tmp_path):
    frames = [Image.new("RGB", (40, 40), color) for color in ((200, 0, 0), (0, 200, 0))]
    frames[0].save(tmp_path / "with space and ü 画像.png")
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "was_here_once.jpg")
    found = find_images(str(tmp_path))[0]
    assert len(found) == 3
    dataset = ImageFiles(found, eval_view(32), seed=0)
    samples = [dataset[(0, index)] for index in range(3)]
    failed = [text for sample in samples for text in sample["failed"]]
    assert len(failed) == 1
    assert "gone.jpg" in failed[0]
    for sample in samples:  # the link's place is taken by the next image; an animation shows its first frame
        assert sample["image"][0].mean() > 0.7
        assert sample["image"][1].mean() < 0.05

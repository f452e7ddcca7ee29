"""Reading images: what a sample depends on, broken files, and the data sets of the
stages.
"""

import json
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from refusals import user_reads
from tiny_data import build_pretraining_dataset, data_args, vqkd_dataset, write_classes, write_image

from data_pipeline import samplers
from data_pipeline.crops import TokenizerViews
from data_pipeline.files import BadFiles, collate
from data_pipeline.samplers import (
    EvalSampler,
    ResumableSampler,
    build_loader,
)
from datasets import ImageFiles
from run_class_finetuning import build_dataset as build_finetuning_dataset
from run_vqkd_training import build_held_out_dataset
from transforms import eval_view


def epoch_of(dataset, sampler, workers=0):
    return list(build_loader(dataset, sampler, workers, pin_memory=False))


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch if name != "failed")


def test_samples_depend_on_seed_epoch_and_index_alone(flat):
    dataset = build_pretraining_dataset(data_args(flat))
    sampler = ResumableSampler(len(dataset), 2, 2, 0, 1, seed=0)
    sampler.set_position(3)
    whole = epoch_of(dataset, sampler)
    assert len(whole) == 6
    assert set(whole[0]) == {"image", "tokenizer_image", "mask", "masked", "index", "failed"}
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
    other_seed = build_pretraining_dataset(data_args(flat, seed=1))
    assert not torch.equal(dataset[key]["image"], other_seed[key]["image"])


def test_augmentations_of_timm_are_seeded_too(tmp_path):
    dataset, _ = build_finetuning_dataset(data_args(write_classes(tmp_path, {"a": 3, "b": 3})), train=True)
    views = [torch.stack([dataset[epoch, 1]["image"] for epoch in range(10)]) for _ in range(2)]
    assert torch.equal(*views)
    assert views[0].std(dim=0).min() > 0


def test_reading_leaves_the_global_generators_alone(flat):
    dataset = build_pretraining_dataset(data_args(flat))
    sampler = ResumableSampler(len(dataset), 4, 1, 0, 1, seed=0)
    states = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
    epoch_of(dataset, sampler)
    epoch_of(dataset, sampler, workers=1)
    assert random.getstate() == states[0]
    assert pickle.dumps(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_data_sets_travel_to_spawned_workers(tmp_path):
    """Not every platform forks: what a loader sends to its workers must pickle."""
    args = data_args(write_classes(tmp_path, {"a": 2, "b": 2}))
    for dataset in (
        build_pretraining_dataset(args),
        vqkd_dataset(args, True),
        build_finetuning_dataset(args, True)[0],
    ):
        assert torch.equal(pickle.loads(pickle.dumps(dataset))[1, 2]["image"], dataset[1, 2]["image"])


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
    # a record counts once, however many of pytest's handlers caught it
    records = {id(record): record.getMessage() for record in caplog.records}
    assert sum("cannot read 0.jpg (broken)" in text for text in records.values()) == 1
    with user_reads(r"10 of this epoch's 950 images .*0.jpg.*check --my_data"):
        bad.add(["9.jpg (broken)"])

    bad.start_epoch(reads=1000)
    for i in range(10):
        bad.add([f"{i}.jpg (broken)"])  # exactly one percent
    # a record counts once, however many of pytest's handlers caught it
    records = {id(record): record.getMessage() for record in caplog.records}
    assert sum("cannot read 0.jpg (broken)" in text for text in records.values()) == 1
    with user_reads("11 of this epoch's 1000"):
        bad.add(["10.jpg (broken)"])

    bad.start_epoch(reads=20)
    for i in range(9):
        bad.add([f"{i}.jpg (broken)"])  # far over one percent, but under ten


def test_pretraining_dataset(flat):
    dataset = build_pretraining_dataset(data_args(flat, input_size=128))
    sample = dataset[0]
    assert sample["mask"].shape == (64,)
    assert sample["mask"].sum() == 24
    assert "label" not in sample
    assert build_pretraining_dataset(data_args(flat, num_mask_patches=5))[0]["mask"].sum() == 5
    assert len(build_pretraining_dataset(data_args(flat), held_out=str(flat / "part1"))) == 6
    with user_reads("--eval_data_path /nowhere: no such folder"):
        build_pretraining_dataset(data_args(flat), held_out="/nowhere")
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"max_mask_patches_per_block": -1}, "--max_mask_patches_per_block"),
        ({"data_set": "imagefolder"}, "unknown --data_set 'imagefolder'; did you mean image_folder"),
    ]
    for changed, sentence in mistakes:
        with user_reads(sentence):
            build_pretraining_dataset(data_args(flat, **changed))


def test_where_each_data_set_is_read_from(tmp_path, flat):
    write_classes(tmp_path / "train", {"a": 3, "b": 2})
    write_classes(tmp_path / "val", {"a": 1, "b": 1})
    imnet = data_args(tmp_path, data_set="IMNET")
    assert len(build_pretraining_dataset(imnet)) == 5
    assert len(vqkd_dataset(imnet, True)) == 5
    assert len(vqkd_dataset(imnet, False)) == 2
    assert isinstance(vqkd_dataset(imnet, True).view, TokenizerViews)
    sample = vqkd_dataset(imnet, False)[0]
    assert sample["image"].shape == (3, 64, 64)
    assert 0 <= sample["image"].min() < sample["image"].max() <= 1
    assert build_held_out_dataset(data_args(flat)) is None
    assert len(vqkd_dataset(data_args(tmp_path, eval_data_path=str(flat)), False)) == 12
    train, classes = build_finetuning_dataset(imnet, True)
    evaluation, _ = build_finetuning_dataset(imnet, False)
    assert (len(train), len(evaluation), classes) == (5, 2, 2)
    assert [evaluation[i]["label"] for i in range(2)] == [0, 1]
    (tmp_path / "index").write_text('{"class": "b", "files": ["b/00.jpg"]}')
    index = data_args(tmp_path / "train", image_folder_class_index_file=str(tmp_path / "index"))
    assert len(build_pretraining_dataset(index)) == 1


def test_validation_labels_are_those_of_training(tmp_path):
    write_classes(tmp_path / "train", {"ant": 2, "bee": 2, "cow": 2})
    write_classes(tmp_path / "val", {"cow": 1, "bee": 1})
    args = data_args(tmp_path / "train", eval_data_path=str(tmp_path / "val"), nb_classes=3)
    evaluation, classes = build_finetuning_dataset(args, train=False)
    assert classes == 3
    assert [evaluation[i]["label"] for i in range(2)] == [1, 2]
    own, classes = build_finetuning_dataset(args, train=False, own_classes=True)
    assert classes == 2
    assert [own[i]["label"] for i in range(2)] == [0, 1]

    lines = [{"class": "cow", "files": ["cow/00.jpg"]}, {"class": "bee", "files": ["bee/00.jpg"]}]
    (tmp_path / "index").write_text("\n".join(map(json.dumps, lines)))
    args = data_args(
        tmp_path / "train",
        eval_data_path=str(tmp_path / "val"),
        image_folder_class_index_file=str(tmp_path / "index"),
    )
    assert build_finetuning_dataset(args, train=True)[1] == 2
    assert build_finetuning_dataset(args, train=False)[0].labels.tolist() == [0, 1]

    write_image(tmp_path / "val" / "dodo" / "1.jpg")
    with user_reads(r"--eval_data_path .*class folder 'dodo' is not a class of the " r"training data"):
        build_finetuning_dataset(args, train=False)


def test_finetuning_mistakes(tmp_path):
    root = write_classes(tmp_path / "train", {"ant": 2, "bee": 2, "cow": 2})
    with user_reads("--nb_classes 10: the data has 3 classes"):
        build_finetuning_dataset(data_args(root, nb_classes=10), train=True)
    with user_reads("--eval_data_path is missing"):
        build_finetuning_dataset(data_args(root), train=False)
    with user_reads(r"--data_path .*val: no such folder"):
        build_finetuning_dataset(data_args(tmp_path, data_set="IMNET"), train=False)


def test_label_fraction_keeps_the_same_share_whatever_the_seed(tmp_path):
    root = write_classes(tmp_path, {"a": 10, "b": 4})
    shares = [
        build_finetuning_dataset(data_args(root, label_fraction=0.5, seed=s), train=True)[0] for s in (0, 1)
    ]
    assert shares[0].labels.tolist() == [0] * 5 + [1] * 2
    assert list(shares[0].sources) == list(shares[1].sources)


def test_cifar(tmp_path, monkeypatch):
    with user_reads(r"no CIFAR-100 below --data_path .*--download fetches it"):
        build_finetuning_dataset(data_args(tmp_path, data_set="CIFAR"), train=True)
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
    args = data_args(tmp_path, data_set="CIFAR", input_size=32, label_fraction=0.5, nb_classes=100)
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

"""Pairs of images and masks: found, read and checked; names and colors of their
classes.
"""

import logging
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import user_reads
from tiny_segmentation import CLASSES, colored, read_classes, scene, segmentation_args, write, write_pair

from errors import UserError
from run_segmentation_finetuning import build_dataset, build_evaluation_view
from runtime import distributed, terminal
from segmentation import classes as segmentation_classes
from segmentation import image_mask_pairs
from segmentation.classes import read_palette
from segmentation.image_mask_pairs import Pair, find_pairs


def palette(args, n_classes):
    return read_palette(args.palette, n_classes)


# ── where pairs are ──
def relative(pairs, root):
    return [tuple(str(Path(path).relative_to(root)) for path in pair) for pair in pairs]


@pytest.mark.parametrize("splits", [("training", "validation"), ("train", "val")])
def test_both_layouts_and_nested_folders(tmp_path, splits):
    for name in ("b", "a.2", "deep/er/c"):
        write_pair(tmp_path, name, splits[0])
    write_pair(tmp_path, "v", splits[1])
    (tmp_path / "annotations" / splits[0] / "b.png").rename(tmp_path / "annotations" / splits[0] / "b.TIF")
    found = relative(find_pairs(str(tmp_path), train=True), tmp_path)
    expected = [("a.2.png", "a.2.png"), ("b.png", "b.TIF"), ("deep/er/c.png", "deep/er/c.png")]
    assert found == [
        (f"images/{splits[0]}/{image}", f"annotations/{splits[0]}/{mask}") for image, mask in expected
    ]
    assert len(find_pairs(str(tmp_path), train=False)) == 1
    assert len(find_pairs(str(tmp_path), train=False, origin="`eval_data_path`")) == 1


def test_pairs_without_splits(tmp_path):
    write_pair(tmp_path, "x", "")
    write_pair(tmp_path, "town/y", "")
    assert len(find_pairs(str(tmp_path), train=True)) == 2
    assert len(find_pairs(str(tmp_path), train=False, origin="`eval_data_path`")) == 2
    with user_reads("no validation/ or val/, all of it is for training; --eval_data_path names"):
        find_pairs(str(tmp_path), train=False)


def test_folders_that_hold_no_pairs(tmp_path):
    with user_reads(r"^--data_path is missing: name a folder that holds images/ " r"and annotations/"):
        find_pairs("", train=True)
    with user_reads(r"--eval_data_path .*nowhere: no such folder"):
        find_pairs(str(tmp_path / "nowhere"), train=False, origin="`eval_data_path`")
    with user_reads(r"has no images/; expected are images/ and annotations/"):
        find_pairs(str(tmp_path), train=True)
    (tmp_path / "images" / "train").mkdir(parents=True)
    with user_reads(r"there is .*images/train, but no .*annotations/train with " r"the masks"):
        find_pairs(str(tmp_path), train=True)
    with user_reads(r"images/ has train/, but no validation/ or val/; " r"--eval_data_path names"):
        find_pairs(str(tmp_path), train=False)
    (tmp_path / "annotations" / "train").mkdir(parents=True)
    with user_reads(r"no images in .*images/train"):
        find_pairs(str(tmp_path), train=True)
    (tmp_path / "images" / "training").mkdir()
    with user_reads(r"images/ has both training/ and train/"):
        find_pairs(str(tmp_path), train=True)


def test_incomplete_and_ambiguous_pairs(tmp_path, caplog, monkeypatch):
    for name in "abc":
        write_pair(tmp_path, name)
    # JPEG changes labels: no mask
    (tmp_path / "annotations/train/b.png").rename(tmp_path / "annotations/train/b.jpg")
    with user_reads(
        (r"images/train/b.png: has no mask, .*annotations/train/b.png " r"\(or .*1 of 3 have none"),
    ):
        find_pairs(str(tmp_path), train=True)
    (tmp_path / "annotations/train/b.jpg").rename(tmp_path / "annotations/train/b.png")
    write(tmp_path / "images/train/c.jpg", colored(scene()))
    with user_reads(r"train/c.jpg and .*train/c.png: which belongs to the pair 'c'"):
        find_pairs(str(tmp_path), train=True)
    (tmp_path / "images/train/c.jpg").unlink()
    for name in "cb":
        (tmp_path / f"images/train/{name}.png").unlink()
    monkeypatch.setattr(terminal.log, "propagate", True)
    caplog.clear()
    assert len(find_pairs(str(tmp_path), train=True)) == 1
    assert not caplog.text
    assert len(build_dataset(segmentation_args(tmp_path), True, CLASSES)) == 1
    assert (
        len(
            {
                record
                for record in caplog.records
                if "masks without an image are not used" in record.getMessage()
            }
        )
        == 1
    )
    assert "annotations/train/b.png (in all 2)" in caplog.text


# ── classes ──
def test_names_come_from_the_list_then_ade_then_the_masks(pair_folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(terminal.log, "propagate", True)
    caplog.set_level(logging.INFO, "beit")
    pairs = find_pairs(str(pair_folder), train=True)
    assert read_classes(segmentation_args(pair_folder), pairs) == ["class 0", "class 1", "class 2", "class 3"]
    assert len({record for record in caplog.records if "looking through 5 masks" in record.getMessage()}) == 1
    assert read_classes(segmentation_args(pair_folder, reduce_zero_label=True), pairs) == [
        "class 0",
        "class 1",
        "class 2",
    ]
    caplog.clear()
    assert read_classes(segmentation_args(pair_folder, nb_classes=7), pairs) == [
        f"class {i}" for i in range(7)
    ]
    table = (
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t11664\t1172\twall\n22 \t0.1\t6\t6\tbed "
        "\n3\t0.1\t1\t2\tbuilding, edifice\n"
    )
    (tmp_path / "objectInfo150.txt").write_text(table)
    assert read_classes(segmentation_args(tmp_path, reduce_zero_label=True), pairs) == [
        "wall",
        "bed",
        "building",
    ]
    with user_reads(r"objectInfo150.txt: its first class is label 1.*add " r"--reduce_zero_label"):
        read_classes(segmentation_args(tmp_path), pairs)
    (tmp_path / "names").write_text("\ufeffsky\r\n\n grass \nblue sun\n", encoding="utf-8")
    named = segmentation_args(tmp_path, class_names=str(tmp_path / "names"))
    assert read_classes(named, pairs) == ["sky", "grass", "blue sun"]
    assert not caplog.text
    with user_reads(r"--nb_classes 4: --class_names .*names names 3 classes"):
        read_classes(Namespace(**vars(named) | {"nb_classes": 4}), pairs)
    assert len(read_classes(Namespace(**vars(named) | {"nb_classes": 3}), pairs)) == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read"),
        ("\n \n", "is empty"),
        ("a\nb\na\n", "'a' is there twice"),
        ("a\n", "2 classes at least are needed, here are 1"),
        ("\n".join(map(str, range(256))), "256 classes; at most 255 fit"),
    ],
)
def test_class_names_that_will_not_do(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "names").write_text(text)
    with user_reads(f"--class_names .*names: .*{sentence}"):
        read_classes(segmentation_args(tmp_path, class_names=str(tmp_path / "names")), [])


def test_numbers_of_classes_that_will_not_do(tmp_path):
    for count in (-1, 1, 256):
        with user_reads(f"--nb_classes {count}: "):
            read_classes(segmentation_args(tmp_path, nb_classes=count), [])
    assert len(read_classes(segmentation_args(tmp_path, nb_classes=255), [])) == 255
    binary = write_pair(tmp_path, labels=(scene() > 2).astype(np.uint8), add=0)
    write(binary, ((scene() > 2) * 255).astype(np.uint8))
    with user_reads(r"the 1 masks, such as .*a.png: 2 classes at least .*255 is ignored"):
        read_classes(segmentation_args(tmp_path), find_pairs(str(tmp_path), True))
    write(binary, scene().astype(np.uint16) * 300)
    with user_reads(r"a.png: 901 classes; at most 255"):
        read_classes(segmentation_args(tmp_path), find_pairs(str(tmp_path), True))
    write(binary, colored(scene()))
    with user_reads(r"annotations/train/a.png: its pixels are RGB, not numbers of " r"classes"):
        read_classes(segmentation_args(tmp_path), find_pairs(str(tmp_path), True))


def test_ranks_share_the_looking_and_its_error(pair_folder, tmp_path, monkeypatch):
    pairs = find_pairs(str(pair_folder), train=True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    seen: list[str] = []
    look = segmentation_classes.highest_label
    monkeypatch.setattr(
        segmentation_classes,
        "highest_label",
        lambda mask, path, reduce: seen.append(path) or look(mask, path, reduce),
    )
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [8, value])
    assert len(read_classes(segmentation_args(pair_folder), pairs)) == 9
    assert sorted(seen) == [pair.mask for pair in pairs[1::2]]
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [UserError("rank 0 found it"), value])
    with user_reads("rank 0 found it"):
        read_classes(segmentation_args(pair_folder), pairs)


def test_palette(tmp_path):
    colors = palette(segmentation_args(tmp_path), 255)
    assert colors.shape == (255, 3) and colors.dtype == torch.float32
    assert len(colors.unique(dim=0)) == 255
    assert torch.equal(palette(segmentation_args(tmp_path), 20), colors[:20])
    assert torch.pdist(colors[:20]).min() > 0.25  # no two alike
    assert torch.pdist(colors).min() > 0.1
    file = tmp_path / "colors"
    own = segmentation_args(tmp_path, palette=str(file))
    file.write_text("\ufeff0 0 0\n\n255 51 0\n", encoding="utf-8")
    torch.testing.assert_close(palette(own, 2), torch.tensor([[0, 0, 0], [1, 0.2, 0]]))
    with user_reads(r"--palette .*colors: 2 colors for 3 classes"):
        palette(own, 3)
    for line in ("1 2", "1 2 256", "red", "1 2 -3", "1, 2, 3"):
        file.write_text(f"0 0 0\n{line}\n")
        with user_reads(f"color 2: '{line}'; red, green and blue are expected, each 0 to 255"):
            palette(own, 2)
    file.unlink()
    with user_reads("cannot be read"):
        palette(own, 2)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"scale_range": [2.0, 0.5]}, "--scale_range 2.0 0.5: give the smallest"),
        ({"scale_range": [0.0, 0.5]}, "--scale_range 0.0 0.5"),
        ({"max_class_share": 0.0}, "--max_class_share 0.0"),
        ({"max_class_share": 1.5}, "--max_class_share 1.5"),
        ({"hflip": 1.5}, "--hflip 1.5: give a probability"),
    ],
)
def test_flags_that_will_not_do(pair_folder, flags, sentence):
    with user_reads(sentence):
        build_dataset(segmentation_args(pair_folder, **flags), True, CLASSES)


def test_many_names_in_one_array(tmp_path):
    """Names that are no UTF-8 and of different lengths come back as they were."""
    pairs = [Pair(f"/x/{name}.jpg", f"/y/{name}.png") for name in ("a", "long name \udcff", "ü 画像")]
    view = build_evaluation_view(segmentation_args(tmp_path))
    dataset = image_mask_pairs.SegmentationFiles(pairs, view, CLASSES, ((0.5,) * 3, (0.5,) * 3))
    assert [dataset.pair(index) for index in range(3)] == pairs

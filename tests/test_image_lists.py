"""Which images there are: folders, class folders, class index files, and shares of
them.
"""

import hashlib
import json
import os
import random
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from refusals import user_reads
from tiny_data import data_args, write_classes, write_image

from data_pipeline import samplers
from data_pipeline.image_lists import (
    find_classes_folder,
    find_images,
    read_class_index,
    take_class_balanced_share,
)
from datasets import ImageFiles, ImageSource, find_held_out, find_labeled, find_unlabeled
from run_class_finetuning import build_dataset as build_finetuning_dataset
from runtime.terminal import log_once
from transforms import eval_view


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


# Names around the "/" of a folder: "a-1" and "a.jpg" come before "a/...", "a0" behind it.
TRICKY = ["a.jpg", "a-1/x.jpg", "a/b.jpg", "a/b/c.jpg", "a/b-1.jpg", "a/b0.jpg", "a0.jpg", "b.jpg", "ü/é.jpg"]


def test_order_and_digest_of_a_folder(tmp_path):
    """The order is that of the whole paths, and the digest, by which a checkpoint knows
    its images, is of paths and labels alone.
    """
    names = [*TRICKY, os.fsdecode(b"a/latin\xe9.jpg"), os.fsdecode(b"\xff.jpg")]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    root = str(tmp_path)
    expected = sorted(os.path.join(root, name) for name in names)
    found = find_images(root)[0]
    assert [path for path, _ in found] == expected == [found[index][0] for index in range(len(names))]
    assert [path for path, _ in found[2:5]] == expected[2:5] and found[-1] == (expected[-1], None)
    content = b"".join(os.fsencode(os.path.relpath(path, root)) + b"\0" for path in expected)
    dataset = ImageFiles(found, eval_view(32))
    assert dataset.digest(root) == hashlib.blake2b(content, digest_size=16).hexdigest()
    labeled, classes = find_classes_folder(root)
    below = [path for path in expected if os.sep in os.path.relpath(path, root)]
    labels = [sorted(classes).index(os.path.relpath(path, root).split(os.sep)[0]) for path in below]
    assert sorted(labeled) == list(zip(below, labels, strict=True))
    content = b"".join(os.fsencode(os.path.relpath(path, root)) + b"\0" for path, _ in labeled)
    content += np.array([label for _, label in labeled], dtype=np.int64).tobytes() + b"\0"
    expected_digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    assert ImageFiles(labeled, eval_view(32)).digest(root) == expected_digest
    assert ImageFiles(list(labeled), eval_view(32)).digest(root) == expected_digest


def test_memory_of_a_long_list(tmp_path):
    """A million paths of 50 letters take less than 70 MB, and 200 while they are found,
    whatever the longest is.
    """
    for folder in range(10):
        (tmp_path / f"n{folder:08}").mkdir()
        for number in range(1000):
            (tmp_path / f"n{folder:08}" / f"n{folder:08}_{number}.JPEG").touch()
    (tmp_path / "n00000003" / f"{'x' * 240}.JPEG").touch()
    find_classes_folder(str(tmp_path))  # what is made once
    length = len(str(tmp_path / "n00000000" / "n00000000_100.JPEG"))
    for find in (find_images, find_classes_folder):
        tracemalloc.start()
        dataset = ImageFiles(find(str(tmp_path))[0], eval_view(32))
        now, peak = (size / len(dataset) for size in tracemalloc.get_traced_memory())
        tracemalloc.stop()
        assert now < length + 20 and peak < 2 * length + 100


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
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "0.npy").write_bytes(b"")
    with user_reads("no images in this folder .*; .npy only where --in_chans or --image_range says"):
        find_images(str(tmp_path / "scenes"))
    (tmp_path / "scenes" / "0.npy").rename(tmp_path / "0.npy")
    (tmp_path / "scenes").rmdir()
    write_image(tmp_path / "cats" / "1.jpg")
    (tmp_path / "dogs").mkdir()
    with user_reads(r"class folder 'dogs' has no images \(accepted: [^;]*\)"):
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
    assert "(accepted: .jpg" in caplog.text
    caplog.clear()
    write_classes(tmp_path / "loose", {"a": 1, "b": 1})
    write_image(tmp_path / "loose" / "x.jpg")
    find_classes_folder(str(tmp_path / "loose"))
    assert "1 beside the class folders" in caplog.text and "accepted" not in caplog.text


FINDERS = {
    "unlabeled": lambda source: [find_unlabeled(source, train) for train in (True, False)],
    "labeled": lambda source: [find_labeled(source, train) for train in (True, False)],
    "held out": find_held_out,
}


@pytest.mark.parametrize("find", FINDERS.values(), ids=FINDERS)
def test_figures_of_training_images_are_warned_of(find, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(samplers.log, "propagate", True)
    caplog.set_level("INFO", "beit")
    write_classes(tmp_path / "data", {"a": 1, "b": 1})
    write_classes(tmp_path / "new", {"a": 1, "b": 1})
    for held_out, warned in (("new", False), ("data/a/..", True)):
        source = ImageSource(str(tmp_path / "data"), str(tmp_path / held_out))
        log_once.cache_clear()
        find(source)
        assert ("figures are of images that were trained on" in caplog.text) is warned


def test_links_do_not_label_images_of_other_classes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(samplers.log, "propagate", True)
    caplog.set_level("INFO", "beit")
    root = tmp_path / "data"
    write_classes(root, {"a": 2, "b": 2, "b/deep": 1, "c": 1})
    write_image(tmp_path / "elsewhere" / "x.jpg")
    for link, target in (
        ("a/up", ".."),
        ("a/higher", "../.."),
        ("a/other", "../b"),
        ("a/inside", "../b/deep"),
        ("a/me", "."),
        ("a/more", "../../elsewhere"),
        ("me", "."),
        ("up", ".."),
    ):
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
        build_finetuning_dataset(data_args(root), train=True)
    with user_reads("has one class folder, 'photos'; two classes at least"):
        build_finetuning_dataset(data_args(tmp_path), train=True)
    (tmp_path / "index.jsonl").write_text('{"class": "a", "files": ["a/00.jpg"]}')
    with user_reads("--data_path: has one class, 'a'"):
        build_finetuning_dataset(
            data_args(root / "train", image_folder_class_index_file=str(tmp_path / "index.jsonl")), train=True
        )
    build_finetuning_dataset(data_args(root / "train"), train=True)
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
        ('{"class": "a", "files": ["' + "\\ud800" + '.jpg"]}', "has a name that is not text"),
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

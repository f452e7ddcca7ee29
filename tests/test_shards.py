"""Tar shards: what is found in them, their index, plain words for what is wrong."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from refusals import user_reads
from tiny_data import data_args, shard_pattern, write_image

import run_class_finetuning
from data_pipeline import shard_index, shards
from data_pipeline.image_lists import EXTENSIONS, find_shards
from data_pipeline.pixel_format import measure_pixels
from datasets import open_evenly
from run_class_finetuning import build_dataset as build_finetuning_dataset
from run_vqkd_training import build_dataset as build_vqkd_dataset


def write_tar(path, members, **how):
    with tarfile.open(path, "w", **how) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def jpeg(tmp_path, seed=0):
    return Path(write_image(tmp_path / f"{seed}.jpg", seed)).read_bytes()


def test_shards_hold_each_file_once_unchanged_with_its_label(shard_photos, packed):
    members, classes = find_shards(shard_pattern(packed))
    assert classes == ["a", "b"]
    assert members.count_by_shard() == [5, 5, 5, 5, 4]
    inside = sorted((member.read().getvalue(), label) for member, label in members)
    assert inside == sorted(
        (path.read_bytes(), "ab".index(path.parent.name)) for path in shard_photos.rglob("*.jpg")
    )
    # shuffled: a shard is a sample of all
    assert [label for _, label in members] != sorted(label for _, label in members)


def test_the_webdataset_library_reads_what_we_wrote(packed):
    import webdataset

    samples = list(webdataset.WebDataset(shard_pattern(packed), shardshuffle=False))
    members, _ = find_shards(shard_pattern(packed))
    assert [(sample["jpg"], int(sample["cls"])) for sample in samples] == [
        (member.read().getvalue(), label) for member, label in members
    ]


@pytest.mark.parametrize("kind", ["braces", "folder", "list", "stars"])
def test_ways_to_name_shards(kind, packed):
    names = [str(packed / f"00000{i}.tar") for i in range(5)]
    text = {
        "braces": shard_pattern(packed),
        "folder": str(packed),
        "list": "::".join(names),
        "stars": f"{packed}/*.tar",
    }[kind]
    assert shards.find_shards(text, "--data_path") == names


def test_foreign_shards_with_long_names_and_more_kinds(tmp_path):
    one, two = jpeg(tmp_path, 1), jpeg(tmp_path, 2)
    members = [
        ("deep/" * 40 + "x.jpg", one),  # longer than a header: its own record in the tar file
        ("no_image.cls", b"3"),
        ("y.seg.png", b"not ours"),
        ("y.cls", b"1\n"),
        ("y.JPEG", two),
        ("y.png", b"a second image of the same sample"),
        (".hidden.jpg", one),
    ]
    for how in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = write_tar(tmp_path / f"{how}.tar", members, format=how)
        index = shard_index.scan(path, EXTENSIONS)
        found = [shards.Member(path, *place).read().getvalue() for place in index.places.tolist()]
        assert found == [one, two]
        assert index.labels.tolist() == [-1, 1]
    with user_reads(r"x\.jpg has no label \(\.cls\)|deep.* has no label"):
        shards.list_members([path], EXTENSIONS, "--data_path")


def test_class_numbers_without_names_and_names_in_another_order(tmp_path):
    for name, labels in (("train", (0, 2, 1)), ("val", (2, 0))):
        (tmp_path / name).mkdir()
        members = [(f"{i}.{kind}", data) for i, label in enumerate(labels)
                   for kind, data in (("jpg", jpeg(tmp_path, i)), ("cls", str(label).encode()))]  # fmt: skip
        write_tar(tmp_path / name / "0.tar", members)
    flags = data_args(tmp_path / "train", eval_data_path=str(tmp_path / "val"), data_set="webdataset")
    train, count = build_finetuning_dataset(flags, train=True)
    assert (count, train.classes, train.labels.tolist()) == (3, ["0", "1", "2"], [0, 2, 1])
    assert build_finetuning_dataset(flags, train=False)[0].labels.tolist() == [2, 0]
    (tmp_path / "train" / "classes.txt").write_text("cat\ndog\nowl\n")
    (tmp_path / "val" / "classes.txt").write_text("owl\nfox\ncat\n")
    with user_reads("class 'fox' is not a class of the training data"):
        build_finetuning_dataset(flags, train=False)
    (tmp_path / "val" / "classes.txt").write_text("owl\ndog\ncat\n")
    assert build_finetuning_dataset(flags, train=False)[0].labels.tolist() == [0, 2]
    half = data_args(tmp_path / "train", data_set="webdataset", label_fraction=0.5)
    assert len(build_finetuning_dataset(half, train=True)[0]) == 3  # at least one image per class


def test_an_index_saves_reading_and_must_be_the_shards_own(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(tmp_path, 1)), ("b.jpg", jpeg(tmp_path, 2))])
    first = shard_index.load_index(path, EXTENSIONS)
    scans = []
    monkeypatch.setattr(
        shard_index, "scan", lambda *asked, scan=shard_index.scan: scans.append(asked) or scan(*asked)
    )
    assert shard_index.load_index(path, EXTENSIONS).places.tolist() == first.places.tolist()
    assert not scans
    length = os.path.getsize(path)
    write_tar(path, [("c.jpg", jpeg(tmp_path, 1)), ("d.jpg", jpeg(tmp_path, 2))])  # of the same length
    assert os.path.getsize(path) == length
    shard_index.load_index(path, EXTENSIONS)
    assert len(scans) == 1
    Path(path + shard_index.INDEX).write_bytes(b"half an ind")
    assert shard_index.load_index(path, EXTENSIONS).places.tolist() == first.places.tolist()
    assert len(scans) == 2


def test_a_folder_that_cannot_be_written_to_is_scanned_each_time(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(tmp_path, 1))])
    monkeypatch.setattr(shard_index.np, "savez", refuse)
    assert len(shard_index.load_index(path, EXTENSIONS).labels) == 1
    assert [file.name for file in tmp_path.glob("0.tar*")] == ["0.tar"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}/{{000000..000006}}.tar", r"--data_path .*000005\.tar and 1 more of 7 shards are missing"),
        ("{}/000009.tar", r"000009\.tar of 1 shards is missing"),
        ("https://host/{{0..3}}.tar", "read from disks only"),
        ("pipe:cat {}/000000.tar", "read from disks only"),
        ("{}/{{000000..0000.tar", "[Uu]nbalanced braces"),
        ("{}/00000[89].tar", "no file is called"),
        ("{0}::{0}/000001.tar", r"000001\.tar is named twice"),
        ("{}/classes.txt", "is not a complete tar file"),
    ],
)
def test_plain_words_for_shards_that_cannot_be_read(text, message, packed):
    with user_reads(message):
        find_shards(text.format(packed))


def test_plain_words_for_what_is_in_shards(packed, shard_photos, tmp_path):
    whole = (packed / "000000.tar").read_bytes()
    third = shard_index.scan(str(packed / "000000.tar"), EXTENSIONS).places[2, 0]
    # not at a block's end, within an image, between two samples
    for cut in (3000, third + 100, third - 3 * tarfile.BLOCKSIZE):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with user_reads(r"cut\.tar is not a complete tar file .*; write or copy it again"):
            find_shards(str(tmp_path / "cut.tar"))
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "a.tar.gz"): "is compressed",
        str(tmp_path / "empty"): "no .tar files in this folder",
        write_tar(tmp_path / "text.tar", [("a.txt", b"hello")]): "no images in these 1 shards",
        write_tar(
            tmp_path / "named.tar", [("a.jpg", b"x"), ("a.cls", b"cat")]
        ): r"a\.cls holds b'cat'; a class number",
    }
    for text, message in cases.items():
        with user_reads(message):
            find_shards(text)
    unlabeled = write_tar(tmp_path / "unlabeled.tar", [("a.jpg", b"x")])
    with user_reads(r"have no labels; scripts/make_shards\.py --classes"):
        build_finetuning_dataset(data_args(unlabeled, data_set="webdataset"), train=True)
    with user_reads("--image_folder_class_index_file lists files of a folder"):
        build_vqkd_dataset(data_args(packed, data_set="webdataset", image_folder_class_index_file="x"))


def test_images_that_are_not_taken_are_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("runtime.terminal.log.propagate", True)
    caplog.set_level("INFO", "beit")
    image = jpeg(tmp_path)
    names = ["00.jpg", "IMG_1.2021.jpg", "IMG_2.2021.jpg", "01.jpg", "01.png", "01.json"]
    path = write_tar(tmp_path / "0.tar", [(name, image) for name in names])
    for _ in range(2):  # also from the index
        assert len(find_shards(path)[0]) == 2
    assert f"{path}: 3 images, since a name ends at its first dot" in caplog.text
    with user_reads(r"no images in these 1 shards .*behind the first dot of a name"):
        find_shards(write_tar(tmp_path / "1.tar", [("a.b.jpg", image)]))


@pytest.mark.parametrize("number", ["1000000", "100000000", "1" + "0" * 12, "1" + "0" * 60, "-1", "1_0", "١"])
def test_a_class_number_is_one(number, tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(tmp_path)), ("a.cls", number.encode())])
    with user_reads(r"0\.tar: a\.cls holds .*; a class number from 0 to 999,999 " r"is expected"):
        find_shards(path)


def test_names_of_classes_that_are_no_text(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(tmp_path)), ("a.cls", b"0")])
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with user_reads(r"classes\.txt: cannot be read .*in UTF-8, is expected"):
        find_shards(path)


def test_a_label_beyond_all_images_is_refused_without_names(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(tmp_path)), ("a.cls", b"7")])
    flags = ["--data_path", str(tmp_path), "--data_set", "webdataset"]
    args = run_class_finetuning.get_parser().parse_args(flags)
    with user_reads(r"a label is 7, but there are 1 images, and no classes\.txt"):
        build_finetuning_dataset(args, train=True)
    args = run_class_finetuning.get_parser().parse_args([*flags, "--nb_classes", "8"])
    build_finetuning_dataset(args, train=True)


@pytest.mark.parametrize(("text", "what"), [("", "holds no names"), ("a\nb\na\n", "names 'a' twice")])
def test_names_of_classes_that_name_none_or_one_twice(text, what, tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(tmp_path)), ("a.cls", b"0")])
    (tmp_path / "classes.txt").write_text(text)
    with user_reads(rf"classes\.txt {what}"):
        find_shards(path, classes=["a", "b"])


def spoil(kind, shard, index):
    content = dict(np.load(index))
    if kind == "truncated":
        index.write_bytes(b"PK\x03\x04 half of an index")
    elif kind == "time":  # rewritten in place, as long as before, with the same first, middle and last image
        os.utime(shard, ns=(1, 1))
    elif kind == "pipe":
        index.unlink()
        os.mkfifo(index)
    else:
        content[kind] = content[kind] + 1
        np.savez(index, **content)


@pytest.mark.parametrize("kind", ["truncated", "time", "pipe", "places", "labels", "left_out", "numbers"])
def test_an_index_that_contradicts_its_shard_is_made_anew(kind, tmp_path):
    members = [
        (f"{i}.{end}", data)
        for i in range(8)
        for end, data in (("jpg", jpeg(tmp_path, i)), ("cls", b"%d" % i))
    ]
    path = Path(write_tar(tmp_path / "0.tar", members))
    first = shard_index.load_index(str(path), EXTENSIONS)
    spoil(kind, path, Path(f"{path}{shard_index.INDEX}"))
    again = shard_index.load_index(str(path), EXTENSIONS)
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    kept = np.load(f"{path}{shard_index.INDEX}")
    assert kept["labels"].tolist() == list(range(8)) and kept["mark"][2] == path.stat().st_mtime_ns


def test_an_image_that_does_not_decode_is_named_and_replaced(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", b"no image"), ("b.jpg", jpeg(tmp_path, 2))])
    sample = build_vqkd_dataset(data_args(path, data_set="webdataset"))[0, 0]
    assert sample["failed"] == [f"{path}/a.jpg (not an image)"]
    assert "image" in sample


def test_a_sample_of_shards_names_what_it_cannot_read(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", b"no image")])
    with user_reads(r"no image of a sample of 1 could be read: .*0\.tar/a\.jpg: not an image"):
        measure_pixels(open_evenly(find_shards(path)[0], 9), 3, None, auto=True)

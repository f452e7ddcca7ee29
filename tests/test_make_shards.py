"""scripts/make_shards.py: what it packs, arrays too, and what it refuses."""

import os

import numpy as np
import pytest
import tifffile
from refusals import user_reads
from tiny_channels import four_channels
from tiny_data import write_image

from data_pipeline import shard_index
from data_pipeline.array_files import ARRAY_EXTENSIONS
from data_pipeline.image_lists import find_images, find_shards
from data_pipeline.pixel_format import PixelFormat, load_pixels, measure_pixels
from datasets import open_evenly


@pytest.mark.parametrize("name", ["two\nlines", "\udcff", " "])
def test_make_shards_refuses_class_names_that_are_no_text(name, make_shards, tmp_path, capsys):
    write_image(tmp_path / "data" / "a" / "0.jpg")
    os.makedirs(tmp_path / "data" / name)
    write_image(tmp_path / "data" / name / "0.jpg")
    with pytest.raises(SystemExit):
        make_shards([str(tmp_path / "data"), str(tmp_path / "out"), "--images_per_shard", "5", "--classes"])
    assert "is not a line of text, which classes.txt is to hold: rename it" in capsys.readouterr().err


def test_make_shards_does_not_wait_for_a_pipe(make_shards, tmp_path, capsys):
    write_image(tmp_path / "data" / "0.jpg")
    os.mkfifo(tmp_path / "data" / "1.jpg")
    with pytest.raises(SystemExit):
        make_shards([str(tmp_path / "data"), str(tmp_path / "out"), "--images_per_shard", "5"])
    assert "1.jpg cannot be read (a pipe, socket or device, no regular file)" in capsys.readouterr().err


def test_make_shards_refuses_and_leaves_nothing_half(
    shard_photos, packed, make_shards, tmp_path, capsys, monkeypatch
):
    for words, message in (
        ([shard_photos, packed], "has shards already"),
        ([tmp_path / "none", tmp_path / "out"], "no such folder"),
        ([shard_photos, shard_photos / "a" / "0.jpg"], "cannot be made"),
    ):
        with pytest.raises(SystemExit):
            make_shards([*map(str, words), "--images_per_shard", "5"])
        assert message in capsys.readouterr().err
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(SystemExit):
        make_shards([str(shard_photos), str(tmp_path / "full"), "--images_per_shard", "5"])
    assert "No space left" in capsys.readouterr().err
    assert list((tmp_path / "full").iterdir()) == []


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Sixteen images of four channels in two classes: .npy, TIFF, and a TIFF of floats."""
    folder = four_channels(tmp_path_factory.mktemp("scenes"))
    first = folder / "a" / "1.tif"
    tifffile.imwrite(first, tifffile.imread(first).astype("float32") + 0.25)
    return folder


@pytest.fixture(scope="module")
def packed_scenes(scenes, make_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed_scenes")
    make_shards([str(scenes), str(out), "--images_per_shard", "5", "--classes", "--seed", "3"])
    return out


def test_arrays_and_float_tiffs_are_packed_byte_by_byte(scenes, packed_scenes, monkeypatch):
    def unexpected(*_):
        raise AssertionError("the index that make_shards wrote is not used")

    monkeypatch.setattr(shard_index, "scan", unexpected)
    members, classes = find_shards(str(packed_scenes), endings=ARRAY_EXTENSIONS)
    assert classes == ["a", "b"]
    files = sorted(path for path in scenes.rglob("*.*"))
    in_order = [(member.read().getvalue(), label) for member, label in members.in_folder_order()]
    assert in_order == [(path.read_bytes(), "ab".index(path.parent.name)) for path in files]
    assert [member.read().getvalue() for member, _ in members] != [content for content, _ in in_order]
    pixels = PixelFormat(4, (0.0, 4095.0))
    for (member, _), path in zip(members.in_folder_order(), files, strict=True):
        assert load_pixels(member.read(), pixels).equal(load_pixels(str(path), pixels))


def test_arrays_in_shards_are_images_where_they_are_asked_for(packed_scenes, make_shards, tmp_path, capsys):
    assert len(find_shards(str(packed_scenes))[0]) == 8  # as in a folder: the TIFFs
    np.save(tmp_path / "x.npy", np.zeros((4, 4, 2)))
    make_shards([str(tmp_path), str(tmp_path / "out"), "--images_per_shard", "5"])
    assert "1 images (1 of them arrays: add --in_chans or --image_range)" in capsys.readouterr().out
    with user_reads("no images in these 1 shards"):
        find_shards(str(tmp_path / "out"))


@pytest.mark.parametrize("count", [3, 5, 16, 256])
def test_a_sample_of_shards_is_that_of_the_folder(count, scenes, packed_scenes):
    """So that what `auto` measures is the same."""
    members = find_shards(str(packed_scenes), endings=ARRAY_EXTENSIONS)[0].with_labels(None)
    files, _ = find_images(str(scenes), endings=ARRAY_EXTENSIONS)
    of_shards, of_files = (measure_pixels(open_evenly(s, count), 4, None, True) for s in (members, files))
    assert of_shards == of_files and of_files.files == min(count, 16)

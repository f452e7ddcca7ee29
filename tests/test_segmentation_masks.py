"""Masks of every kind: read as labels, or refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import user_reads
from tiny_segmentation import (
    CLASSES,
    COLORS,
    colored,
    evaluation,
    read_classes,
    scene,
    segmentation_args,
    write,
    write_pair,
)

from data_pipeline.image_formats import load_image
from data_pipeline.samplers import EvalSampler, build_loader
from errors import report_user_errors
from run_segmentation_finetuning import build_dataset
from segmentation.image_mask_pairs import find_pairs
from segmentation.joint_views import IGNORED
from segmentation.mask_files import read_mask


# ── masks ──
def gray_png_of_few_bits(labels, bits):
    """PIL writes no such file."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = labels.shape
    digits = (labels[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(digits.reshape(height, -1), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def as_palette(labels):
    picture = Image.fromarray(labels)
    picture.putpalette(np.random.RandomState(0).bytes(768))
    return picture


@pytest.mark.parametrize(
    "kind", ["L", "16 bits", "palette", "palette of 2 bits", "2 bits", "4 bits", "tif", "bmp", "bmp palette"]
)
def test_kinds_of_masks(tmp_path, kind):
    labels = scene()
    mask = write_pair(tmp_path)
    if kind in ("tif", "bmp"):
        mask.unlink()
        mask = write(mask.with_suffix(f".{kind}"), as_palette(labels) if kind == "bmp" else labels)
    elif kind == "16 bits":
        write(mask, labels.astype(np.uint16))
    elif "palette" in kind:
        write(mask, as_palette(labels), **({"bits": 2} if "2" in kind else {}))
    elif "bits" in kind:
        mask.write_bytes(gray_png_of_few_bits(labels, int(kind[0])))
    dataset = build_dataset(segmentation_args(tmp_path), True, CLASSES)
    assert dataset.pair(0).mask == str(mask)
    assert np.array_equal(np.asarray(read_mask(str(mask))), labels)
    assert set(dataset[0]["label"].unique().tolist()) <= {0, 1, 2, 3, IGNORED}
    assert read_classes(segmentation_args(tmp_path), find_pairs(str(tmp_path), True)) == [
        f"class {i}" for i in range(4)
    ]


def one_bit(tmp_path):
    mask = write_pair(tmp_path, split="")
    write(mask, Image.fromarray(scene() > 1))
    return mask


def test_masks_of_one_bit(tmp_path):
    one_bit(tmp_path)
    assert read_classes(segmentation_args(tmp_path), find_pairs(str(tmp_path), True)) == [
        "class 0",
        "class 1",
    ]
    assert np.array_equal(evaluation(tmp_path)[0]["label"], scene() > 1)


def test_label_zero_can_be_left_out(tmp_path):
    labels = scene()
    labels[:5] = IGNORED
    mask = write_pair(tmp_path, split="", labels=scene())
    for written in (labels, labels.astype(np.uint16)):
        write(mask, written)
        expected = torch.from_numpy(labels).long()
        assert torch.equal(evaluation(tmp_path)[0]["label"].long(), expected)
        left_out = torch.where(
            expected == 0, IGNORED, torch.where(expected == IGNORED, IGNORED, expected - 1)
        )
        assert torch.equal(
            evaluation(tmp_path, CLASSES[1:], reduce_zero_label=True)[0]["label"].long(), left_out
        )


@pytest.mark.parametrize(
    ("picture", "flags", "sentence"),
    [
        (
            scene() + 4,
            {},
            r"label 7, but 4 classes are labels 0 to 3, and 255 is ignored; correct --nb_classes "
            r".*reduce_zero_label",
        ),
        (
            scene() + 2,
            {"reduce_zero_label": True},
            r"label 5, but --reduce_zero_label makes labels 1 to 4 the 4 " r"classes",
        ),
        (scene().astype(np.uint16) + 256, {"reduce_zero_label": True}, "label 259, but"),
        (scene() + 251, {}, "label 254, but"),  # 255, the house, is ignored
        (scene()[:-1], {}, r"120 x 79 pixels, but its image .*images/a.png has 120 x 80"),
        (np.rot90(scene()).copy(), {}, r"80 x 120 pixels, but its image .*images/a.png has 120 x 80"),
        (colored(scene()), {}, "its pixels are RGB, not numbers of classes; a mask is expected to be gray"),
        (colored(scene()).convert("RGBA"), {}, "its pixels are RGBA"),
        (Image.fromarray(scene()).convert("LA"), {}, "its pixels are LA"),
    ],
)
def test_masks_that_are_refused(tmp_path, picture, flags, sentence):
    write(write_pair(tmp_path, split=""), picture)
    for dataset in (
        evaluation(tmp_path, **flags),
        build_dataset(segmentation_args(tmp_path, **flags), True, CLASSES),
    ):
        with user_reads(rf"annotations/a.png: {sentence}"):
            dataset[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_the_user_reads_the_sentence_alone(tmp_path, capsys, workers, train):
    """A worker's exception arrives with its traceback in its text."""
    for name in "abcd":
        write_pair(tmp_path, name, split="", add=5)
    dataset = build_dataset(segmentation_args(tmp_path), True, CLASSES) if train else evaluation(tmp_path)

    @report_user_errors
    def main():
        for _ in build_loader(dataset, EvalSampler(4, 1, 0, 1), workers, pin_memory=False):
            raise AssertionError("a batch")

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    out, err = capsys.readouterr()
    mask = tmp_path / "annotations" / "a.png"
    assert not out
    assert err.startswith(f"error: {mask}: label 8, but 4 classes are labels 0 to 3")
    assert err.count("\n") == 1 and "Traceback" not in err and "UserError" not in err


# ── images on their side ──
@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_of_images_that_exif_turns(tmp_path, orientation):
    """Drawn on what is shown, or, if the sizes say so, on the pixels as they are
    stored.
    """
    from PIL import ImageOps

    labels = scene()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = write(tmp_path / "images" / "a.png", colored(labels), exif=exif)
    mask = Image.fromarray(labels)
    mask.getexif()[0x0112] = orientation
    shown = ImageOps.exif_transpose(mask)
    expected = np.asarray(shown)
    assert np.array_equal(np.asarray(load_image(str(image))), COLORS[expected])
    write(tmp_path / "annotations" / "a.png", np.asarray(shown).copy())
    sample = evaluation(tmp_path, base_size=80)[0]
    assert np.array_equal(sample["label"], expected)
    if orientation >= 5:
        write(tmp_path / "annotations" / "a.png", labels)
        sample = evaluation(tmp_path, base_size=80)[0]
        assert np.array_equal(sample["label"], expected)
        assert np.array_equal(sample["image"].permute(1, 2, 0), COLORS[expected])
        write(tmp_path / "annotations" / "a.png", labels[1:])
        with user_reads(r"120 x 79 pixels, but its image .*a.png has 80 x 120"):
            evaluation(tmp_path)[0]

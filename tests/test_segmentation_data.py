"""Pairs of images and masks: found, read, checked, and augmented alike."""

import logging
import pickle
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import user_reads

from data_pipeline.image_formats import load_image
from data_pipeline.samplers import EvalSampler, ResumableSampler, build_loader
from errors import UserError, report_user_errors
from run_segmentation_finetuning import build_dataset, build_evaluation_view, class_settings
from runtime import distributed, terminal
from segmentation import classes as segmentation_classes
from segmentation import image_mask_pairs
from segmentation.classes import find_classes, read_palette
from segmentation.image_mask_pairs import Pair, find_pairs
from segmentation.joint_views import IGNORED, TrainingView, distorted, fitted, largest_share
from segmentation.mask_files import read_mask

CLASSES = ["sky", "grass", "sun", "house"]
# of the labels, in images
COLORS = np.array([[40, 80, 220], [60, 200, 40], [230, 210, 40], [180, 40, 30]], np.uint8)


def arguments(root, **changed):
    flags: dict[str, Any] = {
        "data_path": str(root),
        "eval_data_path": "",
        "input_size": 64,
        "base_size": None,
        "nb_classes": 0,
        "class_names": None,
        "palette": None,
        "reduce_zero_label": False,
        "max_class_share": 0.75,
        "scale_range": [0.5, 2.0],
        "hflip": 0.5,
        "photometric": True,
        "imagenet_default_mean_and_std": False,
        "seed": 0,
    }
    return Namespace(**{**flags, **changed})


def read_classes(args, pairs):
    return find_classes(class_settings(args), pairs)


def palette(args, n_classes):
    return read_palette(args.palette, n_classes)


def scene(seed=0, size=(120, 80)):
    """Labels (height, width): sky over grass, a sun and a house somewhere."""
    rng = np.random.RandomState(seed)
    down, across = np.mgrid[: size[1], : size[0]]
    labels = (down > size[1] * rng.uniform(0.4, 0.7)).astype(np.uint8)
    labels[(across - rng.randint(20, 50)) ** 2 + (down - rng.randint(20, 40)) ** 2 < 15**2] = 2
    left = rng.randint(size[0] // 2, size[0] - 20)
    labels[size[1] // 3 : size[1] - 10, left : left + 25] = 3
    return labels


def colored(labels):
    return Image.fromarray(COLORS[labels])


def write(path: Path, picture: Image.Image | np.ndarray, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(path, **how)
    return path


def write_pair(root, name="a", split="train", seed=0, labels=None, add=0):
    labels = scene(seed) if labels is None else labels
    write(root / "images" / split / f"{name}.png", colored(labels))
    return write(root / "annotations" / split / f"{name}.png", (labels + add).astype(np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Five training pairs, two of validation."""
    root = tmp_path_factory.mktemp("pairs")
    for seed in range(5):
        write_pair(root, f"{seed}", seed=seed)
    for seed in range(2):
        write_pair(root, f"nested/{seed}", "val", seed=10 + seed)
    return root


# ----------------------------------------------------------------------------------------------------
#   where pairs are
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
    assert len(build_dataset(arguments(tmp_path), True, CLASSES)) == 1
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


# ------------------------------------------------------------------------------------------------------------
#   classes
def test_names_come_from_the_list_then_ade_then_the_masks(root, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(terminal.log, "propagate", True)
    caplog.set_level(logging.INFO, "beit")
    pairs = find_pairs(str(root), train=True)
    assert read_classes(arguments(root), pairs) == ["class 0", "class 1", "class 2", "class 3"]
    assert len({record for record in caplog.records if "looking through 5 masks" in record.getMessage()}) == 1
    assert read_classes(arguments(root, reduce_zero_label=True), pairs) == ["class 0", "class 1", "class 2"]
    caplog.clear()
    assert read_classes(arguments(root, nb_classes=7), pairs) == [f"class {i}" for i in range(7)]
    table = (
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t11664\t1172\twall\n22 \t0.1\t6\t6\tbed "
        "\n3\t0.1\t1\t2\tbuilding, edifice\n"
    )
    (tmp_path / "objectInfo150.txt").write_text(table)
    assert read_classes(arguments(tmp_path, reduce_zero_label=True), pairs) == ["wall", "bed", "building"]
    with user_reads(r"objectInfo150.txt: its first class is label 1.*add " r"--reduce_zero_label"):
        read_classes(arguments(tmp_path), pairs)
    (tmp_path / "names").write_text("\ufeffsky\r\n\n grass \nblue sun\n", encoding="utf-8")
    named = arguments(tmp_path, class_names=str(tmp_path / "names"))
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
        read_classes(arguments(tmp_path, class_names=str(tmp_path / "names")), [])


def test_numbers_of_classes_that_will_not_do(tmp_path):
    for count in (-1, 1, 256):
        with user_reads(f"--nb_classes {count}: "):
            read_classes(arguments(tmp_path, nb_classes=count), [])
    assert len(read_classes(arguments(tmp_path, nb_classes=255), [])) == 255
    binary = write_pair(tmp_path, labels=(scene() > 2).astype(np.uint8), add=0)
    write(binary, ((scene() > 2) * 255).astype(np.uint8))
    with user_reads(r"the 1 masks, such as .*a.png: 2 classes at least .*255 is ignored"):
        read_classes(arguments(tmp_path), find_pairs(str(tmp_path), True))
    write(binary, scene().astype(np.uint16) * 300)
    with user_reads(r"a.png: 901 classes; at most 255"):
        read_classes(arguments(tmp_path), find_pairs(str(tmp_path), True))
    write(binary, colored(scene()))
    with user_reads(r"annotations/train/a.png: its pixels are RGB, not numbers of " r"classes"):
        read_classes(arguments(tmp_path), find_pairs(str(tmp_path), True))


def test_ranks_share_the_looking_and_its_error(root, tmp_path, monkeypatch):
    pairs = find_pairs(str(root), train=True)
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
    assert len(read_classes(arguments(root), pairs)) == 9
    assert sorted(seen) == [pair.mask for pair in pairs[1::2]]
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [UserError("rank 0 found it"), value])
    with user_reads("rank 0 found it"):
        read_classes(arguments(root), pairs)


def test_palette(tmp_path):
    colors = palette(arguments(tmp_path), 255)
    assert colors.shape == (255, 3) and colors.dtype == torch.float32
    assert len(colors.unique(dim=0)) == 255
    assert torch.equal(palette(arguments(tmp_path), 20), colors[:20])
    assert torch.pdist(colors[:20]).min() > 0.25  # no two alike
    assert torch.pdist(colors).min() > 0.1
    file = tmp_path / "colors"
    own = arguments(tmp_path, palette=str(file))
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


# --------------------------------------------------------------------------------------------------------------
#   masks
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
    dataset = build_dataset(arguments(tmp_path), True, CLASSES)
    assert dataset.pair(0).mask == str(mask)
    assert np.array_equal(np.asarray(read_mask(str(mask))), labels)
    assert set(dataset[0]["label"].unique().tolist()) <= {0, 1, 2, 3, IGNORED}
    assert read_classes(arguments(tmp_path), find_pairs(str(tmp_path), True)) == [
        f"class {i}" for i in range(4)
    ]


def one_bit(tmp_path):
    mask = write_pair(tmp_path, split="")
    write(mask, Image.fromarray(scene() > 1))
    return mask


def evaluation(root, classes=CLASSES, **changed):
    return build_dataset(arguments(root, eval_data_path=str(root), **changed), False, classes)


def test_masks_of_one_bit(tmp_path):
    one_bit(tmp_path)
    assert read_classes(arguments(tmp_path), find_pairs(str(tmp_path), True)) == ["class 0", "class 1"]
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
        build_dataset(arguments(tmp_path, **flags), True, CLASSES),
    ):
        with user_reads(rf"annotations/a.png: {sentence}"):
            dataset[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_the_user_reads_the_sentence_alone(tmp_path, capsys, workers, train):
    """A worker's exception arrives with its traceback in its text."""
    for name in "abcd":
        write_pair(tmp_path, name, split="", add=5)
    dataset = build_dataset(arguments(tmp_path), True, CLASSES) if train else evaluation(tmp_path)

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


# ---------------------------------------------------------------------------------------------------
#   images on their side
@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_of_images_that_exif_turns(tmp_path, orientation):
    """Drawn on what is shown, or, if the sizes say so, on the pixels as they are stored."""
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


# ------------------------------------------------------------------------------------------------------------
#   samples
def same(one, other):
    return torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


def test_samples_follow_from_seed_epoch_and_index_alone(root):
    dataset = build_dataset(arguments(root), True, CLASSES, passes=3)
    assert len(dataset) == 15
    assert [dataset.pair(index) for index in range(15)] == find_pairs(str(root), True) * 3
    first = dataset[2, 1]
    assert set(first) == {"image", "label", "index", "failed"}
    assert first["image"].shape == (3, 64, 64) and first["image"].dtype == torch.uint8
    assert first["label"].shape == (64, 64) and first["label"].dtype == torch.uint8
    random.seed(99)
    state = random.getstate()
    assert same(dataset[2, 1], first)
    assert random.getstate() == state
    assert same(pickle.loads(pickle.dumps(dataset))[2, 1], first)
    others = [
        dataset[3, 1],
        dataset[2, 6],
        dataset[2, 11],
        build_dataset(arguments(root, seed=1), True, CLASSES)[2, 1],
    ]
    assert not any(same(other, first) for other in others)  # the next passes draw anew
    assert dataset[2, 6]["index"] == 6
    sampler = ResumableSampler(len(dataset), 5, 1, 0, 1, seed=0)
    batches = [list(build_loader(dataset, sampler, workers, pin_memory=False)) for workers in (0, 2)]
    assert len(batches[0]) == 3
    assert all(same(*pair) for pair in zip(*batches, strict=True))


def test_a_pair_is_replaced_together(root, tmp_path):
    for seed in range(4):
        write_pair(tmp_path, f"{seed}", seed=seed)
    (tmp_path / "images/train/0.png").write_text("<html>404</html>")
    mask = tmp_path / "annotations/train/1.png"
    mask.write_bytes(mask.read_bytes()[:-40])
    dataset = build_dataset(
        arguments(tmp_path, photometric=False, hflip=0.0, max_class_share=1.0), True, CLASSES, passes=2
    )
    for index in (0, 1, 4, 5):
        sample = dataset[index]
        assert agreement(sample["image"], sample["label"]) > 0.99
        names = [text.partition(" (")[0] for text in sample["failed"]]
        assert names == [str(tmp_path / f"images/train/{i}.png") for i in range(index % 4, 2)]
    assert "(not an image)" in dataset[0]["failed"][0]
    assert f"(its mask {mask}: " in dataset[1]["failed"][0]
    assert dataset[2]["failed"] == []
    good = dataset[2]
    assert dataset[1]["index"] == 1 and good["index"] == 2
    # the scan goes on
    assert read_classes(arguments(tmp_path), find_pairs(str(tmp_path), True))[-1] == "class 3"
    for image in (tmp_path / "images/train").iterdir():
        image.write_bytes(b"")
    assert set(dataset[0]) == {"failed"}
    assert len(dataset[0]["failed"]) == 4


def test_evaluation_keeps_the_masks_and_finish_normalizes(root):
    dataset = build_dataset(arguments(root, base_size=40, imagenet_default_mean_and_std=True), False, CLASSES)
    assert len(dataset) == 2 and dataset.classes == CLASSES
    sample = dataset[1]
    assert sample["image"].shape == (3, 40, 60) and sample["image"].dtype == torch.uint8
    assert np.array_equal(sample["label"], scene(11))
    assert same(sample, dataset[5, 1])
    view = build_evaluation_view(arguments(root, base_size=40))
    assert torch.equal(view(load_image(dataset.pair(1).image)), sample["image"])
    batch = next(iter(build_loader(dataset, EvalSampler(2, 2, 0, 1), 0, pin_memory=False)))
    finished = dataset.device_transform(batch)
    assert finished["label"].dtype == torch.int64 and finished["label"].shape == (2, 80, 120)
    expected = (batch["image"][1, 2].double() / 255 - 0.406) / 0.225
    torch.testing.assert_close(finished["image"][1, 2].double(), expected, atol=1e-5, rtol=0)
    assert finished["index"].tolist() == [0, 1] and finished["failed"] == []


# --------------------------------------------------------------------------------------------------------------
#   views
def agreement(image, label, margin=2):
    """The share of labeled pixels, `margin` away from borders of labels, whose color is that of their label."""
    image, label = image.permute(1, 2, 0).numpy().astype(int), label.numpy()
    inside = label != IGNORED
    for down in range(-margin, margin + 1):
        for across in range(-margin, margin + 1):
            inside &= np.roll(label, (down, across), (0, 1)) == label
    inside[:margin], inside[-margin:], inside[:, :margin], inside[:, -margin:] = False, False, False, False
    seen = np.abs(image[:, :, None] - COLORS.astype(int)).sum(-1).argmin(-1)
    assert inside.sum() > 100
    return float((seen == label)[inside].mean())


@pytest.mark.parametrize("size", [(120, 80), (80, 120), (200, 200), (301, 77)])
def test_masks_follow_their_images(size):
    labels = scene(3, size)
    view = TrainingView(96, 80, photometric=False, max_class_share=1.0)
    flipped, padded = 0, 0
    for seed in range(40):
        random.seed(seed)
        sample = view.pair(colored(labels), Image.fromarray(labels))
        assert agreement(sample["image"], sample["label"]) == 1
        unlabeled = sample["label"] == IGNORED
        assert (sample["image"].permute(1, 2, 0)[unlabeled] == 128).all()
        rows, columns = (~unlabeled).any(1).sum(), (~unlabeled).any(0).sum()
        assert not unlabeled[:rows, :columns].any()  # filled up at the right and the bottom alone
        padded += bool(unlabeled.any())
        random.seed(seed)
        still = TrainingView(96, 80, photometric=False, max_class_share=1.0, hflip=0.0).pair(
            colored(labels), Image.fromarray(labels)
        )
        if not torch.equal(still["label"], sample["label"]):
            mirrored = still["label"][:rows, :columns].flip(1)
            assert torch.equal(mirrored, sample["label"][:rows, :columns])
            flipped += 1
    assert 8 < flipped < 32
    assert padded > 3


def test_the_crop_is_that_of_the_whole_image_resized():
    rng = np.random.RandomState(0)
    pixels = Image.fromarray(rng.randint(0, 256, (70, 110, 3), dtype=np.uint8))
    labels = Image.fromarray(rng.randint(0, 9, (70, 110), dtype=np.uint8))
    for factor in (0.6, 1.0, 1.7):
        view = TrainingView(48, 64, (factor, factor), max_class_share=1.0)
        width, height = fitted(pixels.size, 64, factor)
        whole = np.asarray(pixels.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
        mask = np.asarray(labels.resize((width, height), Image.Resampling.NEAREST))
        random.seed(4)
        image, cropped = view.crop(pixels, labels)
        random.seed(4)
        random.uniform(factor, factor)
        left, top = random.randint(0, width - image.width), random.randint(0, height - image.height)
        there = np.s_[top : top + image.height, left : left + image.width]
        rows = (np.arange(top, top + image.height) + 0.5) * 70 / height
        columns = (np.arange(left, left + image.width) + 0.5) * 110 / width
        # between two pixels: either
        sure = np.logical_and.outer(*[np.abs(at - at.round()) > 1e-6 for at in (rows, columns)])
        assert (np.asarray(cropped) == mask[there])[sure].all() and sure.mean() > 0.5
        assert np.abs(np.asarray(image).astype(int) - whole[there]).max() <= 1


def test_sizes():
    assert fitted((683, 512), 512) == (683, 512)
    assert fitted((512, 683), 256) == (256, 342)
    assert fitted((3000, 300), 512) == (2048, 205)  # the longer side is at most four times the base
    assert fitted((300, 3000), 512, 0.5) == (102, 1024)
    assert fitted((1, 5000), 64) == (1, 256)
    scales = []
    for seed in range(200):
        random.seed(seed)
        image, _ = TrainingView(1000, 100, (0.5, 2.0)).crop(
            Image.new("RGB", (150, 100)), Image.new("L", (150, 100))
        )
        scales.append(image.height / 100)
    assert 0.5 <= min(scales) < 0.55 and 1.9 < max(scales) <= 2


def test_crops_that_one_class_fills_are_drawn_anew():
    labels = np.zeros((100, 400), np.uint8)
    labels[:, 200:] = np.arange(200) // 50 + 1
    labels[:, :20] = IGNORED
    image, mask = Image.new("RGB", (400, 100)), Image.fromarray(labels)

    def shares(limit):
        found = []
        for seed in range(100):
            random.seed(seed)
            found.append(largest_share(TrainingView(100, 100, (1, 1), limit).crop(image, mask)[1]))
        return np.array(found)

    assert 0.3 < (shares(1.0) > 0.75).mean() < 0.8
    assert (shares(0.75) > 0.75).mean() < 0.05  # ten more draws do not always help
    labels[:] = 2
    random.seed(0)
    assert TrainingView(100, 100, (1, 1)).crop(image, Image.fromarray(labels))[1].size == (100, 100)
    assert largest_share(Image.new("L", (9, 9), IGNORED)) > 1  # nothing to learn from
    half = Image.fromarray(np.array([[1, 1, 2, IGNORED]], np.uint8))
    assert largest_share(half) == pytest.approx(2 / 3)  # of what is labeled


def test_colors_vary_as_said():
    image = Image.fromarray(np.full((4, 4, 3), (100, 140, 60), np.uint8))
    random.seed(0)
    seen = np.array([np.asarray(distorted(image))[0, 0] for _ in range(2000)])
    unchanged = (seen == (100, 140, 60)).all(1).mean()
    assert 0.03 < unchanged < 0.10  # (1/2) ** 4, and hues that turn by nothing
    gray = Image.fromarray(np.full((4, 4, 3), 100, np.uint8))
    random.seed(0)
    grays = np.array([np.asarray(distorted(gray))[0, 0] for _ in range(2000)])
    assert (grays == grays[:, :1]).all()  # hue and saturation leave gray alone
    assert grays.min() == pytest.approx((100 - 32) * 0.5, abs=2)
    assert grays.max() == pytest.approx((100 + 32) * 1.5, abs=3)
    red = Image.fromarray(np.full((4, 4, 3), (200, 0, 0), np.uint8))
    random.seed(0)
    hues = np.array([distorted(red).convert("HSV").getpixel((0, 0))[0] for _ in range(1000)])
    degrees = ((hues * 360 / 256) + 180) % 360 - 180
    assert degrees.min() == pytest.approx(-36, abs=2) and degrees.max() == pytest.approx(36, abs=2)
    assert 0.4 < (degrees == 0).mean() < 0.62


def test_labels_do_not_vary_with_the_colors(root):
    for index in range(5):
        plain, varied = (
            build_dataset(arguments(root, photometric=on), True, CLASSES)[index] for on in (False, True)
        )
        assert torch.equal(plain["label"], varied["label"])


def test_filling_has_the_color_of_the_mean(root):
    dataset = build_dataset(
        arguments(root, scale_range=[0.3, 0.3], imagenet_default_mean_and_std=True), True, CLASSES
    )
    batch = {name: value[None] for name, value in dataset[0].items() if name in ("image", "label")}
    filled = dataset.device_transform(batch)["image"].permute(0, 2, 3, 1)[batch["label"] == IGNORED]
    assert len(filled) > 1000
    assert filled.abs().max() < 0.01


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
def test_flags_that_will_not_do(root, flags, sentence):
    with user_reads(sentence):
        build_dataset(arguments(root, **flags), True, CLASSES)


def test_many_names_in_one_array(tmp_path):
    """Names that are no UTF-8 and of different lengths come back as they were."""
    pairs = [Pair(f"/x/{name}.jpg", f"/y/{name}.png") for name in ("a", "long name \udcff", "ü 画像")]
    view = build_evaluation_view(arguments(tmp_path))
    dataset = image_mask_pairs.SegmentationFiles(pairs, view, CLASSES, ((0.5,) * 3, (0.5,) * 3))
    assert [dataset.pair(index) for index in range(3)] == pairs

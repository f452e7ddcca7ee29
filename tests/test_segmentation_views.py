"""Views of image and mask: augmented alike, cropped, colored, filled."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_segmentation import CLASSES, COLORS, colored, read_classes, scene, segmentation_args, write_pair

from data_pipeline.image_formats import load_image
from data_pipeline.samplers import EvalSampler, ResumableSampler, build_loader
from run_segmentation_finetuning import build_dataset, build_evaluation_view
from segmentation.image_mask_pairs import find_pairs
from segmentation.joint_views import IGNORED, TrainingView, distort_colors, fit_size, largest_share


# ── samples ──
def same(one, other):
    return torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


def test_samples_follow_from_seed_epoch_and_index_alone(pair_folder):
    dataset = build_dataset(segmentation_args(pair_folder), True, CLASSES, passes=3)
    assert len(dataset) == 15
    assert [dataset.pair(index) for index in range(15)] == find_pairs(str(pair_folder), True) * 3
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
        build_dataset(segmentation_args(pair_folder, seed=1), True, CLASSES)[2, 1],
    ]
    assert not any(same(other, first) for other in others)  # the next passes draw anew
    assert dataset[2, 6]["index"] == 6
    sampler = ResumableSampler(len(dataset), 5, 1, 0, 1, seed=0)
    batches = [list(build_loader(dataset, sampler, workers, pin_memory=False)) for workers in (0, 2)]
    assert len(batches[0]) == 3
    assert all(same(*pair) for pair in zip(*batches, strict=True))


def test_a_pair_is_replaced_together(pair_folder, tmp_path):
    for seed in range(4):
        write_pair(tmp_path, f"{seed}", seed=seed)
    (tmp_path / "images/train/0.png").write_text("<html>404</html>")
    mask = tmp_path / "annotations/train/1.png"
    mask.write_bytes(mask.read_bytes()[:-40])
    dataset = build_dataset(
        segmentation_args(tmp_path, photometric=False, hflip=0.0, max_class_share=1.0),
        True,
        CLASSES,
        passes=2,
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
    assert read_classes(segmentation_args(tmp_path), find_pairs(str(tmp_path), True))[-1] == "class 3"
    for image in (tmp_path / "images/train").iterdir():
        image.write_bytes(b"")
    assert set(dataset[0]) == {"failed"}
    assert len(dataset[0]["failed"]) == 4


def test_evaluation_keeps_the_masks_and_finish_normalizes(pair_folder):
    dataset = build_dataset(
        segmentation_args(pair_folder, base_size=40, imagenet_default_mean_and_std=True), False, CLASSES
    )
    assert len(dataset) == 2 and dataset.classes == CLASSES
    sample = dataset[1]
    assert sample["image"].shape == (3, 40, 60) and sample["image"].dtype == torch.uint8
    assert np.array_equal(sample["label"], scene(11))
    assert same(sample, dataset[5, 1])
    view = build_evaluation_view(segmentation_args(pair_folder, base_size=40))
    assert torch.equal(view(load_image(dataset.pair(1).image)), sample["image"])
    batch = next(iter(build_loader(dataset, EvalSampler(2, 2, 0, 1), 0, pin_memory=False)))
    finished = dataset.device_transform(batch)
    assert finished["label"].dtype == torch.int64 and finished["label"].shape == (2, 80, 120)
    expected = (batch["image"][1, 2].double() / 255 - 0.406) / 0.225
    torch.testing.assert_close(finished["image"][1, 2].double(), expected, atol=1e-5, rtol=0)
    assert finished["index"].tolist() == [0, 1] and finished["failed"] == []


# ── views ──
def agreement(image, label, margin=2):
    """The share of labeled pixels, `margin` away from borders of labels, whose color is
    that of their label.
    """
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
        sample = view.transform_pair(colored(labels), Image.fromarray(labels))
        assert agreement(sample["image"], sample["label"]) == 1
        unlabeled = sample["label"] == IGNORED
        assert (sample["image"].permute(1, 2, 0)[unlabeled] == 128).all()
        rows, columns = (~unlabeled).any(1).sum(), (~unlabeled).any(0).sum()
        assert not unlabeled[:rows, :columns].any()  # filled up at the right and the bottom alone
        padded += bool(unlabeled.any())
        random.seed(seed)
        still = TrainingView(96, 80, photometric=False, max_class_share=1.0, hflip=0.0).transform_pair(
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
        width, height = fit_size(pixels.size, 64, factor)
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
    assert fit_size((683, 512), 512) == (683, 512)
    assert fit_size((512, 683), 256) == (256, 342)
    assert fit_size((3000, 300), 512) == (2048, 205)  # the longer side is at most four times the base
    assert fit_size((300, 3000), 512, 0.5) == (102, 1024)
    assert fit_size((1, 5000), 64) == (1, 256)
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
    seen = np.array([np.asarray(distort_colors(image))[0, 0] for _ in range(2000)])
    unchanged = (seen == (100, 140, 60)).all(1).mean()
    assert 0.03 < unchanged < 0.10  # (1/2) ** 4, and hues that turn by nothing
    gray = Image.fromarray(np.full((4, 4, 3), 100, np.uint8))
    random.seed(0)
    grays = np.array([np.asarray(distort_colors(gray))[0, 0] for _ in range(2000)])
    assert (grays == grays[:, :1]).all()  # hue and saturation leave gray alone
    assert grays.min() == pytest.approx((100 - 32) * 0.5, abs=2)
    assert grays.max() == pytest.approx((100 + 32) * 1.5, abs=3)
    red = Image.fromarray(np.full((4, 4, 3), (200, 0, 0), np.uint8))
    random.seed(0)
    hues = np.array([distort_colors(red).convert("HSV").getpixel((0, 0))[0] for _ in range(1000)])
    degrees = ((hues * 360 / 256) + 180) % 360 - 180
    assert degrees.min() == pytest.approx(-36, abs=2) and degrees.max() == pytest.approx(36, abs=2)
    assert 0.4 < (degrees == 0).mean() < 0.62


def test_labels_do_not_vary_with_the_colors(pair_folder):
    for index in range(5):
        plain, varied = (
            build_dataset(segmentation_args(pair_folder, photometric=on), True, CLASSES)[index]
            for on in (False, True)
        )
        assert torch.equal(plain["label"], varied["label"])


def test_filling_has_the_color_of_the_mean(pair_folder):
    dataset = build_dataset(
        segmentation_args(pair_folder, scale_range=[0.3, 0.3], imagenet_default_mean_and_std=True),
        True,
        CLASSES,
    )
    batch = {name: value[None] for name, value in dataset[0].items() if name in ("image", "label")}
    filled = dataset.device_transform(batch)["image"].permute(0, 2, 3, 1)[batch["label"] == IGNORED]
    assert len(filled) > 1000
    assert filled.abs().max() < 0.01

"""The pipelines of the data: exact is torchvision's bit for bit, fast is near it."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageEnhance, ImageStat
from refusals import refused, user_reads
from tiny_runs import photos, pretraining_flags, tokenizer
from tiny_views import files_of_many_kinds, pretraining, scene
from torchvision import transforms as T
from torchvision.transforms import functional as F

import run_beitv2_pretraining
import run_class_finetuning
from data_pipeline import augmentation, crops, image_formats, resizing
from data_pipeline.augmentation import BRIGHTNESS, CONTRAST, SATURATION, CropParams
from data_pipeline.crops import ASPECT_RANGE, RandomCrop, TokenizerViews
from data_pipeline.image_formats import load_image
from datasets import ImageFiles
from masking_generator import MaskingGenerator
from runtime.seeding import seeded
from transforms import HALF_MEAN, HALF_STD

SIZES = [(500, 375), (375, 500), (90, 70), (33, 32), (7, 300), (400, 5), (3, 2), (1, 1)]
ORDERS = list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION)))
ADJUST = {BRIGHTNESS: F.adjust_brightness, CONTRAST: F.adjust_contrast, SATURATION: F.adjust_saturation}


def crop_of_torchvision(image, min_crop_scale, color_jitter, vflip):
    jitter = [T.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []
    image = T.Compose([*jitter, T.RandomHorizontalFlip(0.5), T.RandomVerticalFlip(vflip)])(image)
    return F.crop(image, *T.RandomResizedCrop.get_params(image, [min_crop_scale, 1.0], ASPECT_RANGE))


def levels(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many of 255 levels two views in [0, 1] differ by."""
    return 255 * (one - other).abs()


# ── Exact ──


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("jitter", "vflip"), [(0.4, 0.0), (0.4, 0.5), (1.5, 0.0), (0.0, 0.5)])
def test_a_crop_is_torchvisions_bit_for_bit(size, jitter, vflip):
    image = scene(*size)
    crops = set()
    for seed in range(12):
        with seeded(seed):
            expected = crop_of_torchvision(image, 0.2, jitter, vflip)
            drawn_last = torch.rand(1)
        with seeded(seed):
            crop = RandomCrop(0.2, jitter, vflip)(image)
            assert torch.equal(torch.rand(1), drawn_last)  # as many numbers were drawn
        assert crop.size == expected.size
        assert crop.tobytes() == expected.tobytes()
        crops.add(crop.tobytes())
    assert len(crops) > 3 or max(size) <= 3


@pytest.mark.parametrize(
    "order", [*ORDERS, (SATURATION, CONTRAST), (CONTRAST,), (BRIGHTNESS, SATURATION), ()]
)
@pytest.mark.parametrize(
    "factors", [(0.6, 0.6, 0.6), (1.4, 1.4, 1.4), (1.37, 0.71, 1.21), (0.8, 1.3, 0.0), (1.0, 1.0, 1.0)]
)
def test_every_order_of_the_jitter_is_exact(order, factors):
    image = scene(120, 90)
    params = CropParams(
        image.size, tuple((kind, factors[kind]) for kind in order), True, True, 11, 23, 40, 50
    )
    whole = image
    for kind in order:
        whole = ADJUST[kind](whole, factors[kind])
    expected = F.crop(F.vflip(F.hflip(whole)), 11, 23, 40, 50)
    assert augmentation.exact_crop(image, params).tobytes() == expected.tobytes()


def test_the_pivot_is_pils():
    for seed in range(20):
        image = scene(60, 41, seed)
        assert augmentation.mean_gray(image) == int(ImageStat.Stat(image.convert("L")).mean[0] + 0.5)


@pytest.mark.parametrize("second", [None, 64, 32])
def test_exact_views_are_the_published_steps(second):
    image = scene()
    for seed in range(6):
        with seeded(seed):
            crop = crop_of_torchvision(image, 0.2, 0.4, 0.0)
            mask = torch.as_tensor(MaskingGenerator(4, 6)(), dtype=torch.bool).flatten()
        with seeded(seed):
            sample = pretraining(64, second)(image)
        first = F.to_tensor(F.resize(crop, [64, 64], resizing.MODES["bicubic"]))
        assert torch.equal(sample["image"], F.normalize(first, HALF_MEAN, HALF_STD))
        assert torch.equal(sample["mask"], mask)
        assert ("tokenizer_image" in sample) == (second is not None)
        if second is not None:
            resized = F.to_tensor(F.resize(crop, [second, second], resizing.MODES["bicubic"]))
            assert torch.equal(sample["tokenizer_image"], resized)


# ── Fast ──


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (90, 70), (33, 32)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "lanczos", "random"])
def test_fast_shows_the_same_crop(size, mode):
    """The scene is harder than photos, which differ by half a level
    (docs/performance.md): much of it is clipped.
    """
    image, means, crops = scene(*size), [], []
    for seed in range(10):
        samples = []
        for pipeline in ("exact", "fast"):
            with seeded(seed):
                samples.append(pretraining(pipeline=pipeline, mode=mode, vflip=0.5)(image))
        exact, fast = samples
        means.append(float(levels(exact["tokenizer_image"], fast["tokenizer_image"]).mean()))
        assert torch.equal(exact["mask"], fast["mask"])
        torch.testing.assert_close(fast["image"] * 0.5 + 0.5, fast["tokenizer_image"])
        crops.append(fast["tokenizer_image"])
    assert max(means) < 3
    assert sum(means) / len(means) < 1.5
    assert levels(crops[0], crops[1]).mean() > 10  # the bounds mean something


def test_without_jitter_fast_is_within_a_level():
    for seed in range(8):
        views = []
        for pipeline in ("exact", "fast"):
            with seeded(seed):
                views.append(
                    TokenizerViews(96, 0.2, 0.0, "bicubic", 0.5, pipeline)(scene(seed=seed))["image"]
                )
        assert levels(*views).max() < 1.01
        assert levels(*views).mean() < 0.02


@pytest.mark.parametrize("size", SIZES)
def test_fast_takes_every_size(size):
    for seed in range(4):
        with seeded(seed):
            sample = pretraining(32, 48, pipeline="fast")(scene(*size))
        assert sample["image"].shape == (3, 32, 32)
        assert sample["tokenizer_image"].shape == (3, 48, 48)


@pytest.mark.parametrize("order", ORDERS)
def test_jitter_on_tensors_is_pils_within_rounding(order):
    image = scene(64, 48)
    for factors in ((0.6, 0.7, 0.8), (1.4, 1.3, 1.2), (1.1, 0.8, 1.4)):
        operations = tuple((kind, factors[kind]) for kind in order)
        params = CropParams(image.size, operations, False, False, 0, 0, 48, 64)
        before = operations[: order.index(CONTRAST)]
        pivot = augmentation.mean_gray(augmentation.apply_jitter(image, before))
        ours = augmentation.jitter_and_flip(F.pil_to_tensor(image), params, pivot)
        difference = (
            ours.int() - F.pil_to_tensor(augmentation.apply_jitter(image, operations, pivot)).int()
        ).abs()
        assert difference.max() <= 2
        assert difference.float().mean() < 0.01
        assert abs(augmentation.estimate_pivot(image, operations) - pivot) <= 2


def test_the_sampled_pivot_of_a_large_image():
    for seed in range(6):
        image = scene(seed=seed)
        operations = ((BRIGHTNESS, 1.3), (SATURATION, 1.2), (CONTRAST, 0.7))
        whole = ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(1.3)).enhance(1.2)
        assert abs(augmentation.estimate_pivot(image, operations) - augmentation.mean_gray(whole)) <= 2


# ── Files ──


def test_both_pipelines_read_every_kind_of_file(tmp_path):
    for name, file in files_of_many_kinds(tmp_path).items():
        for seed in range(4):
            with seeded(seed):
                expected = crop_of_torchvision(load_image(file), 0.2, 0.4, 0.0)
            samples = {}
            for pipeline in ("exact", "fast"):
                views = pretraining(96, 96, pipeline=pipeline)
                with seeded(seed):
                    samples[pipeline] = views(views.load(file))["tokenizer_image"]
            resized = F.to_tensor(F.resize(expected, [96, 96], resizing.MODES["bicubic"]))
            assert torch.equal(samples["exact"], resized), name
            assert levels(samples["exact"], samples["fast"]).mean() < 1.5, name


@pytest.mark.parametrize("decoder", ["torchvision", "simplejpeg"])
def test_plain_jpegs_need_no_pillow(tmp_path, monkeypatch, decoder):
    """The same pixels, and the same pivot and view of them; all else goes through
    Pillow.
    """
    if decoder == "torchvision":
        monkeypatch.setattr(image_formats, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    files = files_of_many_kinds(tmp_path)
    for name, options in {
        "444": {"subsampling": 0},
        "420": {"subsampling": 2, "quality": 60},
        "progressive": {"progressive": True},
        "restarts": {"restart_marker_rows": 1, "icc_profile": b"0" * 70_000, "comment": b"text"},
    }.items():
        files[name] = str(tmp_path / f"plain_{name}.jpg")
        scene(123, 91).save(files[name], **options)
    params = CropParams((123, 91), ((SATURATION, 1.3), (CONTRAST, 0.7)), False, False, 11, 23, 60, 50)
    plain = set()
    for name, file in files.items():
        expected = load_image(file)
        found = image_formats.load_plain(file, lambda size: size)
        if isinstance(found, Image.Image):
            assert found.tobytes() == expected.tobytes(), name
            continue
        plain.add(name)
        assert torch.equal(found, F.pil_to_tensor(expected)), name
        pivots = {augmentation.estimate_pivot(image, params.operations) for image in (found, expected)}
        views = [
            augmentation.resize_fast(
                augmentation.SampledImage(image, dataclasses.replace(params, size=expected.size)), 48, mode
            )
            for mode in (resizing.MODES["bicubic"], resizing.MODES["lanczos"])
            for image in (found, expected)
        ]
        assert len(pivots) == 1 and torch.equal(views[0], views[1]) and torch.equal(views[2], views[3])
    assert {"444", "420", "progressive", "restarts", "rgb.jpg"} <= plain
    assert not any("turned" in name or "gray" in name or "cmyk" in name or "png" in name for name in plain)


def test_large_jpegs_are_decoded_no_larger_than_needed(tmp_path):
    files = files_of_many_kinds(tmp_path)
    views = pretraining(64, None, pipeline="fast")
    sizes = set()
    for seed in range(12):
        with seeded(seed):
            drawn = views.load(files["turned_large.jpg"])
        assert isinstance(drawn, augmentation.SampledImage)
        assert drawn.params.size == (1200, 1600)  # upright
        shrink = 1200 / drawn.image.width
        assert drawn.image.size == (1200 / shrink, 1600 / shrink)
        assert min(drawn.params.width, drawn.params.height) / shrink >= crops.DECODED_TO_SHOWN * 64
        sizes.add(shrink)
    assert sizes <= {2.0, 4.0, 8.0}
    assert len(sizes) > 1
    with seeded(0):
        small = views.load(files["rgba.png"])
    assert isinstance(small, augmentation.SampledImage)
    assert small.image.size == small.params.size == (500, 375)
    exact = pretraining(64, None).load(files["turned_large.jpg"])
    assert isinstance(exact, Image.Image)
    assert exact.size == (1200, 1600)


@pytest.mark.parametrize("pipeline", ["exact", "fast"])
def test_a_replaced_file_gets_the_same_random_numbers(tmp_path, pipeline):
    files = files_of_many_kinds(tmp_path)
    whole = Path(files["rgb.jpg"]).read_bytes()
    # its size is known before the decoding fails
    (tmp_path / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    good, broken = (files["rgb.jpg"], None), (str(tmp_path / "broken.jpg"), None)
    replaced = ImageFiles([broken, good], pretraining(pipeline=pipeline))[3, 0]
    itself = ImageFiles([good, good], pretraining(pipeline=pipeline))[3, 0]
    assert len(replaced["failed"]) == 1
    assert torch.equal(replaced["image"], itself["image"])
    assert torch.equal(replaced["mask"], itself["mask"])


def test_what_cannot_act_is_refused(tmp_path, capsys):
    with user_reads(r"--augment_on_device.*add --data_pipeline fast"):
        TokenizerViews(32, 0.2, 0.4, "bicubic", augment_on_device=True)
    with user_reads(r"--data_pipeline.*fsat.*did you mean fast"):
        TokenizerViews(32, 0.2, 0.4, "bicubic", data_pipeline="fsat")
    data, codes = photos(tmp_path / "photos"), tokenizer(tmp_path / "tokenizer.pth")
    assert "--data_pipeline fast" in refused(
        run_beitv2_pretraining.main,
        pretraining_flags(data, tmp_path / "out", codes, "--augment_on_device"),
        capsys,
    )
    with pytest.raises(SystemExit):
        run_class_finetuning.get_parser().parse_args(["--data_path", str(data), "--data_pipeline", "fast"])

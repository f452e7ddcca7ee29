"""Views: shapes, ranges, one crop for both views, what each flag does."""

import random
from typing import Any

import pytest
import torch
from PIL import Image
from refusals import user_reads
from tiny_data import photo
from torchvision.transforms import functional as F

from data_pipeline import crops, resizing
from data_pipeline.crops import PretrainingViews, TokenizerViews
from data_pipeline.pixel_format import PixelFormat
from data_pipeline.resizing import interpolation
from masking_generator import MaskingGenerator
from runtime.seeding import seeded
from transforms import HALF_MEAN, HALF_STD, IMAGENET_MEAN, IMAGENET_STD, eval_view, finetuning_view


def pretraining(
    size=64, second=32, first_mode="bicubic", second_mode="bicubic", jitter=0.4, mean=HALF_MEAN, std=HALF_STD
):
    masks = MaskingGenerator(size // 16, 6)
    return PretrainingViews(size, second, 0.2, jitter, first_mode, second_mode, mean, std, masks)


def denormalized(image, mean=HALF_MEAN, std=HALF_STD):
    return image * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)


# ── training views ──
def test_pretraining_views():
    with seeded(0):
        sample = pretraining()(photo())
    assert sample["image"].shape == (3, 64, 64)
    assert sample["tokenizer_image"].shape == (3, 32, 32)
    assert sample["mask"].shape == (16,)
    assert sample["mask"].dtype == torch.bool
    assert sample["mask"].sum() == 6
    assert sample["tokenizer_image"].min() >= 0
    assert sample["tokenizer_image"].max() <= 1
    assert sample["image"].min() < -0.1  # normalized
    assert sample["image"].dtype == sample["tokenizer_image"].dtype == torch.float32


@pytest.mark.parametrize("second_mode", ["bicubic", "lanczos"])
def test_both_views_show_one_crop(second_mode):
    """The tokenizer's view is the network's view at half the size, whatever flip,
    jitter and crop were drawn.
    """
    for seed in range(8):
        with seeded(seed):
            sample = pretraining(second_mode=second_mode)(photo())
        halved = torch.nn.functional.avg_pool2d(denormalized(sample["image"]), 2)
        assert (halved - sample["tokenizer_image"]).abs().mean() < 0.02
    with seeded(99):
        other = pretraining()(photo())
    # the bound means something
    assert (other["tokenizer_image"] - sample["tokenizer_image"]).abs().mean() > 0.05


def test_equal_sizes_resize_once_with_the_result_of_two(monkeypatch):
    resizes, resize = [], crops.resize_to_square

    def counting(*args):
        resizes.append(args)
        return resize(*args)

    monkeypatch.setattr(crops, "resize_to_square", counting)
    views = pretraining(second=64)
    with seeded(5):
        once = views(photo())
    assert len(resizes) == 1
    monkeypatch.setitem(resizing.MODES, "bicubic by another name", resizing.MODES["bicubic"])
    views.second = 64, "bicubic by another name"
    with seeded(5):
        twice = views(photo())
    assert len(resizes) == 3
    for name in once:
        assert torch.equal(once[name], twice[name])
    torch.testing.assert_close(denormalized(once["image"]), once["tokenizer_image"])


def test_normalization_is_the_one_asked_for():
    with seeded(5):
        sample = pretraining(second=64, mean=IMAGENET_MEAN, std=IMAGENET_STD)(photo())
    torch.testing.assert_close(
        denormalized(sample["image"], IMAGENET_MEAN, IMAGENET_STD), sample["tokenizer_image"]
    )


def test_second_interpolation_acts():
    tokenizer_images = []
    for mode in ("bicubic", "lanczos"):
        with seeded(5):
            tokenizer_images.append(pretraining(second_mode=mode)(photo())["tokenizer_image"])
    assert not torch.equal(*tokenizer_images)


def test_jitter_flips_and_crop_scale_act():
    plain = Image.new("RGB", (64, 64), (100, 150, 200))
    without = [TokenizerViews(32, 0.2, 0.0, "bicubic")(plain)["image"] for _ in range(10)]
    assert all(torch.equal(view, without[0]) for view in without)
    jittered = [TokenizerViews(32, 0.2, 0.4, "bicubic")(plain)["image"].mean() for _ in range(10)]
    assert torch.stack(jittered).std() > 0.02

    halves = Image.new("RGB", (64, 64), "black")
    halves.paste("white", (0, 0, 32, 64))
    flips = [TokenizerViews(32, 0.9999, 0.0, "bicubic")(halves)["image"][0, 16, 2] < 0.5 for _ in range(200)]
    assert 70 < sum(flips) < 130
    upper = halves.transpose(Image.Transpose.ROTATE_270)
    turned = [
        TokenizerViews(32, 0.9999, 0.0, "bicubic", vflip=1.0)(upper)["image"][0, 2, 16] < 0.5
        for _ in range(20)
    ]
    assert all(turned)
    upright = [TokenizerViews(32, 0.9999, 0.0, "bicubic")(upper)["image"][0, 2, 16] > 0.5 for _ in range(20)]
    assert all(upright)

    areas: dict[float, list[float]] = {0.05: [], 0.9: []}
    for scale, found in areas.items():
        crop = crops.RandomCrop(scale, 0.0, 0.0)
        for _ in range(100):
            width, height = crop(photo(200, 200)).size
            found.append(width * height / 40000)
            assert 0.7 < width / height < 1.4
    assert min(areas[0.9]) > 0.88
    assert min(areas[0.05]) < 0.2
    assert max(areas[0.05]) > 0.8


def test_tokenizer_views_stay_in_unit_range():
    image = TokenizerViews(48, 0.08, 0.4, "lanczos")(photo())["image"]
    assert image.shape == (3, 48, 48)
    assert image.min() >= 0
    assert image.max() <= 1


# ── evaluation and fine-tuning ──
def test_eval_view_is_the_published_geometry():
    image = photo(120, 80)
    expected = F.to_tensor(F.center_crop(F.resize(image, 64, interpolation("bicubic")), [56, 56]))
    assert torch.equal(eval_view(56)(image)["image"], expected)
    expected = F.to_tensor(F.center_crop(F.resize(image, 384, interpolation("bicubic")), [384, 384]))
    assert torch.equal(eval_view(384)(image)["image"], expected)
    expected = F.to_tensor(F.center_crop(F.resize(image, 70, interpolation("bicubic")), [56, 56]))
    assert torch.equal(eval_view(56, crop_pct=0.8)(image)["image"], expected)
    cifar = photo(32, 32)
    assert torch.equal(eval_view(32)(cifar)["image"], F.to_tensor(cifar))


def test_eval_view_normalizes_when_asked():
    plain, normal = eval_view(56), eval_view(56, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    image = photo()
    torch.testing.assert_close(
        denormalized(normal(image)["image"], IMAGENET_MEAN, IMAGENET_STD), plain(image)["image"]
    )


@pytest.mark.parametrize("size", [32, 64])
def test_finetuning_view(size):
    view = finetuning_view(size, HALF_MEAN, HALF_STD)
    for source in (photo(), photo(32, 32), photo(300, 40)):
        image = view(source)["image"]
        assert image.shape == (3, size, size)
        assert image.dtype == torch.float32
    assert image.abs().max() < 8


def test_small_images_are_shifted_not_cropped():
    """At CIFAR's size a view is the padded image moved by up to 4 pixels, so most
    pixels are the image's own.
    """
    image = photo(32, 32)
    view = finetuning_view(32, (0, 0, 0), (1, 1, 1), aa="none", color_jitter=0, reprob=0, hflip=0)
    padded = torch.nn.functional.pad(F.to_tensor(image), (4, 4, 4, 4))
    for _ in range(10):
        shifted = view(image)["image"]
        assert any(
            torch.equal(shifted, padded[:, y : y + 32, x : x + 32]) for y in range(9) for x in range(9)
        )


def test_finetuning_flags_act():
    plain = Image.new("RGB", (64, 64), (100, 150, 200))
    off: dict[str, Any] = {"aa": "none", "color_jitter": 0.0, "reprob": 0.0}

    def views(**changed):
        view = finetuning_view(48, (0, 0, 0), (1, 1, 1), **{**off, **changed})
        return torch.stack([view(plain)["image"] for _ in range(12)])

    assert views().std(dim=0).max() == 0
    assert views(color_jitter=0.4).std(dim=0).min() > 0
    assert views(aa="rand-m9-mstd0.5-inc1").std(dim=0).max() > 0
    assert (views(reprob=1.0, remode="const") == 0).any(dim=-1).any(dim=-1).all()
    halves = Image.new("RGB", (64, 64), "black")
    halves.paste("white", (0, 0, 64, 32))
    kept = finetuning_view(48, (0, 0, 0), (1, 1, 1), min_crop_scale=0.999, **off)(halves)["image"]
    turned = finetuning_view(48, (0, 0, 0), (1, 1, 1), min_crop_scale=0.999, vflip=1.0, **off)(halves)[
        "image"
    ]
    assert kept[0, 2, 24] > 0.9
    assert turned[0, 2, 24] < 0.1


@pytest.mark.parametrize(
    "aa", ["rand-m9-mstd0.5-inc1", "rand-m10-n6-mstd0-inc1", "v0", "original", "3a", "augmix-m10-w3"]
)
def test_no_policy_stumbles_at_full_strength(aa):
    """timm's posterize asks Pillow for 0 bits at magnitude 10, which newer releases
    refuse.
    """
    random.seed(0)
    view = finetuning_view(32, HALF_MEAN, HALF_STD, aa=aa)
    for _ in range(150):
        view(photo(40, 40))


def test_random_interpolation_draws_both():
    random.seed(0)
    assert {interpolation("random").value for _ in range(20)} == {"bilinear", "bicubic"}


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: interpolation("bicubik"), "bicubik.*did you mean bicubic"),
        (lambda: pretraining(second_mode="cubic"), "--second_interpolation cubic"),
        (lambda: TokenizerViews(32, 0.0, 0.0, "bicubic"), "--min_crop_scale 0.0"),
        (lambda: TokenizerViews(32, 0.1, -1, "bicubic"), "--color_jitter -1"),
        (lambda: TokenizerViews(32, 0.1, 0.1, "bicubic", vflip=2), "--vflip 2"),
        (lambda: eval_view(32, crop_pct=1.5), "--crop_pct 1.5"),
        (lambda: finetuning_view(32, HALF_MEAN, HALF_STD, aa="nonsense"), "--aa nonsense"),
        (lambda: finetuning_view(32, HALF_MEAN, HALF_STD, aa="rand-zz9"), "--aa rand-zz9"),
        (lambda: finetuning_view(32, HALF_MEAN, HALF_STD, remode="stripes"), "--remode stripes"),
    ],
)
def test_user_mistakes(build, sentence):
    with user_reads(sentence):
        build()


# ── The center, decoded at a reduced size ──
def test_a_large_jpeg_is_decoded_no_larger_than_its_center_needs(tmp_path):
    exact, fast = eval_view(32, 0.5), eval_view(32, 0.5, data_pipeline="fast")
    sizes = {}
    for width, height in ((800, 600), (700, 1000), (150, 140)):
        path = str(tmp_path / f"{width}.jpg")
        photo(width, height).save(path, quality=95)
        loaded = fast.load(path)
        sizes[width, height] = loaded.size
        images = [view.transform(view.load(path))["image"] for view in (exact, fast)]
        assert images[0].shape == (3, 32, 32)
        error = (images[0] - images[1]).abs().mean()
        assert error == 0 if loaded.size == (width, height) else error < 0.02
    # the resize is to a shorter side of 64: 96 are kept
    assert sizes == {(800, 600): (200, 150), (700, 1000): (175, 250), (150, 140): (150, 140)}


def test_other_files_than_jpeg_are_read_whole(tmp_path):
    path = str(tmp_path / "a.png")
    photo(400, 300).save(path)
    assert eval_view(32, data_pipeline="fast").load(path).size == (400, 300)


def test_fast_centers_are_of_rgb():
    with user_reads("data_pipeline"):
        eval_view(32, pixels=PixelFormat(1), data_pipeline="fast")

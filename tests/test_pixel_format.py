"""Files of other channels and depths: read exactly, scaled by one rule, and cropped,
jittered and resized without a step of 8 bits.
"""

import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from refusals import user_reads
from tiny_channels import four_channels

from data_pipeline.array_files import read_array
from data_pipeline.augmentation import BRIGHTNESS, CONTRAST, SATURATION, CropSampler
from data_pipeline.crops import PretrainingViews, TokenizerViews
from data_pipeline.float_images import jitter_float
from data_pipeline.pixel_format import PixelFormat, load_pixels, measure_pixels
from datasets import ImageSource, find_unlabeled
from errors import UserError
from runtime.seeding import seeded
from transforms import eval_view, finetuning_view, normalization_of

RNG = np.random.RandomState(0)
GRAY = PixelFormat(1)


def write_png_16(path, pixels):
    """PNG of 16 bits in several channels, which Pillow does not write."""
    kinds = {1: 0, 2: 4, 3: 2, 4: 6}
    height, width, channels = pixels.shape

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, kinds[channels], 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def numbers(dtype, channels):
    top = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    return (RNG.rand(20, 30, channels) * top).astype(dtype)


def pages(path, pixels):
    tifffile.imwrite(path, pixels.transpose(2, 0, 1), photometric="minisblack")


def planes(path, pixels):
    tifffile.imwrite(path, pixels.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate")


def compressed(path, pixels):
    tifffile.imwrite(path, pixels, compression="zlib", predictor=True)


def with_pillow(path, pixels):
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)


@pytest.mark.parametrize(
    ("name", "write", "dtype", "channels"),
    [
        ("x.npy", np.save, "uint8", 5),
        ("x.npy", np.save, "float32", 2),
        ("x.png", with_pillow, "uint16", 1),
        ("x.png", write_png_16, "uint16", 2),
        ("x.png", write_png_16, "uint16", 3),
        ("x.png", write_png_16, "uint16", 4),
        ("x.png", with_pillow, "uint8", 4),
        ("x.tif", with_pillow, "float32", 1),
        ("x.tif", tifffile.imwrite, "uint16", 3),
        ("x.tif", tifffile.imwrite, "uint16", 4),
        ("x.tif", tifffile.imwrite, "uint8", 7),
        ("x.tif", tifffile.imwrite, "float32", 6),
        ("x.tif", tifffile.imwrite, "float16", 1),
        ("x.tif", tifffile.imwrite, "int16", 1),
        ("x.tif", pages, "uint16", 4),
        ("x.tif", planes, "uint16", 4),
        ("x.tif", compressed, "uint16", 4),
    ],
)
def test_every_number_of_a_file_is_read(name, write, dtype, channels, tmp_path):
    pixels = numbers(dtype, channels)
    write(tmp_path / name, pixels)
    assert np.array_equal(read_array(str(tmp_path / name), channels), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_of_many_channels_are_turned_upright(orientation, tmp_path):
    """As Pillow turns a gray one."""
    pixels = numbers("uint8", 5)
    tag = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "x.tif", pixels, extratags=tag)
    Image.fromarray(pixels[..., 2]).save(tmp_path / "y.tif", tiffinfo={274: orientation})
    upright = read_array(str(tmp_path / "y.tif"), 1)
    assert np.array_equal(read_array(str(tmp_path / "x.tif"), 5)[..., 2:3], upright)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.npy"])
def test_a_16_bit_ramp_keeps_its_values_up_to_the_tensor(name, tmp_path):
    ramp = np.arange(2**16, dtype=np.uint16).reshape(256, 256, 1)
    {"x.png": with_pillow, "x.tif": tifffile.imwrite, "x.npy": np.save}[name](tmp_path / name, ramp)
    half = ((0.5,), (0.5,))
    mask = np.zeros((16, 16))
    views = [
        PretrainingViews(256, None, 1.0, 0.0, "bicubic", "bicubic", *half, lambda: mask, pixels=GRAY),
        TokenizerViews(256, 1.0, 0.0, "bicubic", pixels=GRAY),
        eval_view(256, 1.0, mean=half[0], std=half[1], pixels=GRAY),
    ]
    for view in views:
        # a random crop has fewer pixels, and is enlarged
        image = view(view.load(str(tmp_path / name)))["image"]
        assert image.shape == (1, 256, 256)
        assert len(image.unique()) > 60_000
    exact = load_pixels(str(tmp_path / name), GRAY)
    assert torch.equal(exact, torch.arange(2**16).view(1, 256, 256) / 65535)


def test_the_range_is_scaled_and_clipped(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[-1000, 0], [1000, 5000]], dtype=np.int16))
    image = load_pixels(str(tmp_path / "x.npy"), PixelFormat(1, (-1000.0, 3000.0)))
    assert image.flatten().tolist() == [0, 0.25, 0.5, 1]
    with pytest.raises(ValueError, match="int16 numbers, and nothing says which are black and white"):
        load_pixels(str(tmp_path / "x.npy"), GRAY)


@pytest.mark.parametrize(
    ("pixels", "in_chans", "message"),
    [
        (np.zeros((4, 4, 5), "uint8"), 4, "it has 5 channels, not the 4 of `in_chans`"),
        (np.zeros((4, 4), "uint8"), 4, "it has 1 channel, not the 4"),
        (np.array([[0.5, np.nan]], "float32"), 1, "NaN"),
        (np.zeros((2, 4, 4, 1), "uint8"), 1, r"an array \(2, 4, 4, 1\)"),
        (np.zeros((4, 4), "complex64"), 1, "numbers .* are expected"),
        (np.array([{"a": 1}], dtype=object), 1, "allow_pickle"),
    ],
)
def test_other_arrays_are_told(pixels, in_chans, message, tmp_path):
    np.save(tmp_path / "x.npy", pixels, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        load_pixels(str(tmp_path / "x.npy"), PixelFormat(in_chans, (0.0, 1.0)))


def test_gray_and_rgb_stand_for_each_other(tmp_path):
    rgb = numbers("uint8", 3)
    with_pillow(tmp_path / "rgb.png", rgb)
    gray = load_pixels(str(tmp_path / "rgb.png"), GRAY)
    expected = np.asarray(Image.fromarray(rgb).convert("L"), dtype=np.float32) / 255
    assert np.abs(gray[0].numpy() - expected).max() < 0.6 / 255
    with_pillow(tmp_path / "gray.png", rgb[..., :1])
    three = load_pixels(str(tmp_path / "gray.png"), PixelFormat(3, (0.0, 255.0)))
    assert three.shape == (3, 20, 30) and torch.equal(three[0], three[2])


def test_floats_look_like_8_bit_rgb(tmp_path):
    """The same crop, jitter, flips and filter as on PIL images."""
    smooth = np.kron(RNG.randint(40, 215, (6, 7, 3)), np.ones((10, 10, 1)))
    file = str(tmp_path / "x.png")
    Image.fromarray(smooth.astype("uint8")).save(file)
    images = []
    for pixels in (PixelFormat(), PixelFormat(3, (0.0, 255.0))):
        view = TokenizerViews(32, 0.3, 0.4, "bicubic", vflip=0.5, pixels=pixels)
        with seeded(3):
            images.append(view(view.load(file))["image"])
    # each of the three jitters in 8 bits cuts off half a level
    assert (images[0] - images[1]).abs().mean() < 2 / 255
    evaluated = [eval_view((48, 32), pixels=pixels) for pixels in (PixelFormat(), PixelFormat(3, (0, 255)))]
    one, other = (view(view.load(file))["image"] for view in evaluated)
    assert (one - other).abs().max() < 2.5 / 255


def test_other_channels_vary_in_brightness_and_contrast_alone():
    sample = CropSampler([0.2, 1.0], [0.75, 1.33], color_jitter=0.4, vflip=0.0, saturation=False)
    torch.manual_seed(0)
    kinds = {kind for _ in range(8) for kind, _ in sample((40, 30)).operations}
    assert kinds == {BRIGHTNESS, CONTRAST} and SATURATION not in kinds
    image = torch.tensor([0.2, 0.4, 0.9, 0.1]).view(4, 1, 1)
    brighter, apart = (jitter_float(image, [(kind, 2.0)]).flatten() for kind in (BRIGHTNESS, CONTRAST))
    assert brighter.tolist() == pytest.approx([0.4, 0.8, 1, 0.2])
    assert apart.tolist() == pytest.approx([0, 0.4, 1, 0])


@pytest.mark.parametrize("size", [32, (48, 64)])
def test_fine_tuning_augments_any_number_of_channels(size, tmp_path):
    np.save(tmp_path / "x.npy", numbers("uint16", 5))
    view = finetuning_view(size, (0.5,) * 5, (0.5,) * 5, reprob=1.0, pixels=PixelFormat(5))
    loaded = view.load(str(tmp_path / "x.npy"))
    with seeded(0):
        one = view(loaded)["image"]
    with seeded(1):
        other = view(loaded)["image"]
    height, width = (size, size) if isinstance(size, int) else size
    assert one.shape == (5, height, width) and one.dtype == torch.float32
    assert not torch.equal(one, other)


def test_statistics_of_a_sample_are_those_of_its_pixels():
    images = [numbers("uint16", 3) // 16 for _ in range(4)]
    found = measure_pixels(images, 3, None, auto=True)
    values = np.stack(images)
    low, high = np.percentile(values, (0.1, 99.9))
    assert found.image_range == pytest.approx((low, high), rel=1e-5)
    scaled = ((values - low) / (high - low)).clip(0, 1)
    assert found.mean == pytest.approx(scaled.mean(axis=(0, 1, 2)), abs=1e-5)
    assert found.std == pytest.approx(scaled.std(axis=(0, 1, 2)), abs=1e-5)
    assert measure_pixels(images, 3, (0.0, 4095.0), auto=False).warning == ""
    assert "fill" in measure_pixels(images, 3, (0.0, 2.0**17), auto=False).warning
    assert "outside" in measure_pixels(images, 3, (0.0, 2000.0), auto=False).warning


def test_a_sample_without_an_image_says_why(tmp_path):
    np.save(tmp_path / "x.npy", numbers("uint8", 2))
    with user_reads(
        r"no image of a sample of 1 could be read: .*x.npy: it has 2 channels, not the 3 of --in_chans"
    ):
        measure_pixels([str(tmp_path / "x.npy")], 3, None, auto=True)
    with pytest.raises(UserError, match="nearly all pixels"):
        measure_pixels([np.zeros((9, 9, 3), "uint8")], 3, None, auto=True)


def test_arrays_are_images_where_they_are_asked_for(tmp_path):
    four_channels(tmp_path, per_class=2)
    assert len(find_unlabeled(ImageSource(str(tmp_path)), True)) == 2
    assert len(find_unlabeled(ImageSource(str(tmp_path), endings=(".npy", ".tif")), True)) == 4


def test_flags_say_mean_and_std():
    assert normalization_of({}) == ((0.5,) * 3, (0.5,) * 3)
    assert normalization_of({}, imagenet=True)[0] == (0.485, 0.456, 0.406)
    assert normalization_of({"imagenet_default_mean_and_std": False}, imagenet=True)[0] == (0.5,) * 3
    assert normalization_of({"in_chans": 2}) == ((0.5,) * 2, (0.5,) * 2)
    assert normalization_of({"mean_std": ["imagenet"]})[1] == (0.229, 0.224, 0.225)
    assert normalization_of({"mean_std": [0.1, 0.2, 0.3, 0.4], "in_chans": 2}) == ((0.1, 0.2), (0.3, 0.4))

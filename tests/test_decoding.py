"""Decoding of image files: modes, depths, transparency, rotation, and what is refused."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_data import photo
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from data_pipeline.image_formats import load_image
from datasets import ImageFiles
from transforms import eval_view


def save(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return str(tmp_path / name)


def test_every_mode_becomes_rgb(tmp_path):
    gray = Image.fromarray(np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5))
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    assert deep.mode.startswith("I;16")
    for image, name in [
        (gray, "gray.png"),
        (deep, "deep.png"),
        (deep, "deep.tif"),
        (deep, "deep.jp2"),
        (gray.convert("P"), "palette.png"),
    ]:
        loaded = load_image(save(tmp_path, image, name))
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded)[..., 0], np.asarray(gray), err_msg=name)


def test_deep_ppm_is_scaled_by_its_own_maximum(tmp_path):
    values = np.arange(0, 1000, 40, dtype=">u2").reshape(5, 5)
    (tmp_path / "deep.pgm").write_bytes(b"P5 5 5 1000\n" + values.tobytes())
    loaded = np.asarray(load_image(str(tmp_path / "deep.pgm")))[..., 0]
    assert np.abs(loaded - values.astype(float) * 0.255).max() <= 0.51


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1, 25, dtype=np.float32),
        np.full(25, 1.001, dtype=np.float32),
        np.arange(25, dtype=np.int32),
        np.arange(25, dtype=np.int32) * 4000,
    ],
)
def test_numbers_without_a_white_are_refused(values, tmp_path):
    Image.fromarray(values.reshape(5, 5)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="nothing says which is white; give `image_range`"):
        load_image(str(tmp_path / "x.tif"))


@pytest.mark.parametrize(("brightest", "told"), [(4095, True), (40000, False)])
def test_12_bit_images_in_16_bit_files_are_told(brightest, told, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("runtime.terminal.log.propagate", True)
    caplog.set_level("INFO", "beit")
    Image.fromarray(np.linspace(0, brightest, 25).astype(np.uint16).reshape(5, 5)).save(tmp_path / "x.png")
    dataset = ImageFiles([(str(tmp_path / "x.png"), None)], eval_view(32))
    assert ("no value above 4095" in caplog.text) is told
    assert np.asarray(dataset.view.load(dataset.open(0))).max() == round(brightest / 257)


def test_a_line_of_pixels_is_shown_by_what_the_crop_shows(monkeypatch):
    """Lines of 65,000 x 1 pixels took 10 GB; others stay as they were, bit for bit."""
    resize, largest = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *rest, **more: largest.append(size) or resize(self, size, *rest, **more),
    )
    rng = np.random.RandomState(0)
    for width, height in ((65000, 1), (1, 64999), (9000, 7)):
        pixels = rng.randint(0, 256, (height, width, 3), dtype=np.uint8)
        shown = eval_view(224)(Image.fromarray(pixels))["image"]
        assert max(max(size) for size in largest) < 20_000
        middle, half = (width / 2, height / 2), min(width, height) * 224 / 256 / 2
        box = (middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half)
        exact = F.to_tensor(resize(Image.fromarray(pixels), (224, 224), Image.Resampling.BICUBIC, box=box))
        assert (shown - exact).abs().max() < 0.15 and (shown - exact).abs().mean() < 0.01, (width, height)
        assert eval_view((32, 64))(Image.fromarray(pixels))["image"].shape == (3, 32, 64)
        assert max(max(size) for size in largest) < 20_000
    for size in ((90, 70), (500, 333), (64, 1)):
        image = photo(*size)
        plain = T.Compose([T.Resize(256, InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor()])(image)
        assert torch.equal(eval_view(224)(image)["image"], plain)


def test_cmyk_jpeg(tmp_path):
    red = Image.new("RGB", (16, 16), (220, 30, 40))
    loaded = load_image(save(tmp_path, red.convert("CMYK"), "cmyk.jpg", quality=95))
    assert loaded.mode == "RGB"
    assert np.abs(np.asarray(loaded).mean((0, 1)) - (220, 30, 40)).max() < 12


def test_transparent_pixels_are_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 255))
    image.putpixel((0, 0), (10, 20, 30, 0))
    loaded = load_image(save(tmp_path, image, "alpha.png"))
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 1)) == (10, 20, 30)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    loaded = load_image(save(tmp_path, palette, "palette.png", transparency=0))
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 1)) == (10, 20, 30)


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("red", (0, 0, 20, 20))  # the left half, as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees for viewing: left becomes top
    loaded = load_image(save(tmp_path, image, "turned.jpg", exif=exif))
    assert loaded.size == (20, 40)
    red = np.asarray(loaded)[..., 0]
    assert red[5, 10] > 200
    assert red[35, 10] < 50


def test_broken_exif_is_no_broken_picture(tmp_path, monkeypatch):
    """Pillow turns the image and then writes the EXIF block again, which fails for some
    cameras' blocks.
    """
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path, photo(), "exif.jpg", exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", lambda self: struct.pack("H", -1))
    assert load_image(path).size == (70, 90)

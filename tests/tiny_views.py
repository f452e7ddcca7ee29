"""A scene that is hard to resize, in files of many kinds, and views of pretraining."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.crops import PretrainingViews
from masking_generator import MaskingGenerator
from transforms import HALF_MEAN, HALF_STD


def scene(width=500, height=375, seed=0) -> Image.Image:
    """Like a photo: smooth shades, hard edges, saturated and clipped places, some
    noise.
    """
    rng = np.random.RandomState(seed)
    shades = Image.fromarray(rng.randint(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    values = np.array(shades).astype(np.float32)
    for _ in range(6):
        top, left = rng.randint(0, height), rng.randint(0, width)
        values[top : top + height // 4, left : left + width // 4] = rng.choice([0, 255, 40, 210], 3)
    return Image.fromarray((values + 6 * rng.randn(height, width, 3)).clip(0, 255).astype(np.uint8))


def pretraining(
    size=64, second: int | None = 64, jitter=0.4, vflip=0.0, pipeline="exact", on_device=False, mode="bicubic"
):
    masks = MaskingGenerator(4, 6)
    return PretrainingViews(
        size, second, 0.2, jitter, mode, mode, HALF_MEAN, HALF_STD, masks, vflip, pipeline, on_device
    )


def files_of_many_kinds(folder: Path) -> dict[str, str]:
    image, turned = scene(), Image.Exif()
    turned[0x0112] = 6
    transparent = image.convert("RGBA")
    transparent.putalpha(image.convert("L"))
    kinds = {
        "rgb.jpg": (image, {"quality": 92}),
        "gray.jpg": (image.convert("L"), {"quality": 92}),
        "cmyk.jpg": (image.convert("CMYK"), {"quality": 92}),
        "progressive.jpg": (image, {"quality": 92, "progressive": True}),
        "turned.jpg": (image, {"quality": 92, "exif": turned}),
        "turned_large.jpg": (scene(1600, 1200), {"quality": 92, "exif": turned}),
        "rgba.png": (transparent, {}),
        "palette.png": (image.quantize(64), {}),
        "gray.png": (image.convert("L"), {}),
        "lossy.webp": (image, {"quality": 90}),
    }
    for name, (picture, options) in kinds.items():
        picture.save(folder / name, **options)
    return {name: str(folder / name) for name in kinds}

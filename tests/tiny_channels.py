"""Images that are not 8-bit RGB: 12-bit gray in 16-bit PNGs, and four channels in .npy
and TIFF files.
"""

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image


def stripes(seed: int, turned: bool, channels: int, size: int = 40) -> np.ndarray:
    """(size, size, channels) uint16 of 12 bits: stripes of a phase of its own in each
    channel, in one of two directions.
    """
    rng = np.random.RandomState(seed)
    waves = np.sin(np.arange(size)[:, None] * 0.6 + rng.rand(channels) * 6) * 1500 + 2000
    pixels = waves[:, None].repeat(size, 1) + rng.randn(size, size, channels) * 100
    pixels = pixels.clip(0, 4095).astype(np.uint16)
    return pixels.swapaxes(0, 1) if turned else pixels


def gray_12_bits(folder: Path, per_class: int = 8) -> Path:
    """class/number.png."""
    for number, name in enumerate("ab"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = stripes(100 * number + index, bool(number), 1)[..., 0]
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def four_channels(folder: Path, per_class: int = 8) -> Path:
    """class/number.npy (H, W, 4), every second one a TIFF."""
    for number, name in enumerate("ab"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = stripes(100 * number + index, bool(number), 4)
            if index % 2:
                tifffile.imwrite(folder / name / f"{index}.tif", pixels)
            else:
                np.save(folder / name / f"{index}.npy", pixels)
    return folder


def four_channel_pairs(folder: Path) -> Path:
    """ADE20K's layout: four channels in .npy and TIFF, masks of two classes (labels 1
    and 2).
    """
    for split, count in (("training", 6), ("validation", 3)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            mask = np.ones((40, 56), dtype=np.uint8)
            mask[:, 20 + 3 * index :] = 2
            rng = np.random.RandomState(index)
            means = np.array([[0, 0, 0, 0], [800, 3000, 500, 2000], [3000, 700, 2500, 1500]])
            pixels = (means[mask] + rng.randn(40, 56, 4) * 100).clip(0, 4095).astype(np.uint16)
            if index % 2:
                tifffile.imwrite(folder / "images" / split / f"{index}.tif", pixels)
            else:
                np.save(folder / "images" / split / f"{index}.npy", pixels)
            Image.fromarray(mask).save(folder / "annotations" / split / f"{index}.png")
    return folder

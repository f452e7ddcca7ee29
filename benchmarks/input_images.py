"""Input of benchmark.py: random batches, and image files as large as ImageNet's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_pipeline.crops import PretrainingViews
from masking_generator import MaskingGenerator, scaled_mask_count, scaled_min_block
from modeling_vqkd import PATCH_SIZE
from runtime.seeding import seeded
from transforms import HALF_MEAN, HALF_STD

CLASSES = 1000
PHOTO = (500, 375)  # ImageNet's usual size


def masks(grid: int) -> MaskingGenerator:
    return MaskingGenerator(grid, scaled_mask_count(grid), scaled_min_block(grid))


def random_masks(batch_size: int, grid: int, seed: int) -> Tensor:
    """(B, N) bool, on the CPU as in training."""
    generator = masks(grid)
    with seeded(seed, "masks"):
        return torch.stack([torch.from_numpy(generator()).flatten().bool() for _ in range(batch_size)])


def pretraining_view(size: int, patch_size: int = PATCH_SIZE) -> PretrainingViews:
    """For a student of that patch size; the tokenizer sees the crop on the same grid."""
    grid, jitter, scale = size // patch_size, 0.4, 0.2
    ways = ("bicubic", "bicubic", HALF_MEAN, HALF_STD)
    return PretrainingViews(size, grid * PATCH_SIZE, scale, jitter, *ways, masks(grid))


def random_batch(
    batch_size: int, size: int, device: torch.device, second_size: int | None = None
) -> dict[str, Any]:
    """Of (size x size) pixels, for the tokenizer (second_size x second_size)."""
    pixels = torch.rand(batch_size, 3, size, size).to(device)
    labels = torch.randint(CLASSES, (batch_size,)).to(device)
    seen = pixels if second_size in (None, size) else F.interpolate(pixels, second_size)
    return {"image": (pixels - 0.5) / 0.5, "tokenizer_image": seen, "label": labels, "failed": []}


def write_photos(folder: Path, count: int) -> list[str]:
    """Write JPEG files about as large as ImageNet's (100 kB): coarse shapes with fine
    noise.
    """
    width, height = PHOTO
    paths = []
    for index in range(count):
        rng = np.random.RandomState(index)
        coarse = Image.fromarray(rng.randint(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            PHOTO, Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse) + rng.randn(height, width, 3) * 12
        paths.append(str(folder / f"{index}.jpg"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths

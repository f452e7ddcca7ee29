"""Blockwise masking (BEiT v1, algorithm 1): rectangles are masked until the budget of
patches is used up.

Beside it, the ablation that masks single patches.
"""

from __future__ import annotations

import math
import random

import numpy as np
import numpy.typing as npt

TRIES_PER_BLOCK = 10


class MaskingGenerator:
    """Calling it gives an (H, W) int array, 1 = masked, with exactly
    `num_masking_patches` ones.

    Args:
        input_size: the patch grid, H = W or (H, W), in patches.
        num_masking_patches: masked patches of one mask; ValueError when the grid has
            fewer.
        min_num_patches, max_num_patches: area of one rectangle in patches; no maximum:
            whatever is still to be masked.
        min_aspect, max_aspect: range of height / width, log-uniform; the maximum
            defaults to 1 / min_aspect.

    Draws from Python's global `random`, which the caller seeds.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int,
        min_num_patches: int = 4,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        if not 0 <= num_masking_patches <= self.height * self.width:
            raise ValueError(
                f"{num_masking_patches} patches cannot be masked on a {self.height}x{self.width} grid"
            )
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        self.max_num_patches = num_masking_patches if max_num_patches is None else max_num_patches
        if min_num_patches < 0 or self.max_num_patches < 0 or min_aspect <= 0:
            raise ValueError(
                f"block areas {min_num_patches} to {max_num_patches} or min_aspect {min_aspect} are negative"
            )
        self.log_aspect = math.log(min_aspect), math.log(max_aspect or 1 / min_aspect)

    def __repr__(self) -> str:
        return (
            f"MaskingGenerator({self.num_masking_patches} of {self.height}x{self.width} patches, blocks of "
            f"{self.min_num_patches} to {self.max_num_patches})"
        )

    def __call__(self) -> npt.NDArray[np.int_]:
        mask = np.zeros((self.height, self.width), dtype=int)
        left = self.num_masking_patches
        while left > 0:
            added = self._mask_block(mask, min(left, self.max_num_patches))
            if added == 0:
                break
            left -= added
        # A block never exceeds what is left, so cells may be missing at the end but are
        # never too many.
        if left > 0:
            mask_cells(mask, left)
        return mask

    def _mask_block(self, mask: npt.NDArray[np.int_], most: int) -> int:
        """Mask one rectangle that adds 1 to `most` cells, in place; the number added, 0
        when no try fitted.
        """
        for _ in range(TRIES_PER_BLOCK):
            # `most` may be the smaller of the two: uniform takes them in either order.
            area = random.uniform(self.min_num_patches, most)
            aspect = math.exp(random.uniform(*self.log_aspect))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= self.height or w >= self.width:
                continue
            top, left = random.randint(0, self.height - h), random.randint(0, self.width - w)
            block = mask[top : top + h, left : left + w]
            added = h * w - int(block.sum())
            if 0 < added <= most:
                block[:] = 1
                return added
        return 0


class RandomMaskingGenerator(MaskingGenerator):
    """Single patches, each as likely as any other (BEiT's ablation of blockwise
    masking). What describes blocks is not used.
    """

    def __repr__(self) -> str:
        return f"RandomMaskingGenerator({self.num_masking_patches} of {self.height}x{self.width} patches)"

    def __call__(self) -> npt.NDArray[np.int_]:
        mask = np.zeros((self.height, self.width), dtype=int)
        mask_cells(mask, self.num_masking_patches)
        return mask


def mask_cells(mask: npt.NDArray[np.int_], count: int) -> None:
    """Mask `count` of the cells that are not masked yet, in place."""
    mask.flat[random.sample(np.flatnonzero(mask == 0).tolist(), count)] = 1


MASK_TYPES = {"block": MaskingGenerator, "random": RandomMaskingGenerator}


def scaled_mask_count(grid: int) -> int:
    """Masked patches of a grid x grid image when `num_mask_patches` is not given: the
    recipe's share, 75 of 14x14.
    """
    return max(1, round(75 / 196 * grid * grid))


def scaled_min_block(grid: int) -> int:
    """Smallest block when `min_mask_patches_per_block` is not given: the square of the
    same share of the grid's side as the recipe's (16 patches = 4x4 of 14x14), and at
    least 2x2; 4 on an 8x8 grid.
    """
    return max(2, round(4 / 14 * grid)) ** 2

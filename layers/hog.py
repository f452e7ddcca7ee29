"""Histograms of oriented gradients (Dalal and Triggs, 2005), as a target for every
patch.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

BINS = 9  # unsigned orientations; bin b is centered at 20 b degrees (0: a vertical edge)
CELL = 8  # pixels on a side
DIM_PER_CHANNEL = 2 * 2 * BINS  # cells x orientations
DIM = 3 * DIM_PER_CHANNEL  # of colors


def compute_hog(x: Tensor) -> Tensor:
    """Images (B, C, 16 G, 16 G) -> (B, G * G, C * DIM_PER_CHANNEL): the histograms of
    the 2 x 2 cells of each patch of 16 pixels, one for each channel, normalized
    together.

    A gradient is shared between its two nearest bins by their distance.
    """
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    magnitude = torch.hypot(dx, dy)
    # opposite directions are one
    orientation = torch.atan2(dy, dx).mul_(BINS / math.pi).remainder_(BINS)
    cells = []
    for b in range(BINS):
        distance = (orientation - b).abs_()
        # orientations close in a circle
        weight = torch.minimum(distance, BINS - distance).neg_().add_(1).clamp_(min=0)
        cells.append(F.avg_pool2d(weight.mul_(magnitude), CELL))
    histograms = rearrange(torch.stack(cells), "o b c (gy y) (gx x) -> b (gy gx) (c y x o)", y=2, x=2)
    # Under 1e-3, less than a gray level, a patch is flat: its target fades out
    # instead of becoming amplified noise.
    return F.normalize(histograms, dim=-1, eps=1e-3)

"""The feature maps of a network of timm, and which sizes of images give a map of a
certain grid.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

# timm's ways of refusing a size
CANNOT_RUN = (AttributeError, AssertionError, RuntimeError, TypeError, ValueError)


def compute_feature_maps(network: Any, x: torch.Tensor, levels: list[int] | None) -> list[torch.Tensor]:
    return network.forward_intermediates(
        x, indices=levels, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )


@torch.no_grad()
def measure_map_shapes(network: Any, size: int) -> list[tuple[int, int, int]]:
    """(channels, height, width) of the network's maps of a `size` px image; measured,
    because paddings differ.
    """
    maps = compute_feature_maps(network.eval(), torch.zeros(1, 3, size, size), None)
    return [(m.shape[1], m.shape[2], m.shape[3]) for m in maps]


def find_matching_sizes(network: Any, grid: int) -> str:
    """Input sizes at which one of the network's maps is grid x grid, to be named in an
    error.
    """
    sizes = []
    for stride in sorted({stage["reduction"] for stage in network.feature_info}):
        with contextlib.suppress(*CANNOT_RUN):
            if any(shape[1:] == (grid, grid) for shape in measure_map_shapes(network, stride * grid)):
                sizes.append(f"{stride * grid} (stride {stride})")
    return " or ".join(sizes)

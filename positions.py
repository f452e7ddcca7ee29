"""Where a token stands: relative position bias, absolute positions, and what becomes of both on another grid of patches.

Shapes: grid (height, width) in patches, T = 1 + height * width tokens with CLS in front, H heads, C width.
Sources: Swin (relative position bias); BEiT's fine-tuning at other resolutions (geometric spacing).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.interpolate import InterpolatedUnivariateSpline
from torch import Tensor, nn


def is_exported() -> bool:
    """Whether torch.export or torch.jit.trace records this call: then no size of a batch or an image may become a constant."""
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 lacks the first
    return torch.jit.is_tracing() or exporting()


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def grid_of(tokens: int) -> int:
    """Side of the square grid that `tokens` patches fill."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens do not fill a square grid")
    return side


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """(T, T) int64: the row of the bias table for each (query, key).

    Patches: (dy + height - 1) * (2 * width - 1) + (dx + width - 1) with d = query - key. The last three rows of the
    table stand for CLS -> patch, patch -> CLS and CLS -> CLS.
    """
    height, width = grid
    rows = (2 * height - 1) * (2 * width - 1) + 3
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    index = torch.empty(height * width + 1, height * width + 1, dtype=torch.int64)
    index[1:, 1:] = (dy + height - 1) * (2 * width - 1) + (dx + width - 1)
    index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    return index


def add_relative_position_bias(module: Any, grid: tuple[int, int], num_heads: int) -> None:
    """Give `module` a zero table and its index under the published names; shared and per-block bias differ only in owner."""
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    module.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
    module.register_buffer("relative_position_index", relative_position_index(grid))
    module.grid = grid


def relative_position_bias(module: Any, other: OtherGrid | None = None) -> Tensor:
    """(H, T, T) from the table of `module`, on its own grid or stretched to another one."""
    table = module.relative_position_bias_table
    if other is None:
        return gather_bias(table, module.relative_position_index)
    return gather_bias(resize_rel_pos_bias_table(table, other.size, module.grid), other.pairs)


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """Table (rows, H) and index (T, T) -> bias (H, T, T)."""
    bias = table.index_select(0, index.flatten())
    return rearrange(bias, "(q k) h -> h q k", q=index.shape[0]).contiguous()  # each block reads it row by row


class OtherGrid(NamedTuple):
    """A grid that a model was not built for, and the row of its bias table for each pair of tokens, on the model's device."""

    size: tuple[int, int]
    pairs: Tensor  # (T, T), of relative_position_index


def resize_rel_pos_bias_table(
    table: Tensor, dst_grid: int | tuple[int, int], src_grid: tuple[int, int] | None = None
) -> Tensor:
    """Bias table (rows, H) of one grid -> table of another, (height, width) or a square's side; the three CLS rows are kept.

    `src_grid` None: the table is a square grid's. Source distances are spaced geometrically (1, 1+q, 1+q+q^2, ...) so that
    the farthest one meets the target's: near offsets keep their values, far ones are stretched. Cubic spline per head
    (BEiT's fine-tuning at other resolutions), each axis by itself: linear in the table, so gradients pass. ValueError:
    the rows do not fit the source grid.
    """
    patch_rows, cls_rows = table[:-3], table[-3:]
    if src_grid is None:
        src_grid = (round(len(patch_rows) ** 0.5) + 1) // 2, (round(len(patch_rows) ** 0.5) + 1) // 2
    dst_grid = as_pair(dst_grid)
    if (2 * src_grid[0] - 1) * (2 * src_grid[1] - 1) != len(patch_rows):
        raise ValueError(f"a bias table of {len(table)} rows does not belong to a grid of {src_grid[0]} x {src_grid[1]}")
    if src_grid == dst_grid:
        return table.clone()
    spaced = rearrange(patch_rows, "(y x) h -> h y x", y=2 * src_grid[0] - 1).double()
    down, across = (
        torch.from_numpy(stretching(src, dst)).to(table.device) for src, dst in zip(src_grid, dst_grid, strict=True)
    )
    resized = rearrange(down @ spaced @ across.T, "h y x -> (y x) h").to(table.dtype)
    return torch.cat((resized, cls_rows))


@functools.lru_cache(maxsize=64)
def stretching(src: int, dst: int) -> np.ndarray:
    """Matrix (2 dst - 1, 2 src - 1) that takes an axis of a bias table from `src` patches to `dst`: the spline is linear in
    the values that it goes through."""
    if src == dst:
        return np.eye(2 * dst - 1)
    if src == 1:  # a single row or column says nothing of distances: it counts for all of them
        return np.ones((2 * dst - 1, 1))
    sources, targets = _geometric_coordinates(src - 1, max(dst - 1, 1)), _unit_coordinates(dst - 1)
    splines = (InterpolatedUnivariateSpline(sources, unit, k=min(3, 2 * src - 2), ext="const") for unit in np.eye(2 * src - 1))
    return np.stack([spline(targets) for spline in splines], axis=1)


def _unit_coordinates(reach: int) -> np.ndarray:
    return np.arange(-reach, reach + 1, dtype=np.float64)


def _geometric_coordinates(steps: int, reach: int) -> np.ndarray:
    """Symmetric coordinates with `steps` distances each side; the ratio is bisected until the farthest meets `reach`."""
    if steps == reach:  # this axis keeps its length
        return _unit_coordinates(steps)
    low, high, ratio = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**steps) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    distances = np.cumsum(ratio ** np.arange(steps, dtype=np.float64))
    return np.concatenate((-distances[::-1], [0.0], distances))


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], src_grid: tuple[int, int] | None = None) -> Tensor:
    """Absolute positions (1, 1 + h*w, C) -> (1, 1 + height*width, C), patches bicubic, CLS kept. `src_grid` None: square."""
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    height, width = src_grid or as_pair(grid_of(patches.shape[1]))
    patches = patches.reshape(1, height, width, -1).permute(0, 3, 1, 2)  # (1, C, h, w)
    patches = F.interpolate(patches.float(), size=grid, mode="bicubic", align_corners=False).to(pos_embed)
    return torch.cat((cls, patches.flatten(2).transpose(1, 2)), dim=1)

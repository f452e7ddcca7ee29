"""Where a token stands: relative position bias, absolute positions, and what becomes of
both on another grid of patches.

Shapes: grid (height, width) in patches, T = 1 + height * width tokens with CLS in
front, H heads, C width. Sources: Swin (relative position bias); BEiT's fine-tuning at
other resolutions (geometric spacing).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.interpolate import InterpolatedUnivariateSpline
from torch import Tensor, nn


def is_exporting() -> bool:
    """Whether torch.export or torch.jit.trace records this call: then no size of a
    batch or an image may become a constant.
    """
    # torch 2.6 lacks the first
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return torch.jit.is_tracing() or exporting()


def has_dynamic_size(sides: Sequence[int]) -> bool:
    """Whether this call is recorded for images of any size: whether one of these sides
    may be another when it is played.
    """
    sizes_hidden = torch.jit.is_tracing() or torch.compiler.is_dynamo_compiling()
    return is_exporting() and (sizes_hidden or any(isinstance(side, torch.SymInt) for side in sides))


def at_least(size: Any, least: int) -> Any:
    """max(size, least) of a size, which while a call is recorded is a symbol or a
    tensor.
    """
    return size.clamp(min=least) if isinstance(size, Tensor) else torch.sym_max(size, least)


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def grid_of(tokens: int) -> int:
    """Side of the square grid that `tokens` patches fill."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens do not fill a square grid")
    return side


def relative_position_index(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(T, T) int64: the row of the bias table for each (query, key).

    Patches: (dy + height - 1) * (2 * width - 1) + (dx + width - 1) with d = query -
    key. The last three rows of the table stand for CLS -> patch, patch -> CLS and CLS
    -> CLS.
    """
    height, width = grid
    rows = (2 * height - 1) * (2 * width - 1) + 3
    sides = (torch.arange(side, device=device) for side in grid)
    y, x = torch.meshgrid(*sides, indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    index = torch.empty(height * width + 1, height * width + 1, dtype=torch.int64, device=device)
    index[1:, 1:] = (dy + height - 1) * (2 * width - 1) + (dx + width - 1)
    index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    return index


def add_relative_position_bias(module: Any, grid: tuple[int, int], num_heads: int) -> None:
    """Give `module` a zero table and its index under the published names; shared and
    per-block bias differ only in owner.
    """
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    module.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
    module.register_buffer("relative_position_index", relative_position_index(grid))
    module.grid = grid


def relative_position_bias(module: Any, grid: PositionGrid | None = None) -> Tensor:
    """(H, T, T) from the table of `module`, on its own grid or stretched to another
    one.
    """
    table = module.relative_position_bias_table
    if grid is None:
        return gather_bias(table, module.relative_position_index)
    if grid.stretch is not None:
        return gather_bias(stretch_table(table, module.grid, *grid.stretch), grid.pairs)
    return gather_bias(resize_rel_pos_bias_table(table, grid.size, module.grid), grid.pairs)


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """Table (rows, H) and index (T, T) -> bias (H, T, T)."""
    bias = table.index_select(0, index.flatten())
    # each block reads it row by row
    return rearrange(bias, "(q k) h -> h q k", q=index.shape[0]).contiguous()


class PositionGrid(NamedTuple):
    """A grid that a model was not built for, and the row of its bias table for each
    pair of tokens, on the model's device.

    `stretch`: in an export, where the grid may be any, the matrices that bring the
    model's tables to it, for rows and columns.
    """

    size: tuple[int, int]
    pairs: Tensor  # (T, T), of relative_position_index
    stretch: tuple[Tensor, Tensor] | None = None


def resize_rel_pos_bias_table(
    table: Tensor, dst_grid: int | tuple[int, int], src_grid: tuple[int, int] | None = None
) -> Tensor:
    """Bias table (rows, H) of one grid -> table of another, (height, width) or a
    square's side; the three CLS rows are kept.

    `src_grid` None: the table is a square grid's. Source distances are spaced
    geometrically (1, 1+q, 1+q+q^2, ...) so that the farthest one meets the target's:
    near offsets keep their values, far ones are stretched. Cubic spline per head
    (BEiT's fine-tuning at other resolutions), each axis by itself: linear in the table,
    so gradients pass. ValueError: the rows do not fit the source grid.
    """
    patch_rows = table[:-3]
    if src_grid is None:
        src_grid = (round(len(patch_rows) ** 0.5) + 1) // 2, (round(len(patch_rows) ** 0.5) + 1) // 2
    dst_grid = as_pair(dst_grid)
    if (2 * src_grid[0] - 1) * (2 * src_grid[1] - 1) != len(patch_rows):
        raise ValueError(
            f"a bias table of {len(table)} rows does not belong to a grid of {src_grid[0]} x {src_grid[1]}"
        )
    if src_grid == dst_grid:
        return table.clone()
    down, across = (
        torch.from_numpy(resize_matrix(src, dst)).to(table.device, non_blocking=True)
        for src, dst in zip(src_grid, dst_grid, strict=True)
    )
    return stretch_table(table, src_grid, down, across)


def stretch_table(table: Tensor, src_grid: tuple[int, int], down: Tensor, across: Tensor) -> Tensor:
    """Bias table (rows, H) of `src_grid` by the matrices of resize_matrix for its rows
    and its columns; the CLS rows are kept.
    """
    spaced = rearrange(table[:-3], "(y x) h -> h y x", y=2 * src_grid[0] - 1).double()
    if is_exporting():  # where folding the heads into the rows, as matmul does, would compare sizes
        heads = spaced.shape[0]
        columns = torch.bmm(torch.bmm(down.expand(heads, -1, -1), spaced), across.T.expand(heads, -1, -1))
    else:
        columns = down @ spaced @ across.T
    resized = columns.permute(1, 2, 0).flatten(0, 1).to(table.dtype)
    return torch.cat((resized, table[-3:]))


@functools.lru_cache(maxsize=64)
def resize_matrix(src: int, dst: int) -> np.ndarray:
    """Matrix (2 dst - 1, 2 src - 1) that takes an axis of a bias table from `src`
    patches to `dst`: the spline is linear in the values that it goes through.
    """
    if src == dst:
        return np.eye(2 * dst - 1)
    if src == 1:  # a single row or column says nothing of distances: it counts for all of them
        return np.ones((2 * dst - 1, 1))
    sources, targets = _geometric_coordinates(src - 1, max(dst - 1, 1)), _unit_coordinates(dst - 1)
    splines = (
        InterpolatedUnivariateSpline(sources, unit, k=min(3, 2 * src - 2), ext="const")
        for unit in np.eye(2 * src - 1)
    )
    return np.stack([spline(targets) for spline in splines], axis=1)


def dynamic_resize_matrix(src: int, dst: int) -> Tensor:
    """`resize_matrix` in torch alone, for an export in which `dst` is free: the spline
    is computed when the model is called.

    A cubic spline by its second derivatives, whose third derivative does not jump at
    the second and the last but one point.
    """
    targets = torch.arange(2 * dst - 1, dtype=torch.float64)
    reach = targets[-1] / 2
    targets = targets - reach
    if src == 1:
        return torch.ones_like(targets)[:, None]
    low, high, steps = torch.full_like(reach, 1.01), torch.full_like(reach, 1.5), src - 1
    ratio = low
    for _ in range(19):  # as often as _geometric_coordinates halves 0.49 until 1e-6 is left
        ratio = (low + high) / 2
        too_far = (1 - ratio**steps) / (1 - ratio) > reach.clamp(min=1)
        low, high = torch.where(too_far, low, ratio), torch.where(too_far, ratio, high)
    # this axis keeps its length
    ratio = torch.where(reach.clamp(min=1) == steps, torch.ones_like(ratio), ratio)
    distances = (ratio ** torch.arange(steps, dtype=torch.float64)).cumsum(0)
    x = torch.cat((-distances.flip(0), torch.zeros(1, dtype=torch.float64), distances))
    targets = torch.minimum(torch.maximum(targets, x[0]), x[-1])
    if src == 2:  # three points: a parabola
        known, asked = (torch.stack([torch.ones_like(p), p, p**2], dim=1) for p in (x, targets))
        return asked @ torch.linalg.inv(known)
    points, h = torch.eye(2 * src - 1, dtype=torch.float64), x.diff()[:, None]
    slopes = points.diff(dim=0) / h
    inner = h[:-1] * points[:-2] + 2 * (h[:-1] + h[1:]) * points[1:-1] + h[1:] * points[2:]
    first = h[1] * points[0] - (h[0] + h[1]) * points[1] + h[0] * points[2]
    last = h[-1] * points[-3] - (h[-1] + h[-2]) * points[-2] + h[-2] * points[-1]
    none = torch.zeros_like(points[:1])
    curvature = torch.linalg.solve(
        torch.cat((first[None], inner, last[None])), torch.cat((none, 6 * slopes.diff(dim=0), none))
    )
    piece = (targets[:, None] >= x[1:-1]).sum(dim=1)
    h, left, right = h[piece], (targets - x[piece])[:, None], (x[piece + 1] - targets)[:, None]
    bend, next_bend = curvature[piece], curvature[piece + 1]
    cubic = (bend * right**3 + next_bend * left**3) / (6 * h)
    linear = (points[piece] / h - bend * h / 6) * right + (points[piece + 1] / h - next_bend * h / 6) * left
    return cubic + linear


def _unit_coordinates(reach: int) -> np.ndarray:
    return np.arange(-reach, reach + 1, dtype=np.float64)


def _geometric_coordinates(steps: int, reach: int) -> np.ndarray:
    """Symmetric coordinates with `steps` distances each side; the ratio is bisected
    until the farthest meets `reach`.
    """
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


def resize_pos_embed(
    pos_embed: Tensor, grid: tuple[int, int], src_grid: tuple[int, int] | None = None
) -> Tensor:
    """Absolute positions (1, 1 + h*w, C) -> (1, 1 + height*width, C), patches bicubic,
    CLS kept. `src_grid` None: square.
    """
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    height, width = src_grid or as_pair(grid_of(patches.shape[1]))
    patches = patches.reshape(1, height, width, -1).permute(0, 3, 1, 2)  # (1, C, h, w)
    patches = F.interpolate(patches.float(), size=grid, mode="bicubic", align_corners=False).to(pos_embed)
    return torch.cat((cls, patches.flatten(2).transpose(1, 2)), dim=1)

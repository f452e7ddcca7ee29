"""Convolution, batch norm over all processes, pooling and resizing: what segmentation
heads are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from layers.rel_pos_bias import has_dynamic_size


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes, on any device (torch's own
    SyncBatchNorm is for GPUs alone).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same"""
        if not self.training or not (
            dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        ):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            z = x.float()
            count = all_reduce(z.new_tensor(z.numel() / z.shape[1]))
            mean = all_reduce(z.sum(dim=(0, 2, 3))) / count
            centered = z - mean[:, None, None]
            var = all_reduce(centered.square().sum(dim=(0, 2, 3))) / count
            self.remember(mean.detach(), var.detach(), count)
            scale = self.weight * (var + self.eps).rsqrt()
            return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def remember(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Running statistics as torch keeps them: the variance without bias."""
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr, operator]
        self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
        self.running_var.lerp_(var * count / (count - 1).clamp(min=1), self.momentum)  # type: ignore[union-attr, arg-type]


class AveragePool(nn.AdaptiveAvgPool2d):
    """To `output_size` squares of a map of any size; torch's own compares sizes, which
    no export can.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, output_size, output_size)"""
        if not has_dynamic_size(x.shape[-2:]):
            return super().forward(x)
        rows, columns = (self.averages(side).to(x) for side in x.shape[-2:])
        maps = x.flatten(0, 1)  # matmul would compare sizes, bmm does not
        count = maps.shape[0]
        pooled = torch.bmm(torch.bmm(rows.expand(count, -1, -1), maps), columns.T.expand(count, -1, -1))
        return pooled.unflatten(0, x.shape[:2])

    def averages(self, side: int) -> Tensor:
        """(output_size, side): each row is the mean of one of as many parts of a side,
        which may overlap by one.
        """
        count: Any = self.output_size
        part, position = torch.arange(count)[:, None], torch.arange(side)
        first, end = part * side // count, -((part + 1) * -side // count)
        inside = (position >= first) & (position < end)
        return inside / (end - first)


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU; the size stays."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = BatchNorm(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    same = not has_dynamic_size((*x.shape[-2:], *size)) and x.shape[-2:] == tuple(size)
    return x if same else F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)

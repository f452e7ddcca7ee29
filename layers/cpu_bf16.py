"""Training in bf16 on a CPU: linear layers and heads whose backward passes suit oneDNN. Same numbers, less time.

Shapes: B batch, T tokens, C width, H heads, D = C / H, M rows. Measured: docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

OUTPUTS_IN_CACHE = 512  # gradients of weights are transposed by so many outputs at once


def trains_in_bf16(x: Tensor, weight: Tensor) -> bool:
    """Whether this is training under bf16 autocast on a CPU, uncompiled."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    return torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_grad_enabled() and weight.requires_grad


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, with a faster gradient of the weight where that is known."""
    if not trains_in_bf16(x, weight):
        return F.linear(x, weight, bias)
    return LinearOnCpu.apply(*(given if given is None else given.to(torch.bfloat16) for given in (x, weight, bias)))


class LinearOnCpu(torch.autograd.Function):
    """F.linear of bf16 tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        return of_x, weight_gradient(rows, x.flatten(0, -2)), rows.sum(dim=0) if ctx.with_bias else None


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Of a linear layer, from its output's gradient (M, out) and its input (M, in): (out, in).

    In bf16 on a CPU from a transposed copy of the narrower factor: given a transposed view, oneDNN is up to 1.4 times as
    slow, most of all with a wide one.
    """
    if gradient.device.type != "cpu" or gradient.dtype != torch.bfloat16:
        return gradient.t() @ x
    if x.shape[1] >= gradient.shape[1]:
        return gradient.t().contiguous() @ x
    result, narrow = x.new_empty(gradient.shape[1], x.shape[1]), x.t().contiguous()
    for rows, columns in zip(result.split(OUTPUTS_IN_CACHE), gradient.split(OUTPUTS_IN_CACHE, dim=1), strict=True):
        rows.copy_((narrow @ columns).t())
    return result


class HeadsOnCpu(torch.autograd.Function):
    """(B, T, 3 * C) -> query, key and value (B, H, T, D), each in one piece as the products want them. Their gradients are
    written straight to where the projection's is read."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for part in rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        b, h, t, d = gradients[0].shape
        of_qkv = gradients[0].new_empty(b, t, 3, h, d)
        for part, gradient in zip(of_qkv.unbind(2), gradients, strict=True):
            part.copy_(gradient.transpose(1, 2))
        return of_qkv.flatten(2), None

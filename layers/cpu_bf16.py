"""Training on a CPU, mostly in bf16: linear layers, patch embedding and attention whose
backward passes suit oneDNN.

`swap_in` exchanges them in a model that is built of torch's own layers, in place:
parameters and their names stay, the numbers are those of the plain layers except for
the order of sums. Nothing else refers to this module but the fused cross-entropy, for
`weight_gradient`. Measured: docs/lab/performance.md.

Shapes: B batch, N patches, C width, M rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from layers.attention import fused_attention, plain_attention
from layers.meant_device import is_cpu
from layers.rel_pos_bias import is_exporting

OUTPUTS_IN_CACHE = 512  # gradients of weights are transposed by this many outputs at once
SCORES_IN_CACHE = 2**23  # bytes of attention's scores at once, where no gradient needs them


def swap_in(model: nn.Module) -> None:
    """Exchange, in place, the layers of a model that is about to be trained on a
    CPU.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CpuLinear
        elif type(module) is nn.Conv2d and module.kernel_size == module.stride:
            module.__class__ = CpuPatchConv
        if getattr(module, "attend", None) is fused_attention:
            module.attend = cpu_attention  # type: ignore[assignment]


def trains_in_bf16(x: Tensor, weight: Tensor) -> bool:
    """Whether this is training under bf16 autocast on a CPU, uncompiled."""
    if torch.compiler.is_compiling() or not is_cpu(x.device) or not torch.is_autocast_enabled("cpu"):
        return False
    return (
        torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_grad_enabled() and weight.requires_grad
    )


class CpuLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class CpuPatchConv(nn.Conv2d):
    """A convolution of patches that do not overlap, as a matrix product: its own
    backward pass takes 4 times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not trains_in_bf16(x, self.weight):
            return super().forward(x)
        p, q = self.kernel_size
        pixels = rearrange(x.to(torch.bfloat16), "b c (h p) (w q) -> b h w (c p q)", p=p, q=q)
        return linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)  # (B, C, h, w)


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, drop: float) -> Tensor:
    """fused_attention. On a CPU torch's fused kernels have no fast bf16 backward pass
    (step by step is 2 to 5 times as fast), and none at all for a learned bias: what
    torch does instead is 1.15 times as slow and keeps more. Without gradients step by
    step is as fast or faster in bf16, as long as the scores stay in the cache.
    """
    in_bf16, learned_bias = q.dtype == torch.bfloat16, bias is not None and bias.requires_grad
    if torch.is_grad_enabled():
        if in_bf16 or learned_bias:
            return plain_attention(q, k, v, bias, scale, drop)[0]
    elif in_bf16 and not is_exporting():
        images = SCORES_IN_CACHE // (2 * q.shape[1] * q.shape[2] * k.shape[2])
        if images > 0:
            return attend_in_chunks(images, q, k, v, bias, scale, drop)
    return fused_attention(q, k, v, bias, scale, drop)


def attend_in_chunks(
    images: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, drop: float
) -> Tensor:
    """plain_attention of so many images at a time."""
    parts = zip(q.split(images), k.split(images), v.split(images), strict=True)
    if bias is None:
        return torch.cat([plain_attention(*part, None, scale, drop)[0] for part in parts])
    biases = bias.to(q.dtype).expand(len(q), -1, -1, -1).split(images)
    chunks = zip(parts, biases, strict=True)
    return torch.cat([plain_attention(*part, own, scale, drop)[0] for part, own in chunks])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, with a faster gradient of the weight while training in bf16."""
    if not trains_in_bf16(x, weight):
        return F.linear(x, weight, bias)
    return LinearOnCpu.apply(
        *(given if given is None else given.to(torch.bfloat16) for given in (x, weight, bias))
    )


class LinearOnCpu(torch.autograd.Function):
    """F.linear of bf16 tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_output @ weight if ctx.needs_input_grad[0] else None
        rows = grad_output.flatten(0, -2)
        return grad_x, weight_gradient(rows, x.flatten(0, -2)), rows.sum(dim=0) if ctx.with_bias else None


def weight_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    """Of a linear layer, from its output's gradient (M, out) and its input (M, in):
    (out, in).

    In bf16 on a CPU from a transposed copy of the narrower factor: given a transposed
    view, oneDNN is up to 1.4 times as slow, most of all with a wide one.
    """
    if not is_cpu(grad_output.device) or grad_output.dtype != torch.bfloat16:
        return grad_output.t() @ x
    if x.shape[1] >= grad_output.shape[1]:
        return grad_output.t().contiguous() @ x
    result, narrow = x.new_empty(grad_output.shape[1], x.shape[1]), x.t().contiguous()
    for rows, columns in zip(
        result.split(OUTPUTS_IN_CACHE), grad_output.split(OUTPUTS_IN_CACHE, dim=1), strict=True
    ):
        rows.copy_((narrow @ columns).t())
    return result

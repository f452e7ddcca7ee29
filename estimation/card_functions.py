"""How GPUs compute what CPUs compute otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from runtime.cards import Card

IN_FP32 = ("layer_norm", "group_norm", "softmax", "log_softmax", "cosine_similarity", "mse_loss")


def card_functions(card: Card, add_flops: Callable[[int], None]) -> list[tuple[Any, str, Any]]:
    """(where, name, what CUDA computes in its place) on tensors that are a CPU's to
    torch: attention without a matrix of all pairs, and what autocast computes in fp32.
    """

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        """As torch chooses among its kernels: flash where it can, else memory-efficient."""
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
            attn_mask = None if attn_mask is None else attn_mask.to(dtype)
        flash = attn_mask is None and card.capability >= 80 and is_half(q)
        return FusedAttention.apply(q, k, v, attn_mask, flash, add_flops)

    def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if is_half(x) and dtype is torch.float32:
            return torch.ops.aten._softmax(x, dim, True)  # without a copy in fp32
        return own_softmax(x, dim, dtype)

    def in_fp32(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                args = tuple(arg.float() if is_half(arg) else arg for arg in args)
            return function(*args, **kwargs)

        return wrapped

    own_softmax = in_fp32(Tensor.softmax)
    return [
        (F, "scaled_dot_product_attention", attention),
        (Tensor, "softmax", softmax),
        *((F, name, in_fp32(getattr(F, name))) for name in IN_FP32),
    ]


def is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


class FusedAttention(torch.autograd.Function):
    """What flash and memory-efficient attention allocate and compute; the numbers are
    none. Sources: ATen's native/transformers/cuda/attention.cu and attention_backward.cu.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, flash: bool, add_flops: Any
    ) -> Tensor:
        batch, heads, rows, _ = q.shape
        out = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(batch, heads, rows if flash else up(rows, 32), dtype=torch.float32)
        ctx.bias_shape = ctx.bias_kept = None
        if bias is not None:
            ctx.bias_shape = bias.shape
            if bias.shape[-1] % 8:  # a padded copy, which is kept
                bias = F.pad(bias, (0, 8 - bias.shape[-1] % 8))
        ctx.flash, ctx.add_flops, ctx.wants_bias = flash, add_flops, ctx.needs_input_grad[3]
        ctx.save_for_backward(q, k, v, bias, out, lse)
        add_flops(2 * products(q, k))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _, lse = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
        workspace = [torch.empty_like(lse)]
        if ctx.flash:  # the query's gradient is summed in fp32
            batch, heads, rows, width = q.shape
            workspace.append(q.new_empty(batch, heads, up(rows, 128), up(width, 32), dtype=torch.float32))
        grad_bias = None
        if ctx.wants_bias:  # of every image, then summed
            shape = ctx.bias_shape
            every = q.new_empty(*q.shape[:3], up(k.shape[2], 16))[..., : k.shape[2]]
            grad_bias = every.sum_to_size(shape) if tuple(every.shape) != tuple(shape) else every
        ctx.add_flops(4 * products(q, k))
        return (*grads, grad_bias, None, None)


def up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def products(q: Tensor, k: Tensor) -> int:
    """FLOP of one product of all queries with all keys."""
    batch, heads, rows, width = q.shape
    return 2 * batch * heads * rows * k.shape[2] * width

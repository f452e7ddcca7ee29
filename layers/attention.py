"""softmax(scale * q k^T + bias) v, fused and step by step.

Shapes: B batch, H heads, T tokens, R queries (all tokens or a subset of them), D
channels of a head. The bias is (H, T, T) or (B, H, R, T).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, drop: float
) -> Tensor:
    """Query (B, H, R, D), key and value (B, H, T, D) -> (B, H, R, D)."""
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, drop: float
) -> tuple[Tensor, Tensor]:
    """The same, and the weights before dropout (B, H, R, T)."""
    with torch.autocast(q.device.type, enabled=False):
        scores = (q * scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        weights = scores.softmax(dim=-1)
        return F.dropout(weights, drop, drop > 0) @ v, weights

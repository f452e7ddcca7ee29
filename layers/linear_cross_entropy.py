"""Cross-entropy of a linear layer over thousands of classes, without keeping its
logits.

Shapes: P rows, C width, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from layers.codebook_search import ROWS_IN_CACHE
from layers.cpu_bf16 import weight_gradient
from layers.meant_device import is_cpu

# rows whose probabilities are in memory at once; on a CPU so few that they stay in its
# cache
ROWS_ON_GPU = 2048
FP16_ROWS = 4096  # the gradients of this many rows can be summed in fp16, which ends at 65504


def linear_cross_entropy(hidden: Tensor, head: nn.Linear, labels: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (P, C), labels (P,) -> loss () and predictions (P,), the classes of the
    largest logits.

    The loss equals F.cross_entropy(head(hidden).float(), labels), under autocast too,
    but no (P, K) values are kept for the backward pass.
    """
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return LinearCrossEntropy.apply(hidden, head.weight, head.bias, labels, dtype, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    """softmax(logits) - one_hot(labels) is the logits' gradient, except for a factor
    that the backward pass brings (the mean, the loss scale). It is computed in the
    forward pass, in the logits' place, and only the gradients of hidden, weight and
    bias that follow from it are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        logits = torch.addmm(bias.to(dtype), hidden, weight.t())  # (P, K)
        rows = ROWS_IN_CACHE if is_cpu(logits.device) else ROWS_ON_GPU
        scale = FP16_ROWS / len(labels) if dtype == torch.float16 and len(labels) > FP16_ROWS else 1.0
        grad_bias = bias.new_zeros(bias.shape, dtype=torch.float32)
        losses, preds = [], []
        for chunk, label in zip(logits.split(rows), labels[:, None].split(rows), strict=True):
            pred = chunk.argmax(dim=1, keepdim=True)
            probs = chunk.softmax(dim=1, dtype=torch.float32)
            # -log softmax[label], from the largest term, whose probability is never 0
            losses.append(
                chunk.gather(1, pred).float() - chunk.gather(1, label).float() - probs.gather(1, pred).log()
            )
            preds.append(pred)
            if needs_grad:
                grad_logits = probs.scatter_add_(1, label, probs.new_full(label.shape, -1.0))
                chunk.copy_(grad_logits if scale == 1 else grad_logits.mul_(scale))
                grad_bias += grad_logits.sum(dim=0)
        if needs_grad:
            ctx.save_for_backward(logits @ weight, weight_gradient(logits, hidden), grad_bias)
            ctx.rows = len(labels) * scale
        predictions = torch.cat(preds).squeeze(1)
        ctx.mark_non_differentiable(predictions)
        return torch.cat(losses).mean(), predictions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_output / ctx.rows
        return (
            *(grad.to(torch.float32, copy=True).mul_(factor) for grad in ctx.saved_tensors),
            None,
            None,
            None,
        )

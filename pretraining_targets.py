"""What a patch must predict: its code (BEiT, BEiT v2) or, the ablation of BEiT's table 4, its pixels.

Shapes: B batch, N patches, P predicted patches of the whole batch, V values that the model's head gives for a patch,
K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import distributed
import visualization
from bf16_on_cpu import weight_gradient
from norm_ema_quantizer import ROWS_IN_CACHE, first_maximum
from vit_backbone import at_mask

ROWS_ON_GPU = 2048  # patches whose shares of all codes are in memory at once; on a CPU so few that they stay in its cache
FP16_ROWS = 4096  # the gradients of so many patches are summed in fp16, which ends at 65504, without danger


class Judged(NamedTuple):
    """What became of one branch's predictions."""

    loss: Tensor  # () mean
    right: Tensor | None  # (P,) 1 where the answer is the target, else 0; None where answers are neither right nor wrong


class Target:
    """What the pretraining stage asks of a target."""

    name: str  # for the log and for pictures
    width: int  # V

    def of(self, batch: dict[str, Any], masked_only: bool = False) -> Tensor:
        """A batch on the device (its mask on the host) -> the targets of every patch, (B * N, ...), images one after the
        other, row-major; or of the masked patches alone (M, ...)."""
        raise NotImplementedError

    def judge(self, hidden: Tensor, head: nn.Linear, target: Tensor) -> Judged:
        """What the head reads, (P, C) or (B, N, C), the head, and the targets of those P patches."""
        raise NotImplementedError

    def networks(self) -> list[Any]:
        """Frozen ones that it computes with."""
        return []

    def answer(self, prediction: Tensor) -> Tensor:
        """Predictions (P, V) as values of the same kind as the targets."""
        raise NotImplementedError

    def count(self, target: Tensor) -> None:
        """Take note of the targets of a training step."""

    def start_epoch(self) -> None:
        """Forget what was counted."""

    def end_epoch(self) -> dict[str, float]:
        """What was counted, for log.txt."""
        return {}

    def pictures(self, target: Tensor, answered: Tensor, grid: tuple[int, int], size: Sequence[int]) -> list[Tensor]:
        """One image's targets (N, ...), and the same with the predicted patches answered, as pictures of `size`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo state_dict."""


class Tokens(Target):
    """The frozen tokenizer's code of each patch, by cross-entropy over the K codes."""

    name = "tokens"

    def __init__(self, tokenizer: Any, n_codes: int, device: torch.device) -> None:
        self.tokenizer, self.width = tokenizer, n_codes
        self.code_counts = torch.zeros(n_codes, device=device)  # of this epoch's targets

    @torch.no_grad()
    def of(self, batch: dict[str, Any], masked_only: bool = False) -> Tensor:
        return self.tokenizer.get_codebook_indices(batch["tokenizer_image"], batch["mask"] if masked_only else None).flatten()

    def networks(self) -> list[Any]:
        return [self.tokenizer]

    def judge(self, hidden: Tensor, head: nn.Linear, target: Tensor) -> Judged:
        loss, answers = cross_entropy_of_head(hidden.flatten(0, -2), head, target)
        return Judged(loss, (answers == target).float())

    def answer(self, prediction: Tensor) -> Tensor:
        return first_maximum(prediction)

    def count(self, target: Tensor) -> None:
        self.code_counts.index_add_(0, target, torch.ones_like(target, dtype=torch.float32))

    def start_epoch(self) -> None:
        self.code_counts.zero_()

    def end_epoch(self) -> dict[str, float]:
        """What a model that always says the commonest code would score: accuracy means something above that share."""
        counts = self.code_counts.clone()
        distributed.all_reduce_sum(counts)
        return {
            "majority_code_share": float(counts.max() / counts.sum().clamp(min=1)),
            "target_codes": int((counts > 0).sum()),
        }

    def pictures(self, target: Tensor, answered: Tensor, grid: tuple[int, int], size: Sequence[int]) -> list[Tensor]:
        return [visualization.token_map(codes.view(grid), self.width, size) for codes in (target, answered)]

    def state_dict(self) -> dict[str, Any]:
        return {"code_counts": self.code_counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if distributed.is_main():  # the saved counts are rank 0's share
            self.code_counts.copy_(state["code_counts"])


class Pixels(Target):
    """The patch's pixels as the network would see them, normalised by mean and std: mean squared error, no tokenizer.

    The V = 3 * patch_size ** 2 values of a patch are in the order of the patch embedding's weights: channel, row, column.
    """

    name = "pixels"

    def __init__(self, patch_size: int, mean_std: tuple[Sequence[float], Sequence[float]]) -> None:
        self.patch_size, self.mean_std = patch_size, mean_std
        self.width = 3 * patch_size**2

    def of(self, batch: dict[str, Any], masked_only: bool = False) -> Tensor:
        side = self.patch_size
        pixels = rearrange(batch["image"], "b c (h row) (w col) -> (b h w) (c row col)", row=side, col=side)
        return at_mask(pixels, batch["mask"]) if masked_only else pixels

    def judge(self, hidden: Tensor, head: nn.Linear, target: Tensor) -> Judged:
        return Judged(F.mse_loss(head(hidden).flatten(0, -2).float(), target), None)

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction.float()

    def pictures(self, target: Tensor, answered: Tensor, grid: tuple[int, int], size: Sequence[int]) -> list[Tensor]:
        """The image with the predicted patches pasted into it; its targets are the image itself."""
        side = self.patch_size
        image = rearrange(answered, "(h w) (c row col) -> c (h row) (w col)", h=grid[0], c=3, row=side, col=side)
        return [visualization.denormalise(image, *self.mean_std)]


# ── Cross-entropy over thousands of codes ────────────────────────────────────────────────────────────────────────────


def cross_entropy_of_head(hidden: Tensor, head: nn.Linear, target: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (P, C), target (P,) -> mean cross-entropy () of head(hidden) in fp32, and the codes of the largest logits (P,).

    The same as F.cross_entropy(head(hidden).float(), target), under autocast too, but no (P, K) values are kept for the
    backward pass.
    """
    place, low = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(place):
        low = torch.get_autocast_dtype(place)
    return CrossEntropyOfHead.apply(hidden, head.weight, head.bias, target, low, torch.is_grad_enabled())


class CrossEntropyOfHead(torch.autograd.Function):
    """The logits' gradient is known as soon as they are, but for a factor that the backward pass brings (mean, loss scale):
    so it is taken in the logits' place, and what is kept are the gradients of the head's inputs, short of that factor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, low: torch.dtype, learns: bool
    ) -> tuple[Tensor, Tensor]:
        read, weight = hidden.to(low), weight.to(low)
        logits = torch.addmm(bias.to(low), read, weight.t())
        rows = ROWS_IN_CACHE if logits.device.type == "cpu" else ROWS_ON_GPU
        shrink = FP16_ROWS / len(target) if low == torch.float16 and len(target) > FP16_ROWS else 1.0
        of_bias = bias.new_zeros(bias.shape, dtype=torch.float32)
        losses, answers = [], []
        for part, wanted in zip(logits.split(rows), target[:, None].split(rows), strict=True):
            answer = first_maximum(part)[:, None]
            shares = part.softmax(dim=1, dtype=torch.float32)
            above = part.gather(1, answer).float() - part.gather(1, wanted).float()
            losses.append(above - shares.gather(1, answer).log())  # the logarithm of the sum, from the largest term's share
            answers.append(answer)
            if learns:
                shares.scatter_add_(1, wanted, shares.new_full(wanted.shape, -1.0))
                part.copy_(shares if shrink == 1 else shares.mul_(shrink))
                of_bias += shares.sum(dim=0)
        if learns:
            ctx.save_for_backward(logits @ weight, weight_gradient(logits, read), of_bias)
            ctx.rows = len(target) * shrink
        answered = torch.cat(answers).squeeze(1)
        ctx.mark_non_differentiable(answered)
        return torch.cat(losses).mean(), answered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        factor = of_loss / ctx.rows
        return *(gradient.to(torch.float32, copy=True).mul_(factor) for gradient in ctx.saved_tensors), None, None, None

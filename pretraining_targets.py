"""What a patch must predict: its code (BEiT, BEiT v2) or, the ablation of BEiT's table 4, its pixels.

Shapes: B batch, N patches, P predicted patches of the whole batch, V values that the model's head gives for a patch,
K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import distributed
import visualization
from norm_ema_quantizer import first_maximum
from vit_backbone import at_mask


class Target:
    """What the pretraining stage asks of a target."""

    name: str  # for the log and for pictures
    width: int  # V

    def of(self, batch: dict[str, Any], masked_only: bool = False) -> Tensor:
        """A batch on the device (its mask on the host) -> the targets of every patch, (B * N, ...), images one after the
        other, row-major; or of the masked patches alone (M, ...)."""
        raise NotImplementedError

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """What the head gave (P, V) and the targets of those patches -> mean loss ()."""
        raise NotImplementedError

    def networks(self) -> list[Any]:
        """Frozen ones that it computes with."""
        return []

    def answer(self, prediction: Tensor) -> Tensor:
        """Predictions (P, V) as values of the same kind as the targets."""
        raise NotImplementedError

    def right(self, prediction: Tensor, target: Tensor) -> Tensor | None:
        """(P,) 1 where the answer is the target, else 0; None where answers are neither right nor wrong."""
        return None

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

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction.float(), target)

    def answer(self, prediction: Tensor) -> Tensor:
        return first_maximum(prediction)

    def right(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (self.answer(prediction) == target).float()

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

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction.float(), target)

    def answer(self, prediction: Tensor) -> Tensor:
        return prediction.float()

    def pictures(self, target: Tensor, answered: Tensor, grid: tuple[int, int], size: Sequence[int]) -> list[Tensor]:
        """The image with the predicted patches pasted into it; its targets are the image itself."""
        side = self.patch_size
        image = rearrange(answered, "(h w) (c row col) -> c (h row) (w col)", h=grid[0], c=3, row=side, col=side)
        return [visualization.denormalise(image, *self.mean_std)]

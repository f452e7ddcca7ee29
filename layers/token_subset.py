"""The tokens of each image that the loss needs: the last block computes no others."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from layers.rel_pos_bias import (
    is_exporting,
)


class TokenSubset(NamedTuple):
    """The R tokens of each image whose outputs are needed: the last block computes no
    others.

    Keys and values still come from all tokens, so these outputs are exactly those of
    the whole block.
    """

    flat_index: Tensor  # (B * R,) int64, among the B * T tokens
    token_index: Tensor  # (B * R,) int64, among one image's T tokens
    batch_size: int

    def gather(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, R, C)"""
        return x.flatten(0, 1).index_select(0, self.flat_index).unflatten(0, (self.batch_size, -1))

    def gather_bias(self, bias: Tensor) -> Tensor:
        """(H, T, T) -> the rows of the subset's queries, (B, H, R, T)."""
        return rearrange(bias.index_select(1, self.token_index), "h (b r) t -> b h r t", b=self.batch_size)


def masked_subset(mask: Tensor, device: torch.device, with_cls: bool) -> TokenSubset | None:
    """The masked patches of each image, after its CLS token if asked for, from a mask
    (B, N) best held on the host.

    None where the images have different numbers of them, or none at all, and in an
    export, where that is not known.
    """
    if is_exporting():
        return None
    per_image = mask.sum(dim=1)
    if len(mask) == 0 or int(per_image[0]) == 0 or bool((per_image != per_image[0]).any()):
        return None
    chosen = F.pad(mask, (1, 0), value=with_cls)  # the CLS token stands before the patches
    flat = chosen.flatten().nonzero().squeeze(1)
    query = flat % chosen.shape[1]
    return TokenSubset(flat.to(device, non_blocking=True), query.to(device, non_blocking=True), len(mask))


def select_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Of one value per patch, (B * N, ...), those of the patches in a mask (B, N) that
    is best held on the host: (M, ...).
    """
    return values.index_select(0, mask.flatten().nonzero().squeeze(1).to(values.device, non_blocking=True))

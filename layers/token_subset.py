"""The tokens of each image that the loss needs: the last block computes no others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from layers.rel_pos_bias import is_exporting


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


class MaskedPositions(NamedTuple):
    """Where the M masked patches of a batch are, on the images' device.

    Listed on the host, where it takes no waiting for the device, and copied as one
    tensor: all else that a network needs of the mask is computed from it.
    """

    patches: Tensor  # (M,) int64, among the B * N patches
    batch_size: int
    num_patches: int  # N
    per_image: int | None  # where all images have equally many, and any

    @classmethod
    def of(cls, mask: Tensor, device: torch.device, listed: Tensor | None = None) -> MaskedPositions:
        """Of a mask (B, N), best held on the host. `listed`: what `list_masked` says of
        it, wherever that is.
        """
        listed = list_masked(mask) if listed is None else listed
        per_image = listed.shape[1] if listed.ndim == 2 else None
        patches = listed.flatten().to(device, non_blocking=True)
        return cls(patches, mask.shape[0], mask.shape[1], per_image)

    def mask(self) -> Tensor:
        """(B, N) bool"""
        mask = self.patches.new_zeros(self.batch_size * self.num_patches, dtype=torch.bool)
        return mask.index_fill_(0, self.patches, True).view(-1, self.num_patches)

    def tokens(self) -> Tensor:
        """(M,) int64, among the B * T tokens: one CLS token stands before each image's
        patches.
        """
        return self.patches + self.patches // self.num_patches + 1

    def subset(self, with_cls: bool) -> TokenSubset | None:
        """The masked patches of each image, after its CLS token if asked for; None where
        the images have different numbers of them.
        """
        if self.per_image is None:
            return None
        flat, tokens = self.tokens(), self.num_patches + 1
        if with_cls:
            first = torch.arange(0, self.batch_size * tokens, tokens, device=flat.device)
            flat = torch.cat((first[:, None], flat.view(self.batch_size, -1)), dim=1).flatten()
        return TokenSubset(flat, flat % tokens, self.batch_size)

    def select(self, values: Tensor) -> Tensor:
        """Of one value per patch, (B * N, ...), those of the masked patches (M, ...)."""
        return values.index_select(0, self.patches)


def list_masked(mask: Tensor) -> Tensor:
    """Mask (B, N) -> the masked of its B * N patches, int64: (B, M / B) where all images
    have equally many, at least one, else (M,), as in an export, where that is not known.
    """
    patches = mask.flatten().nonzero().squeeze(1)
    if is_exporting() or len(mask) == 0:
        return patches
    per_image = mask.sum(dim=1)
    uneven = int(per_image[0]) == 0 or bool((per_image != per_image[0]).any())
    return patches if uneven else patches.view(len(mask), -1)

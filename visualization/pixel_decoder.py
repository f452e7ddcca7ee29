"""A small decoder from the codes of a frozen tokenizer to pixels, which shows what
tokens keep.

It has no part in training BEiT v2. Its loss does not reach the tokenizer, so that it
draws what the codes hold and nothing else.

Shapes: B batch, h x w grid of N patches, D code dim, C width, P patch side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import modeling_vqkd
from checkpoint_io import downloads, tokenizer_weights, weight_files, weight_formats
from data_pipeline.pixel_format import PixelFormat
from errors import UserError
from layers.init_weights import truncated_normal_
from modeling_finetune import VisionTransformer
from modeling_vqkd import PATCH_SIZE, VQKD
from runtime.phases import FROZEN, phase

HEAD_DIM = 32


class PixelDecoder(nn.Module):
    """Code vectors -> ViT over the grid -> a window of 2P x 2P pixels for each token.

    A window is twice as wide as its patch, and overlapping windows are added. If they
    only touch, the edges of patches stand out and the PSNR is lower
    (docs/lab/reconstruction.md).

    Args:
        grid: (h, w).
        code_dim: D.
        depth, dim: blocks and width C of the ViT; heads have 32 channels each.

    ValueError: `dim` is not a multiple of 32.
    """

    def __init__(
        self, grid: tuple[int, int], code_dim: int, depth: int, dim: int, out_chans: int = 3
    ) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=grid,
            patch_size=1,
            in_chans=code_dim,
            num_classes=0,
            embed_dim=dim,
            depth=depth,
            num_heads=count_heads(dim),
        )
        self.grid = grid
        self.to_pixels = nn.ConvTranspose2d(
            dim, out_chans, 2 * PATCH_SIZE, stride=PATCH_SIZE, padding=PATCH_SIZE // 2
        )
        truncated_normal_(self.to_pixels.weight, std=0.02, cut=2.0)
        self.to_pixels.bias.data.zero_()

    def forward(self, z: Tensor) -> Tensor:
        """Code vectors (B, D, h, w) -> images (B, C, h * P, w * P) in [0, 1], fp32."""
        tokens = self.vit.forward_features(z, return_patch_tokens=True)  # (B, N, C)
        height, _ = self.grid
        return torch.sigmoid(self.to_pixels(rearrange(tokens, "b (h w) c -> b c h w", h=height)).float())


def count_heads(dim: int) -> int:
    if dim < HEAD_DIM or dim % HEAD_DIM:
        raise ValueError(f"dim must be a multiple of {HEAD_DIM}, the width of a head, not {dim}")
    return dim // HEAD_DIM


class Reconstructor(nn.Module):
    """A frozen tokenizer (image -> codes) and a trained decoder (codes -> pixels) in
    one file.
    """

    def __init__(self, tokenizer: VQKD, depth: int, dim: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        # A tokenizer's own file does not hold how it scales images. Ours must, as it is
        # opened without any other file.
        for name in ("input_mean", "input_std"):
            tokenizer.register_buffer(name, getattr(tokenizer, name), persistent=True)
        self.grid: tuple[int, int] = tokenizer.encoder.patch_embed.patch_shape
        code_dim, in_chans = tokenizer.quantize.codebook_dim, tokenizer.pixels.in_chans
        self.decoder = PixelDecoder(self.grid, code_dim, depth, dim, in_chans)

    def train(self, mode: bool = True) -> Reconstructor:
        super().train(mode)
        self.tokenizer.eval()
        return self

    @property
    def image_size(self) -> int:
        return PATCH_SIZE * self.grid[0]

    @property
    def pixels(self) -> PixelFormat:
        """Of the images that it encodes and draws."""
        return self.tokenizer.pixels

    @property
    def n_codes(self) -> int:
        return self.tokenizer.quantize.num_tokens

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, height, width) in [0, 1] -> codes (B, h, w) int64."""
        return self.tokenizer.get_codebook_indices(images).view(-1, *self.grid)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> images (B, C, height, width) in [0, 1], from the codes'
        vectors alone.
        """
        vectors = F.embedding(codes, self.tokenizer.quantize.embedding.weight)
        return self.decoder(rearrange(vectors, "b h w d -> b d h w"))

    def forward(self, images: Tensor) -> Tensor:
        with phase(FROZEN):
            codes = self.encode(images)
        return self.decode(codes)

    def no_weight_decay(self) -> set[str]:
        return {f"decoder.vit.{name}" for name in self.decoder.vit.no_weight_decay()}


def open_reconstructor(source: str, flag: str) -> Reconstructor:
    """The model in a file of `run_vqkd_training.py --train_pixel_decoder`, in eval
    mode.

    `source`: a path or a URL, which `flag` names in messages. UserError: the file holds
    no pixel decoder.
    """
    content = weight_files.load_file(downloads.fetch(source))
    weights = weight_formats.strip_wrappers(weight_files.extract_weights(content, source))
    if "decoder.to_pixels.weight" not in weights:
        raise UserError(
            f"{flag} {source} holds no pixel decoder: run_vqkd_training.py --train_pixel_decoder trains one"
        )
    own = {
        key.removeprefix("tokenizer."): value
        for key, value in weights.items()
        if key.startswith("tokenizer.")
    }
    tokenizer_weights.require_tokenizer(own, f"{flag} {source}")
    settings: dict[str, Any] = modeling_vqkd.infer_settings(own, {}, f"{flag} {source}")
    teacher_dim = len(own["decode_task_layer.2.bias"])
    tokenizer = modeling_vqkd.create_model(**settings, as_tokenizer=True, decoder_out_dim=teacher_dim)
    depth, dim = (
        tokenizer_weights.count_blocks(weights, "decoder.vit"),
        weights["decoder.to_pixels.weight"].shape[0],
    )
    flags = weight_files.flags_to_dict(content.get("args") if isinstance(content, dict) else None)
    tokenizer.image_range = flags.get("image_range")
    model = Reconstructor(tokenizer, depth, dim)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)

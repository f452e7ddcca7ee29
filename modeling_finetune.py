"""The vision transformer that reads images: classifier, frozen feature extractor, and encoder and decoder of VQ-KD.

Shapes: B batch, N patches, T = 1 + N tokens with CLS in front, C width, H heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline
from torch import Tensor, nn

from errors import pick
from vit_backbone import SIZES, Block, LayerNorm, Trunk, init_linear_and_norm, rescale_outputs

__all__ = ["MODELS", "Block", "VisionTransformer", "create_model", "remap_pretrained", "resize_rel_pos_bias_table"]


class VisionTransformer(Trunk):
    """ViT with a linear head. Mean pooling norms the mean of the patch tokens (`fc_norm`); CLS pooling norms all (`norm`)."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | None = None,
        init_values: float | None = 0.0,
        use_abs_pos_emb: bool = True,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = False,
        use_mean_pooling: bool = True,
        init_scale: float = 0.001,
    ) -> None:
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, qkv_bias, drop_rate,
            attn_drop_rate, drop_path_rate, norm_layer, init_values, use_abs_pos_emb, use_rel_pos_bias,
            use_shared_rel_pos_bias,
        )  # fmt: skip
        self.num_classes = num_classes
        norm_layer = norm_layer or LayerNorm
        self.norm = nn.Identity() if use_mean_pooling else norm_layer(embed_dim)
        self.fc_norm = norm_layer(embed_dim) if use_mean_pooling else None
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

        self.init_tokens(std=0.02, cut=2.0)
        self.apply(functools.partial(init_linear_and_norm, std=0.02, cut=2.0))
        rescale_outputs(self.blocks)
        if isinstance(self.head, nn.Linear):
            self.head.weight.data.mul_(init_scale)
            self.head.bias.data.mul_(init_scale)

    def forward_features(self, x: Tensor, return_patch_tokens: bool = False, return_all_tokens: bool = False) -> Tensor:
        """Pooled features (B, C); or the normalised patch tokens (B, N, C); or all tokens (B, T, C)."""
        tokens, bias = self.embed(x), self.shared_bias()
        for block in self.blocks:
            tokens = block(tokens, bias)
        tokens = self.norm(tokens)
        if return_all_tokens or return_patch_tokens:
            kept = tokens if return_all_tokens else tokens[:, 1:]
            return kept if self.fc_norm is None else self.fc_norm(kept)
        return tokens[:, 0] if self.fc_norm is None else self.fc_norm(tokens[:, 1:].mean(dim=1))

    def forward(self, x: Tensor, return_patch_tokens: bool = False, return_all_tokens: bool = False) -> Tensor:
        """Images (B, in_chans, height, width) -> logits (B, num_classes), or the head of each token asked for."""
        return self.head(self.forward_features(x, return_patch_tokens, return_all_tokens))

    def get_intermediate_layers(self, x: Tensor) -> list[Tensor]:
        """The raw output of every block, CLS included: depth times (B, T, C)."""
        tokens, bias = self.embed(x), self.shared_bias()
        layers = []
        for block in self.blocks:
            tokens = block(tokens, bias)
            layers.append(tokens)
        return layers


# ── Variants: name -> (row of SIZES, patch size, image size) ─────────────────────────────────────────────────────────

VARIANTS = {
    "beit_demo_patch16_128": ("demo", 16, 128),
    "beit_tiny_patch16_224": ("tiny", 16, 224),
    "beit_small_patch16_224": ("small", 16, 224),
    "beit_base_patch16_224": ("base", 16, 224),
    "beit_base_patch16_256": ("base", 16, 256),
    "beit_base_patch16_384": ("base", 16, 384),
    "beit_24x544_patch16_224": ("24x544", 16, 224),
    "beit_large_patch16_224": ("large", 16, 224),
    "beit_large_patch16_384": ("large", 16, 384),
    "beit_large_patch16_512": ("large", 16, 512),
    "beit_huge_patch14_224": ("huge", 14, 224),
    "beit_giant_patch14_224": ("giant", 14, 224),
}


def _builder(name: str) -> Callable[..., VisionTransformer]:
    size, patch_size, img_size = VARIANTS[name]

    def build(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        if pretrained:
            raise ValueError(f"{name} has no weights of its own: load a checkpoint with --finetune or remap_pretrained")
        return VisionTransformer(**{"img_size": img_size, "patch_size": patch_size, **SIZES[size]._asdict(), **kwargs})

    build.__name__ = name
    return build


# A registry of our own: timm's model of the name beit_base_patch16_224 stays timm's.
MODELS = {name: _builder(name) for name in VARIANTS}
globals().update(MODELS)


def create_model(name: str, **kwargs: Any) -> VisionTransformer:
    return pick(MODELS, name, "fine-tuning model")(**kwargs)


# ── Weights of another model into this one ───────────────────────────────────────────────────────────────────────────


def resize_rel_pos_bias_table(table: Tensor, dst_grid: int) -> Tensor:
    """Bias table (rows, H) of a square grid -> table of a dst_grid x dst_grid grid; the three CLS rows are kept.

    Source distances are spaced geometrically (1, 1+q, 1+q+q^2, ...) so that the farthest one meets the target's: near
    offsets keep their values, far ones are stretched. Cubic spline per head (BEiT's fine-tuning at other resolutions).
    """
    patch_rows, cls_rows = table[:-3], table[-3:]
    src_side, dst_side = round(len(patch_rows) ** 0.5), 2 * dst_grid - 1
    if src_side * src_side != len(patch_rows):
        raise ValueError(f"a bias table of {len(table)} rows does not belong to a square grid")
    if src_side == dst_side:
        return table.clone()
    source = _geometric_coordinates(src_side // 2, dst_side // 2)
    target = np.arange(-(dst_side // 2), dst_side // 2 + 1, dtype=np.float64)
    heads = []
    for values in patch_rows.T.reshape(-1, src_side, src_side).double().cpu().numpy():
        order = min(3, src_side - 1)
        spline = RectBivariateSpline(source, source, values, kx=order, ky=order)
        heads.append(torch.from_numpy(spline(target, target)).flatten())
    resized = torch.stack(heads, dim=1).to(table)
    return torch.cat((resized, cls_rows))


def _geometric_coordinates(steps: int, reach: int) -> np.ndarray:
    """Symmetric coordinates with `steps` distances each side; the ratio is bisected until the farthest meets `reach`."""
    low, high, ratio = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**steps) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    distances = np.cumsum(ratio ** np.arange(steps, dtype=np.float64))
    return np.concatenate((-distances[::-1], [0.0], distances))


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Absolute positions (1, 1 + n*n, C) -> (1, 1 + height*width, C), patches bicubic, CLS kept."""
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, C, n, n)
    patches = F.interpolate(patches.float(), size=grid, mode="bicubic", align_corners=False).to(pos_embed)
    return torch.cat((cls, patches.flatten(2).transpose(1, 2)), dim=1)


def remap_pretrained(state_dict: dict[str, Tensor], model: Trunk) -> dict[str, Tensor]:
    """The entries of a checkpoint that `model` can take, under its names and in its shapes. Pure: nothing is modified.

    Strips `module.` and `backbone.`, copies a shared bias table to every block, resizes tables and absolute positions
    to the model's grid, and leaves out a head of another size and all that the model lacks (lm_head, cls_pt_layers).
    """
    wanted = model.state_dict()
    grid = model.patch_embed.patch_shape
    source: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        for prefix in ("module.", "backbone."):
            key = key.removeprefix(prefix)
        source[key] = value
    shared = source.get("rel_pos_bias.relative_position_bias_table")
    if shared is not None:
        for key in wanted:
            if key.endswith(".attn.relative_position_bias_table"):
                source.setdefault(key, shared)
    remapped = {}
    for key, value in source.items():
        if key not in wanted or key.endswith("relative_position_index"):
            continue  # the index is the model's own: it depends on the grid alone
        if value.shape != wanted[key].shape and key.endswith("relative_position_bias_table"):
            value = resize_rel_pos_bias_table(value, grid[0])
        elif value.shape != wanted[key].shape and key == "pos_embed":
            value = resize_pos_embed(value, grid)
        if value.shape == wanted[key].shape:
            remapped[key] = value.clone()
    return remapped

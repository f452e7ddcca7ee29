"""The vision transformer that reads images: classifier, frozen feature extractor, and
encoder and decoder of VQ-KD.

Shapes: B batch, N patches, T = 1 + N tokens with CLS in front, C width, H heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from checkpoint_io.remapping import remap_pretrained
from errors import pick
from layers.rel_pos_bias import resize_rel_pos_bias_table
from vit_backbone import SIZES, Block, LayerNorm, TokenSubset, Trunk, init_linear_and_norm, rescale_outputs

__all__ = [
    "MODELS",
    "Block",
    "VisionTransformer",
    "create_model",
    "remap_pretrained",
    "resize_rel_pos_bias_table",
]


class VisionTransformer(Trunk):
    """ViT with a linear head. Mean pooling norms the mean of the patch tokens (`fc_norm`);
    CLS pooling norms all (`norm`).
    """

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

    def forward_features(
        self,
        x: Tensor,
        return_patch_tokens: bool = False,
        return_all_tokens: bool = False,
        subset: TokenSubset | None = None,
    ) -> Tensor:
        """Pooled features (B, C); or the normalized patch tokens (B, N, C); or all tokens (B, T, C).

        `subset`: only those of all tokens, (B, R, C); the last block computes no others.
        """
        tokens, bias = self.embed(x), self.shared_bias()
        for block in self.blocks[:-1]:
            tokens = block(tokens, bias)
        tokens = self.norm(self.blocks[-1](tokens, bias, subset))
        if subset is not None:
            return tokens if self.fc_norm is None else self.fc_norm(tokens)
        if return_all_tokens or return_patch_tokens:
            kept = tokens if return_all_tokens else tokens[:, 1:]
            return kept if self.fc_norm is None else self.fc_norm(kept)
        return tokens[:, 0] if self.fc_norm is None else self.fc_norm(tokens[:, 1:].mean(dim=1))

    compiled_methods = ("forward_features",)

    def forward(
        self, x: Tensor, return_patch_tokens: bool = False, return_all_tokens: bool = False
    ) -> Tensor:
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


# ── Variants: name -> (row of SIZES, patch size, image size) ──

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
            raise ValueError(
                f"{name} has no weights of its own: load a checkpoint with --finetune or remap_pretrained"
            )
        return VisionTransformer(
            **{"img_size": img_size, "patch_size": patch_size, **SIZES[size]._asdict(), **kwargs}
        )

    build.__name__ = name
    return build


# A registry of our own: timm's model of the name beit_base_patch16_224 stays timm's.
MODELS = {name: _builder(name) for name in VARIANTS}
globals().update(MODELS)


def create_model(name: str, **kwargs: Any) -> VisionTransformer:
    return pick(MODELS, name, "fine-tuning model")(**kwargs)

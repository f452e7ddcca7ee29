"""The vision transformer that reads images: classifier, frozen feature extractor, and
encoder and decoder of VQ-KD.

Shapes: B batch, N patches, T = 1 + N tokens with CLS in front, C width, H heads.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from checkpoint_io.remapping import remap_pretrained
from errors import pick
from layers.init_weights import init_linear_and_norm, rescale_outputs
from layers.rel_pos_bias import resize_rel_pos_bias_table
from layers.token_subset import TokenSubset
from vit_backbone import Block, Trunk, Variant

__all__ = [
    "MODELS",
    "Block",
    "VisionTransformer",
    "create_model",
    "remap_pretrained",
    "resize_rel_pos_bias_table",
]


class VisionTransformer(Trunk):
    """ViT with a linear head. Mean pooling norms the mean of the patch tokens
    (`fc_norm`); CLS pooling norms all (`norm`).

    Args:
        num_classes: 0 for features alone, without a head.
        use_mean_pooling: of the patch tokens; else the CLS token is classified.
        init_scale: factor of the head's initial weights.
        trunk: fields of vit_backbone.TrunkConfig.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        use_mean_pooling: bool = True,
        init_scale: float = 0.001,
        **trunk: Any,
    ) -> None:
        super().__init__(**trunk)
        self.num_classes = num_classes
        self.norm = nn.Identity() if use_mean_pooling else self.norm_layer(self.embed_dim)
        self.fc_norm = self.norm_layer(self.embed_dim) if use_mean_pooling else None
        self.head: nn.Module = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()

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
        """Pooled features (B, C); or the normalized patch tokens (B, N, C); or all
        tokens (B, T, C).

        `subset`: only those of all tokens, (B, R, C); the last block computes no
        others.
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
        """Images (B, in_chans, height, width) -> logits (B, num_classes), or the head
        of each token asked for.
        """
        return self.head(self.forward_features(x, return_patch_tokens, return_all_tokens))

    def get_intermediate_layers(self, x: Tensor, layer: int | None = None) -> list[Tensor]:
        """The raw output of every block, CLS included: depth times (B, T, C). With
        `layer`, from 1: of that block alone, and later ones are not computed.
        """
        tokens, bias = self.embed(x), self.shared_bias()
        layers: list[Tensor] = []
        for block in self.blocks[:layer]:
            tokens = block(tokens, bias)
            layers = [*layers, tokens] if layer is None else [tokens]
        return layers


class AllTokens(nn.Module):
    """A transformer that gives all its tokens after the last norm, (B, T, C)."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x, return_all_tokens=True)


# ── Variants: a row of SIZES, patch size, image size ──

beit_mini_patch16_96 = Variant(VisionTransformer, "mini", 16, 96)
beit_demo_patch16_128 = Variant(VisionTransformer, "demo", 16, 128)
beit_tiny_patch16_224 = Variant(VisionTransformer, "tiny", 16, 224)
beit_small_patch16_224 = Variant(VisionTransformer, "small", 16, 224)
beit_base_patch16_224 = Variant(VisionTransformer, "base", 16, 224)
beit_base_patch16_256 = Variant(VisionTransformer, "base", 16, 256)
beit_base_patch16_384 = Variant(VisionTransformer, "base", 16, 384)
beit_24x544_patch16_224 = Variant(VisionTransformer, "24x544", 16, 224)
beit_large_patch16_224 = Variant(VisionTransformer, "large", 16, 224)
beit_large_patch16_384 = Variant(VisionTransformer, "large", 16, 384)
beit_large_patch16_512 = Variant(VisionTransformer, "large", 16, 512)
beit_huge_patch14_224 = Variant(VisionTransformer, "huge", 14, 224)
beit_giant_patch14_224 = Variant(VisionTransformer, "giant", 14, 224)

# A registry of our own: timm's model of the name beit_base_patch16_224 stays timm's.
MODELS = {name: value for name, value in globals().items() if isinstance(value, Variant)}


def create_model(name: str, **options: Any) -> VisionTransformer:
    return pick(MODELS, name, "fine-tuning model")(**options)

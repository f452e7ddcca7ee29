"""Masked image modeling (BEiT) and its CLS pretraining (BEiT v2).

Shapes: B batch, N patches, T = 1 + N tokens with CLS in front, C width, K codes, M
masked patches of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError, pick
from layers.init_weights import init_linear_and_norm, rescale_outputs, truncated_normal_
from layers.token_subset import MaskedPositions, TokenSubset
from vit_backbone import Trunk, Variant, drop_path_ramp

# of normalized tokens (M, C) or (B, N, C) and the prediction head
Criterion = Callable[[Tensor, nn.Linear], Any]


class MaskedPatches(NamedTuple):
    """The M masked patches of a batch, and the tokens that the last block of each
    branch computes.

    Only masked patches reach the heads, so the last blocks compute no other outputs
    (`subset`), except for CLS in front of them where the other branch needs it
    (`subset_with_cls`). Both are None where the images have different numbers of masked
    patches: then all outputs are computed.
    """

    flat_index: Tensor  # (M,) int64 among the B * T tokens
    subset: TokenSubset | None
    subset_with_cls: TokenSubset | None

    def gather(self, tokens: Tensor) -> Tensor:
        """The masked patches (M, C) of all tokens (B, T, C), or of a subset, which ends
        with the masked patches.
        """
        if self.subset is not None:  # so every image has equally many
            per_image = len(self.flat_index) // len(tokens)
            if tokens.shape[1] <= per_image + 1:
                return tokens[:, -per_image:].flatten(0, 1)
        return tokens.flatten(0, 1).index_select(0, self.flat_index)


class VisionTransformerForMaskedImageModeling(Trunk):
    """ViT that predicts the visual token of every masked patch (BEiT, section 2.3).

    Args:
        vocab_size: K, the values that the head gives for a patch: one for each code, or
            (`target` pixels) for each number of its pixels.
        init_std: of all initial weights.
        trunk: fields of vit_backbone.TrunkConfig.
    """

    def __init__(self, *, vocab_size: int = 8192, init_std: float = 0.02, **trunk: Any) -> None:
        super().__init__(with_mask_token=True, **trunk)
        self.vocab_size, self.init_std = vocab_size, init_std
        self.norm = self.norm_layer(self.embed_dim)
        self.lm_head = nn.Linear(self.embed_dim, vocab_size)

        self.init_tokens(std=init_std, cut=init_std)
        truncated_normal_(self.patch_embed.proj.weight, init_std, cut=init_std)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        self.apply(self.init_weights)
        rescale_outputs(self.blocks)

    def init_weights(self, module: nn.Module) -> None:
        init_linear_and_norm(module, self.init_std, cut=self.init_std)

    def forward(
        self,
        x: Tensor,
        bool_masked_pos: Tensor | MaskedPositions | None = None,
        return_all_tokens: bool = False,
        return_patch_tokens: bool = False,
        criterion: Criterion | None = None,
    ) -> Any:
        """Images (B, in_chans, height, width), mask (B, N) or None for nothing masked.

        Returns the logits of the masked patches (M, K) in row-major order; with
        return_all_tokens those of all patches (B, N, K); with return_patch_tokens the
        normalized patch tokens (B, N, C). With `criterion`, in place of the logits what
        criterion(normalized tokens, head) gives: a loss that need not keep the logits.
        A mask on the CPU beside images on a GPU spares a synchronization: its positions
        are listed on the host. In its place they are taken too (MaskedPositions).
        """
        mask, masked = self.locate_masked(x, bool_masked_pos)
        every_patch = return_all_tokens or return_patch_tokens
        tokens = self.encode(x, mask, None if every_patch else masked.subset)
        return self.predict(
            tokens, masked, return_all_tokens, return_patch_tokens, self.norm, self.lm_head, criterion
        )

    compiled_methods: tuple[str, ...] = ("encode",)

    def locate_masked(
        self, x: Tensor, bool_masked_pos: Tensor | MaskedPositions | None
    ) -> tuple[Tensor | None, MaskedPatches]:
        """The mask on the images' device, and where in the tokens the masked patches
        are.
        """
        if bool_masked_pos is None:
            return None, MaskedPatches(torch.zeros(0, dtype=torch.int64, device=x.device), None, None)
        if isinstance(bool_masked_pos, MaskedPositions):
            positions, mask = bool_masked_pos, bool_masked_pos.mask()
        else:
            mask = bool_masked_pos.flatten(1).to(torch.bool)
            positions = MaskedPositions.of(mask, x.device)
            mask = mask.to(x.device, non_blocking=True)
        subsets = positions.subset(with_cls=False), positions.subset(with_cls=True)
        return mask, MaskedPatches(positions.tokens(), *subsets)

    def encode(self, x: Tensor, mask: Tensor | None, subset: TokenSubset | None = None) -> Tensor:
        """Images -> tokens after the last block, (B, T, C) or only the subset (B, R,
        C).
        """
        tokens, bias = self.embed(x, mask), self.shared_bias()
        for block in self.blocks[:-1]:
            tokens = block(tokens, bias)
        return self.blocks[-1](tokens, bias, subset)

    def predict(
        self,
        tokens: Tensor,
        masked: MaskedPatches,
        all_tokens: bool,
        patch_tokens: bool,
        norm: nn.Module,
        head: nn.Linear,
        criterion: Criterion | None,
    ) -> Any:
        """Only what is asked for passes the norm and the large head."""
        asked = norm(tokens[:, 1:] if all_tokens or patch_tokens else masked.gather(tokens))
        if patch_tokens:
            return asked
        return head(asked) if criterion is None else criterion(asked, head)


class VisionTransformerForMaskedImageModelingCLS(VisionTransformerForMaskedImageModeling):
    """BEiT v2, section 3.2: the last layer's CLS token must carry what the early
    layers' patch tokens lack.

    [last CLS; patch tokens of block `early_layers`] passes `head_layers` more blocks,
    whose patch tokens predict the visual tokens a second time. forward returns the pair
    (main branch, CLS branch).
    """

    def __init__(
        self, *, early_layers: int = 6, head_layers: int = 2, shared_lm_head: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        depth = len(self.blocks)
        if not 0 < early_layers <= depth:
            raise UserError(
                f"`early_layers` {early_layers} must lie between 1 and the model's depth, {depth}"
            )
        self.early_layers, self.shared_lm_head = early_layers, shared_lm_head
        rates = drop_path_ramp(self.drop_path_rate, max(depth, early_layers + head_layers))
        # These blocks keep PyTorch's default initialization, rescaled: the released
        # weights were trained so.
        self.cls_pt_layers = nn.ModuleList(
            self.make_block(drop_path=rates[early_layers + i]) for i in range(head_layers)
        )
        rescale_outputs(self.cls_pt_layers, first=early_layers + 1)
        if not shared_lm_head:
            self.cls_pt_norm = self.norm_layer(self.embed_dim)
            self.cls_pt_lm_head = nn.Linear(self.embed_dim, self.vocab_size)
            self.cls_pt_norm.apply(self.init_weights)
            self.cls_pt_lm_head.apply(self.init_weights)

    def forward(
        self,
        x: Tensor,
        bool_masked_pos: Tensor | MaskedPositions | None = None,
        return_all_tokens: bool = False,
        return_patch_tokens: bool = False,
        criterion: Criterion | None = None,
    ) -> tuple[Any, Any]:
        mask, masked = self.locate_masked(x, bool_masked_pos)
        every_patch = return_all_tokens or return_patch_tokens
        last, early, bias = self.encode_both(x, mask, None if every_patch else masked.subset_with_cls)
        bridged = self.aggregate_into_cls(last, early, bias, None if every_patch else masked.subset)
        cls_norm, cls_head = (
            (self.norm, self.lm_head) if self.shared_lm_head else (self.cls_pt_norm, self.cls_pt_lm_head)
        )
        asked = (masked, return_all_tokens, return_patch_tokens)
        main = self.predict(last, *asked, self.norm, self.lm_head, criterion)
        return main, self.predict(bridged, *asked, cls_norm, cls_head, criterion)

    compiled_methods = ("encode_both", "aggregate_into_cls")

    def encode_both(
        self, x: Tensor, mask: Tensor | None, subset: TokenSubset | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens after the last block, (B, T, C) or those of the subset (B, R, C), CLS
        first; patch tokens after block `early_layers` (B, N, C); and the shared bias.
        """
        tokens, bias = self.embed(x, mask), self.shared_bias()
        early, depth = tokens, len(self.blocks)
        for layer, block in enumerate(self.blocks, start=1):
            needs_all = layer < depth or layer == self.early_layers
            tokens = block(tokens, bias, None if needs_all else subset)
            if layer == self.early_layers:
                early = tokens
        return tokens, early[:, 1:], bias

    def aggregate_into_cls(
        self, last: Tensor, early: Tensor, bias: Tensor | None, subset: TokenSubset | None = None
    ) -> Tensor:
        """[last CLS; early patches] through the head's layers: (B, T, C), or only the
        subset (B, R, C).
        """
        bridged = torch.cat((last[:, :1], early), dim=1)
        for block in self.cls_pt_layers[:-1]:
            bridged = block(bridged, bias)
        return self.cls_pt_layers[-1](bridged, bias, subset)


# ── Variants: a row of SIZES, patch size, image size ──

BEiT, BEiTv2 = VisionTransformerForMaskedImageModeling, VisionTransformerForMaskedImageModelingCLS

beit_mini_patch16_96_8k_vocab = Variant(BEiT, "mini", 16, 96)
beit_mini_patch16_96_8k_vocab_cls_pt = Variant(BEiTv2, "mini", 16, 96)
beit_demo_patch16_128_8k_vocab = Variant(BEiT, "demo", 16, 128)
beit_demo_patch16_128_8k_vocab_cls_pt = Variant(BEiTv2, "demo", 16, 128)
beit_tiny_patch16_224_8k_vocab = Variant(BEiT, "tiny", 16, 224)
beit_tiny_patch16_224_8k_vocab_cls_pt = Variant(BEiTv2, "tiny", 16, 224)
beit_small_patch16_224_8k_vocab = Variant(BEiT, "small", 16, 224)
beit_small_patch16_224_8k_vocab_cls_pt = Variant(BEiTv2, "small", 16, 224)
beit_base_patch16_192_8k_vocab = Variant(BEiT, "base", 16, 192)
beit_base_patch16_224_8k_vocab = Variant(BEiT, "base", 16, 224)
beit_base_patch16_256_8k_vocab = Variant(BEiT, "base", 16, 256)
beit_base_patch16_224_8k_vocab_cls_pt = Variant(BEiTv2, "base", 16, 224)
beit_24x544_patch16_224_8k_vocab = Variant(BEiT, "24x544", 16, 224)
beit_24x544_patch16_224_8k_vocab_cls_pt = Variant(BEiTv2, "24x544", 16, 224)
beit_large_patch16_224_8k_vocab = Variant(BEiT, "large", 16, 224)
beit_large_patch16_224_8k_vocab_cls_pt = Variant(BEiTv2, "large", 16, 224)
beit_huge_patch14_224_8k_vocab = Variant(BEiT, "huge", 14, 224)
beit_huge_patch14_224_8k_vocab_cls_pt = Variant(BEiTv2, "huge", 14, 224)
beit_giant_patch14_224_8k_vocab = Variant(BEiT, "giant", 14, 224)
beit_giant_patch14_224_8k_vocab_cls_pt = Variant(BEiTv2, "giant", 14, 224)

# A registry of our own: importing this module leaves timm's models alone.
MODELS = {name: value for name, value in globals().items() if isinstance(value, Variant)}
OF_THE_CLS_HEAD = ("early_layers", "head_layers", "shared_lm_head")


def create_model(name: str, **options: Any) -> VisionTransformerForMaskedImageModeling:
    """Options of the CLS head are dropped for models without one."""
    variant = pick(MODELS, name, "pretraining model")
    if variant.model is BEiT:
        options = {key: value for key, value in options.items() if key not in OF_THE_CLS_HEAD}
    return variant(**options)

"""Semantic segmentation: the ViT as a backbone of four maps, and heads that give every
pixel a class.

Shapes: B batch, C width, K classes, h x w patches of an image of H x W pixels. Sources:
BEiT (Bao et al. 2022, section 3.2 and appendix), UPerNet (Xiao et al. 2018), SETR-PUP
(Zheng et al. 2021). Names of parameters are those of the released ADE20K checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, pick
from layers.conv_module import AveragePool, BatchNorm, ConvModule, resize
from layers.init_weights import init_linear_and_norm, rescale_outputs
from layers.rel_pos_bias import at_least, has_dynamic_size
from vit_backbone import SIZES, Trunk

POOL_SCALES = (1, 2, 3, 6)


class Head(nn.Module):
    """What every head ends with: dropout of whole channels and a 1 x 1 convolution to
    the classes.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        self.dropout = nn.Dropout2d(0.1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))


def set_head_dropout(model: nn.Module, share: float) -> None:
    """`share` of the channels that each head's last convolution does not see in
    training.
    """
    for head in (module for module in model.modules() if isinstance(module, Head)):
        head.dropout.p = share


class UPerHead(Head):
    """UPerNet: pools of the coarsest map tell what the scene is, and a feature pyramid
    brings that down to the finest one.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        pool_scales: Sequence[int] = POOL_SCALES,
    ) -> None:
        super().__init__(channels, num_classes)
        *fine, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AveragePool(scale), ConvModule(coarsest, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = ConvModule(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for width in fine)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in fine)
        self.fpn_bottleneck = ConvModule(len(in_channels) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, in_channels[i], h_i, w_i), finest first -> logits (B, K, h_0,
        w_0).
        """
        *fine, coarsest = maps
        pooled = [resize(pool(coarsest), coarsest.shape[-2:]) for pool in self.psp_modules]
        pyramid = [lateral(x) for lateral, x in zip(self.lateral_convs, fine, strict=True)]
        pyramid.append(self.bottleneck(torch.cat((coarsest, *pooled), dim=1)))
        for i in reversed(range(len(fine))):  # top down
            pyramid[i] = pyramid[i] + resize(pyramid[i + 1], pyramid[i].shape[-2:])
        smoothed = [conv(x) for conv, x in zip(self.fpn_convs, pyramid[:-1], strict=True)]
        size = smoothed[0].shape[-2:]
        fused = self.fpn_bottleneck(torch.cat([resize(x, size) for x in (*smoothed, pyramid[-1])], dim=1))
        return self.classify(fused)


class FCNHead(Head):
    """One convolution: the auxiliary head, which gives the middle of the network a loss
    of its own.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> logits (B, K, h, w)"""
        return self.classify(self.convs(x))


class SETRPUPHead(Head):
    """SETR-PUP, the task layer of BEiT v1's paper: progressive upsampling, 16 times in
    four stages.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, stages: int = 4) -> None:
        super().__init__(channels, num_classes)
        self.up_convs = nn.ModuleList(
            ConvModule(channels if i else in_channels, channels, 3) for i in range(stages)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[(B, in_channels, h, w)] -> logits (B, K, 16 h, 16 w)"""
        (x,) = maps
        for conv in self.up_convs:
            x = conv(x)
            x = resize(x, [2 * side for side in x.shape[-2:]])
        return self.classify(x)


class SegmentationBackbone(Trunk):
    """The ViT without head and last norm: raw outputs of chosen blocks, as maps.

    `pyramid`: the four maps are brought to strides 4, 8, 16 and 32; without it they
    stay at the patches' stride.
    """

    def __init__(self, out_indices: Sequence[int], pyramid: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.out_indices = tuple(out_indices)
        self.init_tokens(std=0.02, cut=2.0)
        self.apply(functools.partial(init_linear_and_norm, std=0.02, cut=2.0))
        rescale_outputs(self.blocks)
        self.to_strides: tuple[Callable[[Tensor], Tensor], ...] = (nn.Identity(),) * len(self.out_indices)
        if pyramid:
            if self.patch_size != 16 or len(self.out_indices) != 4:
                raise ValueError("the pyramid is of four maps of a model with patches of 16 pixels")
            width = self.embed_dim
            self.fpn1 = nn.Sequential(
                nn.ConvTranspose2d(width, width, 2, stride=2),
                BatchNorm(width),
                nn.GELU(),
                nn.ConvTranspose2d(width, width, 2, stride=2),
            )
            self.fpn2 = nn.Sequential(nn.ConvTranspose2d(width, width, 2, stride=2))
            self.to_strides = (self.fpn1, self.fpn2, nn.Identity(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W), sides multiples of the patch size -> a map (B, C,
        h_i, w_i) for each of out_indices.
        """
        grid = self.position_grid(x)
        size = self.patch_embed.patch_shape if grid is None else grid.size
        tokens, bias = self.embed(x, grid=grid), self.shared_bias(grid)
        maps = []
        for i, block in enumerate(self.blocks[: max(self.out_indices) + 1]):
            tokens = block(tokens, bias, None, grid)
            if i in self.out_indices:
                maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, size))  # (B, N, C) -> (B, C, h, w)
        return [at_stride(x) for at_stride, x in zip(self.to_strides, maps, strict=True)]

    compiled_methods = ("forward",)


class Segmenter(nn.Module):
    """Backbone, head and, where there is one, auxiliary head on the third map. Takes
    images of any size.
    """

    def __init__(
        self, backbone: SegmentationBackbone, decode_head: Head, auxiliary_head: FCNHead | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.decode_head, self.auxiliary_head = backbone, decode_head, auxiliary_head

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) -> logits (B, K, H, W); in training beside them those of
        the auxiliary head, or None.
        """
        patch = self.backbone.patch_size
        # two for the max-pool
        rows, columns = (at_least((side + patch - 1) // patch, 2) for side in x.shape[-2:])
        down, right = rows * patch - x.shape[-2], columns * patch - x.shape[-1]
        padded = F.pad(x, (0, right, 0, down))  # with the mean color: images are normalized
        maps = self.backbone(padded)
        logits = self.at_pixels(self.decode_head(maps), padded, x)
        if not self.training:
            return logits
        auxiliary = self.auxiliary_head
        return logits, None if auxiliary is None else self.at_pixels(auxiliary(maps[2]), padded, x)

    @staticmethod
    def at_pixels(logits: Tensor, padded: Tensor, x: Tensor) -> Tensor:
        scores = resize(logits.float(), padded.shape[-2:])
        if has_dynamic_size(x.shape[-2:]):  # slicing would compare sizes
            rows, columns = (torch.arange(side, device=x.device) for side in x.shape[-2:])
            return scores.index_select(2, rows).index_select(3, columns)
        return scores[..., : x.shape[-2], : x.shape[-1]]

    def get_num_layers(self) -> int:
        return self.backbone.get_num_layers()

    def no_weight_decay(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}


# ── Variants: <head>_beit_<size>_patch16 ──

SMALL_HEAD = 256  # channels of SETR-PUP's head and of the auxiliary one
MODELS = {
    f"{head}_beit_{size}_patch16": (head, size)
    for head in ("upernet", "setr_pup")
    for size in ("mini", "demo", "tiny", "small", "base", "24x544", "large")
}


def create_model(
    name: str, num_classes: int, img_size: int | tuple[int, int] = 512, **kwargs: Any
) -> Segmenter:
    """`kwargs`: of vit_backbone.Trunk. `img_size`: of the position tables; images may
    have any other.
    """
    head, size = pick(MODELS, name, "segmentation model")
    width = SIZES[size].embed_dim
    settings = {"img_size": img_size, "patch_size": 16, **SIZES[size]._asdict(), **kwargs}
    small = min(width, SMALL_HEAD)
    channels, aux_channels = (small, 0) if head == "setr_pup" else (width, small)
    return assemble(head, settings, num_classes, channels, aux_channels)


def assemble(
    head: str, backbone: dict[str, Any], num_classes: int, channels: int, aux_channels: int
) -> Segmenter:
    """`backbone`: of vit_backbone.Trunk; `channels`: of the decode head; `aux_channels`
    0: no other head.
    """
    pyramid, depth = head == "upernet", backbone["depth"]
    outputs = [depth // 3, depth // 2, 2 * depth // 3, depth] if pyramid else [depth]  # blocks, from 1
    try:
        trunk = SegmentationBackbone([number - 1 for number in outputs], pyramid, **backbone)
    except ValueError as error:
        raise UserError(f"`input_size`: {error}") from None
    width = trunk.embed_dim
    if not pyramid:
        return Segmenter(trunk, SETRPUPHead(width, channels, num_classes))
    auxiliary = FCNHead(width, aux_channels, num_classes) if aux_channels else None
    return Segmenter(trunk, UPerHead([width] * 4, channels, num_classes), auxiliary)

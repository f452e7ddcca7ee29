"""Frozen backbones whose features are measured or written: transformers from weight
files, and any network of timm (`timm:<name>`) with its own normalization.

Shapes: B batch, L layers, T tokens (prefix in front), N patches, C width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import pretrained
from checkpoint_io import weight_source
from checkpoint_io.timm_models import create_timm_model
from data_pipeline.pixel_format import RGB8, PixelFormat
from errors import ParameterError, UserError
from evaluation import knn
from layers import cpu_bf16
from layers.meant_device import is_cpu
from layers.rel_pos_bias import as_pair
from runtime.device import Precision
from runtime.terminal import log
from transforms import normalization, normalization_of

TIMM = "timm:"


@dataclass(frozen=True)
class Backbone:
    """A network, frozen and in eval mode, and how it was shown images.

    `model` has embed_dim, num_prefix_tokens, get_num_layers() and
    get_intermediate_layers(x, layer), which gives every layer's (B, T, C), or one's.

    Attributes:
        img_size: Height and width of its images in pixels.
        crop_pct: Of evaluation; None: as eval_view does.
        has_cls: Whether token 0 is a CLS token.
        summary: `cls` or `mean`, what stands for an image by the network's training;
            None: nothing says so.
        pixels: Of its images.
        flags: Of its training, {} where unknown.
    """

    model: Any
    img_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    crop_pct: float | None = None
    interpolation: str = "bicubic"
    has_cls: bool = True
    summary: str | None = None
    pixels: PixelFormat = RGB8
    flags: Mapping[str, Any] = field(default_factory=dict)

    def describe_statistics(self) -> str:
        for imagenet, name in ((True, "ImageNet's mean and std"), (False, "mean and std 0.5")):
            if (tuple(self.mean), tuple(self.std)) == normalization(imagenet):
                return name
        mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean} and std {std}"


def open_frozen(
    source: str,
    input_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    imagenet: bool = False,
    origin: str = "`checkpoint`",
    keys: str = "model|module",
    in_chans: int | None = None,
) -> Backbone:
    """`source`: what pretrained.open_backbone opens, or `timm:<name>`: timm's weights of
    that name, `timm:local-dir:<folder>` or `timm:hf-hub:<id>`.

    `input_size`: side or (height, width) in pixels; default: the network's own.
    `imagenet`: images have ImageNet's mean and std where the file does not tell.
    `origin`: the parameter that names the source, for messages. `keys`: where the weights
    are in a file, the first hit. `in_chans`: channels of the images; default: as it was
    trained.
    """
    if source.startswith(TIMM):
        if num_heads is not None or imagenet:
            name = "num_heads" if num_heads is not None else "imagenet_default_mean_and_std"
            log.warning(f"warning: `{name}` does nothing with {source}: timm knows it")
        if in_chans not in (None, 3):
            raise ParameterError(f"`in_chans` {in_chans}: {source} is opened for images of 3 channels only")
        return open_timm(source.removeprefix(TIMM), input_size)
    content = weight_source.read_weights(source, keys=keys, origin=origin)
    model, flags = pretrained.open_backbone(source, input_size, num_heads, origin, content, in_chans)
    own = flags | {"in_chans": model.patch_embed.proj.in_channels}
    mean, std = normalization_of(own, pretrained.uses_imagenet_statistics(flags, imagenet, source))
    summary = "cls" if pretrained.has_cls_head(content.weights) else None
    size, pixels = model.patch_embed.img_size, PixelFormat.of_flags(own)
    return Backbone(model, size, mean, std, summary=summary, pixels=pixels, flags=own)


def open_timm(name: str, input_size: int | tuple[int, int] | None = None) -> Backbone:
    advice = f"{TIMM}local-dir:FOLDER opens a folder that timm has written"
    network = create_timm_model(name, 0, input_size, None, f"{TIMM}{name}", "input_size", advice)
    model = TimmBackbone(network.eval().requires_grad_(False))
    own = resolve_model_data_config(network)
    size = as_pair(input_size or own["input_size"][1:])
    try:
        model.get_intermediate_layers(torch.zeros(1, 3, *size))
    except Exception as error:  # of any of timm's networks
        raise ParameterError(
            f"`input_size`: timm's {name} takes no images of {size[0]} x {size[1]} pixels ({error})"
        ) from None
    has_cls = getattr(network, "cls_token", None) is not None and model.num_prefix_tokens > 0
    return Backbone(
        model,
        size,
        own["mean"],
        own["std"],
        own["crop_pct"],
        own["interpolation"],
        has_cls,
        "cls" if has_cls and getattr(network, "global_pool", "") == "token" else "mean",
    )


class TimmBackbone(nn.Module):
    """A network of timm with the methods of ours. A ViT has a layer for each block, and
    the last is what its head is given, after the final norm; other networks have one
    layer, the positions of their last map.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.embed_dim: int = network.num_features
        intermediate = getattr(network, "forward_intermediates", None)
        self.has_tokens = intermediate is not None and (
            "return_prefix_tokens" in inspect.signature(intermediate).parameters
        )
        self.num_prefix_tokens: int = network.num_prefix_tokens if self.has_tokens else 0

    def get_num_layers(self) -> int:
        return len(self.network.blocks) if self.has_tokens else 1

    def get_intermediate_layers(self, x: Tensor, layer: int | None = None) -> list[Tensor]:
        """Of every layer, or of one alone, as VisionTransformer's."""
        if not self.has_tokens:
            maps = self.network.forward_features(x)
            if maps.ndim == 4:  # (B, C, h, w), or (B, h, w, C) of windowed transformers
                channels_first = maps.shape[1] == self.embed_dim
                maps = maps.flatten(2).transpose(1, 2) if channels_first else maps.flatten(1, 2)
            return [maps]
        which: dict[str, Any] = {"return_prefix_tokens": True, "output_fmt": "NLC"}
        if layer is not None:
            which |= {"indices": [layer - 1], "stop_early": True}
        last, layers = self.network.forward_intermediates(x, **which)
        joined = [torch.cat((part[1], part[0]), 1) if isinstance(part, tuple) else part for part in layers]
        return joined if layer not in (None, self.get_num_layers()) else [*joined[:-1], last]


class FrozenBackbone:
    """Images (B, in_chans, height, width) -> outputs of every layer, pooled (B, L, D), or of
    one (from 1): (B, D), or its patch tokens (B, N, C) with `features` patches. Never
    trained.

    UserError: `features` asks for a CLS token that the network lacks.
    """

    def __init__(
        self, backbone: Backbone, features: str, precision: Precision, layer: int | None = None
    ) -> None:
        if "cls" in features and not backbone.has_cls:
            raise UserError(f"{features}: this network has no CLS token; ask for the mean of its patches")
        self.model, self.features, self.precision, self.layer = backbone.model, features, precision, layer
        self.layers = self.model.get_num_layers()
        if is_cpu(next(self.model.parameters()).device):
            cpu_bf16.swap_in(self.model)
        self.dim = self.model.embed_dim * len(features.split("_"))
        self.at_once: int | None = None  # images; None: those of a batch

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """In halves, quarters and so on where the GPU's memory does not hold the batch."""
        while True:
            at_once = min(self.at_once or len(images), len(images))
            try:
                return torch.cat([self.encode(part) for part in images.split(at_once)])
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                self.at_once = at_once // 2
            # here the tensors of the attempt are released
            log.warning(f"memory     does not hold {at_once} images: from here on {self.at_once} at once")

    def encode(self, images: Tensor) -> Tensor:
        with self.precision.autocast():
            outputs = self.model.get_intermediate_layers(images, self.layer)
        if self.layer is not None:
            return self.pool(outputs[0])
        return torch.stack([self.pool(tokens) for tokens in outputs], dim=1)

    def pool(self, tokens: Tensor) -> Tensor:
        return knn.pool(tokens.float(), self.features, self.model.num_prefix_tokens)

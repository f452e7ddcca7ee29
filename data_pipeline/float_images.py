"""Random crops, jitter and resizing of images as float tensors (C, height, width) in
[0, 1], for pixels that are not 8-bit RGB (pixel_format.py).

The random numbers are those of augmentation.py. PIL resizes each channel, with the
filters of the 8-bit images, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from data_pipeline.augmentation import (
    CONTRAST,
    SATURATION,
    CropParams,
    CropSampler,
    build_jitter,
    draw_operations,
)

Box = tuple[float, float, float, float]  # left, top, right, bottom


def crop_float(image: Tensor, params: CropParams) -> Tensor:
    """The crop of the jittered and flipped image."""
    image = jitter_float(image, params.operations)
    left, top, right, bottom = params.box()
    return flip(image[:, top:bottom, left:right], params.hflip, params.vflip)


def flip(image: Tensor, hflip: bool, vflip: bool) -> Tensor:
    return image.flip([dim for dim, flips in ((-1, hflip), (-2, vflip)) if flips])


def jitter_float(image: Tensor, operations: Iterable[tuple[int, float]]) -> Tensor:
    """Brightness, contrast about the mean (of RGB: of its gray) and of three channels
    saturation, each clipped to [0, 1].
    """
    for kind, factor in operations:
        if kind == SATURATION:
            image = F.adjust_saturation(image, factor)
        else:
            gray = F.rgb_to_grayscale(image) if len(image) == 3 else image
            pivot = gray.mean() if kind == CONTRAST else 0.0
            image = ((image - pivot) * factor + pivot).clamp(0, 1)
    return image


def resize_float(
    image: Tensor, size: Sequence[int], mode: InterpolationMode, box: Box | None = None
) -> Tensor:
    """`box` of the image, or all of it, to (C, *size), clipped to [0, 1]."""
    height, width = size
    if box is None and image.shape[-2:] == (height, width):
        return image
    filtered = Image.Resampling[mode.value.upper()]
    channels = [
        np.asarray(Image.fromarray(channel.numpy()).resize((width, height), filtered, box))
        for channel in image.contiguous()
    ]
    return torch.from_numpy(np.stack(channels)).clamp_(0, 1)


def pad_float(image: Tensor, side: int, fill: Sequence[float]) -> Tensor:
    """To (C, side, side), at the right and at the bottom with the color `fill`."""
    canvas = torch.tensor(fill).view(-1, 1, 1).repeat(1, side, side)
    canvas[:, : image.shape[-2], : image.shape[-1]] = image
    return canvas


class FloatCrop(torch.nn.Module):
    """CropSampler's random crop, resized, for torchvision's Compose."""

    def __init__(
        self, sampler: CropSampler, size: tuple[int, int], mode: Callable[[], InterpolationMode]
    ) -> None:
        super().__init__()
        self.sampler, self.size, self.mode = sampler, size, mode

    def forward(self, image: Tensor) -> Tensor:
        crop = crop_float(image, self.sampler((image.shape[-1], image.shape[-2])))
        return resize_float(crop, self.size, self.mode())


class FloatJitter(torch.nn.Module):
    """torchvision's ColorJitter, for any number of channels."""

    def __init__(self, strength: float, saturation: bool) -> None:
        super().__init__()
        self.jitter = build_jitter(strength, saturation)

    def forward(self, image: Tensor) -> Tensor:
        return jitter_float(image, draw_operations(self.jitter))

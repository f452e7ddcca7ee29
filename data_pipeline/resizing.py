"""Resizing images: interpolation by name, and images that are very long. Images are
PIL's, or float tensors (C, height, width).
"""

from __future__ import annotations

import random
from typing import TypeVar

from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from data_pipeline.float_images import resize_float
from errors import ParameterError, pick

MODES = {
    name: InterpolationMode(name) for name in ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
}


def interpolation(name: str) -> InterpolationMode:
    """The mode of that name; `random` draws bilinear or bicubic at each call.
    UserError for other names.
    """
    if name == "random":
        return MODES[random.choice(("bilinear", "bicubic"))]
    return pick(MODES, name, "interpolation")


AnyImage = Image.Image | Tensor
ImageT = TypeVar("ImageT", Image.Image, Tensor)


def cut_to_length(image: ImageT, most: int = 64) -> ImageT:
    """The middle of an image that is more than `most` times as long as wide: of a line
    of pixels, resized as a whole, a center crop would need gigabytes to show a few. All
    others as they are. Nothing moves: as much is cut off at either end.
    """
    sides, whole = [], F.get_image_size(image)  # width, height
    for side in whole:
        longest = max(most * min(whole), 1)
        sides.append(side if side <= longest else longest + (side - longest) % 2)
    if sides == whole:
        return image
    left, top = (whole[0] - sides[0]) // 2, (whole[1] - sides[1]) // 2
    return F.crop(image, top, left, sides[1], sides[0])


class Resize(T.Resize):
    """torchvision's, of the middle of an image that is very long."""

    def forward(self, image: ImageT) -> ImageT:
        image = cut_to_length(image)
        if isinstance(image, Image.Image):
            return super().forward(image)
        if not isinstance(self.size, int):
            return resize_float(image, self.size, self.interpolation)
        shorter = min(image.shape[-2:])
        sides = [int(self.size * side / shorter) for side in image.shape[-2:]]
        return resize_float(image, sides, self.interpolation)


class ResizeToCover:
    """Keeps the aspect ratio; the smallest image that a rectangle (height, width) lies
    in, in pixels.
    """

    def __init__(self, size: tuple[int, int], mode: InterpolationMode) -> None:
        self.size, self.mode = size, mode

    def __call__(self, image: ImageT) -> ImageT:
        image = cut_to_length(image)
        width, height = F.get_image_size(image)
        scale = max(self.size[0] / height, self.size[1] / width)
        sides = [max(self.size[0], round(height * scale)), max(self.size[1], round(width * scale))]
        if isinstance(image, Image.Image):
            return F.resize(image, sides, self.mode)
        return resize_float(image, sides, self.mode)


def check_interpolation(parameter: str, name: str) -> None:
    if name not in MODES and name != "random":
        raise ParameterError(f"`{parameter}` {name}: use {', '.join(MODES)} or random")

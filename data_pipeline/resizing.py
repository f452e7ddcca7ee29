"""Resizing PIL images: interpolation by name, and images that are very long."""

from __future__ import annotations

import random

from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from errors import ParameterError, pick

MODES = {
    name: InterpolationMode(name) for name in ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
}


def interpolation(name: str) -> InterpolationMode:
    """The mode of that name; `random` draws bilinear or bicubic anew at each call.
    UserError for other names.
    """
    if name == "random":
        return MODES[random.choice(("bilinear", "bicubic"))]
    return pick(MODES, name, "interpolation")


def cut_to_length(image: Image.Image, most: int = 64) -> Image.Image:
    """The middle of an image that is more than `most` times as long as wide: of a line
    of pixels, resized as a whole, a center crop would need gigabytes to show a few. All
    others as they are. Nothing moves: as much is cut off at either end.
    """
    sides = []
    for side in image.size:
        longest = max(most * min(image.size), 1)
        sides.append(side if side <= longest else longest + (side - longest) % 2)
    if tuple(sides) == image.size:
        return image
    left, top = (image.width - sides[0]) // 2, (image.height - sides[1]) // 2
    return image.crop((left, top, left + sides[0], top + sides[1]))


class Resize(T.Resize):
    """torchvision's, of the middle of an image that is very long."""

    def forward(self, image: Image.Image) -> Image.Image:
        return super().forward(cut_to_length(image))


class ResizeToCover:
    """Keeps the aspect ratio; the smallest image that a rectangle (height, width) lies
    in, in pixels.
    """

    def __init__(self, size: tuple[int, int], mode: InterpolationMode) -> None:
        self.size, self.mode = size, mode

    def __call__(self, image: Image.Image) -> Image.Image:
        image = cut_to_length(image)
        scale = max(self.size[0] / image.height, self.size[1] / image.width)
        sides = (
            max(self.size[0], round(image.height * scale)),
            max(self.size[1], round(image.width * scale)),
        )
        return F.resize(image, list(sides), self.mode)


def check_interpolation(parameter: str, name: str) -> None:
    if name not in MODES and name != "random":
        raise ParameterError(f"`{parameter}` {name}: use {', '.join(MODES)} or random")

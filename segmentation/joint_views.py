"""Views of an image and its mask together: both are resized, cropped and flipped alike,
colors vary in the image alone.

Images are PIL RGB, or of other channels and depths float tensors (C, height, width) in
[0, 1] (data_pipeline/pixel_format.py); labels PIL "L" (the class of each pixel, IGNORED: none), of one
size. What comes back is {"image": (C, height, width), uint8 or float, "label":
(height, width) uint8}.
Random views draw from Python's global generator, which the data set seeds per sample
(samplers.Files).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from data_pipeline.float_images import Box, pad_float, resize_float
from data_pipeline.resizing import AnyImage
from errors import ParameterError
from segmentation.mask_files import IGNORED

LONGEST = 4  # the longer side is at most this many times the base size
REDRAWS = 10  # of a crop that one class fills
BRIGHTNESS = 32  # levels, added
FACTORS = (0.5, 1.5)  # of contrast and saturation
HUE = 36  # degrees of the circle of colors: 18 of 180 steps in the recipe
LEVELS = np.arange(256)

Size = tuple[int, int]  # width, height


def fit_size(size: Size, base: int, scale: float = 1.0) -> Size:
    """The size at which an image fits into (LONGEST * base, base) pixels, times
    `scale`; the aspect ratio is kept.
    """
    factor = scale * min(base / min(size), LONGEST * base / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


class EvaluationView:
    """The whole image, at the size that the network looks at; labels stay as they are
    in the file.
    """

    def __init__(self, base: int) -> None:
        self.base = base

    def __call__(self, image: AnyImage) -> Tensor:
        """RGB -> (3, height, width) uint8, or floats -> floats, the shorter side
        `base`.
        """
        size = fit_size(size_of(image), self.base)
        return as_tensor(image if size == size_of(image) else resize(image, size))

    def transform_pair(self, image: AnyImage, labels: Image.Image) -> dict[str, Tensor]:
        return {"image": self(image), "label": as_tensor(labels)[0]}


class TrainingView:
    """A random crop of `side` x `side` pixels of the image at a random size, perhaps
    mirrored, in varied colors.

    An image smaller than the crop is filled up at its right and at its bottom with the
    color `fill` (in [0, 1]), its labels with IGNORED. A crop of whose labeled pixels one class has
    more than `max_class_share` is drawn again, up to REDRAWS times.
    """

    def __init__(
        self,
        side: int,
        base: int,
        scale_range: Sequence[float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        hflip: float = 0.5,
        photometric: bool = True,
        fill: tuple[float, ...] = (0.5, 0.5, 0.5),
    ) -> None:
        smallest, largest = scale_range
        if not 0 < smallest <= largest:
            raise ParameterError(
                f"`scale_range` {smallest} {largest}: give the smallest scale, above 0, and then the largest"
            )
        if not 0 < max_class_share <= 1:
            raise ParameterError(
                f"`max_class_share` {max_class_share}: give a share above 0 and up to 1 (off)"
            )
        if not 0 <= hflip <= 1:
            raise ParameterError(f"`hflip` {hflip}: give a probability from 0 to 1")
        self.side, self.base, self.scale_range, self.max_class_share = (
            side,
            base,
            (smallest, largest),
            max_class_share,
        )
        self.hflip, self.photometric, self.fill = hflip, photometric, fill

    def transform_pair(self, image: AnyImage, labels: Image.Image) -> dict[str, Tensor]:
        image, labels = self.crop(image, labels)
        if random.random() < self.hflip:
            image, labels = F.hflip(image), F.hflip(labels)
        if self.photometric:
            image = distort_colors(image)
        labels = pad_to_side(labels, self.side, IGNORED)
        if isinstance(image, Tensor):
            image = pad_float(image, self.side, self.fill)
        else:
            image = pad_to_side(image, self.side, tuple(round(255 * value) for value in self.fill))
        return {"image": as_tensor(image), "label": as_tensor(labels)[0]}

    def crop(self, image: AnyImage, labels: Image.Image) -> tuple[AnyImage, Image.Image]:
        """At most side x side pixels of both, resized. PIL resizes the crop's pixels
        alone, with the same result.
        """
        whole = size_of(image)
        width, height = fit_size(whole, self.base, random.uniform(*self.scale_range))
        size = min(self.side, width), min(self.side, height)
        across, down = whole[0] / width, whole[1] / height
        for _ in range(1 if size == (width, height) else 1 + REDRAWS):
            left, top = random.randint(0, width - size[0]), random.randint(0, height - size[1])
            right = min((left + size[0]) * across, whole[0])  # rounding may take it beyond
            bottom = min((top + size[1]) * down, whole[1])
            box = left * across, top * down, right, bottom
            cropped = labels.resize(size, Image.Resampling.NEAREST, box)
            if largest_share(cropped) <= self.max_class_share:
                break
        return resize(image, size, box), cropped


def size_of(image: AnyImage) -> Size:
    width, height = F.get_image_size(image)
    return width, height


def resize(image: AnyImage, size: Size, box: Box | None = None) -> AnyImage:
    """`box` of the image, or all of it, bilinear."""
    if isinstance(image, Image.Image):
        return image.resize(size, Image.Resampling.BILINEAR, box)
    return resize_float(image, (size[1], size[0]), F.InterpolationMode.BILINEAR, box)


def largest_share(labels: Image.Image) -> float:
    """The share of the labeled pixels that the most frequent class has; above 1 where
    nothing is labeled.
    """
    counts = labels.histogram()[:IGNORED]
    return max(counts) / sum(counts) if any(counts) else 2.0


def distort_colors(image: AnyImage) -> AnyImage:
    """Brightness, contrast, saturation and hue (of floats that are not RGB the first
    two), each varied with probability 1/2; contrast first or last.
    """
    shift = random.uniform(-BRIGHTNESS, BRIGHTNESS) if chance() else 0.0
    contrast, saturation = (random.uniform(*FACTORS) if chance() else 1.0 for _ in range(2))
    hue = random.uniform(-HUE, HUE) if chance() else 0.0
    first = chance()
    if isinstance(image, Tensor):
        image = (image + shift / 255).clamp(0, 1) * (contrast if first else 1.0)
        if len(image) == 3:
            image = F.adjust_hue(F.adjust_saturation(image.clamp(0, 1), saturation), hue / 360)
        return (image if first else image * contrast).clamp(0, 1)
    image = apply_lut(image, (LEVELS + shift).clip(0, 255) * (contrast if first else 1.0))
    if saturation != 1 or hue != 0:
        turned = (LEVELS + round(hue / 360 * 256)) % 256
        tables = [turned, levels(LEVELS * saturation), LEVELS]
        image = image.convert("HSV").point(np.concatenate(tables).tolist()).convert("RGB")
    return image if first else apply_lut(image, LEVELS * contrast)


def apply_lut(image: Image.Image, values: np.ndarray) -> Image.Image:
    """Each level of each channel replaced by its entry of `values` (256,)."""
    table = levels(values)
    return image if (table == LEVELS).all() else image.point(table.tolist() * 3)


def levels(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.int64)


def chance() -> bool:
    return random.random() < 0.5


def pad_to_side(image: Image.Image, side: int, value: int | tuple[int, ...]) -> Image.Image:
    if image.size == (side, side):
        return image
    filled = Image.new(image.mode, (side, side), value)
    filled.paste(image, (0, 0))
    return filled


def as_tensor(image: AnyImage) -> Tensor:
    """(channels, height, width), PIL's as uint8."""
    return image.contiguous() if isinstance(image, Tensor) else F.pil_to_tensor(image).contiguous()

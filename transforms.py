"""Reading an image, and views of it: images (PIL RGB, or of other channels and depths
float tensors, pixel_format.py) in, dictionaries of tensors out.

Random views draw from the global generators, which the data set seeds per sample
(seeding.seeded). Crops travel to the device as uint8 (`transform`) and become floats
there (`device_transform`): a quarter of the bytes in each queue between.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from data_pipeline.augmentation import CropSampler
from data_pipeline.crops import ASPECT_RANGE, DECODED_TO_SHOWN, check_pipeline, check_ranges
from data_pipeline.float_images import FloatCrop, FloatJitter
from data_pipeline.image_formats import Size, Source, load_image
from data_pipeline.pixel_format import RGB8, PixelFormat, load
from data_pipeline.resizing import MODES, Resize, ResizeToCover, check_interpolation, interpolation
from errors import ParameterError, pick

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# CIFAR's size: at or below it images are shifted by a padded crop instead of being
# cropped and enlarged
SMALL = 32


def normalization(imagenet: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) that `imagenet_default_mean_and_std` chooses: ImageNet's, or 0.5 and
    0.5 (the recipes).
    """
    return (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (HALF_MEAN, HALF_STD)


def normalization_of(
    flags: Mapping[str, Any], imagenet: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel by `mean_std` (half, imagenet, or the numbers) of a
    run's flags, else by `imagenet_default_mean_and_std`; `imagenet` where they tell
    neither.
    """
    chosen, in_chans = flags.get("mean_std"), flags.get("in_chans") or 3
    if chosen and len(chosen) > 1:
        return tuple(chosen[: len(chosen) // 2]), tuple(chosen[len(chosen) // 2 :])
    if chosen:
        imagenet = chosen[0] == "imagenet"
    else:
        imagenet = flags.get("imagenet_default_mean_and_std", imagenet)
    return normalization(True) if imagenet else ((HALF_MEAN[0],) * in_chans, (HALF_STD[0],) * in_chans)


class ImageOnly:
    """The view that is finished before the device: {"image": (in_chans, S, S) float},
    as `steps` make it of an image. `decoded_side`: of a JPEG's shorter side so many
    pixels are enough; None: all of them.
    """

    def __init__(
        self, steps: T.Compose, pixels: PixelFormat = RGB8, decoded_side: float | None = None
    ) -> None:
        self.steps, self.pixels, self.decoded_side = steps, pixels, decoded_side

    def load(self, source: Source | IO[bytes]) -> Image.Image | torch.Tensor:
        if self.decoded_side is None:
            return load(source, self.pixels)
        return load_image(source, self.enough)

    def enough(self, size: Size) -> Size:
        """Of an image of this (width, height): to no less may it be decoded."""
        shrink = min(size) / (self.decoded_side or min(size))
        return math.ceil(size[0] / shrink), math.ceil(size[1] / shrink)

    def transform(self, loaded: Image.Image | torch.Tensor) -> dict[str, torch.Tensor]:
        return {"image": self.steps(loaded)}

    def device_transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def __call__(self, image: Image.Image | torch.Tensor) -> dict[str, torch.Tensor]:
        return self.transform(image)


def default_crop_pct(size: int | tuple[int, int]) -> float:
    """The share of the (square) image that evaluation sees: 0.875, all of it from 384
    pixels up and at 32 and below.
    """
    return 0.875 if SMALL < np.max(size) < 384 else 1.0


def eval_view(
    size: int | tuple[int, int],
    crop_pct: float | None = None,
    interpolation: str = "bicubic",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pixels: PixelFormat = RGB8,
    data_pipeline: str = "exact",
) -> ImageOnly:
    """The center of the image, {"image": (in_chans, size, size)}: shorter side to size /
    crop_pct, then a center crop.

    `size` (height, width): the image is made to cover that rectangle / crop_pct.
    `crop_pct` None: 0.875, and 1.0 from 384 pixels up and for CIFAR's 32 and below.
    `mean` None: stays in [0, 1]. `data_pipeline` fast: of a large JPEG, decoded to a
    half, a quarter or an eighth of its size where more is left than the resize needs.
    """
    check_pipeline(data_pipeline, pixels)
    if crop_pct is None:
        crop_pct = default_crop_pct(size)
    if not 0 < crop_pct <= 1:
        raise ParameterError(f"`crop_pct` {crop_pct}: give a share above 0 and up to 1 (or leave it out)")
    mode = pick(MODES, interpolation, "interpolation")
    if not isinstance(size, int) and size[0] == size[1]:
        size = size[0]
    if isinstance(size, int):
        resize: Any = Resize(int(size / crop_pct), mode)
    else:
        resize = ResizeToCover((int(size[0] / crop_pct), int(size[1] / crop_pct)), mode)
    steps = [resize, T.CenterCrop(size), *([T.ToTensor()] if pixels.is_rgb8 else [])]
    if mean is not None and std is not None:
        steps.append(T.Normalize(mean, std))
    decoded_side = DECODED_TO_SHOWN * np.max(size) / crop_pct if data_pipeline == "fast" else None
    return ImageOnly(T.Compose(steps), pixels, decoded_side)


def describe_eval_view(view: ImageOnly) -> str:
    """An eval_view of a square, in words."""
    resize, crop = view.steps.transforms[:2]
    size = " x ".join(map(str, crop.size))
    return f"shorter side to {resize.size} pixels ({resize.interpolation.value}), then the central {size}"


def finetuning_view(
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    aa: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.4,
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    train_interpolation: str = "bicubic",
    min_crop_scale: float = 0.08,
    hflip: float = 0.5,
    vflip: float = 0.0,
    pixels: PixelFormat = RGB8,
) -> ImageOnly:
    """timm's augmentation for training a classifier: {"image": (in_chans, size, size)
    normalized float}.

    `size`: side or (height, width). `aa`: timm's policy string; '' or 'none' switches
    it off, and only then `color_jitter` acts. Random erasing: `reprob`, `remode`
    (const, rand, pixel), `recount`. Up to 32 pixels: a crop of the image padded by 4.
    Policies are of 8-bit RGB: other `pixels` have `color_jitter` alone, brightness and
    contrast.
    """
    check_ranges(min_crop_scale, color_jitter, vflip)
    check_interpolation("train_interpolation", train_interpolation)
    if remode not in ("const", "rand", "pixel"):
        raise ParameterError(f"`remode` {remode}: use const, rand or pixel")
    try:
        first, augment, last = create_transform(
            input_size=size,
            is_training=True,
            separate=True,
            scale=(min_crop_scale, 1.0),
            ratio=(ASPECT_RANGE[0], ASPECT_RANGE[1]),
            hflip=hflip,
            vflip=vflip,
            color_jitter=color_jitter,
            auto_augment=None if aa in ("", "none", None) else aa,
            interpolation=train_interpolation,
            mean=tuple(mean),
            std=tuple(std),
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ParameterError(
            f"`aa` {aa}: timm knows no such policy ({error}); try rand-m9-mstd0.5-inc1 or none"
        ) from None
    _keep_posterize_in_range(augment)
    if np.max(size) <= SMALL:
        # Resize only acts on images that are not of this size already; then shift by up
        # to 4 pixels.
        shift = [Resize(size, InterpolationMode.BICUBIC), T.RandomCrop(size, padding=4)]
        first = T.Compose([*shift, T.RandomHorizontalFlip(hflip), T.RandomVerticalFlip(vflip)])
    elif not pixels.is_rgb8:
        sampler = CropSampler([min_crop_scale, 1.0], ASPECT_RANGE, color_jitter=0, vflip=vflip)
        mode = functools.partial(interpolation, train_interpolation)
        first = FloatCrop(sampler, (size, size) if isinstance(size, int) else size, mode)
    if not pixels.is_rgb8:
        augment = FloatJitter(color_jitter, saturation=pixels.in_chans == 3)
        last = T.Compose([step for step in last.transforms if isinstance(step, (T.Normalize, RandomErasing))])
    return ImageOnly(T.Compose([first, augment, last]), pixels)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, min(max(bits, 1), 8))


def _keep_posterize_in_range(augment: T.Compose) -> None:
    """At full strength timm posterizes to 0 bits: a black image in older Pillow
    releases, an exception in newer ones.

    The default policy draws it for one image in a few hundred.
    """
    for policy in augment.transforms:
        # AutoAugment: pairs of operations; RandAugment and AugMix: a list
        nested = getattr(policy, "policy", ())
        for operation in [*getattr(policy, "ops", ()), *(each for pair in nested for each in pair)]:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize

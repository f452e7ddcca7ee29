"""Reading an image, and views of it: PIL RGB in, dictionaries of tensors out.

Random views draw from the global generators, which the data set seeds per sample (utils.seeded).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from errors import UserError, pick

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
ASPECT_RANGE = [3 / 4, 4 / 3]  # width / height of a random crop
SMALL = 32  # CIFAR's size: at or below it images are shifted by a padded crop instead of being cropped and enlarged

MODES = {name: InterpolationMode(name) for name in ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")}

Source = str | np.ndarray  # an image file, or an (H, W, 3) uint8 image in memory
View = Callable[[Image.Image], dict[str, torch.Tensor]]


def load_image(source: Source | IO[bytes]) -> Image.Image:
    """RGB, upright (EXIF), 8 bits; raises whatever PIL raises for what it cannot decode."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    with Image.open(source) as image:
        image.load()
        with contextlib.suppress(Exception):  # a broken EXIF block does not make a broken picture
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # PIL would clip these at 255 instead of scaling
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        full = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
        grey = np.rint(values.clip(0, full) * (255 / full)).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # What lies under transparent pixels is arbitrary: show them on white, as a page would.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def interpolation(name: str) -> InterpolationMode:
    """The mode of that name; `random` draws bilinear or bicubic anew at each call. UserError for other names."""
    if name == "random":
        return MODES[random.choice(("bilinear", "bicubic"))]
    return pick(MODES, name, "interpolation")


def normalisation(imagenet: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) that --imagenet_default_mean_and_std chooses: ImageNet's, or 0.5 and 0.5 (the recipes)."""
    return (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (HALF_MEAN, HALF_STD)


class ImageOnly:
    """A transform from PIL to tensor as a view: {"image": (3, S, S) float}."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> dict[str, torch.Tensor]:
        return {"image": self.transform(image)}


class RandomCrop:
    """Colour jitter, flips and one random crop, not resized yet: the randomness that all views of one image share."""

    def __init__(self, min_crop_scale: float, color_jitter: float, vflip: float) -> None:
        _check_ranges(min_crop_scale, color_jitter, vflip)
        jitter = [T.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []
        self.jitter_and_flip = T.Compose([*jitter, T.RandomHorizontalFlip(0.5), T.RandomVerticalFlip(vflip)])
        self.area_range = [min_crop_scale, 1.0]

    def __call__(self, image: Image.Image) -> Image.Image:
        image = self.jitter_and_flip(image)
        top, left, height, width = T.RandomResizedCrop.get_params(image, self.area_range, ASPECT_RANGE)
        return F.crop(image, top, left, height, width)


def resized_tensor(image: Image.Image, size: int, mode: InterpolationMode) -> torch.Tensor:
    """(3, size, size) float in [0, 1]; the aspect ratio is not kept."""
    return F.to_tensor(F.resize(image, [size, size], mode))


class PretrainingViews:
    """Two sizes of one random crop, and a mask.

    Gives {"image": (3, S, S) normalised float, for the network; "tokenizer_image": (3, S2, S2) float in [0, 1], for the
    tokenizer, only with a `second_size`; "mask": (H*W,) bool, row-major, True = masked}. `mask_generator()` gives the
    (H, W) mask.
    """

    def __init__(
        self,
        input_size: int,
        second_size: int | None,
        min_crop_scale: float,
        color_jitter: float,
        interpolation: str,
        second_interpolation: str,
        mean: Sequence[float],
        std: Sequence[float],
        mask_generator: Callable[[], Any],
        vflip: float = 0.0,
    ) -> None:
        _check_interpolation("--train_interpolation", interpolation)
        _check_interpolation("--second_interpolation", second_interpolation)
        self.crop = RandomCrop(min_crop_scale, color_jitter, vflip)
        self.first = input_size, interpolation
        self.second = second_size, second_interpolation
        self.mean, self.std = list(mean), list(std)
        self.mask_generator = mask_generator

    def __call__(self, image: Image.Image) -> dict[str, torch.Tensor]:
        crop = self.crop(image)
        first = resized_tensor(crop, self.first[0], interpolation(self.first[1]))
        views = {"image": F.normalize(first, self.mean, self.std)}
        second_size, second_interpolation = self.second
        if second_size is not None:
            same = self.first == self.second  # the recipes' case: resize once
            views["tokenizer_image"] = first if same else resized_tensor(crop, second_size, interpolation(second_interpolation))
        views["mask"] = torch.as_tensor(self.mask_generator(), dtype=torch.bool).flatten()
        return views


class TokenizerViews:
    """A random crop for tokenizer training: {"image": (3, S, S) float in [0, 1]}; models normalise for themselves."""

    def __init__(self, size: int, min_crop_scale: float, color_jitter: float, interpolation: str, vflip: float = 0.0) -> None:
        _check_interpolation("--train_interpolation", interpolation)
        self.crop = RandomCrop(min_crop_scale, color_jitter, vflip)
        self.size, self.mode = size, interpolation

    def __call__(self, image: Image.Image) -> dict[str, torch.Tensor]:
        return {"image": resized_tensor(self.crop(image), self.size, interpolation(self.mode))}


class ResizeToCover:
    """Keeps the aspect ratio; the smallest image that a rectangle (height, width) lies in, in pixels."""

    def __init__(self, size: tuple[int, int], mode: InterpolationMode) -> None:
        self.size, self.mode = size, mode

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = max(self.size[0] / image.height, self.size[1] / image.width)
        sides = (max(self.size[0], round(image.height * scale)), max(self.size[1], round(image.width * scale)))
        return F.resize(image, list(sides), self.mode)


def default_crop_pct(size: int | tuple[int, int]) -> float:
    """The share of the (square) image that evaluation sees: 0.875, all of it from 384 pixels up and at 32 and below."""
    return 0.875 if SMALL < np.max(size) < 384 else 1.0


def eval_view(
    size: int | tuple[int, int],
    crop_pct: float | None = None,
    interpolation: str = "bicubic",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> View:
    """The centre of the image, {"image": (3, size, size)}: shorter side to size / crop_pct, then a centre crop.

    `size` (height, width): the image is made to cover that rectangle / crop_pct. `crop_pct` None: 0.875, and 1.0 from
    384 pixels up and for CIFAR's 32 and below. `mean` None: stays in [0, 1].
    """
    if crop_pct is None:
        crop_pct = default_crop_pct(size)
    if not 0 < crop_pct <= 1:
        raise UserError(f"--crop_pct {crop_pct}: give a share above 0 and up to 1 (or leave it out)")
    mode = pick(MODES, interpolation, "interpolation")
    if not isinstance(size, int) and size[0] == size[1]:
        size = size[0]
    if isinstance(size, int):
        resize: Any = T.Resize(int(size / crop_pct), mode)
    else:
        resize = ResizeToCover((int(size[0] / crop_pct), int(size[1] / crop_pct)), mode)
    steps = [resize, T.CenterCrop(size), T.ToTensor()]
    if mean is not None and std is not None:
        steps.append(T.Normalize(mean, std))
    return ImageOnly(T.Compose(steps))


def finetuning_view(
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    aa: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.4,
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    interpolation: str = "bicubic",
    min_crop_scale: float = 0.08,
    hflip: float = 0.5,
    vflip: float = 0.0,
) -> View:
    """timm's augmentation for training a classifier: {"image": (3, size, size) normalised float}.

    `size`: side or (height, width). `aa`: timm's policy string; '' or 'none' switches it off, and only then
    `color_jitter` acts. Random erasing: `reprob`, `remode` (const, rand, pixel), `recount`. Up to 32 pixels: a crop of
    the image padded by 4.
    """
    _check_ranges(min_crop_scale, color_jitter, vflip)
    _check_interpolation("--train_interpolation", interpolation)
    if remode not in ("const", "rand", "pixel"):
        raise UserError(f"--remode {remode}: use const, rand or pixel")
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
            interpolation=interpolation,
            mean=tuple(mean),
            std=tuple(std),
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"--aa {aa}: timm knows no such policy ({error}); try rand-m9-mstd0.5-inc1 or none") from None
    _keep_posterize_in_range(augment)
    if np.max(size) <= SMALL:
        # Resize only acts on images that are not of this size already; then shift by up to 4 pixels.
        shift = [T.Resize(size, InterpolationMode.BICUBIC), T.RandomCrop(size, padding=4)]
        first = T.Compose([*shift, T.RandomHorizontalFlip(hflip), T.RandomVerticalFlip(vflip)])
    return ImageOnly(T.Compose([first, augment, last]))


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, min(max(bits, 1), 8))


def _keep_posterize_in_range(augment: T.Compose) -> None:
    """At full strength timm posterizes to 0 bits: a black image in older Pillow releases, an exception in newer ones.

    The default policy draws it for one image in a few hundred.
    """
    for policy in augment.transforms:
        nested = getattr(policy, "policy", ())  # AutoAugment: pairs of operations; RandAugment and AugMix: a list
        for operation in [*getattr(policy, "ops", ()), *(each for pair in nested for each in pair)]:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _check_interpolation(flag: str, name: str) -> None:
    if name not in MODES and name != "random":
        raise UserError(f"{flag} {name}: use {', '.join(MODES)} or random")


def _check_ranges(min_crop_scale: float, color_jitter: float, vflip: float) -> None:
    if not 0 < min_crop_scale <= 1:
        raise UserError(f"--min_crop_scale {min_crop_scale}: give a share of the area above 0 and up to 1")
    if color_jitter < 0:
        raise UserError(f"--color_jitter {color_jitter}: give 0 (off) or more")
    if not 0 <= vflip <= 1:
        raise UserError(f"--vflip {vflip}: give a probability from 0 to 1")

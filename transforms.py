"""Reading an image, and views of it: PIL RGB in, dictionaries of tensors out.

Random views draw from the global generators, which the data set seeds per sample
(utils.seeded). Crops travel to the device as uint8 (`transform`) and become floats
there (`device_transform`): a quarter of the bytes in each queue between.
"""

from __future__ import annotations

import contextlib
import functools
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

from data_pipeline.augmentation import (
    Drawing,
    Drawn,
    Draws,
    as_numbers,
    exact_crop,
    jitter_and_flip,
    jitter_and_flip_all,
    resized,
    resized_faster,
    sampled_pivot,
)
from data_pipeline.image_formats import is_16_bit, open_image
from errors import ParameterError, pick

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
ASPECT_RANGE = [3 / 4, 4 / 3]  # width / height of a random crop
# CIFAR's size: at or below it images are shifted by a padded crop instead of being
# cropped and enlarged
SMALL = 32

MODES = {
    name: InterpolationMode(name) for name in ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
}

Source = str | np.ndarray  # an image file, or an (H, W, 3) uint8 image in memory
PIPELINES = dict.fromkeys(("exact", "fast"))
# a crop is decoded to so many times the pixels of a view's side, or more: 9 dB nearer
# than 1
DECODED_TO_SHOWN = 1.5
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
Size = tuple[int, int]  # width, height


def load_image(source: Source | IO[bytes], enough: Callable[[Size], Size] | None = None) -> Image.Image:
    """RGB, upright (EXIF), 8 bits; raises whatever PIL raises for what it cannot decode.

    `enough`: told the size of a JPEG before it is decoded, says which size is large
    enough; it may then be decoded to a half, a quarter or an eighth of its size, but to
    no less than that.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    with open_image(source) as image:
        # PIL takes a while to find out that a JPEG has no orientation
        may_turn = image.format != "JPEG" or not image.info.keys().isdisjoint(("exif", "xmp"))
        if enough is not None and image.format == "JPEG":
            _reduce(image, enough, may_turn)
        image.load()
        if may_turn:
            with contextlib.suppress(Exception):  # a broken EXIF block does not make a broken picture
                ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def _reduce(image: Image.Image, enough: Callable[[Size], Size], may_turn: bool) -> None:
    turned = False
    with contextlib.suppress(Exception):  # a broken EXIF block
        turned = may_turn and image.getexif().get(0x0112, 1) in TURNED
    width, height = enough((image.height, image.width) if turned else image.size)
    image.draft(None, (height, width) if turned else (width, height))


def _to_rgb(image: Image.Image) -> Image.Image:
    if is_16_bit(image):  # PIL would clip these at 255 instead of scaling
        gray = np.rint(np.asarray(image, dtype=np.float32) * (255 / 65535)).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit integer"
        raise ValueError(
            f"its pixels are {kind} numbers, and nothing says which is white; convert it to 8 or 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # What lies under transparent pixels is arbitrary: show them on white, as a page would.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # PIL would copy an image that is RGB already
    return image if image.mode == "RGB" else image.convert("RGB")


def interpolation(name: str) -> InterpolationMode:
    """The mode of that name; `random` draws bilinear or bicubic anew at each call. UserError for other names."""
    if name == "random":
        return MODES[random.choice(("bilinear", "bicubic"))]
    return pick(MODES, name, "interpolation")


def normalization(imagenet: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) that --imagenet_default_mean_and_std chooses: ImageNet's, or 0.5 and 0.5 (the recipes)."""
    return (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (HALF_MEAN, HALF_STD)


class ImageOnly:
    """The view that is finished before the device: {"image": (3, S, S) float}, as `steps`
    make it of a PIL image.
    """

    def __init__(self, steps: T.Compose) -> None:
        self.steps = steps

    def load(self, source: Source | IO[bytes]) -> Image.Image:
        return load_image(source)

    def transform(self, loaded: Image.Image) -> dict[str, torch.Tensor]:
        return {"image": self.steps(loaded)}

    def device_transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def __call__(self, image: Image.Image) -> dict[str, torch.Tensor]:
        return self.transform(image)


class RandomCrop:
    """Color jitter, flips and one random crop, not resized yet: the randomness that all
    views of one image share.
    """

    def __init__(self, min_crop_scale: float, color_jitter: float, vflip: float) -> None:
        _check_ranges(min_crop_scale, color_jitter, vflip)
        self.draw = Drawing([min_crop_scale, 1.0], ASPECT_RANGE, color_jitter, vflip)

    def __call__(self, image: Image.Image) -> Image.Image:
        return exact_crop(image, self.draw(image.size))


class Crops:
    """Views that are one random crop, resized to some sizes.

    `data_pipeline` exact: as torchvision's transforms on PIL images, bit for bit. fast: a
    JPEG is decoded no larger than the resize needs, resized by torch, and jittered
    behind the resize; with `augment_on_device` the jitter and the flips are left to
    `device_transform`, with the same result.
    """

    def __init__(self, crop: RandomCrop, data_pipeline: str, augment_on_device: bool) -> None:
        pick(PIPELINES, data_pipeline, "`data_pipeline`")
        if augment_on_device and data_pipeline != "fast":
            raise ParameterError(
                "`augment_on_device` jitters colors behind the resize, which `data_pipeline` exact does "
                "not: add `data_pipeline` fast, or leave it out"
            )
        self.crop, self.fast, self.augment_on_device = crop, data_pipeline == "fast", augment_on_device

    def sizes(self) -> dict[str, tuple[int, str]]:
        """Name of a view -> side and interpolation."""
        raise NotImplementedError

    def load(self, source: Source | IO[bytes]) -> Image.Image | Drawn:
        """An image for `transform`; raises what load_image raises."""
        if not self.fast:
            return load_image(source)
        drawn: list[Draws] = []

        def enough(size: Size) -> Size:
            drawn.append(self.crop.draw(size))
            needed = DECODED_TO_SHOWN * max(side for side, _ in self.sizes().values())
            shrink = min(drawn[0].width, drawn[0].height) / needed
            return int(-(-size[0] // shrink)), int(-(-size[1] // shrink))

        image = load_image(source, enough)
        return Drawn(image, drawn[0] if drawn else self.crop.draw(image.size))

    def transform(self, loaded: Image.Image | Drawn) -> dict[str, torch.Tensor]:
        """A sample as it travels: each view (3, S, S) uint8, and what `device_transform` needs to know."""
        image, draws = loaded if isinstance(loaded, Drawn) else Drawn(loaded, self.crop.draw(loaded.size))
        if not self.fast:
            crop = exact_crop(image, draws)
            return {
                name: resized(crop, side, interpolation(mode)) for name, (side, mode) in self.sizes().items()
            }
        pivot, drawn = sampled_pivot(image, draws.operations), Drawn(image, draws)
        views = {
            name: resized_faster(drawn, side, interpolation(mode))
            for name, (side, mode) in self.sizes().items()
        }
        if self.augment_on_device:
            return views | {"draws": as_numbers(draws, pivot)}
        return {name: jitter_and_flip(view, draws, pivot) for name, view in views.items()}

    def device_transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of samples, on any device, as the network takes it: views (B, 3, S, S) float in [0, 1]."""
        batch = dict(batch)
        draws = batch.pop("draws", None)
        for name in self.sizes():
            images = batch[name] if draws is None else jitter_and_flip_all(batch[name], draws)
            batch[name] = images.contiguous().float() / per_channel((255.0,), images.device)
        return batch

    def __call__(self, image: Image.Image | Drawn) -> dict[str, torch.Tensor]:
        """One image as the network takes it."""
        batch = {name: value[None] for name, value in self.transform(image).items()}
        return {name: value[0] for name, value in self.device_transform(batch).items()}


@functools.cache
def per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(C, 1, 1) on the device. Divided by as a tensor: GPUs multiply by the reciprocal of
    a number, which rounds otherwise.
    """
    return torch.tensor(values, device=device).view(-1, 1, 1)


class PretrainingViews(Crops):
    """Two sizes of one random crop, and a mask.

    Gives {"image": (3, S, S) normalized float, for the network; "tokenizer_image": (3,
    S2, S2) float in [0, 1], for the tokenizer, only with a `second_size`; "mask":
    (H*W,) bool, row-major, True = masked}. `mask_generator()` gives the (H, W) mask.
    """

    def __init__(
        self,
        input_size: int,
        second_size: int | None,
        min_crop_scale: float,
        color_jitter: float,
        train_interpolation: str,
        second_interpolation: str,
        mean: Sequence[float],
        std: Sequence[float],
        mask_generator: Callable[[], Any],
        vflip: float = 0.0,
        data_pipeline: str = "exact",
        augment_on_device: bool = False,
    ) -> None:
        _check_interpolation("train_interpolation", train_interpolation)
        _check_interpolation("second_interpolation", second_interpolation)
        super().__init__(RandomCrop(min_crop_scale, color_jitter, vflip), data_pipeline, augment_on_device)
        self.first = input_size, train_interpolation
        self.second = second_size, second_interpolation
        self.mean, self.std = tuple(mean), tuple(std)
        self.mask_generator = mask_generator

    def sizes(self) -> dict[str, tuple[int, str]]:
        second_size, second_interpolation = self.second
        if second_size is None or self.first == self.second:  # the latter in the recipes: resize once
            return {"image": self.first}
        return {"image": self.first, "tokenizer_image": (second_size, second_interpolation)}

    def transform(self, loaded: Image.Image | Drawn) -> dict[str, torch.Tensor]:
        views = super().transform(loaded)
        return views | {"mask": torch.as_tensor(self.mask_generator(), dtype=torch.bool).flatten()}

    def device_transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().device_transform(batch)
        image = batch["image"]
        if self.first == self.second:
            batch["tokenizer_image"] = image
        batch["image"] = (image - per_channel(self.mean, image.device)).div_(
            per_channel(self.std, image.device)
        )
        return batch


class TokenizerViews(Crops):
    """A random crop for tokenizer training: {"image": (3, S, S) float in [0, 1]}; models
    normalize for themselves.
    """

    def __init__(
        self,
        size: int,
        min_crop_scale: float,
        color_jitter: float,
        train_interpolation: str,
        vflip: float = 0.0,
        data_pipeline: str = "exact",
        augment_on_device: bool = False,
    ) -> None:
        _check_interpolation("train_interpolation", train_interpolation)
        super().__init__(RandomCrop(min_crop_scale, color_jitter, vflip), data_pipeline, augment_on_device)
        self.size, self.mode = size, train_interpolation

    def sizes(self) -> dict[str, tuple[int, str]]:
        return {"image": (self.size, self.mode)}


def cut_to_length(image: Image.Image, most: int = 64) -> Image.Image:
    """The middle of an image that is more than `most` times as long as wide: of a line of
    pixels, resized as a whole, a center crop would need gigabytes to show a few. All
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
    """Keeps the aspect ratio; the smallest image that a rectangle (height, width) lies in, in pixels."""

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
) -> ImageOnly:
    """The center of the image, {"image": (3, size, size)}: shorter side to size / crop_pct, then a center crop.

    `size` (height, width): the image is made to cover that rectangle / crop_pct.
    `crop_pct` None: 0.875, and 1.0 from 384 pixels up and for CIFAR's 32 and below.
    `mean` None: stays in [0, 1].
    """
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
    train_interpolation: str = "bicubic",
    min_crop_scale: float = 0.08,
    hflip: float = 0.5,
    vflip: float = 0.0,
) -> ImageOnly:
    """timm's augmentation for training a classifier: {"image": (3, size, size) normalized float}.

    `size`: side or (height, width). `aa`: timm's policy string; '' or 'none' switches
    it off, and only then `color_jitter` acts. Random erasing: `reprob`, `remode`
    (const, rand, pixel), `recount`. Up to 32 pixels: a crop of the image padded by 4.
    """
    _check_ranges(min_crop_scale, color_jitter, vflip)
    _check_interpolation("train_interpolation", train_interpolation)
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
        # Resize only acts on images that are not of this size already; then shift by up to 4 pixels.
        shift = [Resize(size, InterpolationMode.BICUBIC), T.RandomCrop(size, padding=4)]
        first = T.Compose([*shift, T.RandomHorizontalFlip(hflip), T.RandomVerticalFlip(vflip)])
    return ImageOnly(T.Compose([first, augment, last]))


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, min(max(bits, 1), 8))


def _keep_posterize_in_range(augment: T.Compose) -> None:
    """At full strength timm posterizes to 0 bits: a black image in older Pillow releases,
    an exception in newer ones.

    The default policy draws it for one image in a few hundred.
    """
    for policy in augment.transforms:
        # AutoAugment: pairs of operations; RandAugment and AugMix: a list
        nested = getattr(policy, "policy", ())
        for operation in [*getattr(policy, "ops", ()), *(each for pair in nested for each in pair)]:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _check_interpolation(parameter: str, name: str) -> None:
    if name not in MODES and name != "random":
        raise ParameterError(f"`{parameter}` {name}: use {', '.join(MODES)} or random")


def _check_ranges(min_crop_scale: float, color_jitter: float, vflip: float) -> None:
    if not 0 < min_crop_scale <= 1:
        raise ParameterError(
            f"`min_crop_scale` {min_crop_scale}: give a share of the area above 0 and up to 1"
        )
    if color_jitter < 0:
        raise ParameterError(f"`color_jitter` {color_jitter}: give 0 (off) or more")
    if not 0 <= vflip <= 1:
        raise ParameterError(f"`vflip` {vflip}: give a probability from 0 to 1")

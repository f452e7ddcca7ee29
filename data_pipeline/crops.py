"""Views that are one random crop of an image, resized to some sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

from data_pipeline.augmentation import (
    CropParams,
    CropSampler,
    SampledImage,
    estimate_pivot,
    exact_crop,
    jitter_and_flip,
    jitter_and_flip_all,
    pack_params,
    resize_fast,
    resize_to_square,
)
from data_pipeline.float_images import crop_float, resize_float
from data_pipeline.image_formats import Size, Source, load_plain
from data_pipeline.pixel_format import RGB8, PixelFormat, load
from data_pipeline.resizing import check_interpolation, interpolation
from errors import ParameterError, pick

ASPECT_RANGE = [3 / 4, 4 / 3]  # width / height of a random crop


PIPELINES = dict.fromkeys(("exact", "fast"))


# a crop is decoded to this many times the pixels of a view's side, or more: 9 dB nearer
# than 1
DECODED_TO_SHOWN = 1.5


class RandomCrop:
    """Color jitter, flips and one random crop, not resized yet: the randomness that all
    views of one image share.
    """

    def __init__(
        self, min_crop_scale: float, color_jitter: float, vflip: float, saturation: bool = True
    ) -> None:
        check_ranges(min_crop_scale, color_jitter, vflip)
        self.sample_params = CropSampler([min_crop_scale, 1.0], ASPECT_RANGE, color_jitter, vflip, saturation)

    def __call__(self, image: Image.Image) -> Image.Image:
        return exact_crop(image, self.sample_params(image.size))


class Crops:
    """Views that are one random crop, resized to some sizes.

    `data_pipeline` exact: as torchvision's transforms on PIL images, bit for bit. fast:
    a JPEG is decoded no larger than the resize needs, resized by torch, and jittered
    after the resize; with `augment_on_device` the jitter and the flips are left to
    `device_transform`, with the same result. `pixels` other than 8-bit RGB travel as
    floats, and know no fast way.
    """

    def __init__(
        self,
        min_crop_scale: float,
        color_jitter: float,
        vflip: float,
        data_pipeline: str,
        augment_on_device: bool,
        pixels: PixelFormat,
    ) -> None:
        self.crop = RandomCrop(min_crop_scale, color_jitter, vflip, saturation=pixels.in_chans == 3)
        check_pipeline(data_pipeline, pixels)
        if augment_on_device and data_pipeline != "fast":
            raise ParameterError(
                "`augment_on_device` jitters colors after the resize, which `data_pipeline` exact does "
                "not: add `data_pipeline` fast, or leave it out"
            )
        self.fast, self.augment_on_device = data_pipeline == "fast", augment_on_device
        self.pixels = pixels

    def sizes(self) -> dict[str, tuple[int, str]]:
        """Name of a view -> side and interpolation."""
        raise NotImplementedError

    def load(self, source: Source | IO[bytes]) -> Image.Image | SampledImage | Tensor:
        """An image for `transform`; raises what load_image and load_pixels raise."""
        if not self.fast:
            return load(source, self.pixels)
        sampled: list[CropParams] = []

        def enough(size: Size) -> Size:
            if not sampled:
                sampled.append(self.crop.sample_params(size))
            needed = DECODED_TO_SHOWN * max(side for side, _ in self.sizes().values())
            shrink = min(sampled[0].width, sampled[0].height) / needed
            return int(-(-size[0] // shrink)), int(-(-size[1] // shrink))

        image = load_plain(source, enough)
        if not sampled:
            assert isinstance(image, Image.Image)  # of other images the size was asked about
            sampled.append(self.crop.sample_params(image.size))
        return SampledImage(image, sampled[0])

    def transform(self, loaded: Image.Image | SampledImage | Tensor) -> dict[str, torch.Tensor]:
        """A sample as it travels: each view (3, S, S) uint8, or (in_chans, S, S) float,
        and what `device_transform` needs to know.
        """
        return self.crop_to(loaded, self.sizes())

    def crop_to(
        self, loaded: Image.Image | SampledImage | Tensor, sizes: Mapping[str, tuple[int, str]]
    ) -> dict[str, torch.Tensor]:
        """The views of these `sizes` alone; each is the same whatever others there are."""
        if isinstance(loaded, Tensor):
            floats = crop_float(loaded, self.crop.sample_params((loaded.shape[-1], loaded.shape[-2])))
            return {
                name: resize_float(floats, (side, side), interpolation(mode))
                for name, (side, mode) in sizes.items()
            }
        if not isinstance(loaded, SampledImage):
            loaded = SampledImage(loaded, self.crop.sample_params(loaded.size))
        image, params = loaded
        if not self.fast:
            assert isinstance(image, Image.Image)  # as load gave it
            crop = exact_crop(image, params)
            return {
                name: resize_to_square(crop, side, interpolation(mode))
                for name, (side, mode) in sizes.items()
            }
        pivot = estimate_pivot(image, params.operations)
        views = {
            name: resize_fast(loaded, side, interpolation(mode))
            for name, (side, mode) in self.sizes().items()
        }
        if self.augment_on_device:
            return views | {"params": pack_params(params, pivot)}
        return {name: jitter_and_flip(view, params, pivot) for name, view in views.items()}

    def device_transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of samples, on any device, as the network takes it: views (B,
        in_chans, S, S) float in [0, 1].
        """
        batch = dict(batch)
        if not self.pixels.is_rgb8:
            return batch
        params = batch.pop("params", None)
        for name in filter(batch.__contains__, self.sizes()):
            images = batch[name] if params is None else jitter_and_flip_all(batch[name], params)
            batch[name] = images.contiguous().float() / per_channel((255.0,), images.device)
        return batch

    def __call__(self, image: Image.Image | SampledImage | Tensor) -> dict[str, torch.Tensor]:
        """One image as the network takes it."""
        batch = {name: value[None] for name, value in self.transform(image).items()}
        return {name: value[0] for name, value in self.device_transform(batch).items()}


def check_pipeline(name: str, pixels: PixelFormat) -> None:
    pick(PIPELINES, name, "`data_pipeline`")
    if name == "fast" and not pixels.is_rgb8:
        raise ParameterError(
            "`data_pipeline` fast is a way for 8-bit RGB: leave it out beside `in_chans` and `image_range`"
        )


@functools.cache
def per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(C, 1, 1) on the device. Divided by as a tensor: GPUs multiply by the reciprocal
    of a number, which rounds otherwise.
    """
    return torch.tensor(values, device=device).view(-1, 1, 1)


def check_ranges(min_crop_scale: float, color_jitter: float, vflip: float) -> None:
    if not 0 < min_crop_scale <= 1:
        raise ParameterError(
            f"`min_crop_scale` {min_crop_scale}: give a share of the area above 0 and up to 1"
        )
    if color_jitter < 0:
        raise ParameterError(f"`color_jitter` {color_jitter}: give 0 (off) or more")
    if not 0 <= vflip <= 1:
        raise ParameterError(f"`vflip` {vflip}: give a probability from 0 to 1")


class PretrainingViews(Crops):
    """Two sizes of one random crop, and a mask.

    Gives {"image": (in_chans, S, S) normalized float, for the network;
    "tokenizer_image": (in_chans, S2, S2) float in [0, 1], for the tokenizer, only with
    a `second_size`; "mask": (H*W,) bool, row-major, True = masked}. `mask_generator()`
    gives the (H, W) mask.
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
        pixels: PixelFormat = RGB8,
    ) -> None:
        check_interpolation("train_interpolation", train_interpolation)
        check_interpolation("second_interpolation", second_interpolation)
        super().__init__(min_crop_scale, color_jitter, vflip, data_pipeline, augment_on_device, pixels)
        self.first = input_size, train_interpolation
        self.second = second_size, second_interpolation
        self.mean, self.std = tuple(mean), tuple(std)
        self.mask_generator = mask_generator

    def sizes(self) -> dict[str, tuple[int, str]]:
        second_size, second_interpolation = self.second
        if second_size is None or self.first == self.second:  # the latter in the recipes: resize once
            return {"image": self.first}
        return {"image": self.first, "tokenizer_image": (second_size, second_interpolation)}

    def transform(self, loaded: Image.Image | SampledImage | Tensor) -> dict[str, torch.Tensor]:
        return self.crop_image(loaded) | {"mask": self.draw_mask()}

    def crop_image(
        self, loaded: Image.Image | SampledImage | Tensor, for_tokenizer: bool = True
    ) -> dict[str, torch.Tensor]:
        """The views without the mask; without `for_tokenizer` that of the network alone."""
        return self.crop_to(loaded, self.sizes() if for_tokenizer else {"image": self.first})

    def draw_mask(self) -> torch.Tensor:
        return torch.as_tensor(self.mask_generator(), dtype=torch.bool).flatten()

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
    """A random crop for tokenizer training: {"image": (in_chans, S, S) float in [0,
    1]}; models normalize for themselves.
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
        pixels: PixelFormat = RGB8,
    ) -> None:
        super().__init__(min_crop_scale, color_jitter, vflip, data_pipeline, augment_on_device, pixels)
        check_interpolation("train_interpolation", train_interpolation)
        self.size, self.mode = size, train_interpolation

    def sizes(self) -> dict[str, tuple[int, str]]:
        return {"image": (self.size, self.mode)}

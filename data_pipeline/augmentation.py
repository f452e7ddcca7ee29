"""One random crop of an image with its color jitter and flips: drawn before a pixel is
touched, applied to few of them.

Two ways give nearly the same picture. `exact_crop` is torchvision's ColorJitter, flips
and crop, bit for bit, on the pixels of the crop as far as that is possible.
`jitter_and_flip` works after the resize, on uint8 tensors and on any device, and gives
the same numbers on all of them (docs/performance.md says how far it is from the exact
way). Above 300 lines, so that the two ways are in one file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers; hue is never changed here
LEVELS = np.arange(256)
RAMP = Image.frombytes("L", (256, 1), bytes(range(256)))
PIVOT_SIDE = 64  # the contrast's pivot is read from this many rows and columns of the image, after the resize
Operations = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class CropParams:
    """What was drawn for an image of `size` (width, height); the crop's place is that
    in the flipped image.
    """

    size: tuple[int, int]
    operations: Operations  # of the jitter, in their order, each with its factor
    hflip: bool
    vflip: bool
    top: int
    left: int
    height: int
    width: int

    def box(self) -> tuple[int, int, int, int]:
        """The crop as (left, top, right, bottom) of the image that is not flipped."""
        left = self.size[0] - self.left - self.width if self.hflip else self.left
        top = self.size[1] - self.top - self.height if self.vflip else self.top
        return left, top, left + self.width, top + self.height


class SampledImage(NamedTuple):
    """An image and what was drawn for it before it was decoded: perhaps to a smaller
    size, or without Pillow, (3, height, width) uint8.
    """

    image: Image.Image | Tensor
    params: CropParams


class CropSampler:
    """CropParams as torchvision's ColorJitter, RandomHorizontalFlip, RandomVerticalFlip
    and RandomResizedCrop do, in this order.
    """

    def __init__(
        self,
        area_range: list[float],
        aspect_range: list[float],
        color_jitter: float,
        vflip: float,
        saturation: bool = True,
    ) -> None:
        self.jitter = build_jitter(color_jitter, saturation) if color_jitter else None
        self.area_range, self.vflip = area_range, vflip
        self.log_aspect_range = torch.log(torch.tensor(aspect_range)).tolist()
        self.aspect_range = aspect_range

    def __call__(self, size: tuple[int, int]) -> CropParams:
        """`size`: width and height of the whole image."""
        operations = () if self.jitter is None else draw_operations(self.jitter)
        hflip, vflip = torch.rand(1).item() < 0.5, torch.rand(1).item() < self.vflip
        return CropParams(size, operations, hflip, vflip, *self.draw_place(*size))

    def draw_place(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) as RandomResizedCrop.get_params draws them, in a
        third of the time.
        """
        for _ in range(10):
            area = width * height * torch.empty(1).uniform_(*self.area_range).item()
            aspect = torch.exp(torch.empty(1).uniform_(*self.log_aspect_range)).item()
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = (torch.randint(0, rest + 1, (1,)).item() for rest in (height - h, width - w))
                return int(top), int(left), h, w
        # none fits: the middle, with the nearest aspect that does
        w, h = width, height
        if width / height < min(self.aspect_range):
            h = round(width / min(self.aspect_range))
        elif width / height > max(self.aspect_range):
            w = round(height * max(self.aspect_range))
        return (height - h) // 2, (width - w) // 2, h, w


def build_jitter(strength: float, saturation: bool = True) -> T.ColorJitter:
    """Of brightness, contrast and, in images that have it, saturation."""
    return T.ColorJitter(strength, strength, strength if saturation else 0)


def draw_operations(jitter: T.ColorJitter) -> Operations:
    order, *factors, _ = T.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None)
    kinds = (kind for kind in order.tolist() if kind != HUE and factors[kind] is not None)
    return tuple((kind, factors[kind]) for kind in kinds)


# ── Exactly, on PIL images ──


def exact_crop(image: Image.Image, params: CropParams) -> Image.Image:
    """The crop of the jittered and flipped RGB `image`, bit for bit, without jittering
    what is cut off.

    Only contrast looks at other pixels: its pivot is the mean gray of the whole image
    as the operations before it left it.
    """
    kinds = [kind for kind, _ in params.operations]
    before, pivot = 0, 0
    if CONTRAST in kinds:
        before = kinds.index(CONTRAST)
        image = apply_jitter(image, params.operations[:before])
        pivot = mean_gray(image)
    crop = apply_jitter(image.crop(params.box()), params.operations[before:], pivot)
    if params.hflip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if params.vflip else crop


def mean_gray(image: Image.Image) -> int:
    """The gray that PIL's ImageEnhance.Contrast turns about."""
    counts = np.array(image.convert("L").histogram())
    return int(counts @ LEVELS / counts.sum() + 0.5)


def apply_jitter(image: Image.Image, operations: Iterable[tuple[int, float]], pivot: int = 0) -> Image.Image:
    """The operations one after the other, each rounded to uint8 as PIL does.

    Brightness and contrast are the same function for every pixel and channel: a table,
    which PIL itself computes from the 256 values, and neighbors of them are one table.
    """
    table = RAMP
    for kind, factor in operations:
        if kind == SATURATION:
            image, table = apply_lut(image, table), RAMP
            image = ImageEnhance.Color(image).enhance(factor)
        else:
            base = Image.new("L", RAMP.size, pivot if kind == CONTRAST else 0)
            table = Image.blend(base, table, factor)
    return apply_lut(image, table)


def apply_lut(image: Image.Image, table: Image.Image) -> Image.Image:
    return image if table is RAMP else image.point(list(table.tobytes()) * 3)


# ── Resizing ──


def resize_to_square(image: Image.Image, size: int, mode: InterpolationMode) -> torch.Tensor:
    """(3, size, size) uint8; the aspect ratio is not kept."""
    pixels = np.asarray(image.resize((size, size), Image.Resampling[mode.value.upper()]))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def resize_fast(drawn: SampledImage, size: int, mode: InterpolationMode) -> torch.Tensor:
    """The same of a crop by torch's vectorized kernels, in a third of the time, within
    one level.

    By PIL where torch has no such mode, and where the image was decoded to a smaller
    size, whose pixels the crop cuts.
    """
    image, params = drawn
    left, top, right, bottom = params.box()
    if isinstance(image, Tensor):
        crop = image[:, top:bottom, left:right]
    elif image.size == params.size:
        crop = _as_tensor(image.crop((left, top, right, bottom)))
    else:
        across, down = image.width / params.size[0], image.height / params.size[1]
        box = (left * across, top * down, right * across, bottom * down)
        return _as_tensor(
            image.resize((size, size), Image.Resampling[mode.value.upper()], box=box)
        ).contiguous()
    if mode not in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
        return resize_to_square(_as_image(crop), size, mode)
    return torch.nn.functional.interpolate(crop[None], (size, size), mode=mode.value, antialias=True)[0]


def _as_tensor(image: Image.Image) -> torch.Tensor:
    """(3, height, width) uint8, its memory in the order of the image."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # half the time of numpy's way
    return values.view(image.height, image.width, 3).permute(2, 0, 1)


def _as_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


# ── Behind the resize, on tensors ──


def estimate_pivot(image: Image.Image | Tensor, operations: Operations) -> int:
    """The contrast's pivot from one pixel in many; 0 where nothing changes the
    contrast.
    """
    kinds = [kind for kind, _ in operations]
    if CONTRAST not in kinds:
        return 0
    if isinstance(image, Tensor):
        rows, columns = map(nearest_indices, image.shape[1:])
        sample = image.permute(1, 2, 0).numpy().take(rows, axis=0).take(columns, axis=1)
    else:
        sides = min(PIVOT_SIDE, image.width), min(PIVOT_SIDE, image.height)
        sample = np.asarray(image.resize(sides, Image.Resampling.NEAREST))
    pixels = np.ascontiguousarray(sample.transpose(2, 0, 1))
    gray = gray_of(jitter(pixels, operations[: kinds.index(CONTRAST)]).astype(np.float32))
    return int(gray.sum(dtype=np.float64) / gray.size + 0.5)


@functools.lru_cache(maxsize=4096)
def nearest_indices(length: int) -> np.ndarray:
    """Which of a row of `length` pixels PIL takes to make PIVOT_SIDE of them."""
    row = Image.fromarray(np.arange(length, dtype=np.int32)[None])
    chosen = row.resize((min(PIVOT_SIDE, length), 1), Image.Resampling.NEAREST)
    return np.array(chosen)[0]


def jitter_and_flip(image: Tensor, params: CropParams, pivot: int) -> Tensor:
    """One image (3, height, width) uint8 of the CPU -> the same shape, jittered and
    flipped as drawn.
    """
    image = torch.from_numpy(jitter(image.numpy(), params.operations, pivot))
    flipped = [dim for dim, flip in ((-1, params.hflip), (-2, params.vflip)) if flip]
    return image.flip(flipped) if flipped else image


def jitter(pixels: np.ndarray, operations: Operations, pivot: int = 0) -> np.ndarray:
    """The operations on (3, height, width) uint8: what `jitter_and_flip_all` computes,
    bit for bit, in two thirds of the time. Brightness and contrast are tables of the 256
    values, and neighbors of them are one table.
    """
    table = None
    for kind, factor in operations:
        if kind == SATURATION:
            x, table = look_up(pixels, table).astype(np.float32), None
            pixels = blend(x, gray_of(x), factor)
        else:
            x = (LEVELS if table is None else table).astype(np.float32)
            table = blend(x, pivot if kind == CONTRAST else 0, factor)
    return look_up(pixels, table)


def look_up(pixels: np.ndarray, table: np.ndarray | None) -> np.ndarray:
    """Each of the uint8 `pixels` in a table (256,) uint8; as they are without one."""
    if table is None:
        return pixels
    found = bytearray(pixels.tobytes().translate(table.tobytes()))  # a third of the time of table[pixels]
    return np.frombuffer(found, dtype=np.uint8).reshape(pixels.shape)


def blend(x: np.ndarray, base: np.ndarray | int, factor: float) -> np.ndarray:
    """As `blend_`, of a float32 array, which is overwritten; uint8."""
    x -= base
    x *= factor
    x += base
    return np.clip(x, 0, 255, out=x).astype(np.uint8)


def gray_of(x: np.ndarray) -> np.ndarray:
    """As `gray`, (3, height, width) float32 -> (height, width)."""
    total = x[0] * 19595
    total += x[1] * 38470
    total += x[2] * 7471
    total += 32768
    total *= 2**-16
    return np.floor(total, out=total)


def pack_params(params: CropParams, pivot: int) -> Tensor:
    """What `jitter_and_flip_all` needs of the params: (9,) float, three operations,
    their factors, pivot, flips.
    """
    filled = (*params.operations, *[(BRIGHTNESS, 1.0)] * (3 - len(params.operations)))
    kinds, factors = zip(*filled, strict=True)
    return torch.tensor([*kinds, *factors, pivot, params.hflip, params.vflip], dtype=torch.float32)


def jitter_and_flip_all(images: Tensor, numbers: Tensor) -> Tensor:
    """`jitter_and_flip` for a batch (B, 3, height, width) uint8 with numbers (B, 9); no
    value is read from the device.
    """
    x = images.float()
    kinds, factors, pivot, hflip, vflip = numbers[:, :, None, None, None].split([3, 3, 1, 1, 1], dim=1)
    for place in range(3):
        kind = kinds[:, place]
        base = torch.where(kind == SATURATION, gray(x), torch.where(kind == CONTRAST, pivot[:, 0], 0.0))
        blend_(x, base, factors[:, place])
    x = torch.where(hflip[:, 0] > 0, x.flip(-1), x)
    return torch.where(vflip[:, 0] > 0, x.flip(-2), x).to(torch.uint8)


def blend_(x: Tensor, base: Tensor | int, factor: Tensor | float) -> None:
    """PIL's Image.blend, in place: away from `base` by `factor`, clipped and cut to
    whole numbers.
    """
    if isinstance(base, Tensor) or base != 0:
        x.sub_(base).mul_(factor).add_(base)
    else:
        x.mul_(factor)
    x.clamp_(0, 255).floor_()


def gray(x: Tensor) -> Tensor:
    """PIL's conversion to L, (..., 3, height, width) -> (..., 1, height, width), in
    floats: its sums stay below 2**24.
    """
    red, green, blue = x.split(1, dim=-3)
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).mul_(2**-16).floor_()

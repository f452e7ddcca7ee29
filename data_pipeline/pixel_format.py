"""What the numbers in image files mean: how many channels there are, and which numbers
are black and white; and statistics of them over a sample of files.

8-bit RGB, the default, is read as PIL images (image_formats.load_image). Everything
else becomes float tensors (C, height, width) in [0, 1], without a step of 8 bits in
between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.array_files import ARRAY_EXTENSIONS, read_array
from data_pipeline.image_formats import EXTENSIONS, Source, load_image
from errors import ParameterError, UserError, count

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's conversion to gray
SAMPLE_FILES, SAMPLE_PIXELS = 256, 4096  # a file's pixels are thinned out to so many
TAILS = (0.1, 99.9)  # percentiles that `image_range` auto takes for black and white
OUTSIDE = 0.05  # a larger share of clipped pixels is warned of
NARROW = 1 / 16  # so is a smaller share of the range in use


@dataclass(frozen=True)
class PixelFormat:
    """`in_chans` channels; `image_range`: the numbers that become 0 and 1, None: those
    of the file's type, 255 or 65535 for 1.
    """

    in_chans: int = 3
    image_range: tuple[float, float] | None = None

    @property
    def is_rgb8(self) -> bool:
        """8-bit RGB as PIL has it, which all of timm's augmentation works on."""
        return self == PixelFormat()

    def __str__(self) -> str:
        bounds = (
            "by the files' type" if self.image_range is None else "{:g} to {:g}".format(*self.image_range)
        )
        return f"{count(self.in_chans, 'channel')}, range {bounds}"

    @classmethod
    def of_flags(cls, flags: Mapping[str, Any]) -> PixelFormat:
        """As a run's flags, or those kept in its checkpoint, say."""
        low_high = flags.get("image_range")
        return cls(flags.get("in_chans") or 3, None if low_high is None else (low_high[0], low_high[1]))


RGB8 = PixelFormat()


def endings_of(pixels: PixelFormat) -> tuple[str, ...]:
    """Of the names of images: .npy only beside other formats than 8-bit RGB, as folders
    of photos may hold other arrays.
    """
    return EXTENSIONS if pixels.is_rgb8 else ARRAY_EXTENSIONS


def load(source: Source | IO[bytes], pixels: PixelFormat) -> Image.Image | Tensor:
    """An image as views take it: PIL RGB where its pixels are 8-bit RGB, else floats."""
    return load_image(source) if pixels.is_rgb8 else load_pixels(source, pixels)


def load_pixels(source: Source | IO[bytes], pixels: PixelFormat) -> Tensor:
    """An image (in_chans, height, width) in [0, 1], fp32; numbers outside of the range
    are clipped. Raises whatever reading raises, and ValueError for other channels.
    """
    return scale_to_unit(*read_channels(source, pixels.in_chans), pixels.image_range).clamp_(0, 1)


def read_channels(source: Source | IO[bytes], in_chans: int) -> tuple[Tensor, np.dtype]:
    """The file's own numbers (in_chans, height, width), fp32, and their type in the
    file.
    """
    array = read_array(source, in_chans)
    x = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))
    if array.dtype.kind == "f" and not bool(torch.isfinite(x).all()):
        raise ValueError("it holds NaN or infinite numbers; write a number for pixels without data")
    if len(x) == 1 and in_chans == 3:
        x = x.expand(3, -1, -1).contiguous()
    elif len(x) == 3 and in_chans == 1:
        x = torch.tensordot(torch.tensor(LUMA), x, dims=1)[None]
    if len(x) != in_chans:
        raise ValueError(f"it has {count(len(x), 'channel')}, not the {in_chans} of `in_chans`")
    return x, array.dtype


def scale_to_unit(x: Tensor, dtype: np.dtype, image_range: tuple[float, float] | None) -> Tensor:
    """`image_range`, or that of the type in the file, to 0 and 1."""
    if image_range is None:
        if dtype.kind not in "bu" or dtype.itemsize > 2:
            raise ValueError(
                f"its pixels are {dtype.name} numbers, and nothing says which are black and white: give "
                "`image_range` LOW HIGH, or `image_range` auto"
            )
        image_range = 0.0, {"b1": 1.0, "u1": 255.0, "u2": 65535.0}[f"{dtype.kind}{dtype.itemsize}"]
    low, high = image_range
    return (x - low) / (high - low)


# ── Statistics of a data set ──


@dataclass(frozen=True)
class PixelStatistics:
    """Of a sample of `files`: the range, in the files' own numbers (None: of their
    type), and each channel's mean and standard deviation in [0, 1].
    """

    files: int
    image_range: tuple[float, float] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    warning: str = ""  # that the range hardly fits


def measure_pixels(
    sources: Iterable[Source | IO[bytes]], in_chans: int, image_range: tuple[float, float] | None, auto: bool
) -> PixelStatistics:
    """Statistics of evenly thinned pixels of the files; `auto`: the range too, of which
    0.1% of the pixels may lie below and 0.1% above. UserError where none can be read.
    """
    samples: list[Tensor] = []
    dtypes: list[np.dtype] = []
    problem, tried = "", 0
    for source in sources:
        tried += 1
        try:
            x, dtype = read_channels(source, in_chans)
            every = max(1, math.isqrt(x[0].numel() // SAMPLE_PIXELS))
            x = x[:, ::every, ::every].flatten(1)
            samples.append(x if auto else scale_to_unit(x, dtype, image_range))
            dtypes.append(dtype)
        except Exception as error:  # decoders raise nearly anything for broken files
            name = source if isinstance(source, str) else getattr(source, "name", "an image")
            problem = problem or f"{name}: {error}"
    if not samples:
        raise UserError(f"no image of a sample of {tried} could be read: {problem}")
    x = torch.cat(samples, dim=1)
    warning = ""
    if auto:
        low, high = (round_to_6(value) for value in np.percentile(x.numpy(), TAILS))
        if low >= high:
            raise ParameterError(
                f"`image_range` auto: nearly all pixels of a sample are {low:g}; give the range as two "
                "numbers"
            )
        image_range = low, high
        x = (x - low) / (high - low)
    else:
        warning = _describe_range(x)
    x = x.clamp_(0, 1).double()
    mean, std = x.mean(dim=1), x.std(dim=1, correction=0)
    return PixelStatistics(
        len(samples),
        image_range,
        tuple(map(round_to_6, mean.tolist())),
        tuple(round_to_6(value) if value > 1e-6 else 1.0 for value in std.tolist()),  # 1: a constant channel
        warning,
    )


def _describe_range(x: Tensor) -> str:
    outside = float(((x < 0) | (x > 1)).float().mean())
    low, high = (float(value) for value in np.percentile(x.numpy(), TAILS))
    if outside > OUTSIDE:
        return f"{outside:.0%} of the pixels lie outside of it and are clipped"
    return f"the pixels fill {max(high - low, 0):.1%} of it" if high - low < NARROW else ""


def round_to_6(value: float) -> float:
    """To six digits: what is printed is what is used."""
    return float(f"{value:.6g}")

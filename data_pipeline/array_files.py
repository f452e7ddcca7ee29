"""Files whose pixels are more than 8-bit RGB, as arrays: NumPy's .npy, TIFF of any
number of channels and PNG of 16 bits per channel; Pillow reads all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image

from data_pipeline.image_formats import EXTENSIONS, Source, convert_to_rgb, open_image, open_regular

ARRAY_EXTENSIONS = (*EXTENSIONS, ".npy")
NPY, PNG = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter two: BigTIFF
ORIENTATION = 0x0112
BITS = 0x0102
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # orientations -> what makes (H, W, C) upright
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def read_array(source: Source | IO[bytes], in_chans: int) -> np.ndarray:
    """(height, width, channels) with the file's own numbers, upright.

    `in_chans`: how many channels are wanted; it decides where a file leaves it open
    which of its axes they are, and whether transparency is one of them or, as in
    image_formats, white paper. The caller compares the number.
    """
    if isinstance(source, np.ndarray):
        return with_channels(source)
    with open_regular(source) if isinstance(source, str) else contextlib.nullcontext(source) as file:
        start = file.read(26)
        file.seek(0)
        if start.startswith(NPY):
            return with_channels(np.load(file, allow_pickle=False))
        if start.startswith(TIFF):
            return read_tiff(file, in_chans)
        if start.startswith(PNG) and start[24:25] == b"\x10" and start[25:26] != b"\0":
            return read_png_16(file)
        return read_with_pillow(file, in_chans)


def with_channels(array: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) -> (H, W, C); ValueError for what is no image."""
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "buif":
        raise ValueError(
            f"an array {array.shape} of {array.dtype}: numbers (height, width) or (height, width, channels) "
            "are expected"
        )
    return array


def read_tiff(file: IO[bytes], in_chans: int) -> np.ndarray:
    """By Pillow, which knows more compressions, as far as it keeps all bits and
    channels; else by tifffile.
    """
    with contextlib.suppress(Image.UnidentifiedImageError), open_image(file) as image:
        bits = image.tag_v2.get(BITS, (1,))  # type: ignore[attr-defined]
        if image.n_frames == 1 and (max(bits) <= 8 or len(bits) == 1):  # type: ignore[attr-defined]
            return convert_pillow(image, in_chans)
    import tifffile  # takes a while, and few need it

    file.seek(0)
    with tifffile.TiffFile(file, name="image") as tiff:
        series = tiff.series[0]
        axes, page = series.axes, series.keyframe
        try:
            array = series.asarray()
        except ValueError as error:
            raise ValueError(
                f"{error} (pip install imagecodecs, or write it without compression, or as .npy)"
            ) from None
        orientation = page.tags.get(ORIENTATION)
    if array.ndim == 3 and channels_first(axes, array.shape, in_chans):
        array = np.moveaxis(array, 0, -1)
    array = with_channels(array)
    return UPRIGHT.get(int(orientation.value) if orientation else 1, lambda x: x)(array)


def channels_first(axes: str, shape: tuple[int, ...], in_chans: int) -> bool:
    """Whether the first of three axes is the channels. tifffile calls them S or C;
    pages (Q, I, Z, T) are channels too, unless the last axis has their number.
    """
    if axes[0] in "SC" or axes[-1] in "SC":
        return axes[0] in "SC"
    return shape[0] == in_chans or shape[-1] != in_chans


def read_png_16(file: IO[bytes]) -> np.ndarray:
    """PNG of 16 bits in several channels, of which Pillow keeps 8."""
    content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    return (
        decode_image(content, ImageReadMode.UNCHANGED, apply_exif_orientation=True).permute(1, 2, 0).numpy()
    )


def read_with_pillow(file: IO[bytes], in_chans: int) -> np.ndarray:
    with open_image(file) as image:
        return convert_pillow(image, in_chans)


def convert_pillow(image: Image.Image, in_chans: int) -> np.ndarray:
    """Gray of any depth and, where they are as many as asked for, 8-bit bands as they
    are; all else as RGB.
    """
    image.load()
    is_png = getattr(image, "format", None) == "PNG"
    if getattr(image, "format", None) == "PPM" and image.mode == "I":
        raise ValueError("a PPM of more than 8 bits, which Pillow rescales; write it as PNG or TIFF")
    with contextlib.suppress(Exception):  # a broken EXIF block does not make a broken picture
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        array = np.asarray(image)  # older releases of Pillow give PNG's 16 bits as I
        return with_channels(array.astype(np.uint16) if is_png and image.mode == "I" else array)
    bands = {"LA": 2, "RGB": 3, "RGBA": 4}.get(image.mode)
    return with_channels(np.asarray(image if bands == in_chans else convert_to_rgb(image)))

"""Opening an image file: which formats are decoded, whatever the file is called, and
from regular files alone.

Pillow by itself decodes some formats by starting another program (EPS by Ghostscript),
and others by plugins that few ever test. Here one table says what is decoded, and what
a file is follows from its content.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_jpeg

try:
    import simplejpeg
except ImportError:  # optional: the same pixels, a tenth faster
    simplejpeg = None

FORMATS = {  # Pillow's name -> endings of file names; JPEG includes MPO, several JPEGs in one file
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp", ".dib"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "AVIF": (".avif", ".avifs"),
}
Image.init()  # else Pillow knows the most common formats only
DECODED = [name for name in FORMATS if name in Image.OPEN]  # AVIF from Pillow 11.3 on
EXTENSIONS = tuple(ending for name in DECODED for ending in FORMATS[name])
OTHERS = (  # what a file is instead, by its first bytes
    ("PostScript", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("PDF", rb"%PDF"),
    ("SVG", rb"\s*(<\?xml.*?)?<(!DOCTYPE )?svg"),
    ("HEIC", rb".{4}ftyp(he[ivx]|mif1|msf1)"),
    ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL "),
    ("Photoshop", rb"8BPS"),
    ("Windows metafile", rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF"),
)


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """A file to read; OSError for what is none: a pipe would be waited for, a device
    read for ever.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise OSError("a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device, no regular file")
    return os.fdopen(number, "rb")


@contextlib.contextmanager
def open_image(source: str | os.PathLike[str] | IO[bytes]) -> Iterator[ImageFile.ImageFile]:
    """As Image.open, for the formats above: the pixels are to be loaded inside the
    block. UnidentifiedImageError with what the file is instead.
    """
    with (
        open_regular(source)
        if isinstance(source, (str, os.PathLike))
        else contextlib.nullcontext(source) as file
    ):
        try:
            image = Image.open(file, formats=DECODED)
        except UnidentifiedImageError:
            raise UnidentifiedImageError(_what_it_is(file)) from None
        with image:
            yield image


def is_16_bit(image: Image.Image) -> bool:
    """Unsigned gray of which 65535 is white. Pillow calls it I where it has scaled a
    PPM to that range, or is older.
    """
    return image.mode.startswith("I;16") or (
        image.mode == "I" and getattr(image, "format", None) in ("PNG", "PPM")
    )


def look_like_12_bits(sources: Iterable[Any]) -> bool:
    """Whether some of these are 16-bit files, and none of those has a pixel above 4095,
    6 % of white.
    """
    brightest = []
    for source in sources:
        # what cannot be read is named when it is needed
        with contextlib.suppress(Exception), open_image(source) as image:
            if is_16_bit(image):
                brightest.append(int(np.asarray(image).max()))
    return bool(brightest) and max(brightest) < 4096


def _what_it_is(file: IO[bytes]) -> str:
    file.seek(0)
    start = file.read(1024)
    name = next((name for name, pattern in OTHERS if re.match(pattern, start, re.DOTALL)), None)
    return "not an image" if name is None else f"{name}, which is not decoded; convert it to JPEG or PNG"


Source = str | np.ndarray  # an image file, or an (H, W, 3) uint8 image in memory


# Tables (DHT, DQT, DRI), comments, APPn but EXIF's and XMP's APP1
PLAIN_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)} - {0xE1}
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


Size = tuple[int, int]  # width, height


def load_image(source: Source | IO[bytes], enough: Callable[[Size], Size] | None = None) -> Image.Image:
    """RGB, upright (EXIF), 8 bits; raises whatever PIL raises for what it cannot
    decode.

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
        return convert_to_rgb(image)


def load_plain(source: Source | IO[bytes], enough: Callable[[Size], Size]) -> Image.Image | Tensor:
    """As load_image, but (3, height, width) uint8 for a JPEG that has nothing to be
    reduced, turned or converted: the same pixels, without Pillow's copies. By simplejpeg
    where it is installed.

    `enough` may be asked more than once.
    """
    if isinstance(source, np.ndarray):
        return load_image(source)
    with open_regular(source) if isinstance(source, str) else contextlib.nullcontext(source) as file:
        start = file.read(2)
        if start != b"\xff\xd8":
            file.seek(0)
            return load_image(file, enough)
        content = start + file.read()
    size = _find_plain_size(content)
    if size is not None and min(side // least for side, least in zip(size, enough(size), strict=True)) < 2:
        with contextlib.suppress(Exception):  # Pillow reads more of what is damaged, or says what it is
            return _decode_plain(content)
    return load_image(io.BytesIO(content), enough)


def _find_plain_size(content: bytes) -> Size | None:
    """(width, height) of a JPEG of three channels without EXIF or XMP, by its segments
    up to the pixels (ITU-T T.81, B.1); None for any other.
    """
    size, at = None, 2
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == 0xDA:  # pixels follow
            return size
        if marker in (0xC0, 0xC1, 0xC2):  # sequential or progressive, Huffman-coded
            bits, height, width, channels = struct.unpack_from(">BHHB", content, at + 4)
            if size or (bits, channels) != (8, 3) or not height or not width:
                return None
            size = width, height
        elif marker not in PLAIN_SEGMENTS:
            return None
        at += 2 + length
    return None


def _decode_plain(content: bytes) -> Tensor:
    if simplejpeg is not None:
        return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
    return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def _reduce(image: Image.Image, enough: Callable[[Size], Size], may_turn: bool) -> None:
    turned = False
    with contextlib.suppress(Exception):  # a broken EXIF block
        turned = may_turn and image.getexif().get(0x0112, 1) in TURNED
    width, height = enough((image.height, image.width) if turned else image.size)
    image.draft(None, (height, width) if turned else (width, height))


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits, transparency on white. ValueError for numbers without a white."""
    if is_16_bit(image):  # PIL would clip these at 255 instead of scaling
        gray = np.rint(np.asarray(image, dtype=np.float32) * (255 / 65535)).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit integer"
        raise ValueError(
            f"its pixels are {kind} numbers, and nothing says which is white; give `image_range` LOW HIGH or "
            "auto, or convert it to 8 or 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # What lies under transparent pixels is arbitrary: show them on white, as a page
        # would.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # PIL would copy an image that is RGB already
    return image if image.mode == "RGB" else image.convert("RGB")

"""Which images the visualizing scripts show, and the files that they write pictures
to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.utils import save_image

from data_pipeline.array_files import read_array
from data_pipeline.image_lists import find_images_or_file
from data_pipeline.pixel_format import RGB8, PixelFormat, endings_of, load
from data_pipeline.samplers import evenly_spaced
from errors import UserError
from runtime.terminal import log

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".pdf")
PAGES = (".html", ".htm")


# ── Images to show ──


def check_shown(sources: Sequence[str], flag: str) -> None:
    """UserError for what does not exist, and for a file named by itself that is neither
    an image nor an array: to be called before a model is opened, which says how pixels
    are read, and which files of a folder are images.
    """
    for source in sources:
        if not os.path.exists(source):
            raise UserError(f"{flag} {source}: no such file or folder")
        if not os.path.isdir(source):
            try:
                read_array(source, in_chans=3)
            except Exception as error:  # decoders raise nearly anything for broken files
                raise UserError(f"{flag} {source}: cannot be read ({error})") from None


def find_shown(sources: Sequence[str], count: int, flag: str, pixels: PixelFormat = RGB8) -> list[str]:
    """The files among `sources`, and `count` files of each folder, evenly spread.

    UserError for what does not exist, and for a file named by itself that is not an
    image; `flag` names the source in its message.
    """
    chosen: list[str] = []
    for source in sources:
        if not os.path.exists(source):
            raise UserError(f"{flag} {source}: no such file or folder")
        paths = find_images_or_file(source, flag, endings_of(pixels))
        if not os.path.isdir(source):
            try:
                load(source, pixels)
            except Exception as error:  # PIL raises nearly anything for broken files
                raise UserError(f"{flag} {source}: cannot be read ({error})") from None
        chosen += [paths[index] for index in evenly_spaced(len(paths), count)]
    return chosen


def read_or_leave_out(path: str, pixels: PixelFormat = RGB8) -> Image.Image | Tensor | None:
    """The image, or None and a warning that names the file if it does not decode."""
    try:
        return load(path, pixels)
    except Exception as error:  # PIL raises nearly anything for broken files
        log.warning(f"cannot read {path} ({error}): left out")
        return None


def read_shown(
    paths: Sequence[str], pixels: PixelFormat = RGB8
) -> Iterator[tuple[str, Image.Image | Tensor]]:
    """(path, image) of those that can be read; the others are named in the log.

    UserError at the end if there was none.
    """
    shown = 0
    for path in paths:
        image = read_or_leave_out(path, pixels)
        if image is not None:
            shown += 1
            yield path, image
    if not shown:
        raise UserError(f"no image could be read, of {len(paths)} such as {paths[0]}")


# ── The file to write ──


def prepare_output(path: str, endings: Sequence[str], flag: str) -> None:
    """Make the folder of the file `path`; to be called before other work.

    UserError for a name that could not be written to in the end: it must have one of
    `endings`, and lie in a folder with write permission. `flag` names it in messages.
    """
    if path.endswith(("/", os.sep)) or os.path.isdir(path):
        raise UserError(
            f"{flag} {path}: is a folder; name the file in it, such as {Path(path) / f'name{endings[0]}'}"
        )
    if Path(path).suffix.lower() not in endings:
        raise UserError(f"{flag} {path}: the name must end in {' '.join(endings)}")
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: its folder cannot be made ({error})") from None
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f"{flag} {path}: no permission to write there")


def save_picture(picture: Tensor, path: str, flag: str) -> None:
    """Write (3, height, width) in [0, 1].

    UserError for a full disk, or a picture larger than its format allows (JPEG); `flag`
    names the file in its message.
    """
    try:
        save_image(picture, path)
    except (OSError, ValueError) as error:
        size = f"{picture.shape[2]} x {picture.shape[1]} pixels"
        raise UserError(f"{flag} {path}: {size} cannot be written ({error}); PNG takes every size") from None

"""What is in the file of a mask: each pixel's class, as the number of a gray value or
of a palette's entry.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.image_formats import open_image
from errors import UserError

IGNORED = 255  # a pixel that counts neither in training nor in evaluation
MOST_CLASSES = 255  # labels 0 to 254 in 8 bits, beside IGNORED
ENDINGS = (".png", ".tif", ".tiff", ".bmp")
# PIL's names: gray of 1 to 32 bits, palette
NUMBERED = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")
STRETCHED = {"L;2": 85, "L;4": 17}  # PNG's gray of 2 and 4 bits, which PIL stretches to 0..255: 3 becomes 255


class Pair(NamedTuple):
    """The files of an image and of its mask."""

    image: str
    mask: str


def read_mask(path: str) -> Image.Image:
    """The mask with the numbers that are in the file; raises whatever PIL raises for
    what it cannot decode.
    """
    with open_image(path) as mask:
        packed = mask.tile[0][3] if mask.format == "PNG" and mask.tile else None
        mask.load()
    stretch = STRETCHED.get(packed, 1) if isinstance(packed, str) else 1
    return mask if stretch == 1 else mask.point([level // stretch for level in range(256)])


def numbers_in(mask: Image.Image, path: str) -> np.ndarray:
    """(height, width) whole numbers. UserError when the mask holds something else, such
    as colors.
    """
    if mask.mode not in NUMBERED:
        raise UserError(
            f"{path}: its pixels are {mask.mode}, not numbers of classes; a mask is expected to be gray (8 "
            "or 16 bits) or to have a palette"
        )
    numbers = np.asarray(mask)
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers


def labels_in(mask: Image.Image, path: str, classes: int, reduce_zero_label: bool) -> Image.Image:
    """The class of each pixel, 0 to `classes` - 1 or IGNORED, as an "L" image.

    255 is ignored; with `reduce_zero_label` 0 is, too, and class 0 is label 1.
    UserError for labels beyond the classes.
    """
    numbers = numbers_in(mask, path)
    highest = classes if reduce_zero_label else classes - 1
    if numbers.max() > highest or numbers.min() < 0:
        beyond = numbers[((numbers > highest) & (numbers != IGNORED)) | (numbers < 0)]
        if beyond.size:
            _refuse(path, int(beyond.max()), classes, reduce_zero_label)
    labels = numbers.astype(np.uint8)
    if reduce_zero_label:
        labels = labels - (labels != IGNORED)  # in 8 bits 0 - 1 is 255
    return Image.fromarray(labels)


def _refuse(path: str, label: int, classes: int, reduce_zero_label: bool) -> None:
    if reduce_zero_label:
        known = f"`reduce_zero_label` makes labels 1 to {classes} the {classes} classes"
        way_out = "leave it out where 0 is a class, or correct `nb_classes` or the mask"
    else:
        known = f"{classes} classes are labels 0 to {classes - 1}"
        way_out = (
            "correct `nb_classes` or the mask, or add `reduce_zero_label` where 0 is not a class and 1 is "
            "the first"
        )
    raise UserError(f"{path}: label {label}, but {known}, and {IGNORED} is ignored; {way_out}")


def highest_label(mask: Image.Image, path: str, reduce_zero_label: bool) -> int:
    """Of those that are not ignored, as `labels_in` numbers them; -1 where there is
    none.
    """
    numbers = numbers_in(mask, path)
    labeled = numbers[numbers != IGNORED]
    return int(labeled.max()) - reduce_zero_label if labeled.size else -1

"""Which classes the masks of a data set have, what they are called, and their
colors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from errors import UserError
from runtime import distributed
from runtime.terminal import log
from segmentation.mask_files import IGNORED, MOST_CLASSES, Pair, highest_label, read_mask
from visualization.drawing import distinct_colors

ADE_NAMES = "objectInfo150.txt"


@dataclass(frozen=True)
class ClassSettings:
    """Where the names of the classes are from: the file `class_names`, one per line;
    else ADE20K's list in `folder`; else there are `nb_classes`, or with 0 as many as
    the masks have. `reduce_zero_label`: label 0 is ignored, and 1 is the first class.
    """

    class_names: str | None = None
    folder: str = ""
    nb_classes: int = 0
    reduce_zero_label: bool = False


def find_classes(settings: ClassSettings, pairs: Sequence[Pair]) -> list[str]:
    """The names of the classes, "class 0", ... where there is no list of them; their
    number is then that of the masks of `pairs`, unless the settings give it. All ranks
    call it: they share the looking.
    """
    names, where = read_class_list(settings)
    if names and settings.nb_classes not in (0, len(names)):
        raise UserError(
            f"`nb_classes` {settings.nb_classes}: {where} names {len(names)} classes; correct one of them"
        )
    if not names:
        count = settings.nb_classes or _highest_label(pairs, settings.reduce_zero_label) + 1
        names, where = [f"class {number}" for number in range(count)], f"`nb_classes` {settings.nb_classes}"
        if not settings.nb_classes:
            where = f"the {len(pairs)} masks, such as {pairs[0].mask}"
    if len(names) < 2:
        raise UserError(
            f"{where}: 2 classes at least are needed, here are {len(names)}; label {IGNORED} is ignored, "
            "and so is 0 with `reduce_zero_label`"
        )
    if len(names) > MOST_CLASSES - settings.reduce_zero_label:
        raise UserError(
            f"{where}: {len(names)} classes; at most {MOST_CLASSES} fit into 8 bits beside {IGNORED}, ignored"
        )
    return names


def read_class_list(settings: ClassSettings) -> tuple[list[str], str]:
    """(names, where they are from); none where there is no list of them."""
    if settings.class_names:
        where = f"`class_names` {settings.class_names}"
        names = [line.strip() for line in _read_lines(settings.class_names, "`class_names`")]
        twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            raise UserError(f"{where}: '{twice}' is there twice; give each class a name of its own")
        if not names:
            raise UserError(f"{where}: is empty; the name of one class per line is expected")
        return names, where
    listed = os.path.join(settings.folder, ADE_NAMES)
    if not os.path.isfile(listed):
        return [], ""
    rows = [line.split("\t") for line in _read_lines(listed, "`data_path`")]
    # the first line is the heading
    names = [row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit()]
    if not names:
        raise UserError(
            f"{listed}: ADE20K's table is expected, number first, names last, tabs between; or give "
            "`class_names`"
        )
    if not settings.reduce_zero_label:
        raise UserError(
            f"{listed}: its first class is label 1, and 0 is none of them: add `reduce_zero_label`, or name "
            "the classes from label 0 on with `class_names`"
        )
    return names, listed


def read_palette(file: str | None, n_classes: int) -> Tensor:
    """The classes' colors (n_classes, 3), float in [0, 1]: those of the file, "r g b"
    on a line, each 0 to 255; without a file, colors that are easy to tell apart.
    """
    if not file:
        return distinct_colors(n_classes)
    where = f"`palette` {file}"
    colors = []
    for number, line in enumerate(_read_lines(file, "`palette`"), 1):
        values = [int(part) if part.isdecimal() else -1 for part in line.split()]
        if len(values) != 3 or not all(0 <= value <= 255 for value in values):
            raise UserError(
                f"{where}, color {number}: '{line.strip()}'; red, green and blue are expected, each 0 to 255"
            )
        colors.append(values)
    if len(colors) != n_classes:
        raise UserError(
            f"{where}: {len(colors)} colors for {n_classes} classes; one line per class is expected"
        )
    return torch.tensor(colors) / 255


def _read_lines(path: str, origin: str) -> list[str]:
    """The lines that are not blank, without a byte order mark."""
    try:
        with open(path, encoding="utf-8-sig") as lines:
            return [line for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{origin} {path}: cannot be read ({error})") from None


def _highest_label(pairs: Sequence[Pair], reduce_zero_label: bool) -> int:
    """Of all masks; those that do not decode are left to the data set."""
    log.info(
        f"looking through {len(pairs)} masks for their highest label; `nb_classes` or `class_names` spares it"
    )
    return look_through(pairs, lambda mask, path: highest_label(mask, path, reduce_zero_label))


def look_through(pairs: Sequence[Pair], look: Callable[[Image.Image, str], int]) -> int:
    """The highest that `look` gives for a mask and its path, over all ranks, which
    share the masks; -1 without any that decodes. A rank's UserError is raised on all of
    them.
    """

    def one(pair: Pair) -> int:
        try:
            mask = read_mask(pair.mask)
        except Exception:  # PIL raises nearly anything for broken files
            return -1
        return look(mask, pair.mask)

    shared: int | UserError
    try:
        with ThreadPoolExecutor(4) as threads:
            share = pairs[distributed.rank() :: distributed.world_size()]
            shared = max(threads.map(one, share), default=-1)
    except UserError as error:
        shared = error
    found = distributed.gather_objects(shared)  # a rank that left alone would be waited for
    for each in found:
        if isinstance(each, UserError):
            raise each
    return max(found)

"""Images and their masks: where the pairs are, and what a sample is.

A folder holds images/ and annotations/, each with training/ and validation/ (ADE20K) or
train/ and val/, or the pairs themselves. A mask has its image's path below
annotations/, except for the ending.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from torch import Tensor

from data_pipeline.crops import per_channel
from data_pipeline.files import Files, reason_of
from data_pipeline.folders import check_folder, list_images, report_left_out
from data_pipeline.image_formats import EXTENSIONS, open_image
from data_pipeline.pixel_format import RGB8, PixelFormat, load
from errors import UserError
from runtime import distributed
from runtime.terminal import log, say_if_slow
from segmentation.classes import look_through
from segmentation.joint_views import EvaluationView, TrainingView, size_of
from segmentation.mask_files import ENDINGS, IGNORED, Pair, labels_in, read_mask

SPLITS = {True: ("training", "train"), False: ("validation", "val")}  # by `train`
MASKS_AT_A_TIME = 256  # looked through for classes
ORIENTATION = 0x0112  # of EXIF
TURNS = {  # orientations that exchange width and height -> what makes the picture upright
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ── Where the pairs are ──


def find_pairs(
    folder: str,
    train: bool,
    origin: str = "`data_path`",
    warn: bool = False,
    image_endings: tuple[str, ...] = EXTENSIONS,
) -> list[Pair]:
    """The pairs of a split, however nested, in the order of the images' paths.

    The split is looked for in images/: training/ or train/, validation/ or val/.
    Without any of these the pairs lie in images/ and annotations/ themselves; a folder
    like this is for training alone where `origin`, which messages name, is `data_path`:
    no run may evaluate on the training images unnoticed. `warn`: of masks
    without an image. UserError for an image without a mask, and for two files that
    differ in the ending alone.
    """
    split = _split_of(folder, train, origin)
    image_folder, mask_folder = (os.path.join(folder, kind, *split) for kind in ("images", "annotations"))
    if not os.path.isdir(mask_folder):
        raise UserError(f"{origin} {folder}: there is {image_folder}, but no {mask_folder} with the masks")
    found = []
    for each, endings in ((image_folder, image_endings), (mask_folder, ENDINGS)):
        left_out: Counter[str] = Counter()
        found.append(_by_stem((path for path, _ in list_images(each, left_out, endings)), each))
        report_left_out(left_out, each, endings)
    images, masks = found
    if not images:
        raise UserError(f"{origin} {folder}: no images in {image_folder} or below it")
    without = [stem for stem in images if stem not in masks]
    if without:
        expected = f"{os.path.join(mask_folder, without[0])}.png (or {' '.join(ENDINGS[1:])})"
        raise UserError(
            f"{images[without[0]]}: has no mask, {expected} is expected; {len(without)} of {len(images)} "
            "have none"
        )
    unused = [masks[stem] for stem in masks if stem not in images]
    if unused and warn:
        log.warning(
            f"warning: {origin} {folder}: masks without an image are not used: {unused[0]} (in all "
            f"{len(unused)})"
        )
    return [Pair(images[stem], masks[stem]) for stem in images]


def _split_of(folder: str, train: bool, origin: str) -> tuple[str, ...]:
    """The name of the split's folders; none where the pairs lie in images/ and
    annotations/ themselves.
    """
    layout = (
        "images/ and annotations/, each with training/ and validation/ or train/ and val/, or with the "
        "pairs themselves"
    )
    if not folder:
        raise UserError(f"{origin} is missing: name a folder that holds {layout}")
    check_folder(folder, origin)
    if not os.path.isdir(os.path.join(folder, "images")):
        raise UserError(f"{origin} {folder}: has no images/; expected are {layout}")
    there = [
        name
        for names in SPLITS.values()
        for name in names
        if os.path.isdir(os.path.join(folder, "images", name))
    ]
    own = [name for name in there if name in SPLITS[train]]
    wanted = "/ or ".join(SPLITS[train])
    elsewhere = "; `eval_data_path` names another folder" if origin == "`data_path`" and not train else ""
    if len(own) > 1:
        raise UserError(
            f"{origin} {folder}: images/ has both {own[0]}/ and {own[1]}/; rename or remove one of them"
        )
    if there and not own:
        raise UserError(f"{origin} {folder}: images/ has {there[0]}/, but no {wanted}/{elsewhere}")
    if not own and elsewhere:
        raise UserError(f"{origin} {folder}: images/ has no {wanted}/, all of it is for training{elsewhere}")
    return tuple(own)


def _by_stem(paths: Iterable[str], root: str) -> dict[str, str]:
    """Path below `root` without the ending -> path."""
    found: dict[str, str] = {}
    for path in paths:
        stem = os.path.splitext(os.path.relpath(path, root))[0]
        if stem in found:
            raise UserError(
                f"{found[stem]} and {path}: which belongs to the pair '{stem}'? Remove or rename one of them"
            )
        found[stem] = path
    return found


# ── Samples ──


class PairView:
    """The view (data_pipeline/files.py) of an image together with its mask: `view`
    resizes and crops both alike.

    `statistics`: mean and std of the channels, by which the device normalizes.
    """

    def __init__(
        self,
        view: TrainingView | EvaluationView,
        n_classes: int,
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
        reduce_zero_label: bool = False,
        pixels: PixelFormat = RGB8,
    ) -> None:
        self.view, self.n_classes, self.statistics = view, n_classes, statistics
        self.reduce_zero_label, self.pixels = reduce_zero_label, pixels

    def load(self, source: Pair) -> tuple[Pair, Image.Image | Tensor, Image.Image]:
        """The files, the image, and the mask with the numbers that are in its file."""
        image = load(source.image, self.pixels)
        try:
            return source, image, read_mask(source.mask)
        except Exception as error:
            raise ValueError(f"its mask {source.mask}: {reason_of(error)}") from None

    def transform(self, loaded: tuple[Pair, Image.Image | Tensor, Image.Image]) -> dict[str, Tensor]:
        """UserError for a mask that does not fit its image, or holds something else
        than classes.
        """
        (pair, image, mask), size = loaded, size_of(loaded[1])
        if mask.size != size and self.pixels.is_rgb8:
            mask = _turn(mask, pair.image)
        if mask.size != size:
            own, wanted = (f"{width} x {height}" for width, height in (mask.size, size))
            raise UserError(
                f"{pair.mask}: {own} pixels, but its image {pair.image} has {wanted}; a mask has a pixel for "
                "each of its image"
            )
        return self.view.transform_pair(image, self.labels_of(mask, pair.mask))

    def labels_of(self, mask: Image.Image, path: str) -> Image.Image:
        return labels_in(mask, path, self.n_classes, self.reduce_zero_label)

    def device_transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalized float images (B, C, h, w), int64 labels (B, h, w)."""
        return {**batch, "image": normalize(batch["image"], self.statistics), "label": batch["label"].long()}


class SegmentationFiles(Files):
    """Images with their masks; keys and undecodable files as samplers.Files says, an
    image and its mask replaced together.

    A sample: {"image": (C, h, w) uint8 or float, "label": (h, w) uint8, class or 255 (ignored),
    "index": int, "failed": [...]}. In training both are one crop; in evaluation the
    image is resized for the network and the label has the file's size. UserError for a
    mask that does not fit its image or holds something else than classes.
    """

    view: PairView

    def __init__(
        self,
        pairs: Sequence[Pair],
        view: TrainingView | EvaluationView,
        classes: Sequence[str],
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
        reduce_zero_label: bool = False,
        seed: int = 0,
        passes: int = 1,
        pixels: PixelFormat = RGB8,
    ) -> None:
        pair_view = PairView(view, len(classes), statistics, reduce_zero_label, pixels)
        super().__init__(len(pairs), pair_view, seed, passes)
        # One array of bytes: the reference counts of many strings would copy them into
        # every worker process.
        self.paths = np.array([[os.fsencode(path) for path in pair] for pair in pairs])
        self.classes = list(classes)
        self.warn_of_12_bits(self.name)

    def pair(self, index: int) -> Pair:
        """The files of an index, in whichever pass."""
        return Pair(*map(os.fsdecode, self.paths[index % self.files]))

    def check_masks(self) -> None:
        """UserError for the first mask that holds something else than these classes,
        and where no pixel is labeled, before hours are spent. Sizes, and files that do
        not decode, are left to the reading.
        """
        if self._look_for_classes([self.pair(index) for index in range(self.files)], set()) == 0:
            self._refuse("not one pixel is labeled")

    def check_that_classes_occur(self) -> None:
        """UserError where fewer than two classes occur in all masks: there would be
        nothing to learn. Reads masks until there are two, mostly the first few.
        """
        pairs = [self.pair(index) for index in range(self.files)]
        occur: set[int] = set()
        most = -1
        for start in range(0, len(pairs), MASKS_AT_A_TIME):
            most = max(most, self._look_for_classes(pairs[start : start + MASKS_AT_A_TIME], occur))
            occur = set().union(*distributed.gather_objects(occur))
            if len(occur) > 1:
                return
        if most >= 0:
            self._refuse(
                f"every labeled pixel is of class '{self.classes[occur.pop()]}'"
                if occur
                else "not one pixel is labeled"
            )

    @say_if_slow("masks      looking through them for their classes")
    def _look_for_classes(self, pairs: Sequence[Pair], occur: set[int]) -> int:
        """Adds those in this rank's masks to `occur`; the most in a mask, -1 without."""

        def look(mask: Image.Image, path: str) -> int:
            classes = self._classes_in(mask, path)
            occur.update(classes)
            return len(classes)

        return look_through(pairs, look)

    def _classes_in(self, mask: Image.Image, path: str) -> list[int]:
        labels = self.view.labels_of(mask, path)
        return [label for label, pixels in enumerate(labels.histogram()) if pixels and label != IGNORED]

    def _refuse(self, what: str) -> NoReturn:
        ignored = (
            f"{IGNORED} and 0 are ignored (`reduce_zero_label`)"
            if self.view.reduce_zero_label
            else f"{IGNORED} is ignored"
        )
        raise UserError(
            f"{self.files} masks, such as {self.pair(0).mask}: {what}; {ignored}: write black and white "
            "masks (0 and 255) as numbers of classes"
        )

    def name(self, index: int) -> str:
        return self.pair(index).image

    def open(self, index: int) -> Pair:
        return self.pair(index)


def normalize(image: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """(..., C, h, w) uint8, or float in [0, 1] -> float; `statistics`: mean and std."""
    one = 1.0 if image.is_floating_point() else 255.0
    whole, mean, std = (per_channel(values, image.device) for values in ((one,), *statistics))
    return (image.float() / whole - mean).div_(std)


def _turn(mask: Image.Image, image_path: str) -> Image.Image:
    """The mask of an image that its EXIF block turns by a quarter, upright like the
    image, if it fits the pixels as stored.
    """
    with open_image(image_path) as stored:
        orientation = 1
        with contextlib.suppress(Exception):  # a broken EXIF block
            orientation = stored.getexif().get(ORIENTATION, 1)
        turn = TURNS.get(orientation) if stored.size == mask.size else None
    return mask if turn is None else mask.transpose(turn)

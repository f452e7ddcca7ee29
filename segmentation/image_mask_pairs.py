"""Images and their masks: where the pairs are, which classes there are, and what a sample is.

A folder holds images/ and annotations/, each with training/ and validation/ (ADE20K) or
train/ and val/, or the pairs themselves. A mask has its image's path below
annotations/, but for the ending. Files: segmentation/mask_files.py; views:
segmentation/joint_views.py.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.image_formats import EXTENSIONS, open_image
from data_pipeline.image_lists import images_below, need_folder, tell_left_out
from data_pipeline.samplers import Files, reason
from errors import UserError
from runtime import distributed
from runtime.distributed import log
from segmentation.joint_views import EvaluationView, TrainingView
from segmentation.mask_files import ENDINGS, IGNORED, MOST_CLASSES, highest_label, labels_in, read_mask
from transforms import load_image, normalization, per_channel
from visualization.drawing import distinct_colors

SPLITS = {True: ("training", "train"), False: ("validation", "val")}  # by `train`
ADE_NAMES = "objectInfo150.txt"
MASKS_AT_A_TIME = 256  # looked through for classes
ORIENTATION = 0x0112  # of EXIF
TURNS = {  # orientations that exchange width and height -> what makes the picture upright
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Pair(NamedTuple):
    """The files of an image and of its mask."""

    image: str
    mask: str


# ── Where the pairs are ──


def find_pairs(folder: str, train: bool, flag: str = "--data_path") -> list[Pair]:
    """The pairs of a split, however nested, in the order of the images' paths.

    The split is looked for in images/: training/ or train/, validation/ or val/.
    Without any of these the pairs lie in images/ and annotations/ themselves; such a
    --data_path is for training alone, since nobody evaluates on it unawares. UserError
    for an image without a mask, and for two files that differ in the ending alone.
    """
    return _paired(folder, train, flag)[0]


def _paired(folder: str, train: bool, flag: str) -> tuple[list[Pair], list[str]]:
    """The pairs, and the masks without an image."""
    split = _split_of(folder, train, flag)
    image_folder, mask_folder = (os.path.join(folder, kind, *split) for kind in ("images", "annotations"))
    if not os.path.isdir(mask_folder):
        raise UserError(f"{flag} {folder}: there is {image_folder}, but no {mask_folder} with the masks")
    found = []
    for each, endings in ((image_folder, EXTENSIONS), (mask_folder, ENDINGS)):
        left_out: Counter[str] = Counter()
        found.append(_by_stem(images_below(each, left_out, endings), each))
        tell_left_out(left_out, each, endings)
    images, masks = found
    if not images:
        raise UserError(f"{flag} {folder}: no images in {image_folder} or below it")
    without = [stem for stem in images if stem not in masks]
    if without:
        expected = f"{os.path.join(mask_folder, without[0])}.png (or {' '.join(ENDINGS[1:])})"
        raise UserError(
            f"{images[without[0]]}: has no mask, {expected} is expected; {len(without)} "
            f"of {len(images)} have none"
        )
    return [Pair(images[stem], masks[stem]) for stem in images], [
        masks[stem] for stem in masks if stem not in images
    ]


def _split_of(folder: str, train: bool, flag: str) -> tuple[str, ...]:
    """The name of the split's folders; none where the pairs lie in images/ and annotations/ themselves."""
    layout = (
        "images/ and annotations/, each with training/ and validation/ or train/ and val/, or "
        "with the pairs themselves"
    )
    if not folder:
        raise UserError(f"{flag} is missing: name a folder that holds {layout}")
    need_folder(folder, flag)
    if not os.path.isdir(os.path.join(folder, "images")):
        raise UserError(f"{flag} {folder}: has no images/; expected are {layout}")
    there = [
        name
        for names in SPLITS.values()
        for name in names
        if os.path.isdir(os.path.join(folder, "images", name))
    ]
    own = [name for name in there if name in SPLITS[train]]
    wanted = "/ or ".join(SPLITS[train])
    elsewhere = "; --eval_data_path names another folder" if flag == "--data_path" and not train else ""
    if len(own) > 1:
        raise UserError(
            f"{flag} {folder}: images/ has both {own[0]}/ and {own[1]}/; rename or remove one of them"
        )
    if there and not own:
        raise UserError(f"{flag} {folder}: images/ has {there[0]}/, but no {wanted}/{elsewhere}")
    if not own and elsewhere:
        raise UserError(f"{flag} {folder}: images/ has no {wanted}/, all of it is for training{elsewhere}")
    return tuple(own)


def _by_stem(paths: Sequence[str], root: str) -> dict[str, str]:
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


# ── Classes and their colors ──


def read_classes(args: Any, pairs: Sequence[Pair]) -> list[str]:
    """The classes' names: of --class_names, else of ADE20K's list in --data_path; else "class 0", ... as many as
    --nb_classes says or the masks of `pairs` have. All ranks call it: they share the looking.
    """
    names, where = read_names(args)
    if names and args.nb_classes not in (0, len(names)):
        raise UserError(
            f"--nb_classes {args.nb_classes}: {where} names {len(names)} classes; correct one of them"
        )
    if not names:
        count = args.nb_classes or _highest_label(pairs, args.reduce_zero_label) + 1
        names, where = [f"class {number}" for number in range(count)], f"--nb_classes {args.nb_classes}"
        if not args.nb_classes:
            where = f"the {len(pairs)} masks, such as {pairs[0].mask}"
    if len(names) < 2:
        raise UserError(
            f"{where}: 2 classes at least are needed, here are {len(names)}; label {IGNORED} is "
            "ignored, and so is 0 with "
            "--reduce_zero_label"
        )
    if len(names) > MOST_CLASSES - args.reduce_zero_label:
        raise UserError(
            f"{where}: {len(names)} classes; at most {MOST_CLASSES} fit into 8 bits beside {IGNORED}, ignored"
        )
    return names


def read_names(args: Any) -> tuple[list[str], str]:
    """(names, where they are from); none where there is no list of them."""
    if args.class_names:
        where = f"--class_names {args.class_names}"
        names = [line.strip() for line in _lines(args.class_names, "--class_names")]
        twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if twice is not None:
            raise UserError(f"{where}: '{twice}' is there twice; give each class a name of its own")
        if not names:
            raise UserError(f"{where}: is empty; the name of one class a line is expected")
        return names, where
    listed = os.path.join(args.data_path or args.eval_data_path or "", ADE_NAMES)
    if not os.path.isfile(listed):
        return [], ""
    rows = [line.split("\t") for line in _lines(listed, "--data_path")]
    # the first line is the heading
    names = [row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit()]
    if not names:
        raise UserError(
            f"{listed}: ADE20K's table is expected, number first, names last, tabs "
            "between; or give --class_names"
        )
    if not args.reduce_zero_label:
        raise UserError(
            f"{listed}: its first class is label 1, and 0 is none of them: add --reduce_zero_label, "
            "or name the classes from "
            "label 0 on with --class_names"
        )
    return names, listed


def _lines(path: str, flag: str) -> list[str]:
    """The lines that are not blank, without a byte order mark."""
    try:
        with open(path, encoding="utf-8-sig") as lines:
            return [line for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error})") from None


def _highest_label(pairs: Sequence[Pair], reduce_zero_label: bool) -> int:
    """Of all masks, of which each rank reads its share; masks that do not decode are left to the data set."""
    log.info(
        "looking through %d masks for their highest label; --nb_classes or --class_names spares it",
        len(pairs),
    )

    return _look_through(pairs, lambda mask, path: highest_label(mask, path, reduce_zero_label))


def _look_through(pairs: Sequence[Pair], look: Callable[[Image.Image, str], int]) -> int:
    """The highest that `look` gives for a mask and its path, over all ranks, which share
    the masks; -1 without any that decodes. A rank's UserError is raised on all of them.
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


def palette(args: Any, n_classes: int) -> Tensor:
    """The classes' colors (n_classes, 3), float in [0, 1]: those of --palette, else well distinguishable ones."""
    if not args.palette:
        return distinct_colors(n_classes)
    where = f"--palette {args.palette}"
    colors = []
    for number, line in enumerate(_lines(args.palette, "--palette"), 1):
        values = [int(part) if part.isdecimal() else -1 for part in line.split()]
        if len(values) != 3 or not all(0 <= value <= 255 for value in values):
            raise UserError(
                f"{where}, color {number}: '{line.strip()}'; red, green and blue are expected, each 0 to 255"
            )
        colors.append(values)
    if len(colors) != n_classes:
        raise UserError(
            f"{where}: {len(colors)} colors for {n_classes} classes; one line a class is expected"
        )
    return torch.tensor(colors) / 255


# ── Samples ──


class SegmentationFiles(Files):
    """Images with their masks; keys and undecodable files as samplers.Files says, an image
    and its mask replaced together.

    A sample: {"image": (3, h, w) uint8, "label": (h, w) uint8, class or 255 (ignored),
    "index": int, "failed": [...]}. In training both are one crop; in evaluation the
    image is resized for the network and the label has the file's size. UserError for a
    mask that does not fit its image or holds something else than classes.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        view: TrainingView | EvaluationView,
        classes: Sequence[str],
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
        reduce_zero_label: bool = False,
        seed: int = 0,
        passes: int = 1,
    ) -> None:
        super().__init__(len(pairs), seed, passes)
        # One array of bytes: the reference counts of many strings would copy them into every worker process.
        self.paths = np.array([[os.fsencode(path) for path in pair] for pair in pairs])
        self.view, self.classes, self.statistics = view, list(classes), statistics
        self.reduce_zero_label = reduce_zero_label
        self.warn_of_12_bits()

    def pair(self, index: int) -> Pair:
        """The files of an index, in whichever pass."""
        return Pair(*map(os.fsdecode, self.paths[index % self.files]))

    def check_masks(self) -> None:
        """UserError for the first mask that holds something else than these classes, and
        where no pixel is labeled, before hours are spent. Sizes, and files that do not
        decode, are left to the reading.
        """
        if self._look_for_classes([self.pair(place) for place in range(self.files)], set()) == 0:
            self._refuse("not one pixel is labeled")

    def check_that_classes_occur(self) -> None:
        """UserError where fewer than two classes occur in all masks: there would be
        nothing to learn. Reads masks until there are two, mostly the first few.
        """
        pairs = [self.pair(place) for place in range(self.files)]
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

    def _look_for_classes(self, pairs: Sequence[Pair], occur: set[int]) -> int:
        """Adds those in this rank's share of the masks to `occur`; the most in a mask, -1 where none decodes."""

        def look(mask: Image.Image, path: str) -> int:
            classes = self._classes_in(mask, path)
            occur.update(classes)
            return len(classes)

        return _look_through(pairs, look)

    def _classes_in(self, mask: Image.Image, path: str) -> list[int]:
        labels = labels_in(mask, path, len(self.classes), self.reduce_zero_label)
        return [label for label, pixels in enumerate(labels.histogram()) if pixels and label != IGNORED]

    def _refuse(self, what: str) -> NoReturn:
        ignored = (
            f"{IGNORED} and 0 are ignored (--reduce_zero_label)"
            if self.reduce_zero_label
            else f"{IGNORED} is ignored"
        )
        raise UserError(
            f"{self.files} masks, such as {self.pair(0).mask}: {what}; {ignored}: write black and "
            "white masks (0 and 255) as "
            "numbers of classes"
        )

    def name(self, place: int) -> str:
        return self.pair(place).image

    def read(self, place: int) -> tuple[Image.Image, Image.Image]:
        pair = self.pair(place)
        image = load_image(pair.image)
        try:
            return image, read_mask(pair.mask)
        except Exception as error:
            raise ValueError(f"its mask {pair.mask}: {reason(error)}") from None

    def sample(self, place: int, content: tuple[Image.Image, Image.Image]) -> dict[str, Tensor]:
        image, mask = content
        pair = self.pair(place)
        if mask.size != image.size:
            mask = _turned(mask, pair.image)
        if mask.size != image.size:
            sizes = (
                f"{mask.width} x {mask.height} pixels, but its image {pair.image} has "
                f"{image.width} x {image.height}"
            )
            raise UserError(f"{pair.mask}: {sizes}; a mask has a pixel for each of its image")
        labels = labels_in(mask, pair.mask, len(self.classes), self.reduce_zero_label)
        return self.view.pair(image, labels)

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch, on any device, as the network takes it: normalized float images (B, 3,
        h, w), int64 labels (B, h, w).
        """
        return {**batch, "image": normalized(batch["image"], self.statistics), "label": batch["label"].long()}


def normalized(image: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """(..., 3, h, w) uint8 -> float, as the network takes it; `statistics`: mean and std."""
    whole, mean, std = (per_channel(values, image.device) for values in ((255.0,), *statistics))
    return (image.float() / whole - mean).div_(std)


def _turned(mask: Image.Image, image_path: str) -> Image.Image:
    """The mask of an image that its EXIF block turns by a quarter, upright like the image,
    if it fits the pixels as stored.
    """
    with open_image(image_path) as stored:
        orientation = 1
        with contextlib.suppress(Exception):  # a broken EXIF block
            orientation = stored.getexif().get(ORIENTATION, 1)
        turn = TURNS.get(orientation) if stored.size == mask.size else None
    return mask if turn is None else mask.transpose(turn)


def build_dataset(args: Any, train: bool, classes: Sequence[str], passes: int = 1) -> SegmentationFiles:
    """The training pairs of --data_path, augmented, `passes` times over; or the validation
    pairs, of --eval_data_path when it is given, as they are.
    """
    elsewhere = not train and args.eval_data_path
    folder, flag = (args.eval_data_path, "--eval_data_path") if elsewhere else (args.data_path, "--data_path")
    pairs, unused = _paired(folder, train, flag)
    if unused:
        log.warning(
            "warning: %s %s: masks without an image are not used: %s (in all %d)",
            flag,
            folder,
            unused[0],
            len(unused),
        )
    statistics = normalization(args.imagenet_default_mean_and_std)
    view = training_view(args) if train else evaluation_view(args)
    return SegmentationFiles(pairs, view, classes, statistics, args.reduce_zero_label, args.seed, passes)


def training_view(args: Any) -> TrainingView:
    mean, _ = normalization(args.imagenet_default_mean_and_std)
    return TrainingView(
        args.input_size,
        args.base_size or args.input_size,
        args.scale_range,
        args.max_class_share,
        args.hflip,
        args.photometric,
        fill=tuple(round(255 * value) for value in mean),
    )


def evaluation_view(args: Any) -> EvaluationView:
    """Makes of a picture (transforms.load_image) what the network looks at: RGB -> (3, height, width) uint8."""
    return EvaluationView(args.base_size or args.input_size)

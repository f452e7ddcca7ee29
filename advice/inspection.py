"""What is in a folder of images: how many, of what kind and size, which classes, copies
and broken files. advise.py and the demo choose by it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.array_files import ARRAY_EXTENSIONS, read_array
from data_pipeline.image_formats import EXTENSIONS
from data_pipeline.image_lists import SPLITS as SPLIT_NAMES
from data_pipeline.image_lists import find_images
from data_pipeline.samplers import evenly_spaced
from errors import UserError
from runtime.terminal import say_if_slow

SPLITS = ("train", "val")
LOOKED_AT = 512  # files that are decoded, evenly spread
THUMBNAIL = 16
PHOTOS = [(chans, dtype) for chans in (1, 3) for dtype in ("uint8", "bool")]
CONSTANT = 0.01  # a standard deviation below this share of an image's type's range shows nothing
DRAWS = 500  # of the permutation test
FEWEST = 30  # images from which the test says something
SIGNIFICANT = 0.01
VALIDATES = 5  # of a class, every n-th image validates


@dataclass(frozen=True)
class LabeledPath:
    path: Path
    label: str | None  # None: the folder is unlabeled
    validates: bool


@dataclass(frozen=True)
class FolderReport:
    """Of the images of `root` or, where it has them, of root/train and root/val."""

    root: str
    images: int  # to train on
    held_out: int  # in val/
    classes: dict[str, int]  # images of each to train on; {}: unlabeled
    loose: int  # images beside folders of images, which are no classes therefore
    has_splits: bool
    unreadable: tuple[str, ...]  # of those looked at
    looked_at: int
    short_side: int  # median, in pixels
    smallest: int
    largest: int
    in_chans: int
    dtype: str  # of the numbers in the files: uint8, uint16, float32, ...
    is_rgb8: bool  # read as photos are: 8 bits, gray or color
    is_gray: bool
    of_other_kinds: int  # of those looked at: other channels or numbers than most
    copies: int  # files that equal an earlier one byte for byte
    copies_across: int  # of these, in val/ a copy of one in train/
    near_constant: int  # of those looked at
    has_up: bool  # turning the images upside down would show

    @property
    def train(self) -> str:
        """The folder of the images to train on."""
        return f"{self.root}/train" if self.has_splits else self.root

    @property
    def val(self) -> str:
        """Of the images to validate on; '' where there are none."""
        return f"{self.root}/val" if self.has_splits else ""

    @property
    def is_labeled(self) -> bool:
        return bool(self.classes)

    @property
    def imbalance(self) -> float:
        """Images of the largest class for one of the smallest."""
        return max(self.classes.values()) / min(self.classes.values()) if self.classes else 1.0


def list_folder(root: str) -> list[LabeledPath]:
    """Every image below `root`. Folders of images are classes when there are two or
    more and every image is in one; train/ and val/ are splits where both are there.
    UserError where other splits are.
    """
    splits = [Path(root, split) for split in SPLITS]
    roots = splits if all(split.is_dir() for split in splits) else [Path(root)]
    found: list[tuple[Path, Path]] = []
    for each in roots:
        samples, _ = find_images(str(each), "FOLDER", ARRAY_EXTENSIONS)
        found += [(Path(str(path)), each) for path, _ in samples]
    arrays = sum(path.suffix.lower() == ".npy" for path, _ in found)
    if 0 < arrays < len(found) / 2:  # other arrays beside photos
        found = [(path, each) for path, each in found if path.name.lower().endswith(EXTENSIONS)]
    parents = [path.relative_to(each).parts[:-1] for path, each in found]
    folders = sorted({names[0] for names in parents if names})
    if len(roots) == 1 and folders and {name.lower() for name in folders} <= SPLIT_NAMES:
        raise UserError(
            f"{root}: its folders are splits ({', '.join(folders)}), but not train and val: name or link "
            f"them so, or give one of them alone, such as {os.path.join(root, folders[-1])}"
        )
    labeled = len(folders) >= 2 and all(parents)
    return [
        LabeledPath(path, names[0] if labeled else None, len(roots) > 1 and each == splits[1])
        for (path, each), names in zip(found, parents, strict=True)
    ]


@say_if_slow("folder     looking at the images in it, and for copies among them")
def inspect_folder(root: str) -> FolderReport:
    """Read all names, the bytes of files of equal size, and LOOKED_AT images. UserError
    where there is no image, or none that can be read.
    """
    root = os.path.normpath(root)
    paths = list_folder(root)
    train = [each for each in paths if not each.validates]
    sample = [train[index].path for index in evenly_spaced(len(train), LOOKED_AT)]
    sides: list[int] = []
    kinds: Counter[tuple[int, str]] = Counter()
    unreadable: list[str] = []
    thumbnails: list[np.ndarray] = []
    constant = colored = 0
    for path in sample:
        try:
            array = read_array(str(path), 3)
            if not np.isfinite(array).all():
                raise ValueError("it holds NaN or infinite numbers")
            thumbnail = gray_thumbnail(array)
        except Exception as error:  # decoders raise nearly anything for broken files
            unreadable.append(f"{path}: {getattr(error, 'strerror', None) or error}")
            continue
        sides.append(min(array.shape[:2]))
        kinds[array.shape[2], str(array.dtype)] += 1
        constant += bool(array.std() < CONSTANT * value_range(array))
        colored += array.shape[2] == 3 and bool((array[..., :1] != array).any())
        thumbnails.append(thumbnail)
    if not sides:
        raise UserError(f"{root}: none of {len(sample)} images could be read; the first: {unreadable[0]}")
    (in_chans, dtype), same = kinds.most_common(1)[0]
    arrays = any(path.suffix.lower() == ".npy" for path in sample)
    is_rgb8 = (in_chans, dtype) in PHOTOS and not arrays
    if is_rgb8:
        same = sum(kinds[kind] for kind in PHOTOS)
    copies, across = count_copies(paths)
    return FolderReport(
        root=root,
        images=len(train),
        held_out=len(paths) - len(train),
        classes=dict(sorted(Counter(each.label for each in train if each.label is not None).items())),
        loose=0 if train[0].label else count_loose(train, root),
        has_splits=len(train) < len(paths),
        unreadable=tuple(unreadable),
        looked_at=len(sample),
        short_side=round(statistics.median(sides)),
        smallest=min(sides),
        largest=max(sides),
        in_chans=3 if is_rgb8 else in_chans,
        dtype=dtype,
        is_rgb8=is_rgb8,
        is_gray=not colored,
        of_other_kinds=len(sides) - same,
        copies=copies,
        copies_across=across,
        near_constant=constant,
        # too few to tell: as photos of the world have
        has_up=len(thumbnails) < FEWEST or flip_probability(thumbnails) <= SIGNIFICANT,
    )


def count_loose(paths: Sequence[LabeledPath], root: str) -> int:
    """Images directly in `root`, or in the split of it that all of `paths` are in,
    where others are in two folders or more.
    """
    parts = [each.path.relative_to(root).parts for each in paths]
    if {names[0] for names in parts} <= set(SPLITS):
        parts = [names[1:] for names in parts]
    folders = {names[0] for names in parts if len(names) > 1}
    return sum(len(names) == 1 for names in parts) if len(folders) >= 2 else 0


def value_range(array: np.ndarray) -> float:
    """From black to white: of the type, or of these pixels where they are floats or
    leave most of the type unused.
    """
    own = float(array.max()) - float(array.min())
    return 255.0 if array.dtype == np.uint8 else max(own, 1e-12)


def gray_thumbnail(array: np.ndarray) -> np.ndarray:
    """(THUMBNAIL, THUMBNAIL), of mean 0 and, unless nothing is on it, deviation 1."""
    gray = Image.fromarray(array.astype(np.float32).mean(axis=2))
    pixels = np.asarray(gray.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), dtype=np.float64)
    centered = pixels - pixels.mean()
    return centered / max(float(centered.std()), 1e-9)


def flip_probability(thumbnails: Sequence[np.ndarray]) -> float:
    """How likely it is that images without an up differ from themselves upside down as
    much as these do, on average: a permutation test.
    """
    images = np.stack(thumbnails)
    differences = (images - images[:, ::-1]).reshape(len(images), -1)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(DRAWS, len(images)))
    turned = np.linalg.norm(signs @ differences, axis=1)
    return float(1 + (turned >= np.linalg.norm(differences.sum(0))).sum()) / (DRAWS + 1)


def count_copies(paths: Sequence[LabeledPath]) -> tuple[int, int]:
    """Files with the bytes of an earlier one; of these, the ones of val/ that equal one
    of train/.
    """
    by_size: dict[int, list[LabeledPath]] = defaultdict(list)
    for each in paths:
        with contextlib.suppress(OSError):  # a broken link, counted where it is decoded
            by_size[os.path.getsize(each.path)].append(each)
    copies = across = 0
    for group in by_size.values():
        by_content: dict[bytes, list[LabeledPath]] = defaultdict(list)
        for each in group if len(group) > 1 else ():
            with contextlib.suppress(OSError):
                by_content[digest(each.path)].append(each)
        for same in by_content.values():
            copies += len(same) - 1
            both = len({each.validates for each in same}) == 2
            across += sum(each.validates for each in same) if both else 0
    return copies, across


def digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()


def make_split(root: str, target: Path) -> None:
    """target/train and target/val with a link to each image of the classes in `root`:
    every fifth of a class validates, of fewer than five the last. Of files that are
    equal only the first is linked, so that no image is in both. UserError where there
    are no classes, `target` is there already, or cannot be written.
    """
    paths = list_folder(root)
    if any(each.label is None or each.validates for each in paths):
        raise UserError(
            f"{root}: a split is made of a folder that has one folder per class, and no train/ and val/ yet"
        )
    if target.exists():
        raise UserError(f"{target} is there already: remove it, or name another `output_dir`")
    files: dict[bytes, LabeledPath] = {}
    for each in paths:
        with contextlib.suppress(OSError):  # what cannot be opened is left out
            files.setdefault(digest(each.path), each)
    classes: dict[str | None, list[Path]] = defaultdict(list)
    for each in files.values():
        classes[each.label].append(each.path)
    try:
        for members in classes.values():
            last = min(len(members), VALIDATES) - 1
            for number, path in enumerate(members):
                split = SPLITS[number % VALIDATES == last and len(members) > 1]
                link = target / split / path.relative_to(root)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
    except OSError as error:
        raise UserError(
            f"{target} could not be written ({error.strerror}): name another `output_dir`"
        ) from None

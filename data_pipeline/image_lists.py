"""Where images are: folders, one folder per class, lists, CIFAR-100, tar shards. Each
finder gives (image, label) pairs in a fixed order, and the names of the classes.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePath

import numpy as np
import torchvision

from data_pipeline import shards
from data_pipeline.folders import (
    ImagePaths,
    check_folder,
    describe_accepted,
    list_class_folders,
    list_images,
    list_parents,
    report_left_out,
)
from data_pipeline.image_formats import EXTENSIONS
from errors import ParameterError, UserError, count
from runtime.distributed import barrier, is_main
from runtime.seeding import derive_seed
from runtime.terminal import log_once, say_if_slow

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}

# image (file, pixels, member of a tar), label
Samples = Sequence[tuple[str | np.ndarray | shards.Member, int | None]]


def find_images(
    root: str, origin: str = "`data_path`", endings: tuple[str, ...] = EXTENSIONS
) -> tuple[Samples, None]:
    """Every image below `root`, however nested, unlabeled, in the order of the
    paths.
    """
    check_folder(root, origin)
    left_out: Counter[str] = Counter()
    with say_if_slow(f"searching  {root} for images"):
        samples = list_images(root, left_out, endings)
    report_left_out(left_out, f"{origin} {root}", endings)
    if not samples:
        raise UserError(
            f"{origin} {root}: no images in this folder or below it ({describe_accepted(endings, left_out)})"
        )
    return samples, None


def find_images_or_file(
    path: str, origin: str = "`data_path`", endings: tuple[str, ...] = EXTENSIONS
) -> list[str]:
    """`path` itself when it is a file, whatever its name ends in, else every image
    below it, in the order of the paths.
    """
    if os.path.isfile(path):
        return [path]
    return [str(source) for source, _ in find_images(path, origin, endings)[0]]


def find_classes_folder(
    root: str,
    origin: str = "`data_path`",
    classes: Sequence[str] | None = None,
    endings: tuple[str, ...] = EXTENSIONS,
) -> tuple[Samples, Sequence[str]]:
    """root/class/**/image, labeled in the order of the names; `classes`: the names that
    exist and their order.
    """
    check_folder(root, origin)
    found = list_class_folders(root)
    if not found:
        raise UserError(
            f"{origin} {root}: no class folders in it; labeled images are expected as class_name/image.jpg"
        )
    _refuse_splits(found, root, origin, classes or ())
    unknown = sorted(set(found) - set(classes)) if classes else []
    if unknown:
        raise UserError(
            f"{origin} {root}: class folder '{unknown[0]}' is not a class of the training data (in all "
            f"{len(unknown)})"
        )
    names = classes or found
    folders = {name: os.path.realpath(os.path.join(root, name)) for name in found}
    others = frozenset(folders.values())
    if len(others) < len(found):
        twice = [name for name in found if list(folders.values()).count(folders[name]) > 1][:2]
        raise UserError(
            f"{origin} {root}: class folders '{twice[0]}' and '{twice[1]}' are the same folder; remove one "
            "of the links"
        )
    above = list_parents(os.path.realpath(root)).union(*(map(str, PurePath(path).parents) for path in others))
    with os.scandir(root) as entries:
        loose = sum(entry.is_file() and entry.name.lower().endswith(endings) for entry in entries)
    left_out = Counter({"beside the class folders": loose})
    with say_if_slow(f"searching  {root} for images"):
        parts = [list_images(os.path.join(root, name), left_out, endings, above, others) for name in names]
    for name, paths in zip(names, parts, strict=True):
        if not paths and classes is None:  # a validation split need not have every class
            raise UserError(
                f"{origin} {root}: class folder '{name}' has no images "
                f"({describe_accepted(endings, left_out)}); fill or remove it"
            )
    samples = ImagePaths.join(parts, np.repeat(np.arange(len(names)), [len(paths) for paths in parts]))
    report_left_out(left_out, f"{origin} {root}", endings)
    if not samples:
        raise UserError(
            f"{origin} {root}: no images in its class folders ({describe_accepted(endings, left_out)})"
        )
    return samples, names


def _refuse_splits(found: Sequence[str], root: str, origin: str, classes: Sequence[str]) -> None:
    """UserError where the class folders are a data set's splits, or one."""
    if {name.lower() for name in found} <= SPLITS and not set(found) <= set(classes):
        train = next((name for name in found if name.lower().startswith("train")), found[0])
        rest = next((name for name in found if name != train), "val")
        raise UserError(
            f"{origin} {root}: its folders are {', '.join(found)}: splits, not classes; give `data_path` "
            f"{os.path.join(root, train)} `eval_data_path` {os.path.join(root, rest)}"
        )
    if len(found) < 2 and not classes:
        raise UserError(
            f"{origin} {root}: has one class folder, '{found[0]}'; two classes at least are needed"
        )


def read_class_index(file: str, root: str, origin: str = "`data_path`") -> tuple[Samples, list[str]]:
    """One JSON object per line, {"class": name, "files": [paths]}; labels in the order
    of the names. The paths are relative to root/class, as in the published code, or to
    root, whichever is there.
    """
    where = f"`image_folder_class_index_file` {file}"
    files: dict[str, list[str]] = {}
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    name, paths = _parse_index_line(line, f"{where}, line {number}")
                    if name in files:
                        raise UserError(
                            f"{where}, line {number}: class '{name}' was listed before; give each class one "
                            "line"
                        )
                    files[name] = paths
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from None
    if not files:
        raise UserError(f'{where}: is empty; one {{"class": ..., "files": [...]}} a line is expected')
    base = os.path.abspath(root)
    firsts = {name: paths[0] for name, paths in sorted(files.items())}
    of_root = sum(os.path.isfile(os.path.join(base, path)) for path in firsts.values())
    of_class = sum(os.path.isfile(os.path.join(base, name, path)) for name, path in firsts.items())

    def full_paths() -> Iterator[str]:
        for name in firsts:
            for path in files[name]:
                full = os.path.normpath(os.path.join(base, name if of_class > of_root else "", path))
                if not full.startswith(base.rstrip(os.sep) + os.sep):
                    raise UserError(
                        f"{where}: '{path}' of class '{name}' lies outside {origin} {root}; give paths "
                        "relative to it"
                    )
                yield full

    labels = np.repeat(np.arange(len(firsts)), [len(files[name]) for name in firsts])
    samples = ImagePaths.of(full_paths(), labels)
    first = samples[0][0]
    if not (of_root or of_class):
        raise UserError(
            f"{where}: there is no {first}; its paths are relative to {origin} {root}, or to the class's "
            "folder in it"
        )
    if of_root == of_class:
        raise UserError(
            f"{where}: {first} is there, and the same path in the class's folder: write the paths relative "
            f"to {origin} {root}, such as class/file"
        )
    return samples, sorted(files)


def _parse_index_line(line: str, where: str) -> tuple[str, list[str]]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    name, files = (entry.get("class"), entry.get("files")) if isinstance(entry, dict) else (None, None)
    if (
        not isinstance(name, str)
        or not isinstance(files, list)
        or not all(isinstance(path, str) for path in files)
    ):
        raise UserError(f'{where}: expected {{"class": "name", "files": ["path", ...]}}')
    if not files:
        raise UserError(f"{where}: class '{name}' has no files; add some or remove the line")
    try:
        os.fsencode("".join([name, *files]))
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and no file's name
        raise UserError(
            f"{where}: class '{name!a}' or one of its files has a name that is not text"
        ) from None
    return name, files


def find_cifar(root: str, train: bool, download: bool = False) -> tuple[Samples, list[str]]:
    """CIFAR-100 (torchvision's copy below `root`), images in memory; fetched only when
    asked, by the first rank.
    """
    cifar = torchvision.datasets.CIFAR100
    if download:
        try:
            if is_main():
                cifar(root, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"`download`: CIFAR-100 could not be fetched ({error}); put its files below {root}"
            ) from None
        barrier()
    try:
        data = cifar(root, train=train)
    except RuntimeError:
        raise UserError(
            f"`data_set` CIFAR: no CIFAR-100 below `data_path` {root}; `download` fetches it"
        ) from None
    return list(zip(data.data, data.targets, strict=True)), data.classes


def find_shards(
    pattern: str,
    origin: str = "`data_path`",
    classes: Sequence[str] | None = None,
    endings: tuple[str, ...] = EXTENSIONS,
) -> tuple[shards.Members, list[str] | None]:
    """The images of tar shards and, where they have labels, the classes' names: those
    in classes.txt, else the numbers.

    `classes`: the names that exist and their order; numbers without names are taken to
    be in that order. One rank looks through shards without an index, the others read
    the index that it leaves.
    """
    paths = shards.find_shards(pattern, origin)
    with say_if_slow(f"searching  {count(len(paths), 'shard')} for images"):
        if not is_main():
            barrier()
        members = shards.list_members(paths, endings, origin)
        if is_main():
            barrier()
    if members.left_out:
        log_once(
            f"left out   of {origin} {pattern}: {members.left_out:,} images, since a name ends at its first "
            "dot (x.2021.jpg is the 2021.jpg of sample x) and a sample has one image; "
            "scripts/make_shards.py writes names without further dots"
        )
    if members.labels is None:
        return members, None
    most = int(members.labels.max()) + 1
    own = shards.read_class_names(paths)
    names = own or list(classes or map(str, range(most)))
    if most > len(names):
        raise UserError(
            f"{origin} {pattern}: there is a label {most - 1}, but only {len(names)} classes are known"
        )
    if classes is None or own is None or own == list(classes):
        return members, names
    unknown = sorted(set(own) - set(classes))
    if unknown:
        raise UserError(
            f"{origin} {pattern}: class '{unknown[0]}' is not a class of the training data (in all "
            f"{len(unknown)})"
        )
    theirs = np.array([list(classes).index(name) for name in own])
    return members.with_labels(theirs[members.labels]), list(classes)


def take_class_balanced_share(samples: Samples, fraction: float, seed: int = 0) -> Samples:
    """max(1, round(fraction * n)) of each class's n images, in the old order.

    Always the same ones for a seed; a smaller share is part of a larger one.
    """
    if not 0 < fraction <= 1:
        raise ParameterError(f"`label_fraction` {fraction}: give a share above 0 and up to 1")
    if fraction == 1:
        return samples
    by_class: dict[int | None, list[int]] = {}
    for index, (_, label) in enumerate(samples):
        by_class.setdefault(label, []).append(index)
    kept: list[int] = []
    for label, indices in by_class.items():
        random.Random(derive_seed(seed, "label_fraction", -1 if label is None else label)).shuffle(indices)
        kept += indices[: max(1, round(fraction * len(indices)))]
    if isinstance(samples, (shards.Members, ImagePaths)):
        return samples.take(sorted(kept))
    return [samples[index] for index in sorted(kept)]

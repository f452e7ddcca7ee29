"""Where images are: folders, one folder a class, lists, CIFAR-100, tar shards. Each finder gives (image, label) pairs in a
fixed order, and the names of the classes."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence

import numpy as np
import torchvision

import shards
from distributed import barrier, is_main
from errors import UserError
from image_formats import EXTENSIONS
from utils import derive_seed

ACCEPTED = f"accepted: {' '.join(EXTENSIONS)}"

Samples = Sequence[tuple[str | np.ndarray | shards.Member, int | None]]  # image (file, pixels, member of a tar), label


def find_images(root: str, flag: str = "--data_path") -> tuple[Samples, None]:
    """Every image below `root`, however nested, unlabelled, in the order of the paths."""
    need_folder(root, flag)
    samples: Samples = [(path, None) for path in images_below(root)]
    if not samples:
        raise UserError(f"{flag} {root}: no images in this folder or below it ({ACCEPTED})")
    return samples, None


def find_images_or_file(path: str, flag: str = "--data_path") -> list[str]:
    """`path` itself when it is a file, whatever its name ends in, else every image below it, in the order of the paths."""
    return [path] if os.path.isfile(path) else [str(source) for source, _ in find_images(path, flag)[0]]


def find_classes_folder(
    root: str, flag: str = "--data_path", classes: Sequence[str] | None = None
) -> tuple[Samples, Sequence[str]]:
    """root/class/**/image, labelled in the order of the names; `classes`: the names that exist and their order."""
    need_folder(root, flag)
    found = class_folders(root)
    if not found:
        raise UserError(f"{flag} {root}: no class folders in it; labelled images are expected as class_name/image.jpg")
    unknown = sorted(set(found) - set(classes)) if classes else []
    if unknown:
        raise UserError(f"{flag} {root}: class folder '{unknown[0]}' is no class of the training data (in all {len(unknown)})")
    names = classes or found
    samples: list[tuple[str | np.ndarray | shards.Member, int | None]] = []
    for label, name in enumerate(names):
        paths = images_below(os.path.join(root, name))
        if not paths and classes is None:  # a validation split need not have every class
            raise UserError(f"{flag} {root}: class folder '{name}' has no images ({ACCEPTED}); fill or remove it")
        samples += [(path, label) for path in paths]
    if not samples:
        raise UserError(f"{flag} {root}: no images in its class folders ({ACCEPTED})")
    return samples, names


def read_class_index(file: str, root: str, flag: str = "--data_path") -> tuple[Samples, list[str]]:
    """One JSON object a line, {"class": name, "files": [paths relative to root]}; labels in the order of the names."""
    where = f"--image_folder_class_index_file {file}"
    files: dict[str, list[str]] = {}
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    name, paths = _index_line(line, f"{where}, line {number}")
                    if name in files:
                        raise UserError(f"{where}, line {number}: class '{name}' was listed before; give each class one line")
                    files[name] = paths
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from None
    if not files:
        raise UserError(f'{where}: is empty; one {{"class": ..., "files": [...]}} a line is expected')
    base = os.path.abspath(root)
    samples: list[tuple[str | np.ndarray | shards.Member, int | None]] = []
    for label, name in enumerate(sorted(files)):
        for path in files[name]:
            full = os.path.normpath(os.path.join(base, path))
            if not full.startswith(base.rstrip(os.sep) + os.sep):
                raise UserError(f"{where}: '{path}' of class '{name}' lies outside {flag} {root}; give paths relative to it")
            samples.append((full, label))
    if not os.path.isfile(str(samples[0][0])):
        raise UserError(f"{where}: there is no {samples[0][0]}; its paths are taken relative to {flag} {root}")
    return samples, sorted(files)


def _index_line(line: str, where: str) -> tuple[str, list[str]]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    name, files = (entry.get("class"), entry.get("files")) if isinstance(entry, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(files, list) or not all(isinstance(path, str) for path in files):
        raise UserError(f'{where}: expected {{"class": "name", "files": ["path", ...]}}')
    if not files:
        raise UserError(f"{where}: class '{name}' has no files; add some or remove the line")
    return name, files


def find_cifar(root: str, train: bool, download: bool = False) -> tuple[Samples, list[str]]:
    """CIFAR-100 (torchvision's copy below `root`), images in memory; fetched only when asked, by the first rank."""
    cifar = torchvision.datasets.CIFAR100
    if download:
        try:
            if is_main():
                cifar(root, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--download: CIFAR-100 could not be fetched ({error}); put its files below {root}") from None
        barrier()
    try:
        data = cifar(root, train=train)
    except RuntimeError:
        raise UserError(f"--data_set CIFAR: no CIFAR-100 below --data_path {root}; --download fetches it") from None
    return list(zip(data.data, data.targets, strict=True)), data.classes


def find_shards(
    pattern: str, flag: str = "--data_path", classes: Sequence[str] | None = None
) -> tuple[shards.Members, list[str] | None]:
    """The images of tar shards and, where they have labels, the classes' names: those in classes.txt, else the numbers.

    `classes`: the names that exist and their order; numbers without names are taken to be in that order. One rank looks
    through shards without an index, the others read the index that it leaves.
    """
    paths = shards.find_shards(pattern, flag)
    if not is_main():
        barrier()
    members = shards.members_of(paths, EXTENSIONS, flag)
    if is_main():
        barrier()
    if members.labels is None:
        return members, None
    most = int(members.labels.max()) + 1
    own = shards.class_names(paths)
    names = own or list(classes or map(str, range(most)))
    if most > len(names):
        raise UserError(f"{flag} {pattern}: there is a label {most - 1}, but only {len(names)} classes are known")
    if classes is None or own is None or own == list(classes):
        return members, names
    unknown = sorted(set(own) - set(classes))
    if unknown:
        raise UserError(f"{flag} {pattern}: class '{unknown[0]}' is no class of the training data (in all {len(unknown)})")
    theirs = np.array([list(classes).index(name) for name in own])
    return members.with_labels(theirs[members.labels]), list(classes)


def class_balanced_share(samples: Samples, fraction: float, seed: int = 0) -> Samples:
    """max(1, round(fraction * n)) of each class's n images, in the old order.

    Always the same ones for a seed; a smaller share is part of a larger one.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--label_fraction {fraction}: give a share above 0 and up to 1")
    if fraction == 1:
        return samples
    by_class: dict[int | None, list[int]] = {}
    for index, (_, label) in enumerate(samples):
        by_class.setdefault(label, []).append(index)
    kept: list[int] = []
    for label, indices in by_class.items():
        random.Random(derive_seed(seed, "label_fraction", -1 if label is None else label)).shuffle(indices)
        kept += indices[: max(1, round(fraction * len(indices)))]
    if isinstance(samples, shards.Members):
        return samples.take(sorted(kept))
    return [samples[index] for index in sorted(kept)]


def need_folder(root: str, flag: str) -> None:
    if not os.path.isdir(root):
        raise UserError(f"{flag} {root}: {'is not a folder' if os.path.exists(root) else 'no such folder'}")


def class_folders(root: str) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def images_below(root: str) -> list[str]:
    """Sorted paths. Symbolic links to folders are followed, each folder is read once: links may form a circle."""
    paths: list[str] = []
    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        images = (name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith("."))
        paths += [os.path.join(folder, name) for name in images]
    return sorted(paths)

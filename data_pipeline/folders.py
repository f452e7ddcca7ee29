"""Folders of images: what is in them, and what is left out."""

from __future__ import annotations

import os
from array import array
from bisect import bisect
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from itertools import pairwise, repeat
from pathlib import PurePath
from typing import Any, overload

import numpy as np

from data_pipeline.image_formats import EXTENSIONS
from errors import UserError
from runtime.terminal import log_once

SYSTEM_FOLDERS = ("@eaDir", "__MACOSX", "lost+found", "#recycle", "$RECYCLE.BIN", "System Volume Information")


class ImagePaths(Sequence[tuple[str, int | None]]):
    """(path, label or None) of image files, kept in three arrays: a list of a million
    would take three times the memory, and its reference counts would copy it into every
    worker process.
    """

    def __init__(self, content: bytes, lengths: np.ndarray, labels: np.ndarray | None = None) -> None:
        self.content = content  # the paths, one after the other
        self.ends = np.cumsum(lengths, dtype=np.int64)  # (n,) where in it
        self.labels = labels  # (n,) int64 or None

    @classmethod
    def of(cls, paths: Iterable[str | bytes], labels: np.ndarray | None = None) -> ImagePaths:
        """Of a list or a generator of paths, which are encoded as the system's names
        are.
        """
        content, lengths = bytearray(), array("q")
        for path in paths:
            encoded = os.fsencode(path)
            content += encoded
            lengths.append(len(encoded))
        return cls(bytes(content), np.frombuffer(lengths, dtype=np.int64), labels)

    @classmethod
    def join(cls, parts: Sequence[ImagePaths], labels: np.ndarray | None = None) -> ImagePaths:
        lengths = [np.diff(part.ends, prepend=0) for part in parts]
        return cls(b"".join(part.content for part in parts), np.concatenate(lengths), labels)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> tuple[str, int | None]: ...
    @overload
    def __getitem__(self, index: slice) -> ImagePaths: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return os.fsdecode(self.encoded(index)), None if self.labels is None else int(self.labels[index])

    def encoded(self, index: int) -> bytes:
        index = range(len(self))[index]
        return self.content[self.ends[index - 1] if index else 0 : self.ends[index]]

    def iterate_encoded(self) -> Iterator[bytes]:
        start = 0
        for end in self.ends.data:
            yield self.content[start:end]
            start = end

    def __iter__(self) -> Iterator[tuple[str, int | None]]:
        labels = repeat(None) if self.labels is None else self.labels.data
        return zip(map(os.fsdecode, self.iterate_encoded()), labels, strict=False)

    def take(self, indices: Sequence[int] | np.ndarray) -> ImagePaths:
        """Some of them, in this order."""
        labels = None if self.labels is None else self.labels[np.asarray(indices, dtype=np.int64)]
        return self.of(map(self.encoded, indices), labels)

    def with_labels(self, labels: np.ndarray | None) -> ImagePaths:
        return ImagePaths(self.content, np.diff(self.ends, prepend=0), labels)


def check_folder(root: str, origin: str) -> None:
    if not os.path.isdir(root):
        raise UserError(f"{origin} {root}: {'is not a folder' if os.path.exists(root) else 'no such folder'}")


def list_class_folders(root: str) -> list[str]:
    """Names of the folders in `root`, sorted; none of those of the system, nor links to
    `root` or above it.
    """
    above = list_parents(os.path.realpath(root))
    with os.scandir(root) as entries:
        folders = [entry for entry in entries if entry.is_dir() and not _is_system_folder(entry.name)]
    return sorted(
        entry.name for entry in folders if not (entry.is_symlink() and os.path.realpath(entry.path) in above)
    )


def list_images(
    root: str,
    left_out: Counter[str] | None = None,
    endings: tuple[str, ...] = EXTENSIONS,
    above: Collection[str] = (),
    others: Set[str] = frozenset(),
) -> ImagePaths:
    """Paths of the images in `root` and below it, sorted, without labels; what is left
    out is counted in `left_out`.

    Symbolic links to folders are followed, and each folder is read once, as links may
    form a circle. They are not followed to folders above `root`, to those in `above`,
    or to those in `others` or below them (real paths, of all classes).
    """
    left_out = Counter() if left_out is None else left_out
    # Neighbors of the sorted list: the path of the first, and the names of the others in its folder.
    runs: list[tuple[str, str]] = []
    visited: set[str] = set()
    start = list_parents(os.path.realpath(root))
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        if folder != root and (
            real in start or real in above or not others.isdisjoint(list_parents(real) - start)
        ):
            log_once(f"left out   {folder}: a link to a folder above or of another class")
            subfolders.clear()
            continue
        visited.add(real)
        for name in filter(_is_system_folder, subfolders):
            kind = "in hidden folders" if name.startswith(".") else f"in {name}"
            left_out[kind] += _count_images(os.path.join(folder, name), endings)
        subfolders[:] = sorted(name for name in subfolders if not _is_system_folder(name))
        images: list[str] = []
        for name in names:
            if not name.lower().endswith(endings):
                left_out[os.path.splitext(name.lower())[1] or "without ending"] += not name.startswith(".")
            elif name.startswith("."):
                left_out["hidden"] += 1
            else:
                images.append(name)
        images.sort()
        between = sorted(bisect(images, name + os.sep) for name in subfolders)
        for first, last in pairwise([0, *between, len(images)]):
            if first < last:
                runs.append((os.path.join(folder, images[first]), "\0".join(images[first + 1 : last])))
    return ImagePaths.of(_iterate_runs(runs))


def _iterate_runs(runs: list[tuple[str, str]]) -> Iterator[str]:
    for first, others in sorted(runs):
        yield first
        folder = first[: len(first) - len(os.path.basename(first))]
        yield from (folder + name for name in others.split("\0") if name)


def report_left_out(left_out: Counter[str], where: str, endings: Sequence[str] = EXTENSIONS) -> None:
    """Log one line, if anything was left out."""
    kinds = [f"{count:,} {kind}" for kind, count in left_out.most_common() if count]
    if kinds:
        by_ending = any(count and kind.startswith((".", "without")) for kind, count in left_out.items())
        accepted = f" ({describe_accepted(endings, left_out)})" if by_ending else ""
        log_once(f"left out   of {where}: {shorten_list(kinds)}{accepted}")


def describe_accepted(endings: Sequence[str], left_out: Mapping[str, int]) -> str:
    """Which files are images, by their endings; `left_out` counts the other ones."""
    arrays = (
        "; .npy only where `in_chans` or `image_range` says what is in it" if left_out.get(".npy") else ""
    )
    return f"accepted: {' '.join(endings)}{arrays}"


def warn_of_training_images(train: str, held_out: str) -> None:
    """Log one line, if the images to measure on are those to train on."""
    if train and held_out and os.path.realpath(train) == os.path.realpath(held_out):
        log_once("warning: `eval_data_path` is `data_path`: the figures are of images that were trained on")


def refuse_one_class(names: Sequence[str], origin: str) -> None:
    """Log the classes; UserError for fewer than two."""
    if len(names) < 2:
        raise UserError(f"{origin}: has one class, '{shorten_list(names)}'; two classes at least are needed")
    log_once(f"classes    {len(names)}: {shorten_list(names)}")


def shorten_list(names: Sequence[str], most: int = 8) -> str:
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in names[:most]]
    return ", ".join(shown) + (", ..." if len(names) > most else "")


def _is_system_folder(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def list_parents(real: str) -> set[str]:
    """`real` and all folders above it."""
    return {real, *map(str, PurePath(real).parents)}


def _count_images(folder: str, endings: tuple[str, ...]) -> int:
    return sum(name.lower().endswith(endings) for _, _, names in os.walk(folder) for name in names)

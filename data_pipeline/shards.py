"""Tar shards in WebDataset's layout, read at random: which there are, and which images
are in them.

A shard is an uncompressed tar file. Its members come in samples: neighbors whose names
agree up to the first dot of the file name; what follows is the kind (`000012.jpg`,
`000012.cls`). With the index of a shard (shard_index.py) an image is one read at a
known offset. So a data set of shards is a map from index to image like a folder, and a
run over it resumes, and is shared by processes, as exactly (docs/data.md says why).
"""

from __future__ import annotations

import concurrent.futures
import functools
import glob
import io
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from data_pipeline.shard_index import BLOCK, load_index
from errors import UserError

CLASS_NAMES = "classes.txt"  # beside labeled shards: the name of class 0, 1, ..., one per line
OPEN_FILES = 64


class Member(NamedTuple):
    """An image in a shard."""

    shard: str
    offset: int  # of its first byte
    size: int

    def read(self) -> io.BytesIO:
        """Its bytes; OSError where the shard has become shorter."""
        # moves no position: processes may share it
        content = os.pread(_open_once(self.shard).fileno(), self.size, self.offset)
        if len(content) < self.size:
            raise OSError(f"the shard ends {self.size - len(content)} bytes too early")
        return io.BytesIO(content)

    def __str__(self) -> str:
        """shard/name, for messages: the name is read from the header before the
        image.
        """
        try:
            header = os.pread(_open_once(self.shard).fileno(), BLOCK, self.offset - BLOCK)
            return f"{self.shard}/{tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name}"
        except (OSError, tarfile.TarError):
            return f"{self.shard} at byte {self.offset}"


@functools.lru_cache(maxsize=OPEN_FILES)
def _open_once(path: str) -> io.FileIO:
    """Open a shard and keep it open: otherwise the disk would be asked for a name as
    often as in a folder of images.
    """
    return io.FileIO(path)


class Members(Sequence[tuple[Member, int | None]]):
    """(image, label or None) of all shards in their order. They are kept in arrays,
    since a list of a million would burden every process.
    """

    def __init__(
        self,
        paths: Sequence[str],
        shard: np.ndarray,
        places: np.ndarray,
        labels: np.ndarray | None,
        numbers: np.ndarray,
        left_out: int = 0,
    ) -> None:
        self.paths = paths
        self.shard = shard  # (n,) which of `paths`, rising
        self.places = places  # (n, 2) offset and size
        self.labels = labels  # (n,) or None
        self.numbers = numbers  # (n,) as of shard_index.Index
        self.left_out = left_out  # images that the shards hold besides

    def __len__(self) -> int:
        return len(self.shard)

    @overload
    def __getitem__(self, index: int) -> tuple[Member, int | None]: ...
    @overload
    def __getitem__(self, index: slice) -> Members: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self.member(index), None if self.labels is None else int(self.labels[index])

    def member(self, index: int) -> Member:
        offset, size = self.places[index].tolist()
        return Member(self.paths[self.shard[index]], offset, size)

    def take(self, indices: Sequence[int] | np.ndarray) -> Members:
        """Some of them, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return Members(self.paths, self.shard[chosen], self.places[chosen], labels, self.numbers[chosen])

    def with_labels(self, labels: np.ndarray | None) -> Members:
        return Members(self.paths, self.shard, self.places, labels, self.numbers)

    def in_folder_order(self) -> Members:
        """In the order that they had in the folder which was packed, as far as their
        names tell it.
        """
        return self.take(np.argsort(self.numbers, kind="stable"))

    def count_by_shard(self) -> list[int]:
        """Images of each shard that has any: neighbors in the order of the indices."""
        return np.unique(self.shard, return_counts=True)[1].tolist()


# ── Which shards ──


def find_shards(pattern: str, origin: str) -> list[str]:
    """The files that `pattern` names: braces (`{000000..000146}`, `{a,b}`), `*`, a
    folder of .tar files, or several of these with `::` between them (WebDataset's
    notation). UserError: missing, compressed, remote, named twice.
    """
    paths: list[str] = []
    for part in pattern.split("::"):
        if part.startswith("pipe:") or "://" in part:
            raise UserError(
                f"{origin} {part}: shards are read from disks only, since their images are read at random; "
                "copy them to a folder first"
            )
        paths += _expand_pattern(part, origin)
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{origin} {pattern}: {missing[0]}{others} of {len(paths)} shards {'are' if others else 'is'} "
            "missing"
        )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(
            f"{origin} {pattern}: {twice} is named twice; its images would be read twice in each epoch"
        )
    compressed = [path for path in paths if path.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst"))]
    if compressed:
        raise UserError(
            f"{origin}: {compressed[0]} is compressed and cannot be read at random: unpack it to a .tar first"
        )
    return paths


def _expand_pattern(part: str, origin: str) -> list[str]:
    if os.path.isdir(part):
        found = sorted(glob.glob(os.path.join(glob.escape(part), "*.tar")))
        if not found:
            raise UserError(
                f"{origin} {part}: no .tar files in this folder (scripts/make_shards.py writes them)"
            )
        return found
    from webdataset.shardlists import expand_urls  # here, for it is slow to import and few runs read shards

    try:
        paths: list[str] = expand_urls(part)
    except ValueError as error:  # braceexpand's UnbalancedBracesError
        raise UserError(
            f"{origin} {part}: {error}; ranges are written {{000000..000146}}, lists {{a,b}}"
        ) from None
    found = []
    for path in paths:
        matches = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.isfile(path) else [path]
        if not matches:
            raise UserError(f"{origin} {part}: no file is called {path}")
        found += matches
    return found


# ── What is in them ──


def list_members(paths: Sequence[str], extensions: Sequence[str], origin: str) -> Members:
    """All images of the shards, with labels if every one has a label. UserError for
    shards that cannot be used.

    Several at once: reading a shard through is waiting for the disk.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        indices = list(pool.map(lambda path: load_index(path, extensions, origin), paths))
    shard = np.repeat(np.arange(len(paths), dtype=np.int32), [len(index.labels) for index in indices])
    places = np.concatenate([index.places for index in indices])
    labels, numbers = (
        np.concatenate(column)
        for column in zip(*((index.labels, index.numbers) for index in indices), strict=True)
    )
    if len(labels) == 0:
        raise UserError(
            f"{origin}: no images in these {len(paths)} shards (accepted: {' '.join(extensions)}, behind "
            "the first dot of a name)"
        )
    labeled = labels >= 0
    if labeled.any() and not labeled.all():
        first = Member(paths[shard[labeled.argmin()]], *places[labeled.argmin()].tolist())
        raise UserError(f"{origin}: {first} has no label (.cls), others have one; label all images or none")
    left_out = int(sum(index.left_out.sum() for index in indices))
    return Members(paths, shard, places, labels if labeled.all() else None, numbers, left_out)


# ── Names of classes ──


def read_class_names(paths: Sequence[str]) -> list[str] | None:
    """The names in classes.txt beside the shards; None where they have none. UserError
    where folders differ in it.
    """
    found: dict[str, list[str]] = {}
    for folder in dict.fromkeys(os.path.dirname(path) for path in paths):
        file = os.path.join(folder, CLASS_NAMES)
        if os.path.isfile(file):
            try:
                with open(file, encoding="utf-8-sig") as lines:
                    found[file] = [line.rstrip("\n") for line in lines if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{file}: cannot be read ({error}); the name of one class per line, in UTF-8, is expected"
                ) from None
    for file, names in found.items():
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if not names or twice is not None:
            what = "holds no names" if not names else f"names '{twice}' twice"
            raise UserError(
                f"{file} {what}; the name of one class per line, in the order of the numbers, is expected"
            )
    different = [file for file, names in found.items() if names != next(iter(found.values()))]
    if different:
        raise UserError(
            f"{different[0]} and {next(iter(found))} name other classes: these shards do not belong together"
        )
    return next(iter(found.values()), None)

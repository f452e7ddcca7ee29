"""Tar shards in WebDataset's layout, read at random: which images are in them, where each begins, and its label.

A shard is an uncompressed tar file. Its members come in samples: neighbors whose names
agree up to the first dot of the file name; what follows is the kind (`000012.jpg`,
`000012.cls`). A shard is read through once for an index of its images (offset, size,
label), which is kept beside it; then an image is one read at a known place. So a data
set of shards is a map from index to image like a folder, and a run over it resumes, and
is shared by processes, as exactly (docs/data.md says why).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import glob
import io
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from data_pipeline.image_formats import open_regular
from errors import UserError

BLOCK = tarfile.BLOCKSIZE  # a header of a tar file, 512 bytes
CLASS_NAMES = "classes.txt"  # beside labeled shards: the name of class 0, 1, ..., one a line
INDEX = ".index.npz"  # behind the shard's name
INDEX_VERSION = 2
MOST_LABEL = 999_999  # a classifier of more classes is rather a wrong number
OPEN_FILES = 64


class Member(NamedTuple):
    """An image in a shard."""

    shard: str
    offset: int  # of its first byte
    size: int

    def read(self) -> io.BytesIO:
        """Its bytes; OSError where the shard has become shorter."""
        # moves no position: processes may share it
        content = os.pread(_opened(self.shard).fileno(), self.size, self.offset)
        if len(content) < self.size:
            raise OSError(f"the shard ends {self.size - len(content)} bytes too early")
        return io.BytesIO(content)

    def __str__(self) -> str:
        """shard/name, for messages: the name is read from the header before the image."""
        try:
            header = os.pread(_opened(self.shard).fileno(), BLOCK, self.offset - BLOCK)
            return f"{self.shard}/{tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name}"
        except (OSError, tarfile.TarError):
            return f"{self.shard} at byte {self.offset}"


@functools.lru_cache(maxsize=OPEN_FILES)
def _opened(path: str) -> io.FileIO:
    """Kept open: with a file opened for each image, the disk would be asked for the name
    as often as in a folder.
    """
    return io.FileIO(path)


class Members(Sequence[tuple[Member, int | None]]):
    """(image, label or None) of all shards in their order; arrays, since a list of a
    million would burden every process.
    """

    def __init__(
        self,
        paths: Sequence[str],
        shard: np.ndarray,
        places: np.ndarray,
        labels: np.ndarray | None,
        left_out: int = 0,
    ) -> None:
        self.paths = paths
        self.shard = shard  # (n,) which of `paths`, rising
        self.places = places  # (n, 2) offset and size
        self.labels = labels  # (n,) or None
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
        return Members(self.paths, self.shard[chosen], self.places[chosen], labels)

    def with_labels(self, labels: np.ndarray | None) -> Members:
        return Members(self.paths, self.shard, self.places, labels)

    def sizes(self) -> list[int]:
        """Images of each shard that has any: neighbors in the order of the indices."""
        return np.unique(self.shard, return_counts=True)[1].tolist()


# ── Which shards ──


def find_shards(pattern: str, flag: str) -> list[str]:
    """The files that `pattern` names: braces (`{000000..000146}`, `{a,b}`), `*`, a folder
    of .tar files, or several of these with `::` between them (WebDataset's notation).
    UserError: missing, compressed, remote, named twice.
    """
    paths: list[str] = []
    for part in pattern.split("::"):
        if part.startswith("pipe:") or "://" in part:
            raise UserError(
                f"{flag} {part}: shards are read from disks only, since their images are read at "
                "random; copy them to a folder "
                "first"
            )
        paths += _expanded(part, flag)
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{flag} {pattern}: {missing[0]}{others} of {len(paths)} shards "
            f"{'are' if others else 'is'} missing"
        )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"{flag} {pattern}: {twice} is named twice; its images would be read twice an epoch")
    compressed = [path for path in paths if path.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst"))]
    if compressed:
        raise UserError(
            f"{flag}: {compressed[0]} is compressed and cannot be read at random: unpack it to a .tar first"
        )
    return paths


def _expanded(part: str, flag: str) -> list[str]:
    if os.path.isdir(part):
        found = sorted(glob.glob(os.path.join(glob.escape(part), "*.tar")))
        if not found:
            raise UserError(
                f"{flag} {part}: no .tar files in this folder (scripts/make_shards.py writes them)"
            )
        return found
    from webdataset.shardlists import expand_urls  # here, for it is slow to import and few runs read shards

    try:
        paths: list[str] = expand_urls(part)
    except ValueError as error:  # braceexpand's UnbalancedBracesError
        raise UserError(
            f"{flag} {part}: {error}; ranges are written {{000000..000146}}, lists {{a,b}}"
        ) from None
    found = []
    for path in paths:
        matches = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.isfile(path) else [path]
        if not matches:
            raise UserError(f"{flag} {part}: no file is called {path}")
        found += matches
    return found


# ── What is in them ──


class Index(NamedTuple):
    """The images of one shard. Arrays of one length."""

    places: np.ndarray  # (n, 2) int64: offset and size
    labels: np.ndarray  # (n,) int64; -1 without label
    left_out: np.ndarray  # (1,) int64: other members whose last ending is an image's


def members_of(paths: Sequence[str], extensions: Sequence[str], flag: str) -> Members:
    """All images of the shards, with labels if every one has a label. UserError for shards that cannot be used.

    Several at once: reading a shard through is waiting for the disk.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        indices = list(pool.map(lambda path: index_of(path, extensions, flag), paths))
    shard = np.repeat(np.arange(len(paths), dtype=np.int32), [len(index.labels) for index in indices])
    places = np.concatenate([index.places for index in indices])
    labels = np.concatenate([index.labels for index in indices])
    if len(labels) == 0:
        raise UserError(
            f"{flag}: no images in these {len(paths)} shards (accepted: {' '.join(extensions)}, "
            "behind the first dot of a name)"
        )
    labeled = labels >= 0
    if labeled.any() and not labeled.all():
        first = Member(paths[shard[labeled.argmin()]], *places[labeled.argmin()].tolist())
        raise UserError(f"{flag}: {first} has no label (.cls), others have one; label all images or none")
    left_out = int(sum(index.left_out.sum() for index in indices))
    return Members(paths, shard, places, labels if labeled.all() else None, left_out)


def index_of(path: str, extensions: Sequence[str], flag: str = "--data_path") -> Index:
    """From the file beside the shard where it fits, else from the shard, which is read through; then it is kept."""
    try:
        kept = _kept_index(path, extensions)
        if kept is not None:
            return kept
        index = scan(path, extensions)
    except (OSError, tarfile.TarError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag}: {path} is no whole tar file ({reason}); write or copy it again") from None
    with contextlib.suppress(OSError):  # a folder that is not ours to write to: the next run scans again
        keep_index(path, extensions, index)
    return index


def scan(path: str, extensions: Sequence[str]) -> Index:
    """Read a shard's headers. The first image of a sample counts."""
    places: list[tuple[int, int]] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        end = os.fstat(file.fileno()).st_size
        for image, label in _samples(tar, extensions, left_out):
            if label is not None:
                labels.append(_number(tar, label, path))
            else:
                labels.append(-1)
            if image.offset_data + image.size > end:
                raise tarfile.ReadError(f"it ends within {image.name}")
            places.append((image.offset_data, image.size))
        file.seek(max(0, end - BLOCK))
        # cut between two members it would pass for a smaller shard
        if end % BLOCK or file.read().strip(b"\0"):
            raise tarfile.ReadError("it ends without the mark of an end")
    images = np.array([left_out.total()], dtype=np.int64)
    return Index(np.array(places, dtype=np.int64).reshape(-1, 2), np.array(labels, dtype=np.int64), images)


def _samples(
    tar: tarfile.TarFile, extensions: Sequence[str], left_out: Counter[str]
) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """(image, label) of each sample that has an image; further images are counted in `left_out`."""
    key, image, label = None, None, None
    for member in tar:
        folder, name = os.path.split(member.name)
        stem, _, kind = name.partition(".")
        if not member.isfile() or not stem:
            continue
        if (folder, stem) != key:
            if image is not None:
                yield image, label
            key, image, label = (folder, stem), None, None
        if "." + kind.lower() in extensions and image is None:
            image = member
        elif kind == "cls":
            label = member
        elif kind.lower().endswith(tuple(extensions)) or "." + kind.lower() in extensions:
            left_out[kind] += 1
    if image is not None:
        yield image, label


def _number(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> int:
    file = tar.extractfile(member)
    text = b"" if file is None else file.read(64)
    if not re.fullmatch(rb"\s*\d{1,20}\s*", text) or int(text) > MOST_LABEL:
        raise UserError(
            f"{path}: {member.name} holds {text[:20]!r}; a class number from 0 to {MOST_LABEL:,} is expected"
        )
    return int(text)


# ── The index beside a shard ──


def keep_index(path: str, extensions: Sequence[str], index: Index) -> None:
    """Write it beside the shard: whole, or not at all."""
    temporary = f"{path}{INDEX}.{os.getpid()}.part"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, mark=_mark(path, index, extensions), **index._asdict())
        os.replace(temporary, path + INDEX)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _kept_index(path: str, extensions: Sequence[str]) -> Index | None:
    """None where there is none, it is another shard's or damaged."""
    try:
        with open_regular(path + INDEX) as file, np.load(file, allow_pickle=False) as kept:
            index = Index(kept["places"], kept["labels"], kept["left_out"])
            return index if np.array_equal(kept["mark"], _mark(path, index, extensions)) else None
    except (
        Exception
    ):  # numpy and zipfile raise nearly anything for broken files; the shard itself is read instead
        return None


def _mark(path: str, index: Index, extensions: Sequence[str]) -> np.ndarray:
    """What tells whether the index is of this shard as it is now: its length and time of
    change, the headers of its first, middle and last image, and the index's own
    content.
    """
    headers = b""
    with open_regular(path) as file:
        for offset, _ in index.places[[0, len(index.places) // 2, -1]].tolist() if len(index.places) else ():
            headers += os.pread(file.fileno(), BLOCK, offset - BLOCK)
        about = os.fstat(file.fileno())
    content = b"".join(column.tobytes() for column in index)
    sums = [zlib.crc32(part) for part in (headers, " ".join(extensions).encode(), content)]
    return np.array([INDEX_VERSION, about.st_size, about.st_mtime_ns, *sums], dtype=np.int64)


# ── Names of classes ──


def class_names(paths: Sequence[str]) -> list[str] | None:
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
                    f"{file}: cannot be read ({error}); the name of one class a line, in UTF-8, is expected"
                ) from None
    for file, names in found.items():
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if not names or twice is not None:
            what = "holds no names" if not names else f"names '{twice}' twice"
            raise UserError(
                f"{file} {what}; the name of one class a line, in the order of the numbers, is expected"
            )
    different = [file for file, names in found.items() if names != next(iter(found.values()))]
    if different:
        raise UserError(
            f"{different[0]} and {next(iter(found))} name other classes: these shards do not belong together"
        )
    return next(iter(found.values()), None)

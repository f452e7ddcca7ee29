"""The index of a tar shard: where its images begin, how long they are, and their
labels.

A shard is read through once for it; then it is kept in a file beside the shard.
"""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.image_formats import open_regular
from errors import UserError

BLOCK = tarfile.BLOCKSIZE  # a header of a tar file, 512 bytes
INDEX = ".index.npz"  # follows the shard's name
INDEX_VERSION = 3
NUMBER = re.compile(r"(\d{8,})_")  # with which scripts/make_shards.py begins a name
MOST_LABEL = 999_999  # a classifier of more classes is rather a wrong number


class Index(NamedTuple):
    """The images of one shard. Arrays of one length."""

    places: np.ndarray  # (n, 2) int64: offset and size
    labels: np.ndarray  # (n,) int64; -1 without label
    left_out: np.ndarray  # (1,) int64: other members whose last ending is an image's
    numbers: np.ndarray  # (n,) int64: which image of the packed folder it was; -1 where the name tells none


def load_index(path: str, extensions: Sequence[str], origin: str = "`data_path`") -> Index:
    """The index in the file beside the shard where it fits; else the shard is read
    through, and the index is kept.
    """
    try:
        kept = _read_kept_index(path, extensions)
        if kept is not None:
            return kept
        index = scan(path, extensions)
    except (OSError, tarfile.TarError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{origin}: {path} is not a complete tar file ({reason}); write or copy it again"
        ) from None
    with contextlib.suppress(OSError):  # a folder that is not ours to write to: the next run scans again
        keep_index(path, extensions, index)
    return index


def scan(path: str, extensions: Sequence[str]) -> Index:
    """Read a shard's headers. The first image of a sample counts."""
    places: list[tuple[int, int]] = []
    labels: list[int] = []
    numbers: list[int] = []
    left_out: Counter[str] = Counter()
    with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        end = os.fstat(file.fileno()).st_size
        for image, label in _iterate_samples(tar, extensions, left_out):
            if label is not None:
                labels.append(_read_label(tar, label, path))
            else:
                labels.append(-1)
            if image.offset_data + image.size > end:
                raise tarfile.ReadError(f"it ends within {image.name}")
            places.append((image.offset_data, image.size))
            number = NUMBER.match(os.path.basename(image.name))
            numbers.append(int(number[1][:18]) if number else -1)
        file.seek(max(0, end - BLOCK))
        # cut between two members it would pass for a smaller shard
        if end % BLOCK or file.read().strip(b"\0"):
            raise tarfile.ReadError("it ends without the mark of an end")
    images = np.array([left_out.total()], dtype=np.int64)
    columns = (np.array(column, dtype=np.int64) for column in (labels, numbers))
    return Index(np.array(places, dtype=np.int64).reshape(-1, 2), next(columns), images, next(columns))


def _iterate_samples(
    tar: tarfile.TarFile, extensions: Sequence[str], left_out: Counter[str]
) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """(image, label) of each sample that has an image; further images are counted in
    `left_out`.
    """
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


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> int:
    file = tar.extractfile(member)
    text = b"" if file is None else file.read(64)
    if not re.fullmatch(rb"\s*\d{1,20}\s*", text) or int(text) > MOST_LABEL:
        raise UserError(
            f"{path}: {member.name} holds {text[:20]!r}; a class number from 0 to {MOST_LABEL:,} is expected"
        )
    return int(text)


def keep_index(path: str, extensions: Sequence[str], index: Index) -> None:
    """Write the index beside the shard, atomically."""
    temporary = f"{path}{INDEX}.{os.getpid()}.part"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, mark=_compute_mark(path, index, extensions), **index._asdict())
        os.replace(temporary, path + INDEX)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _read_kept_index(path: str, extensions: Sequence[str]) -> Index | None:
    """The index beside the shard; None where there is none, or it is another shard's or
    damaged.
    """
    try:
        with open_regular(path + INDEX) as file, np.load(file, allow_pickle=False) as kept:
            index = Index(*(kept[name] for name in Index._fields))
            return index if np.array_equal(kept["mark"], _compute_mark(path, index, extensions)) else None
    except (
        Exception
    ):  # numpy and zipfile raise nearly anything for broken files; the shard itself is read instead
        return None


def _compute_mark(path: str, index: Index, extensions: Sequence[str]) -> np.ndarray:
    """What tells whether the index is of this shard as it is now: its length and time
    of change, the headers of its first, middle and last image, and the index's own
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

"""Codes that a tokenizer gave, kept in files, so that a later epoch with the same crops
need not run it (`crop_cycle`).

A folder holds about.json, which says of what the codes are, and one file for each of the
K crops of an image, crop-0000.npy and so on: a row for each image, its N codes and a
checksum. np.load(file)["codes"] reads them.

A row counts as there only when its checksum agrees: it covers the codes, the image's
index and the file that was shown in its place, should it not decode. So a row that was
cut short by a kill or a power failure, one that was never written (files are made
sparse) and one of a file that was unreadable then are all missing, whatever the order
in which a file system writes. `flush` makes what was written last.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from errors import UserError
from runtime.terminal import format_size, log

ABOUT = "about.json"
LARGEST_SHORT = 1 << 16  # codes that two bytes hold


class Row(NamedTuple):
    """Where the codes of one view are: crop `number` of image `image`; `shown`: the index
    of the file that it is of, another one where that image does not decode.
    """

    number: int
    image: int
    shown: int


class CodeCache:
    """The codes of `crops` views of each of `images` images, of `patches` patches each.

    Any number of processes may read while each writes rows of its own. A process opens
    the files for itself: a copy of this object in a data process reads what all write.
    """

    def __init__(self, folder: str | Path, crops: int, images: int, patches: int, n_codes: int) -> None:
        self.folder, self.crops, self.images = Path(folder), crops, images
        code = "<u2" if n_codes <= LARGEST_SHORT else "<i4"
        self.row = np.dtype([("codes", code, (patches,)), ("checksum", "<u4")])
        self.header = npy_header(self.row, images)
        self.file_size = len(self.header) + images * self.row.itemsize
        self.size = crops * self.file_size
        self.mapped: dict[int, np.ndarray] = {}
        self.written: dict[int, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"mapped": {}, "written": {}}

    def path(self, number: int) -> Path:
        return self.folder / f"crop-{number:04d}.npy"

    # ── Making it ──

    def prepare(self, about: Mapping[str, Any]) -> None:
        """Make the files that are missing, in one process before any other reads. Says how
        large they become.

        `about`: all that the codes depend on, as plain data; UserError where the folder
        holds codes of something else, or the disk has no room.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.require_same(about)
            self.require_room()
            for number in range(self.crops):
                path = self.path(number)
                if not path.exists():
                    with new_file(path) as file:
                        file.write(self.header)
                        file.truncate(self.file_size)
                self.check_file(path)
        except OSError as error:
            raise UserError(f"{self.folder}: codes cannot be kept there ({error.strerror})") from None

    def require_same(self, about: Mapping[str, Any]) -> None:
        """about.json is there and says the same as `about`; it is written first, so that no
        file is without it.
        """
        path = self.folder / ABOUT
        again = f"remove {self.folder} to have the codes made anew"
        if not path.exists():
            if any(self.folder.glob("crop-*.npy")):
                raise UserError(f"{self.folder} holds codes without {ABOUT}, which says of what: {again}")
            with new_file(path) as file:
                file.write((json.dumps(about, indent=1) + "\n").encode())
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differences = [name for name in about if found.get(name) != json.loads(json.dumps(about[name]))]
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"{path} is damaged: {again}") from None
        if differences:
            told = ", ".join(f"{name} {found.get(name)}, here {about[name]}" for name in differences)
            raise UserError(
                f"{self.folder} holds codes of something else ({told}): {again}, or go on as before"
            )

    def require_room(self) -> None:
        # st_blocks: what a sparse file takes; where it is not told, all is still needed
        there = sum(
            min(self.file_size, getattr(self.path(number).stat(), "st_blocks", 0) * 512)
            for number in range(self.crops)
            if self.path(number).exists()
        )
        free = shutil.disk_usage(self.folder).free
        if self.size - there > free:
            size, missing = format_size(self.size), format_size(self.size - there)
            raise UserError(
                f"`crop_cycle` {self.crops}: the codes of {self.images:,} images take {size} in "
                f"{self.folder}, {missing} of them are still to be written, and the "
                f"disk has {format_size(free)}: take fewer crops, or make room"
            )
        log.info(
            f"codes      of {self.crops} crops of each image: {format_size(self.size)} in {self.folder}, "
            f"{format_size(there)} of them are there, {format_size(free)} are free"
        )

    def check_file(self, path: Path) -> None:
        with open(path, "rb") as file:
            same = file.read(len(self.header)) == self.header
        if not same or path.stat().st_size != self.file_size:
            raise UserError(f"{path} is damaged: remove it to have its codes made anew")

    # ── Reading and writing rows ──

    def rows(self, number: int) -> np.ndarray:
        """The file of a crop, mapped into memory: (images,) of codes and checksum."""
        if number not in self.mapped:
            self.mapped[number] = np.load(self.path(number), mmap_mode="r")
        return self.mapped[number]

    def reopen(self) -> None:
        """What is read from here on is what other machines have flushed, too."""
        self.mapped = {}

    def lacks(self, number: int, images: Sequence[int]) -> bool:
        """Whether one of these images has no row, be it of another file; `read` tells."""
        return not self.rows(number)["checksum"][images].all()

    def read(self, row: Row) -> np.ndarray | None:
        """The codes (N,) of a view; None where they are missing."""
        stored = self.rows(row.number)[row.image]
        codes, found = stored["codes"], int(stored["checksum"])
        return codes.copy() if found and found == checksum(codes, row) else None

    def write(self, row: Row, codes: np.ndarray) -> None:
        """Keep the codes (N,) of a view, whatever was there."""
        content = np.zeros((), self.row)
        content["codes"] = codes
        content["checksum"] = checksum(content["codes"], row)
        # Written, not through the map: on a full disk that ends the process, and of two
        # machines' rows in one page of memory the last would win.
        if row.number not in self.written:
            self.written[row.number] = open(self.path(row.number), "r+b", buffering=0)  # noqa: SIM115
        file, rest = self.written[row.number], memoryview(content.tobytes())
        file.seek(len(self.header) + row.image * self.row.itemsize)
        while rest:
            rest = rest[file.write(rest) :]

    def flush(self) -> None:
        """What this process wrote is on the disk, and for others to see."""
        for file in self.written.values():
            os.fsync(file.fileno())
            file.close()
        self.written = {}


def checksum(codes: np.ndarray, row: Row) -> int:
    """Above 0, which stands for a row that was never written."""
    return zlib.crc32(codes.tobytes(), zlib.crc32(struct.pack("<qq", row.image, row.shown))) or 1


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Has its name only once all of it is there."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def npy_header(row: np.dtype, images: int) -> bytes:
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(row), "fortran_order": False, "shape": (images,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()

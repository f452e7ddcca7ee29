"""Files of features: each process writes its share, the first joins them.

- .npy: float32 (images, C), or (images, N, C) of patch tokens, and beside it
  .paths.txt, one path per line in the same order;
- .parquet: columns `path` and `feature`, a list of C numbers, or N lists of them.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from checkpoint_io.checkpoints import PART
from errors import UserError
from runtime import distributed
from runtime.terminal import log

ENDINGS = (".npy", ".parquet")
BLOCK_BYTES = 2**26  # read at a time
NAMED = 3  # unreadable files that a message names


def check_output(output: str) -> None:
    """UserError, before any work: no file that could be written."""
    path = Path(output)
    if path.suffix not in ENDINGS:
        raise UserError(f"`output` {output}: the name must end in {' or '.join(ENDINGS)}")
    if path.is_dir():
        raise UserError(f"`output` {output} is a folder: name a file")
    if path.suffix == ".parquet":
        _import_pyarrow()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`output` {output}: its folder cannot be made ({error.strerror})") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"`output` {output}: no permission to write there")


def _import_pyarrow(name: str = "pyarrow") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError("`output`: .parquet needs one more package: pip install pyarrow") from None


class Parts:
    """The shares of `world_size` processes, in order of rank; `failed`: files of this
    rank's share that did not decode, each with the reason.
    """

    def __init__(self, output: str, rank: int, world_size: int) -> None:
        self.output, self.rank, self.world_size = Path(output), rank, world_size
        self.failed: list[str] = []
        self.paths: list[str] = []
        self.shape: tuple[int, ...] = ()  # of one image's features; () without any

    def part(self, rank: int) -> Path:
        return self.output.with_name(f".{self.output.name}.{rank}{PART}")

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.part(self.rank).unlink(missing_ok=True)

    @contextlib.contextmanager
    def open_own(self) -> Iterator[Callable[[Tensor, Sequence[str]], None]]:
        """Open this rank's file; yields add(features (B, ...), their files)."""
        with self.explain_errors(), open(self.part(self.rank), "wb") as file:

            def add(features: Tensor, paths: Sequence[str]) -> None:
                values = features.float().cpu().numpy().astype("<f4")
                self.shape = values.shape[1:]
                file.write(values.tobytes())
                self.paths += paths

            yield add

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"`output` {self.output}: cannot be written ({error.strerror or error}); make room, or name "
                "another place"
            ) from None

    def join(self, root: str) -> None:
        """Write the finished file, on rank 0, with paths relative to `root`; all ranks
        call this together.
        """
        found = distributed.gather_objects((self.paths, self.failed, self.shape))
        paths = [os.path.relpath(path, root) for share, _, _ in found for path in share]
        failed = [text for _, texts, _ in found for text in texts]
        shape = max((shape for _, _, shape in found), key=len)
        named = ", ".join(failed[:NAMED]) + (", ..." if len(failed) > NAMED else "")
        if not paths:
            raise UserError(f"{root}: no image could be read: {named}")
        if distributed.is_main():
            with self.explain_errors():
                (self.write_npy if self.output.suffix == ".npy" else self.write_parquet)(paths, shape)
            if failed:
                log.warning(
                    f"warning: {len(failed)} of {len(paths) + len(failed)} files cannot be read and are left "
                    f"out: {named}"
                )
            size = " x ".join(map(str, (len(paths), *shape)))
            log.info(f"written    {self.output}: {size} numbers of 32 bits")
        distributed.barrier()  # the other ranks keep their files until they are read

    def write_npy(self, paths: Sequence[str], shape: tuple[int, ...]) -> None:
        lists = self.output.with_suffix(".paths.txt")
        broken = next((path for path in paths if len(path.splitlines()) != 1), None)
        if broken is not None:
            raise UserError(
                f"{broken!r}: {lists.name} has a line for each image, and this name has a line break: rename "
                "it, or write a .parquet"
            )
        names, values = (path.with_name(f".{path.name}{PART}") for path in (lists, self.output))
        with open(names, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as text:
            text.writelines(f"{path}\n" for path in paths)
        with open(values, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(paths), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for rank in range(self.world_size):
                with open(self.part(rank), "rb") as part:
                    shutil.copyfileobj(part, file, BLOCK_BYTES)
        os.replace(names, lists)
        os.replace(values, self.output)

    def write_parquet(self, paths: Sequence[str], shape: tuple[int, ...]) -> None:
        pa, parquet = _import_pyarrow(), _import_pyarrow("pyarrow.parquet")
        kind = pa.float32()
        for size in reversed(shape):
            kind = pa.list_(kind, size)
        schema = pa.schema([("path", pa.string()), ("feature", kind)])
        temporary = self.output.with_name(f".{self.output.name}{PART}")
        done = 0
        with parquet.ParquetWriter(temporary, schema) as writer:
            for block in self.read_blocks(shape):
                names = [_as_text(path) for path in paths[done : done + len(block)]]
                values = pa.array(block.ravel())
                for size in reversed(shape):
                    values = pa.FixedSizeListArray.from_arrays(values, size)
                writer.write_table(pa.table([pa.array(names, pa.string()), values], schema))
                done += len(block)
        os.replace(temporary, self.output)

    def read_blocks(self, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """(images, *shape), a few at a time, of all ranks in order."""
        row = 4 * math.prod(shape)
        size = max(1, BLOCK_BYTES // row) * row
        for rank in range(self.world_size):
            with open(self.part(rank), "rb") as file:
                while block := file.read(size):
                    yield np.frombuffer(block, "<f4").reshape(-1, *shape)


def _as_text(path: str) -> str:
    """Parquet takes text alone: bytes of a name that are not UTF-8 are written as
    \\udcXX.
    """
    return path.encode("utf-8", "backslashreplace").decode("utf-8")

"""Reads the files of torch.save and torch.jit.save without torch.load.

torch.load runs a pickle, which is a program and may call anything. Here nothing that a
file names is called, and every length is compared with the size of the file before
memory is allocated for it.

A file is a zip archive (since torch 1.6) or a stream of pickles (before). In both, a
pickle describes the content and the bytes of the tensors lie beside it. The pickle is
run by `pickle_interpreter`, which can build plain data and tensors and nothing else. A
TorchScript archive is read the same way, as the attributes of its modules; its code is
ignored. zip compares a checksum of every part that is read.
"""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from checkpoint_io.pickle_builders import DamagedFile, Dtype, Name, PickledObject, Storage, UnsupportedFile
from checkpoint_io.pickle_interpreter import MARK, Interpreter

MAX_PICKLE_BYTES = 1 << 26  # the pickle of a checkpoint of the giant model has less than 1 MiB
MAX_DEPTH = 64  # containers within containers
MAX_ITEMS = 5_000_000  # of all containers, counted once for each place they stand in
MAX_COMPRESSION = 100  # unpacked bytes for each byte of the file; weights compress to a half at best
# the first pickle of files before torch 1.6, in bytes or (protocols 0, 1) in digits
MAGIC = 0x1950A86A20F9469CFC6C
MAGICS = (MAGIC.to_bytes(10, "little"), str(MAGIC).encode())
# what the readers of zip archives and pickles raise for content that is damaged
DAMAGE = (
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,  # NotImplementedError and RecursionError too
    AssertionError,
)


def load(path: Path, objects: Collection[str] = ()) -> Any:
    """Nested dictionaries and lists of plain data and tensors, on the CPU.

    A TorchScript archive gives its state dict.

    Args:
        path: A file of torch.save or torch.jit.save.
        objects: Names of classes (module.name) whose instances are read as
            `PickledObject`: their attributes, without their code.

    Raises:
        UnsupportedFile: The file is not read; the message says why.
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(64)
        try:
            archive = zipfile.is_zipfile(file)
            file.seek(0)
            if archive:
                return _load_archive(file, os.fstat(file.fileno()).st_size, objects)
            if any(magic in start for magic in MAGICS):
                return _load_stream(file, os.fstat(file.fileno()).st_size, objects)
        except UnsupportedFile:
            raise
        except DAMAGE as error:
            why = (str(error).strip().splitlines() or [""])[0][:100]
            raise DamagedFile(f"{type(error).__name__}: {why}") from None
    if start[:1] == b"\x80":
        raise UnsupportedFile(
            "it is a pickle that torch.save did not write, and is not opened: save its weights with "
            "torch.save"
        )
    raise DamagedFile("it is empty" if not start else "it begins as no such file does")


# ── The two containers ──


def _load_archive(file: IO[bytes], size: int, objects: Collection[str]) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        _check_records(archive, records, size)
        pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
        if not pickles:
            raise DamagedFile(
                f"it is a zip archive of other files, such as {next(iter(records), 'none at all')}"
            )
        name = min(pickles, key=len)
        prefix = name.removesuffix("data.pkl")
        if records[name].file_size > MAX_PICKLE_BYTES:
            raise UnsupportedFile(
                f"its pickle has {records[name].file_size:,} bytes, more than any checkpoint's"
            )
        if prefix + "byteorder" in records and archive.read(prefix + "byteorder") != b"little":
            raise UnsupportedFile(
                "it was written on a big-endian machine: save it again on a little-endian one"
            )

        def read(key: Any, length: int) -> bytearray:
            record = f"{prefix}data/{key}"
            if record not in records:
                raise DamagedFile(f"{record} is missing in it")
            if records[record].file_size != length:
                raise DamagedFile(f"{record} has {records[record].file_size:,} bytes instead of {length:,}")
            return bytearray(archive.read(record))  # compares the checksum

        script = any(
            each == f"{prefix}constants.pkl" or each.startswith(f"{prefix}code/") for each in records
        )
        content = _check_nesting(Interpreter(archive.read(name), read, objects, script).run())
        return _read_script_state_dict(content) if script else content


def _check_records(archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo], size: int) -> None:
    if len(records) != len(archive.infolist()):
        raise UnsupportedFile("two parts of it have the same name")
    if any(info.flag_bits & 1 for info in records.values()):
        raise UnsupportedFile("it is encrypted: decrypt it first")
    unpacked = sum(info.file_size for info in records.values())
    if unpacked > max(1 << 30, MAX_COMPRESSION * size):
        raise UnsupportedFile(f"it has {size:,} bytes and would unpack to {unpacked:,}")


def _load_stream(file: IO[bytes], size: int, objects: Collection[str]) -> Any:
    """The format before torch 1.6: five pickles, then the storages in the order of the
    last pickle. It has no checksums.
    """
    left, storages = size, dict[str, bytearray]()

    def reserve(key: Any, length: int) -> bytearray:
        """Memory that is filled below: the storages come after the pickle that names
        them.
        """
        nonlocal left
        if key not in storages:
            left -= length
            if left < 0:
                raise DamagedFile("its tensors would be larger than the file")
            storages[key] = bytearray(length)
        if len(storages[key]) != length:
            raise DamagedFile(f"storage {key} has two lengths")
        return storages[key]

    for _ in range(3):  # the magic number, the version, the writer's byte order and sizes
        before = Interpreter(file, reserve, ()).run()
    if isinstance(before, dict) and before.get("little_endian") is False:
        raise UnsupportedFile("it was written on a big-endian machine: save it again on a little-endian one")
    interpreter = Interpreter(file, reserve, objects)
    content = _check_nesting(interpreter.run())
    keys = Interpreter(file, reserve, ()).run()
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise DamagedFile("its list of storages does not fit its tensors")
    for key in keys:
        elements = int.from_bytes(file.read(8), "little")
        if elements * interpreter.element_sizes[key] != len(storages[key]):
            raise DamagedFile(f"storage {key} has another length than its tensors")
        if file.readinto(storages[key]) != len(storages[key]):  # type: ignore[attr-defined]
            raise DamagedFile("it ends within its tensors")
    return content


def _read_script_state_dict(root: Any) -> dict[str, Tensor]:
    """The tensors of a TorchScript module and of the modules in it, by name."""
    found: dict[str, Tensor] = {}
    waiting, seen = [("", root)], set[int]()
    while waiting:
        prefix, node = waiting.pop()
        if not isinstance(node, PickledObject) or id(node) in seen:
            continue
        seen.add(id(node))
        for name, value in vars(node).items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            waiting.append((f"{prefix}{name}.", value))
    if not found:
        raise UnsupportedFile(
            "a TorchScript archive whose tensors only its own code could name, and that code is not run: "
            "where you trust it, save its weights with torch.save(torch.jit.load(FILE).state_dict(), "
            "'weights.pth')"
        )
    return found


# ── The content ──


def _check_nesting(content: Any) -> Any:
    """`content`, if it can be walked through: no container holds itself, none is too
    deep, and there are not too many items.

    A list that stands in two places counts twice. Otherwise ten lists, each with ten
    references to the next, would be small here and too large for any caller that copies
    them.
    """
    count, levels = 0, [iter((content,))]
    while levels:
        item = next(levels[-1], levels)
        if item is levels:
            levels.pop()
            continue
        count += 1
        if count > MAX_ITEMS:
            raise UnsupportedFile(f"it holds more than {MAX_ITEMS:,} items")
        inside = _iterate_items(item)
        if inside is not None:
            levels.append(inside)
            if len(levels) > MAX_DEPTH:
                raise UnsupportedFile(f"its containers are nested more than {MAX_DEPTH} deep")
        elif item is MARK or isinstance(item, (Name, Storage, Dtype)):
            raise DamagedFile(f"it holds a bare {type(item).__name__.lower()}")
    return content


def _iterate_items(item: Any) -> Iterator[Any] | None:
    if isinstance(item, (Name, Storage)):
        return None
    if isinstance(item, dict):
        return iter(item.values())
    if isinstance(item, (argparse.Namespace, PickledObject)):
        return iter(vars(item).values())
    return iter(item) if isinstance(item, (list, tuple, set)) else None

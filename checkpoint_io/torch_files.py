"""Files of torch.save and torch.jit.save, read without torch.load: nothing in a file is
called, and every byte is checked.

A file is a zip archive (since torch 1.6) or a stream (before); in both, a pickle
describes the content, and the bytes of the tensors lie beside it. The pickle is a
program. Here a small interpreter runs it that knows how to build plain data and
tensors, and nothing else: a name that is not in its tables ends the reading. A
TorchScript archive is read the same way, as the attributes of its modules; its code is
left alone. Sizes, strides and lengths are compared with what the file holds before
memory is taken for them, and zip's checksum of every part that is read must fit.
"""

from __future__ import annotations

import argparse
import math
import os
import pickletools
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_PICKLE_BYTES = 1 << 26  # bytes; that of a checkpoint of the giant model has less than one MiB
MAX_OPCODES = 5_000_000  # of the pickle's program; some seconds
MAX_DEPTH = 64  # containers within containers
MAX_ITEMS = 5_000_000  # of all containers, counted once for each place they stand in
MAX_COMPRESSION = 100  # bytes read for a byte on the disk; tensors of weights compress to a half at best
# the first pickle of files before torch 1.6, in bytes or (protocols 0, 1) in digits
MAGIC = 0x1950A86A20F9469CFC6C
MAGICS = (MAGIC.to_bytes(10, "little"), str(MAGIC).encode())

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
        "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )
}  # fmt: skip
NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # of numpy 1 and 2
PATHS = tuple(f"{module}.{name}" for module in ("pathlib", "pathlib._local")
              for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"))  # fmt: skip
KINDS_OF_TENSOR = {  # part of the name of the function that would build it -> what it is
    "sparse": "a sparse tensor",
    "qtensor": "a quantized tensor",
    "meta_tensor": "a tensor without values (on the meta device)",
    "nested": "a nested tensor",
    "wrapper_subclass": "a tensor of a class of its own",
    "dtensor": "a sharded tensor",
}


class UnsupportedFile(Exception):
    """Why a file is not read, as the end of a sentence that begins with its name."""


class DamagedFile(UnsupportedFile):
    """The file is cut off, altered, or none that torch writes."""


class CodeInFile(UnsupportedFile):
    """It names a class or function of Python, which `torch.load` would have called."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it holds Python objects ({name[:100]})")
        self.name = name[:100]


class PickledObject:
    """What an object of a class becomes that the caller allows, or of a TorchScript
    module: its attributes, no code.
    """

    def __init__(self, name: str = "") -> None:
        self.class_name = name


class Name(NamedTuple):
    """A class or function as the pickle names it, module.name. Never looked up."""

    text: str


class Dtype:
    """A numpy dtype under construction."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="


class Storage(NamedTuple):
    """The memory behind tensors: its bytes, and the dtype of its elements; None: of each tensor on it."""

    content: bytearray
    dtype: torch.dtype | None


def load(path: Path, objects: Collection[str] = ()) -> Any:
    """What `path` holds: nested dictionaries and lists of plain data and tensors, on the CPU.

    `objects`: names of classes (module.name) whose instances are read as
    `PickledObject`. A TorchScript archive gives its state dict. UnsupportedFile: with the
    reason; OSError: the file cannot be read.
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
        except (zipfile.BadZipFile, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
                UnicodeError, RuntimeError, NotImplementedError, RecursionError, AssertionError) as error:  # fmt: skip
            why = (str(error).strip().splitlines() or [""])[0][:100]
            raise DamagedFile(f"{type(error).__name__}: {why}") from None
    if start[:1] == b"\x80":
        raise UnsupportedFile(
            "it is a pickle that torch.save did not write, and is not opened: save its "
            "weights with torch.save"
        )
    raise DamagedFile("it is empty" if not start else "it begins as no such file does")


# ── The two kinds of file ──


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
        return _script_state_dict(content) if script else content


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
    last one. It has no checksums.
    """
    left, storages = size, dict[str, bytearray]()

    def reserve(key: Any, length: int) -> bytearray:
        """Filled below: the storages come after the pickle that names them."""
        nonlocal left
        if key not in storages:
            left -= length
            if left < 0:
                raise DamagedFile("its tensors would be larger than the file")
            storages[key] = bytearray(length)
        if len(storages[key]) != length:
            raise DamagedFile(f"storage {key} has two lengths")
        return storages[key]

    for _ in range(3):  # a magic number, the version, the writer's byte order and sizes
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


def _script_state_dict(root: Any) -> dict[str, Tensor]:
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
            "a TorchScript archive whose tensors only its own code could name, and that code is not "
            "run: where you trust it, "
            "save its weights with torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
        )
    return found


# ── The interpreter of pickles ──

MARK = object()  # on the stack, where the items of a container begin


class Interpreter:
    """Runs one pickle. `read(key, bytes)` gives the content of a storage; `objects`:
    classes read as PickledObject; `script`: those of TorchScript too. `run` gives the
    one object that the pickle describes.
    """

    def __init__(
        self,
        pickle: bytes | IO[bytes],
        read: Callable[[Any, int], bytearray],
        objects: Collection[str],
        script: bool = False,
    ) -> None:
        self.pickle, self.read, self.objects, self.script = pickle, read, objects, script
        self.steps = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[Any, Storage] = {}
        self.element_sizes: dict[Any, int] = {}

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self.pickle):
            self.spend(1)
            name = opcode.name
            if name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in LITERALS:
                self.stack.append(argument)
            elif name in OPCODES:
                OPCODES[name](self, argument)
            elif name == "STOP":
                return self.stack.pop()
            elif name == "PERSID":
                raise UnsupportedFile(
                    "it was saved with pickle_protocol=0, which writes storages as text: "
                    "save it again without that"
                )
            elif name not in ("PROTO", "FRAME"):
                raise UnsupportedFile(f"its pickle has the step {name}, which no checkpoint needs")
        raise DamagedFile("its pickle has no end")

    def spend(self, steps: int) -> None:
        """A copy costs as many steps as it has items: a short program could otherwise copy a long list for ever."""
        self.steps += steps
        if self.steps > MAX_OPCODES:
            raise UnsupportedFile(f"its pickle takes more than {MAX_OPCODES:,} steps")

    def pop_mark(self) -> list[Any]:
        """Taken from the stack: what lies above the last mark."""
        index = len(self.stack) - 1
        while self.stack[index] is not MARK:
            index -= 1
            if index < 0:
                raise DamagedFile("its pickle has no mark where it needs one")
        items = self.stack[index + 1 :]
        del self.stack[index:]
        return items

    def collect(self, make: Callable[[list[Any]], Any]) -> None:
        self.stack.append(make(self.pop_mark()))

    def push_tuple(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        if len(items) < count:
            raise DamagedFile("its pickle takes more than there is")
        self.stack.append(items)

    def extend(self, kind: type, pairs: bool = False) -> None:
        """Items above the mark into the container below it."""
        items = self.pop_mark()
        target = self.top(kind)
        if pairs:
            target.update(_build_dict(self, list(zip(items[::2], items[1::2], strict=True))))
        elif kind is list:
            target.extend(items)
        else:
            target.update(_build_set(self, items))

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise DamagedFile(f"its pickle puts items into a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.top(dict)[_check_key(key)] = value

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        self.top(list).append(value)

    def remember(self, slot: int | None) -> None:
        self.memo[len(self.memo) if slot is None else int(slot)] = self.stack[-1]

    def push_name(self, text: str) -> None:
        self.stack.append(self.resolve_name(text.replace(" ", ".")))

    def push_stacked_name(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise DamagedFile("its pickle names a class by something else than text")
        self.push_name(f"{module}.{name}")

    def resolve_name(self, text: str) -> Any:
        """What a name stands for: a dtype is one, a class or function waits to be called, if it is one we know."""
        if text in DTYPES:
            return DTYPES[text]
        storage = text.removeprefix("torch.storage.").removeprefix("torch.").removeprefix("cuda.")
        known = text in BUILDERS or storage in STORAGES or storage in ("UntypedStorage", "TypedStorage")
        if (
            known
            or text in HARMLESS
            or text in self.objects
            or (self.script and text.startswith("__torch__."))
        ):
            return Name(text)
        kind = next(
            (kind for part, kind in KINDS_OF_TENSOR.items() if text.startswith("torch.") and part in text),
            None,
        )
        if kind:
            raise UnsupportedFile(
                f"it holds {kind}; save plain tensors (.to_dense(), .dequantize(), .full_tensor())"
            )
        raise CodeInFile(text)

    def call(self, _: Any) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise DamagedFile("its pickle calls something that is no class or function")
        if name.text in BUILDERS:
            self.spend(
                sum(len(each) for each in arguments if isinstance(each, (str, bytes, list, tuple, dict, set)))
            )
            self.stack.append(BUILDERS[name.text](self, *arguments))
        else:
            self.stack.append(self.new_object(name, arguments))

    def new_object(self, name: Any, arguments: tuple[Any, ...]) -> Any:
        """An instance without content yet, which comes with `build`."""
        if isinstance(name, Name) and name.text == "argparse.Namespace" and not arguments:
            return argparse.Namespace()
        ours = isinstance(name, Name) and (name.text in self.objects or name.text.startswith("__torch__."))
        if not ours or arguments:
            raise CodeInFile(f"{name.text if isinstance(name, Name) else type(name).__name__}")
        return PickledObject(name.text)

    def build(self, _: Any) -> None:
        """The state of an object: the attributes of ours and of a Namespace; a dtype's
        byte order; of others, nothing.
        """
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, (argparse.Namespace, PickledObject)):
            parts = state if isinstance(state, tuple) else (state,)
            for part in parts:
                self.spend(len(part) if isinstance(part, dict) else 1)
                if isinstance(part, dict) and all(isinstance(key, str) for key in part):
                    vars(target).update(
                        {key: value for key, value in part.items() if not key.startswith("__")}
                    )
        elif isinstance(target, Dtype):
            if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
                raise DamagedFile("a number's type has a state of no number")
            if any(part not in (None, -1, 0) for part in state[2:]):
                raise CodeInFile(f"a numpy dtype {target.code} with fields")
            target.order = state[1]
        elif not isinstance(
            target, (dict, Tensor)
        ):  # an OrderedDict's attributes (torch's _metadata) say nothing to us
            raise UnsupportedFile(f"its pickle sets the state of a {type(target).__name__}")

    def push_storage(self, identity: Any) -> None:
        """A persistent id: a storage, or (before 1.6) the class of a module beside its source."""
        if not isinstance(identity, tuple) or len(identity) < 2:
            raise DamagedFile("its pickle names a storage in an unknown way")
        if identity[0] == "module" and isinstance(identity[1], Name):
            self.stack.append(identity[1])
            return
        kind, key, elements = identity[1], identity[2], identity[4]
        if identity[0] != "storage" or not isinstance(kind, Name) or not isinstance(key, (str, int)):
            raise DamagedFile("its pickle names a storage in an unknown way")
        if len(identity) > 5 and identity[5] is not None:
            raise UnsupportedFile(
                "its tensors share parts of storages, as only torch before 0.4 wrote them: save it again"
            )
        if not _is_count(elements):
            raise DamagedFile(f"storage {key} has {elements} elements")
        dtype = STORAGES.get(kind.text.rpartition(".")[2])
        size = 1 if dtype is None else dtype.itemsize
        if key not in self.storages:
            self.storages[key], self.element_sizes[key] = (
                Storage(self.read(key, elements * size), dtype),
                size,
            )
        if self.storages[key].dtype != dtype or len(self.storages[key].content) != elements * size:
            raise DamagedFile(f"storage {key} is described in two ways")
        self.stack.append(self.storages[key])

    def push_persistent(self, _: Any) -> None:
        self.push_storage(self.stack.pop())


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


# ── What may be built ──


def _rebuild_tensor(_: Interpreter, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """`rest`: requires_grad, hooks, metadata."""
    return _resolve_view(
        _view_storage(storage, getattr(storage, "dtype", None), offset, size, stride), *rest[2:]
    )


def _rebuild_tensor_v3(
    _: Interpreter, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> Tensor:
    """`rest`: requires_grad, hooks, dtype, metadata."""
    return _resolve_view(_view_storage(storage, rest[2], offset, size, stride), *rest[3:])


def _resolve_view(tensor: Tensor, metadata: Any = None, *rest: Any) -> Tensor:
    """Of views that are negated or conjugated when they are read (`z.conj().imag`), torch
    stores what they are views of.
    """
    for name in metadata or {}:
        if name not in ("neg", "conj") or metadata[name] is not True:
            raise UnsupportedFile(
                f"it holds a tensor with the mark {str(name)[:50]}; save plain tensors (.clone())"
            )
        tensor = tensor.neg() if name == "neg" else tensor.conj().resolve_conj()
    return tensor


def _view_storage(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """A tensor on a storage, if it lies in it and no two of its elements are one."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise DamagedFile("its pickle makes a tensor of something that is no storage")
    shape_and_stride = (size, stride)
    if not all(
        isinstance(each, (tuple, list)) and all(map(_is_count, each)) for each in shape_and_stride
    ) or not _is_count(offset):
        raise DamagedFile("a tensor has sizes or strides that are no whole numbers from 0 up")
    if len(size) != len(stride) or len(size) > MAX_DEPTH:
        raise DamagedFile(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    elements = len(storage.content) // dtype.itemsize
    if math.prod(size) == 0:
        return torch.empty(size, dtype=dtype)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if last >= elements:
        raise DamagedFile(
            f"a tensor of {' x '.join(map(str, size))} reaches beyond its storage of {elements} elements"
        )
    reach = 0  # of the dimensions of smaller strides together
    for step, length in sorted(
        (step, length) for length, step in zip(size, stride, strict=True) if length > 1
    ):
        if step <= reach:
            raise UnsupportedFile(
                f"a tensor of {' x '.join(map(str, size))} whose elements share memory (strides "
                f"{tuple(stride)}): save it "
                "after .contiguous()"
            )
        reach += (length - 1) * step
    whole = torch.frombuffer(storage.content, dtype=dtype)
    return whole.as_strided(tuple(size), tuple(stride), offset)


def _rebuild_parameter(_: Interpreter, data: Any, *rest: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise DamagedFile("its pickle makes a parameter of something that is no tensor")
    return data


def _rebuild_from_type(
    interpreter: Interpreter, function: Any, kind: Any, arguments: Any, *rest: Any
) -> Tensor:
    """A tensor or parameter that had attributes, which are left."""
    if not isinstance(function, Name) or function.text not in TENSORS or not isinstance(arguments, tuple):
        raise UnsupportedFile(
            f"it holds a tensor of a class of its own ({getattr(kind, 'text', kind)}); save plain tensors"
        )
    return TENSORS[function.text](interpreter, *arguments)


def _check_key(item: Any) -> Any:
    """Keys are plain: Python itself would crash at the hash of a tuple in a tuple in a tuple ..."""
    if not isinstance(item, (str, bytes, int, float, type(None), torch.dtype)):
        raise UnsupportedFile(f"it holds a dictionary or set with a {type(item).__name__} as a key")
    return item


def _build_dict(_: Interpreter, items: Any = ()) -> dict[Any, Any]:
    if not isinstance(items, (list, tuple, dict)):
        raise DamagedFile(f"its pickle makes a dictionary of a {type(items).__name__}")
    return {_check_key(key): value for key, value in (items.items() if isinstance(items, dict) else items)}


def _build_defaultdict(interpreter: Interpreter, factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _build_dict(interpreter, items)


def _build_set(_: Interpreter, items: Any = ()) -> set[Any]:
    if not isinstance(items, (list, tuple, set)):
        raise DamagedFile(f"its pickle makes a set of a {type(items).__name__}")
    return {_check_key(item) for item in items}


def _encode_bytes(_: Interpreter, text: str, encoding: str = "latin1") -> bytes:
    """Bytes in protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise CodeInFile("_codecs.encode")
    return text.encode("latin1")


def _build_numpy_dtype(_: Interpreter, code: Any, *rest: Any) -> Dtype:
    """Of numbers alone: a letter for the kind, and the bytes of one."""
    if not isinstance(code, str) or len(code) != 2 or code[0] not in "biufc" or code[1] not in "1248":
        raise CodeInFile(f"a numpy dtype {code if isinstance(code, str) else type(code).__name__}")
    return Dtype(code)


def _build_number(_: Interpreter, dtype: Any, content: Any = b"") -> int | float | complex | bool:
    """A numpy scalar, as Python's number."""
    if not isinstance(dtype, Dtype) or not isinstance(content, bytes):
        raise CodeInFile("a numpy scalar that is no number")
    kind = np.dtype(("<" if dtype.order in "=|" else dtype.order) + dtype.code)
    if len(content) != kind.itemsize:
        raise DamagedFile(f"a number has {len(content)} bytes instead of {kind.itemsize}")
    return np.frombuffer(content, kind)[0].item()


def _join_path(_: Interpreter, *parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise DamagedFile("a path is made of something else than text")
    return "/".join(parts).replace("//", "/")


def _build_device(_: Interpreter, *parts: Any) -> str:
    if not all(isinstance(part, (str, int)) for part in parts):
        raise DamagedFile("a device is named by something else than text and a number")
    return ":".join(map(str, parts))


def _build_tuple(_: Interpreter, items: Any = ()) -> tuple[Any, ...]:
    if not isinstance(items, (list, tuple)):
        raise DamagedFile(f"its pickle makes a tuple of a {type(items).__name__}")
    return tuple(items)


def _return_first(_: Interpreter, value: Any, *rest: Any) -> Any:
    return value


def _build_instance(interpreter: Interpreter, name: Any, *rest: Any) -> Any:
    """copyreg's way to make an object without calling its class."""
    return interpreter.new_object(name, ())


TENSORS: dict[str, Callable[..., Tensor]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
BUILDERS: dict[str, Callable[..., Any]] = {
    **TENSORS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "collections.OrderedDict": _build_dict,
    "collections.Counter": _build_dict,
    "collections.defaultdict": _build_defaultdict,
    **dict.fromkeys(
        ("builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"), _build_set
    ),
    "torch.Size": _build_tuple,
    "torch.device": _build_device,
    "_codecs.encode": _encode_bytes,
    "numpy.dtype": _build_numpy_dtype,
    **{f"{module}.scalar": _build_number for module in NUMPY_MODULES},
    **dict.fromkeys(PATHS, _join_path),
    **dict.fromkeys(("copy_reg._reconstructor", "copyreg._reconstructor"), _build_instance),
    **{
        f"torch.jit._pickle.build_{kind}list": lambda _, items: list(_build_tuple(_, items))
        for kind in ("int", "tensor", "double", "bool")
    },
    "torch.jit._pickle.restore_type_tag": _return_first,
}
PLAIN_CLASSES = ("object", "int", "float", "list", "dict", "set")
# Named beside an object, never called.
HARMLESS: tuple[str, ...] = ("argparse.Namespace", "torch.Tensor", "torch.nn.parameter.Parameter")
HARMLESS += tuple(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in PLAIN_CLASSES)

CONSTANTS: dict[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "MARK": MARK,
}
LITERALS = frozenset((
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
))  # fmt: skip
OPCODES: dict[str, Callable[[Interpreter, Any], Any]] = {
    "EMPTY_DICT": lambda i, _: i.stack.append({}),
    "EMPTY_LIST": lambda i, _: i.stack.append([]),
    "EMPTY_SET": lambda i, _: i.stack.append(set()),
    "POP": lambda i, _: i.stack.pop(),
    "POP_MARK": lambda i, _: i.pop_mark(),
    "DUP": lambda i, _: i.stack.append(i.stack[-1]),
    "TUPLE": lambda i, _: i.collect(tuple),
    "LIST": lambda i, _: i.collect(list),
    "DICT": lambda i, _: i.collect(
        lambda items: _build_dict(i, list(zip(items[::2], items[1::2], strict=True)))
    ),
    "TUPLE1": lambda i, _: i.push_tuple(1),
    "TUPLE2": lambda i, _: i.push_tuple(2),
    "TUPLE3": lambda i, _: i.push_tuple(3),
    "APPEND": Interpreter.append,
    "APPENDS": lambda i, _: i.extend(list),
    "SETITEM": Interpreter.set_item,
    "SETITEMS": lambda i, _: i.extend(dict, pairs=True),
    "ADDITEMS": lambda i, _: i.extend(set),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda i, slot: i.stack.append(i.memo[int(slot)])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Interpreter.remember),
    "GLOBAL": Interpreter.push_name,
    "STACK_GLOBAL": Interpreter.push_stacked_name,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), Interpreter.call),
    "BUILD": Interpreter.build,
    "BINPERSID": Interpreter.push_persistent,
}


# ── What came of it ──


def _check_nesting(content: Any) -> Any:
    """`content`, if it can be walked through: no container in itself, none too deep, not too many items.

    The same list in two places counts twice: ten lists of ten references each to the
    next would otherwise be small here and endless for whoever copies them.
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
        inside = _iterate(item)
        if inside is not None:
            levels.append(inside)
            if len(levels) > MAX_DEPTH:
                raise UnsupportedFile(f"its containers are nested more than {MAX_DEPTH} deep")
        elif item is MARK or isinstance(item, (Name, Storage, Dtype)):
            raise DamagedFile(f"it holds a bare {type(item).__name__.lower()}")
    return content


def _iterate(item: Any) -> Iterator[Any] | None:
    if isinstance(item, (Name, Storage)):
        return None
    if isinstance(item, dict):
        return iter(item.values())
    if isinstance(item, (argparse.Namespace, PickledObject)):
        return iter(vars(item).values())
    return iter(item) if isinstance(item, (list, tuple, set)) else None

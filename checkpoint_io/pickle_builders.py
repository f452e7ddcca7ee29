"""What `pickle_interpreter` may build: tensors, plain data, and a few types that
checkpoints contain beside them.

Sizes, strides and lengths are compared with what the file holds before a tensor is
made. A file whose tensors would overlap, or reach beyond their storage, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_DIMENSIONS = 64  # of a tensor; as many as numpy 2 allows

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
        "complex64", "complex128", "uint16", "uint32", "uint64",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
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
    """A file that is not read. The message ends a sentence that begins with its
    name.
    """


class DamagedFile(UnsupportedFile):
    """A file that is cut off or altered, or that torch did not write."""


class CodeInFile(UnsupportedFile):
    """A file that names a class or function of Python, which torch.load would call."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it holds Python objects ({name[:100]})")
        self.name = name[:100]


class PickledObject:
    """The attributes of an object, without its code: of a class that the caller allows,
    or of a TorchScript module.
    """

    def __init__(self, name: str = "") -> None:
        self.class_name = name


class Name(NamedTuple):
    """A class or function as the pickle names it, module.name. It is never imported."""

    text: str


class Dtype:
    """A numpy dtype, whose byte order comes after it in the pickle."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="


class Storage(NamedTuple):
    """The memory behind tensors. `dtype` is None where each tensor on it has its
    own.
    """

    content: bytearray
    dtype: torch.dtype | None


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """`rest`: requires_grad, hooks, metadata."""
    return _resolve_view(
        _view_storage(storage, getattr(storage, "dtype", None), offset, size, stride), *rest[2:]
    )


def _rebuild_tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """`rest`: requires_grad, hooks, dtype, metadata."""
    return _resolve_view(_view_storage(storage, rest[2], offset, size, stride), *rest[3:])


def _resolve_view(tensor: Tensor, metadata: Any = None, *rest: Any) -> Tensor:
    """Negate or conjugate a tensor that torch saved as a lazy view (`z.conj().imag`):
    the file holds what it is a view of.
    """
    for name in metadata or {}:
        if name not in ("neg", "conj") or metadata[name] is not True:
            raise UnsupportedFile(
                f"it holds a tensor with the mark {str(name)[:50]}; save plain tensors (.clone())"
            )
        tensor = tensor.neg() if name == "neg" else tensor.conj().resolve_conj()
    return tensor


def _view_storage(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """A tensor on a storage, if it lies inside it and no two elements share memory."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise DamagedFile("its pickle makes a tensor of something that is not a storage")
    shape_and_stride = (size, stride)
    if not is_count(offset) or not all(
        isinstance(each, (tuple, list)) and all(map(is_count, each)) for each in shape_and_stride
    ):
        raise DamagedFile("a tensor has sizes or strides that are no whole numbers from 0 up")
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise DamagedFile(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    elements = len(storage.content) // dtype.itemsize
    if math.prod(size) == 0:
        return torch.empty(size, dtype=dtype)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if last >= elements:
        raise DamagedFile(
            f"a tensor of {' x '.join(map(str, size))} reaches beyond its storage of {elements} elements"
        )
    reach = 0  # the largest offset within the dimensions of smaller strides
    for step, length in sorted(
        (step, length) for length, step in zip(size, stride, strict=True) if length > 1
    ):
        if step <= reach:
            raise UnsupportedFile(
                f"a tensor of {' x '.join(map(str, size))} whose elements share memory (strides "
                f"{tuple(stride)}): save it after .contiguous()"
            )
        reach += (length - 1) * step
    whole = torch.frombuffer(storage.content, dtype=dtype)
    return whole.as_strided(tuple(size), tuple(stride), offset)


def _rebuild_parameter(data: Any, *rest: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise DamagedFile("its pickle makes a parameter of something that is not a tensor")
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, *rest: Any) -> Tensor:
    """A tensor or parameter that had attributes, which are left out."""
    if not isinstance(function, Name) or function.text not in TENSORS or not isinstance(arguments, tuple):
        raise UnsupportedFile(
            f"it holds a tensor of a class of its own ({getattr(kind, 'text', kind)}); save plain tensors"
        )
    return TENSORS[function.text](*arguments)


def check_key(item: Any) -> Any:
    """Only plain keys: the hash of deeply nested tuples would overflow Python's
    stack.
    """
    if not isinstance(item, (str, bytes, int, float, type(None), torch.dtype)):
        raise UnsupportedFile(f"it holds a dictionary or set with a {type(item).__name__} as a key")
    return item


def build_dict(items: Any = ()) -> dict[Any, Any]:
    if not isinstance(items, (list, tuple, dict)):
        raise DamagedFile(f"its pickle makes a dictionary of a {type(items).__name__}")
    return {check_key(key): value for key, value in (items.items() if isinstance(items, dict) else items)}


def _build_defaultdict(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return build_dict(items)


def build_set(items: Any = ()) -> set[Any]:
    if not isinstance(items, (list, tuple, set)):
        raise DamagedFile(f"its pickle makes a set of a {type(items).__name__}")
    return {check_key(item) for item in items}


def _encode_bytes(text: str, encoding: str = "latin1") -> bytes:
    """Bytes, as protocol 2 writes them."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise CodeInFile("_codecs.encode")
    return text.encode("latin1")


def _build_numpy_dtype(code: Any, *rest: Any) -> Dtype:
    """The dtype of numbers only. `code`: a letter for the kind, then the bytes of
    each.
    """
    if not isinstance(code, str) or len(code) != 2 or code[0] not in "biufc" or code[1] not in "1248":
        raise CodeInFile(f"a numpy dtype {code if isinstance(code, str) else type(code).__name__}")
    return Dtype(code)


def _build_number(dtype: Any, content: Any = b"") -> int | float | complex | bool:
    """A numpy scalar as a number of Python."""
    if not isinstance(dtype, Dtype) or not isinstance(content, bytes):
        raise CodeInFile("a numpy scalar that is not a number")
    kind = np.dtype(("<" if dtype.order in "=|" else dtype.order) + dtype.code)
    if len(content) != kind.itemsize:
        raise DamagedFile(f"a number has {len(content)} bytes instead of {kind.itemsize}")
    return np.frombuffer(content, kind)[0].item()


def _join_path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise DamagedFile("a path is made of something else than text")
    return "/".join(parts).replace("//", "/")


def _build_device(*parts: Any) -> str:
    if not all(isinstance(part, (str, int)) for part in parts):
        raise DamagedFile("a device is named by something else than text and a number")
    return ":".join(map(str, parts))


def _build_tuple(items: Any = ()) -> tuple[Any, ...]:
    if not isinstance(items, (list, tuple)):
        raise DamagedFile(f"its pickle makes a tuple of a {type(items).__name__}")
    return tuple(items)


def _return_first(value: Any, *rest: Any) -> Any:
    return value


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
    "collections.OrderedDict": build_dict,
    "collections.Counter": build_dict,
    "collections.defaultdict": _build_defaultdict,
    **dict.fromkeys(
        ("builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"), build_set
    ),
    "torch.Size": _build_tuple,
    "torch.device": _build_device,
    "_codecs.encode": _encode_bytes,
    "numpy.dtype": _build_numpy_dtype,
    **{f"{module}.scalar": _build_number for module in NUMPY_MODULES},
    **dict.fromkeys(PATHS, _join_path),
    **{
        f"torch.jit._pickle.build_{kind}list": lambda items: list(_build_tuple(items))
        for kind in ("int", "tensor", "double", "bool")
    },
    "torch.jit._pickle.restore_type_tag": _return_first,
}
PLAIN_CLASSES = ("object", "int", "float", "list", "dict", "set")
# Names that stand beside an object and are never called.
HARMLESS: tuple[str, ...] = ("argparse.Namespace", "torch.Tensor", "torch.nn.parameter.Parameter")
HARMLESS += tuple(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in PLAIN_CLASSES)
# copyreg's functions that make an object without calling its class
RECONSTRUCTORS = ("copy_reg._reconstructor", "copyreg._reconstructor")

"""An interpreter of pickles that builds plain data and tensors and calls nothing else.

`OPCODES` at the end is the table of what it can do, `pickle_builders.BUILDERS` the
table of what it can build. A pickle with any other opcode or name is refused.
"""

from __future__ import annotations

import argparse
import pickletools
from collections.abc import Callable, Collection
from typing import IO, Any

from torch import Tensor

from checkpoint_io.pickle_builders import (
    BUILDERS,
    DTYPES,
    HARMLESS,
    KINDS_OF_TENSOR,
    RECONSTRUCTORS,
    STORAGES,
    CodeInFile,
    DamagedFile,
    Dtype,
    Name,
    PickledObject,
    Storage,
    UnsupportedFile,
    build_dict,
    build_set,
    check_key,
    is_count,
)

MAX_OPCODES = 5_000_000  # of the pickle's program; some seconds

MARK = object()  # on the stack, where the items of a container begin


class Interpreter:
    """Runs one pickle; `run` gives the object that it describes.

    Args:
        pickle: The pickle, or an open file that stands at its start.
        read: Gives the content of a storage for its key and its length in bytes.
        objects: Names of classes whose instances are read as `PickledObject`.
        script: Whether the classes of a TorchScript archive are read so as well.
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
                    "it was saved with pickle_protocol=0, which writes storages as text: save it again "
                    "without that"
                )
            elif name not in ("PROTO", "FRAME"):
                raise UnsupportedFile(f"its pickle has the step {name}, which no checkpoint needs")
        raise DamagedFile("its pickle has no end")

    def spend(self, steps: int) -> None:
        """Count steps. A copy costs as many as it has items, as a short pickle could
        otherwise copy a long list without end.
        """
        self.steps += steps
        if self.steps > MAX_OPCODES:
            raise UnsupportedFile(f"its pickle takes more than {MAX_OPCODES:,} steps")

    def pop_mark(self) -> list[Any]:
        """Take what lies above the last mark, and the mark, from the stack."""
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
        """Put the items above the mark into the container below it."""
        items = self.pop_mark()
        target = self.top(kind)
        if pairs:
            target.update(build_dict(list(zip(items[::2], items[1::2], strict=True))))
        elif kind is list:
            target.extend(items)
        else:
            target.update(build_set(items))

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise DamagedFile(f"its pickle puts items into a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.top(dict)[check_key(key)] = value

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
        """A dtype for its name; for the name of a class or function in our tables a
        `Name`, which `call` may take.
        """
        if text in DTYPES:
            return DTYPES[text]
        storage = text.removeprefix("torch.storage.").removeprefix("torch.").removeprefix("cuda.")
        known = (
            text in BUILDERS
            or text in RECONSTRUCTORS
            or storage in STORAGES
            or storage in ("UntypedStorage", "TypedStorage")
        )
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
            raise DamagedFile("its pickle calls something that is not a class or function")
        if name.text in BUILDERS:
            self.spend(
                sum(len(each) for each in arguments if isinstance(each, (str, bytes, list, tuple, dict, set)))
            )
            self.stack.append(BUILDERS[name.text](*arguments))
        elif name.text in RECONSTRUCTORS:
            self.stack.append(self.new_object(arguments[0], ()))
        else:
            self.stack.append(self.new_object(name, arguments))

    def new_object(self, name: Any, arguments: tuple[Any, ...]) -> Any:
        """An instance that is still empty: `build` fills it."""
        if isinstance(name, Name) and name.text == "argparse.Namespace" and not arguments:
            return argparse.Namespace()
        ours = isinstance(name, Name) and (name.text in self.objects or name.text.startswith("__torch__."))
        if not ours or arguments:
            raise CodeInFile(f"{name.text if isinstance(name, Name) else type(name).__name__}")
        return PickledObject(name.text)

    def build(self, _: Any) -> None:
        """Set the state of an object: the attributes of a Namespace or PickledObject,
        the byte order of a numpy dtype. Nothing else has one here.
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
        elif not isinstance(target, (dict, Tensor)):
            # the attributes of an OrderedDict (torch's _metadata) are not needed
            raise UnsupportedFile(f"its pickle sets the state of a {type(target).__name__}")

    def push_storage(self, identity: Any) -> None:
        """Resolve a persistent id: a storage, or before torch 1.6 the class of a module
        beside its source code.
        """
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
        if not is_count(elements):
            raise DamagedFile(f"storage {key} has {elements} elements")
        dtype = STORAGES.get(kind.text.rpartition(".")[2])
        size = 1 if dtype is None else dtype.itemsize
        if key not in self.storages:
            self.storages[key] = Storage(self.read(key, elements * size), dtype)
            self.element_sizes[key] = size
        if self.storages[key].dtype != dtype or len(self.storages[key].content) != elements * size:
            raise DamagedFile(f"storage {key} is described in two ways")
        self.stack.append(self.storages[key])

    def push_persistent(self, _: Any) -> None:
        self.push_storage(self.stack.pop())


CONSTANTS: dict[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "MARK": MARK,
}
LITERALS = frozenset((
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE",
    "SHORT_BINSTRING", "BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
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
    "DICT": lambda i, _: i.collect(lambda items: build_dict(list(zip(items[::2], items[1::2], strict=True)))),
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

"""A step on tensors without data: what it allocates, computes and exchanges.

What is made of numbers that are known (a mask, an index, a constant) is computed as
ever, on the host: only what would lie on the device holds no data. A storage is known
by its address and watched by a weak reference: it ends when the real one would.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten: Any = torch.ops.aten
OF_KNOWN_NUMBERS = (aten.lift_fresh.default, aten.lift_fresh_copy.default)
# What an element is that code asks the device for: conditions hold ("is it finite?"),
# numbers are zero ("how many steps were skipped?").
ANSWERS = {torch.bool: True}
# of a collective's arguments, the one that has the size of what is exchanged
PAYLOAD = {"_allgather_base_": 0, "_reduce_scatter_base_": 1}

PARAMETERS, GRADIENTS, MOMENTS = "parameters", "gradients", "moments"
AVERAGE, FROZEN, GATHERED = "moving_average", "frozen_networks", "gathered_shards"
IMAGES, ACTIVATIONS = "images", "activations"  # the latter is whatever is nothing else
KINDS = (PARAMETERS, GRADIENTS, MOMENTS, AVERAGE, FROZEN, GATHERED, IMAGES, ACTIVATIONS)


@dataclass
class Memory:
    """Every allocation and release in their order, as (storage, bytes).

    granularity: what the allocator rounds sizes up to, in bytes.
    """

    granularity: int = 512
    events: list[tuple[int, int]] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)  # storage -> kind
    # address -> storage, bytes, reference
    alive: dict[int, tuple[int, int, Any]] = field(default_factory=dict)
    count: int = 0

    def add(self, tensor: Tensor) -> None:
        """A tensor that an operation gave; its storage may be known already."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.alive or not storage.nbytes():
            return
        number, self.count, size = self.count, self.count + 1, self.round_up(storage.nbytes())
        self.alive[address] = (number, size, weakref.ref(storage, lambda _: self.release(address)))
        self.events.append((number, size))

    def release(self, address: int) -> None:
        number, size, _ = self.alive.pop(address)
        self.events.append((number, -size))

    def resize(self, storage: torch.UntypedStorage) -> None:
        """A storage was given another size, which FSDP alone does, with gathered shards."""
        if (found := self.alive.get(storage._cdata)) is not None:
            number, before, reference = found
            size = self.round_up(storage.nbytes())
            self.alive[storage._cdata] = (number, size, reference)
            self.events.append((number, size - before))
            self.kinds.setdefault(number, GATHERED)

    def round_up(self, size: int) -> int:
        return -(-size // self.granularity) * self.granularity

    def mark(self, kind: str, tensors: Iterable[Any]) -> None:
        """What the storages of these tensors are; a kind once given stays."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                found = self.alive.get(local(tensor).untyped_storage()._cdata)
                if found is not None:
                    self.kinds.setdefault(found[0], kind)

    def peak(self, since: int = 0) -> tuple[int, dict[str, int]]:
        """The most bytes at once, after the first `since` events, and of which kinds."""
        total = most = at = 0
        for index, (_, size) in enumerate(self.events):
            total += size
            if index >= since and total > most:
                most, at = total, index
        by_kind: Counter[str] = Counter()
        for number, size in self.events[: at + 1]:
            by_kind[self.kinds.get(number, ACTIVATIONS)] += size
        return most, {kind: by_kind[kind] for kind in KINDS if by_kind[kind]}


def local(tensor: Any) -> Tensor:
    """Of a sharded tensor this process's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Tracker(TorchDispatchMode):
    """Inside a FakeTensorMode: sees every operation below autograd."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.start_step()

    def start_step(self) -> None:
        self.flops = self.exchanged = 0

    def add_flops(self, flops: int) -> None:
        """Of what is no operation of torch's own."""
        self.flops += flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OF_KNOWN_NUMBERS:
            return args[0]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if given and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return ANSWERS.get(args[0].dtype, 0)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self.memory.add(tensor)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        if func.namespace == "c10d" and func._opname in PAYLOAD:
            self.exchanged += args[PAYLOAD[func._opname]].nbytes
        return out

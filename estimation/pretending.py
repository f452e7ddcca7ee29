"""The surroundings in which an entry's `build` and a step run on tensors without data:
one of many processes, none of which exists, on a card that is not there.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.device_mesh
import torch.nn.parallel.distributed
import torch.utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

import engine
import schedules
from estimation.card_functions import card_functions
from estimation.tracker import Memory, Tracker
from layers.meant_device import meant_for
from norm_ema_quantizer import NormEMAVectorQuantizer
from runtime import distributed, signals
from runtime.cards import Card


@contextlib.contextmanager
def pretend(card: Card | None, processes: int) -> Iterator[Tracker]:
    """Inside the block new tensors hold no data, and the tracker sees what becomes of
    them.

    card: None for this machine's CPU, as it computes. processes: as many as there are
    GPUs; this one is rank 0.
    """
    tracker = Tracker(Memory(1) if card is None else Memory())
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch is asked for pointers of tensors without data
        stack.enter_context(joined(processes))
        stack.enter_context(meant_for("cpu" if card is None else "cuda"))
        cards = [] if card is None else card_functions(card, tracker.add_flops)
        cards += [] if card is None else [(engine, "to_device", tracker.place)]
        for target, name, value in [*replacements(tracker), *cards]:
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(tracker)
        yield tracker


def replacements(tracker: Tracker) -> list[tuple[Any, str, Any]]:
    """(where, name, what stands there meanwhile): what torch and this code cannot do
    without data.
    """
    resize, mesh = torch.UntypedStorage.resize_, torch.distributed.device_mesh.init_device_mesh

    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        tracker.memory.resize(storage)

    def real_mesh(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return mesh(*args, **kwargs)

    def flat(base: float, final: float, epochs: int, niter: int, **_: Any) -> Any:
        return np.broadcast_to(base, epochs * niter)

    def nothing(*_: Any, **__: Any) -> None:
        pass

    ddp = torch.nn.parallel.distributed
    return [
        # initialization: it redraws until the numbers fit
        (torch.nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor),
        # of a schedule only the length is asked: millions of steps of small batches
        (schedules, "cosine_scheduler", flat),
        # the codebook is there
        (NormEMAVectorQuantizer, "sync_ready", lambda quantizer: setattr(quantizer, "ready", True)),
        # `module.to(dtype)`, for tensors to which others refer
        (torch.utils, "swap_tensors", lambda old, new: setattr(old, "data", new)),
        # the ranks compare shapes and weights
        (ddp, "_verify_param_shape_across_processes", nothing),
        (ddp, "_sync_module_states", nothing),
        (dist.Reducer, "_rebuild_buckets", lambda reducer: False),
        (distributed, "gather_objects", lambda value: [value] * distributed.world_size()),
        # FSDP
        (torch.UntypedStorage, "resize_", resize_and_tell),
        (torch.distributed.device_mesh, "init_device_mesh", real_mesh),
        # a signal ends an estimate as any command
        (signals, "end_between_steps", nothing),
    ]


@contextlib.contextmanager
def joined(processes: int) -> Iterator[None]:
    """Rank 0 of so many, in a group that exchanges nothing."""
    cache = torch.is_autocast_cache_enabled()
    with mock.patch.dict(os.environ):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
            os.environ.pop(name, None)
        if processes > 1:
            importlib.import_module("torch.distributed._tools.fake_collectives")  # what they give
            from torch.testing._internal.distributed.fake_pg import FakeStore

            os.environ.update(RANK="0", WORLD_SIZE=str(processes), LOCAL_RANK="0")
            dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cache)  # fsdp.shard turns it off
            if processes > 1:
                dist.destroy_process_group()

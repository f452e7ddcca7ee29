"""One process or many: the same code. Which rank this process is, how the processes
meet, and what they exchange.

Every helper is right at world size 1 and without a process group.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import errors
from errors import UserError
from runtime.device import keep_freed_memory, pick_device
from runtime.terminal import say_if_slow, set_up_logging


@dataclass(frozen=True)
class Launch:
    """What the launcher said of this process. `launcher` is None for a plain `python
    script.py`.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str | None = None


def read_launch(environ: dict[str, str], dist_on_itp: bool = False) -> Launch:
    """Rank and world size as torchrun / torch.distributed.launch, Open MPI
    (`--dist_on_itp`) or SLURM's srun set them.
    """
    e = environ
    if dist_on_itp and "OMPI_COMM_WORLD_SIZE" in e:
        rank, size, local, launcher = (
            *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK")),
            "mpirun",
        )
    elif "RANK" in e and "WORLD_SIZE" in e:
        rank, size, local, launcher = "RANK", "WORLD_SIZE", "LOCAL_RANK", "torchrun"
    # SLURM sets SLURM_PROCID also for a shell inside an allocation; only srun with
    # several tasks means several ranks.
    elif "SLURM_STEP_NUM_TASKS" in e and read_number(e, "SLURM_STEP_NUM_TASKS") > 1:
        rank, size, local, launcher = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "srun"
    else:
        return Launch()
    launch = Launch(read_number(e, rank), read_number(e, size), read_number(e, local, "0"), launcher)
    if launch.rank >= launch.world_size:
        raise UserError(
            f"the environment says {rank}={launch.rank} and {size}={launch.world_size}: ranks count from 0"
        )
    return launch


def read_number(environ: dict[str, str], name: str, default: str = "") -> int:
    text = environ.get(name, default)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(
            f"the environment variable {name} is '{text}' instead of a number: unset it, or start with "
            "torchrun"
        )
    return int(text)


def start(
    device: str = "cuda", dist_url: str = "env://", dist_on_itp: bool = False, timeout_minutes: float = 30.0
) -> tuple[Launch, torch.device]:
    """Join the process group if a launcher started several processes; say which device
    this process computes on.

    Returns the launch (also when there is one process) and the torch device,
    `cuda:local_rank` for GPUs.
    """
    launch = read_launch(dict(os.environ), dist_on_itp)
    set_up_logging(launch.rank)
    own_device = pick_device(device, launch.local_rank, launch.world_size)
    if own_device.type == "cpu":
        keep_freed_memory()
    if launch.launcher and not dist.is_initialized():
        if dist_url == "env://":
            os.environ.setdefault(
                "MASTER_ADDR", first_slurm_host() if launch.launcher == "srun" else "127.0.0.1"
            )
            os.environ.setdefault(
                "MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 9500)) % 20000)
            )
        with say_if_slow(f"processes  waiting until all {launch.world_size} are there"):
            store = meet(launch, own_device, dist_url, datetime.timedelta(minutes=timeout_minutes))
        if launch.world_size > 1:
            global set_up
            set_up = SetUp(store, launch.rank)
    return launch, own_device


def meet(launch: Launch, device: torch.device, dist_url: str, timeout: datetime.timedelta) -> dist.Store:
    """Join the process group; the store in which its processes leave each other word."""
    try:
        store, _, _ = next(dist.rendezvous(dist_url, launch.rank, launch.world_size, timeout=timeout))
    except (ValueError, RuntimeError, OSError) as error:  # DistError is a RuntimeError
        where = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ) if dist_url == "env://" else dist_url
        raise UserError(
            f"the processes cannot meet at {where} ({str(error).splitlines()[0]}): see `dist_url`, or "
            "MASTER_ADDR and MASTER_PORT"
        ) from None
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        store = dist.PrefixStore(agree_on_attempt(store, launch, timeout), store)
    backend, rank, size = "nccl" if device.type == "cuda" else "gloo", launch.rank, launch.world_size
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return store


class SetUp:
    """While the processes set up, the failure of one ends the others at once and with
    its message, wherever they wait for it.

    A thread looks into the store for the message. It ends before the steps begin
    (`end`): data processes are forked then.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.store, self.rank, self.ended = store, rank, threading.Event()
        # a connection that no wait of the main thread holds
        self.own = store.clone() if hasattr(store, "clone") else store
        errors.on_failure.append(self.tell)
        self.thread = threading.Thread(target=self.watch, name="set-up", daemon=True)
        self.thread.start()

    def tell(self, message: str) -> None:
        self.end()
        with contextlib.suppress(Exception):  # the store may have gone with another process
            self.own.set("failed", f"[rank {self.rank}] {message}")
            time.sleep(1)  # rank 0 may be where the store is

    def watch(self) -> None:
        with contextlib.suppress(Exception):
            while not self.ended.wait(0.2):
                if self.own.check(["failed"]):
                    message = self.own.get("failed").decode()
                    if not self.ended.is_set():
                        print(
                            f"error: rank {self.rank} ends with another: {message}",
                            file=sys.stderr,
                            flush=True,
                        )
                        os._exit(2)

    def end(self) -> None:
        self.ended.set()
        if self.tell in errors.on_failure:
            errors.on_failure.remove(self.tell)
        if self.thread is not threading.current_thread():
            self.thread.join(timeout=5)


set_up: SetUp | None = None


def end_set_up() -> None:
    """All processes are ready for the first step."""
    barrier()
    if set_up is not None:
        set_up.end()


def agree_on_attempt(store: dist.Store, launch: Launch, timeout: datetime.timedelta) -> str:
    """A name for this start of the run that all its processes know and no earlier start
    had.

    torchrun keeps one store over its restarts, so a quick process would read the
    address that a slow one left there in its earlier life. Each process therefore says
    hello with a fresh token; rank 0 names the start after all tokens; a process accepts
    only a name made with its present token; and when all have accepted the same one,
    rank 0 says go.
    """
    token, ranks = uuid.uuid4().hex, range(launch.world_size)
    deadline = time.monotonic() + timeout.total_seconds()

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    store.set(f"hello{launch.rank}", token)
    while time.monotonic() < deadline:
        name = hashlib.sha256(" ".join(read(f"hello{rank}") for rank in ranks).encode()).hexdigest()
        if launch.rank == 0:
            store.set("name", name)
            store.set("accepted0", name)
            if all(read(f"accepted{rank}") == name for rank in ranks):
                store.set("go", name)
                return name
        elif read("name") == name:
            store.set(f"accepted{launch.rank}", name)
            if read("go") == name:
                return name
        time.sleep(0.05)
    raise UserError(
        f"the other processes did not come within `dist_timeout` {timeout.total_seconds() / 60:g} minutes"
    )


def first_slurm_host() -> str:
    """Where rank 0 runs. srun tells the nodes in a compressed form, which scontrol
    expands.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return listing.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        if "[" in nodes:
            raise UserError(
                f"srun: cannot tell the first of {nodes}; export MASTER_ADDR in the job script"
            ) from None
        return nodes.split(",")[0]


def stop() -> None:
    """Leave the process group, if there is one. After success only: a failing rank must
    not wait for the others.
    """
    if dist.is_available() and dist.is_initialized():
        end_set_up()
        # gloo's thread may still be freeing the last collective, for which it needs the
        # interpreter's lock, while the group's destructor holds that lock and waits for
        # the thread (torch 2.6 hung so in a test). Give it a moment.
        time.sleep(0.2)
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(*tensors: torch.Tensor) -> None:
    """Sum each tensor over the ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """The source rank's values, in place on every rank."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(n, ...) on each rank -> (sum of n, ...) in rank order on every rank; the ranks
    may hold different n.
    """
    if world_size() == 1:
        return tensor
    counts = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    longest = max(int(c) for c in counts)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def gather_objects(value: Any) -> Sequence[Any]:
    """[value of rank 0, value of rank 1, ...] on every rank. For small plain data."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values

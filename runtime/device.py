"""On what this process computes and in which precision, and batches on their way
there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError


def pick_device(name: str, local_rank: int = 0, world_size_of_launch: int = 1) -> torch.device:
    """`cuda` means this process's own GPU; without one it falls back to the CPU and
    says so. `cuda:1`: that GPU, for a single process. UserError for any other device
    (mps, xpu, meta), and for a GPU that is not there.
    """
    number = re.fullmatch("cuda:([0-9]{1,6})", name)
    if name not in ("cpu", "cuda") and not number:
        raise UserError(
            f"`device` {name[:40]!r}: this code computes on cuda or cpu; use `device` cpu where there is no "
            "GPU"
        )
    if name == "cpu":
        return torch.device("cpu")
    if number and world_size_of_launch > 1:
        raise UserError(f"`device` {name} would put all processes on one GPU: leave the number out")
    if number and int(number[1]) >= (visible := torch.cuda.device_count()):
        raise UserError(
            f"`device` {name}: there is no such GPU, {visible} visible, counted from 0; use cuda or cpu"
        )
    if not torch.cuda.is_available():
        logging.getLogger("beit").info(
            "no CUDA device found: running on the CPU (`device` cpu says so explicitly)"
        )
        return torch.device("cpu")
    local_rank = int(number[1]) if number else local_rank
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} visible; start "
            "as many processes as GPUs (--nproc_per_node)"
        )
    refuse_gpus_without_kernels(torch.cuda.get_device_capability(local_rank), torch.cuda.get_arch_list())
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@dataclass(frozen=True)
class Precision:
    """Autocast dtype, or None for fp32; fp16 needs a gradient scaler."""

    device_type: str
    dtype: torch.dtype | None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device_type, self.dtype) if self.dtype else contextlib.nullcontext()

    def __str__(self) -> str:
        return {torch.bfloat16: "bf16", torch.float16: "fp16 with a gradient scaler", None: "fp32"}[
            self.dtype
        ]


def choose_precision(name: str, device: torch.device) -> Precision:
    """`amp_dtype`; auto takes bf16 only where the device computes in it, not where it
    is emulated.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        else:
            name = "bf16" if device.type == "cpu" and cpu_computes_in_bf16() else "fp32"
    return Precision(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name])


def cpu_computes_in_bf16() -> bool:
    return cpu_has("avx512_bf16") or cpu_has("amx_bf16")


@functools.cache
def cpu_has(flag: str) -> bool:
    """Whether Linux lists it among the CPU's abilities; elsewhere nothing is known."""
    with contextlib.suppress(OSError):
        return flag in Path("/proc/cpuinfo").read_text().split()
    return False


def refuse_gpus_without_kernels(capability: tuple[int, int], built_for: Sequence[str]) -> None:
    """A torch built for newer GPUs alone fails at the first kernel, obscurely: from
    2.15 on no wheel runs on a V100.
    """
    oldest = min(
        (int(arch.split("_")[1].rstrip("af")) for arch in built_for if arch.startswith("sm_")), default=0
    )
    if capability[0] * 10 + capability[1] < oldest:
        raise UserError(
            f"this torch ({torch.__version__}) has no kernels for GPUs of compute capability "
            f"{capability[0]}.{capability[1]} (V100: 7.0). Install one that has: pip install 'torch<2.15' "
            "torchvision --index-url https://download.pytorch.org/whl/cu126"
        )


def keep_freed_memory() -> None:
    """Let the C library keep what torch frees on the CPU: asking the kernel again for
    every large tensor took a third of a training step of a small model (page faults).
    Only glibc has the call; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: large blocks from the heap too
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: do not give the heap's end back


def to_device(
    batch: dict[str, Any], device: torch.device, keep_on_host: Collection[str] = ("mask",)
) -> dict[str, Any]:
    """Move the tensors, except for the mask: its positions, which were listed on the
    host, go in its place (MaskedPositions).

    A GPU copies on a stream of its own, beside the kernels of the step before that are
    still running: the loop asks for a step's batches as soon as it has enqueued the
    step before. What reads them is enqueued after the copy.
    """
    moves = {
        key: value for key, value in batch.items() if isinstance(value, Tensor) and key not in keep_on_host
    }
    if device.type != "cuda":
        return batch | {key: value.to(device) for key, value in moves.items()}
    copying, computing = copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        moved = {key: value.to(device, non_blocking=True) for key, value in moves.items()}
    computing.wait_stream(copying)
    for value in moved.values():
        value.record_stream(computing)  # else the next copy might take its memory while it is still read
    return batch | moved


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

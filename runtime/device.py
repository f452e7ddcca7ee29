"""Batches on their way to the device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors move, but for the mask: its positions are listed on the host, which spares a synchronization.

    A GPU copies on a stream of its own, beside the kernels of the step before that are
    still running: the loop asks for a step's batches as soon as it has enqueued the
    step before. What reads them is enqueued behind the copy.
    """
    moves = {key: value for key, value in batch.items() if isinstance(value, Tensor) and key != "mask"}
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

"""For which kind of device a computation is meant. It is the tensors' own, except in
estimate.py, whose tensors hold no data and lie nowhere: they go the way of the card that
is asked about.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_meant: str | None = None  # "cpu", "cuda"; None: the tensors' own


def is_cpu(device: torch.device) -> bool:
    """Whether what a CPU computes in a way of its own is to be computed so."""
    return (_meant or device.type) == "cpu"


@contextlib.contextmanager
def meant_for(kind: str) -> Iterator[None]:
    """Inside the block all computing is meant for devices of this kind."""
    global _meant
    before, _meant = _meant, kind
    try:
        yield
    finally:
        _meant = before

"""Seeds that derive from what they are for, and random numbers that depend on nothing
else.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """One 32-bit seed from any tuple, e.g. (run seed, epoch, sample index): the same on
    every machine.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed Python, NumPy and torch (the CPU's generator and `device`'s)."""
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed: it formats a stack trace for every call made before CUDA
    # starts.
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Inside the block the random numbers depend on `parts` alone; outside, the
    generators go on as if nothing was drawn.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_all(derive_seed(*parts))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

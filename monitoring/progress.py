"""What a user sees of a run at the terminal."""

from __future__ import annotations

import sys
import time
from typing import Protocol

import torch
from tqdm import tqdm

from runtime import distributed
from runtime.terminal import format_clock, log

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SECONDS_BETWEEN_UPDATES = 10.0


class Progress(Protocol):
    """Where the steps of an epoch are shown."""

    def start_epoch(self, title: str, done: int, steps: int) -> None:
        """`title`: `epoch 2/10`. `done` of its `steps` were taken earlier."""

    def is_due(self) -> bool:
        """Whether an update is wanted, though no report is due."""

    def update(self, step_in_epoch: int, text: str, report: bool) -> None:
        """`report`: at a step of --print_freq or at the end of an epoch."""

    def close(self) -> None: ...


class ProgressLines:
    """A line a report: for a file, or who pipes the output on."""

    def start_epoch(self, title: str, done: int, steps: int) -> None:
        self.title, self.steps = title, steps

    def is_due(self) -> bool:
        return False

    def update(self, step_in_epoch: int, text: str, report: bool) -> None:
        if report:
            log.info(f"{self.title} [{step_in_epoch}/{self.steps}]  {text}")

    def close(self) -> None: ...


class ProgressBar:
    """One line that rewrites itself, about every ten seconds."""

    def __init__(self) -> None:
        self.bar = tqdm(leave=False, dynamic_ncols=True)

    def start_epoch(self, title: str, done: int, steps: int) -> None:
        self.bar.reset(steps)
        self.bar.set_description(title)
        self.last_update = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self.last_update >= SECONDS_BETWEEN_UPDATES

    def update(self, step_in_epoch: int, text: str, report: bool) -> None:
        self.bar.n = step_in_epoch
        self.bar.set_postfix_str(text)
        self.last_update = time.monotonic()

    def close(self) -> None:
        self.bar.close()


def open_progress() -> Progress:
    return ProgressBar() if distributed.is_main() and sys.stderr.isatty() else ProgressLines()


def format_report(
    means: dict[str, float],
    lr: float,
    speed: float,
    data_wait: float,
    memory: int | None,
    seconds_left: float,
    mfu: float | None = None,
) -> str:
    """`speed` in images a second, `data_wait` a share of the time, `memory` in bytes,
    `mfu` a share of the device's peak.
    """
    text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    text += f"  lr {lr:.2e}  {speed:.{0 if speed >= 10 else 2}f} images/s  data wait {100 * data_wait:.0f}%"
    text += "" if mfu is None else f"  mfu {100 * mfu:.0f}%"
    size = "?" if memory is None else f"{memory / 2**30:.1f}"
    return f"{text}  {size} GiB  eta {format_clock(seconds_left)}"


def peak_memory(device: torch.device) -> int | None:
    """Of this process so far, on its GPU or in main memory, in bytes; None where the
    system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

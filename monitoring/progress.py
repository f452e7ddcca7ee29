"""What a user sees of a run at the terminal: progress, the time it takes, a table for
each epoch.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch

from runtime import distributed
from runtime.terminal import (
    WIDEST,
    format_clock,
    format_duration,
    format_end,
    format_figure,
    is_terminal,
    log,
    status,
)

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SECONDS_BETWEEN_UPDATES = 10.0
TIMED_STEPS, TIMED_SECONDS = 2, 2.0  # from which the time of a run is told, at least
ROWS = 7  # of the epoch's table, beyond which it is cut into blocks side by side


class Remark(NamedTuple):
    """What a reader must know beside the figures of now, and the names of those that
    mean nothing yet.
    """

    short: str
    text: str
    hides: Collection[str]


class Progress:
    """Where the steps of an epoch are shown: at a terminal in one line that rewrites
    itself, at the first step and then about every ten seconds; in a file, or for who
    pipes the output on, in a line a report.
    """

    def __init__(self) -> None:
        self.rewrites = distributed.is_main() and status.terminal is not None
        self.prints = not is_terminal(sys.stdout)
        self.last_update = -math.inf

    def is_due(self) -> bool:
        """Whether an update is wanted, though no report is due."""
        return self.rewrites and time.monotonic() - self.last_update >= SECONDS_BETWEEN_UPDATES

    def start_epoch(self, title: str) -> None:
        self.say(f"{title}  reading images")
        self.last_update = -math.inf

    def say(self, text: str) -> None:
        """What is being done now, at a terminal."""
        if self.rewrites:
            status.show(text)

    def update(self, title: str, figures: Sequence[str], seconds_left: float | None, report: bool) -> None:
        """`figures`: the most important first; what does not fit is left out. `report`:
        at a step of --print_freq or at the end of an epoch.
        """
        eta = [] if seconds_left is None else [f"eta {format_clock(seconds_left)}"]
        parts = [title, *figures[:1], *eta, *figures[1:]]
        self.say(fit(parts, status.room))
        self.last_update = time.monotonic()
        if report and self.prints:
            log.info(fit(parts, WIDEST))

    def close(self) -> None:
        status.clear()


def fit(parts: Sequence[str], width: int) -> str:
    """As many of them, from the first on, as fit into a line."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line


def format_report(
    means: Mapping[str, float],
    lr: float,
    speed: float,
    data_wait: float,
    memory: int | None,
    remark: Remark | None = None,
    mfu: float | None = None,
) -> list[str]:
    """What a line of progress says, the most important first. `speed` in images a
    second, `data_wait` a share of the time, `memory` in bytes, `mfu` a share of the
    device's peak.
    """
    hidden = remark.hides if remark else ()
    figures = {name: f"{name} {format_figure(value)}" for name, value in means.items() if name not in hidden}
    loss, norm = figures.pop("loss", ""), figures.pop("grad_norm", "")
    parts = [
        loss,
        remark.short if remark else "",
        *figures.values(),
        f"{speed:.{0 if speed >= 10 else 2}f} images/s",
        f"data wait {100 * data_wait:.0f}%",
        "" if mfu is None else f"mfu {100 * mfu:.0f}%",
        f"lr {lr:.2e}",
        "" if memory is None else f"{memory / 2**30:.1f} GiB",
        norm,
    ]
    return [part for part in parts if part]


class RunTime:
    """How long the steps of a run take. The first step of a process is a warm-up and
    is not timed; what lies between two epochs, such as an evaluation, is timed apart.

    Times are taken when the device has just been read, and so has done its work.
    """

    def __init__(self) -> None:
        self.mark: tuple[int, float] | None = None  # step and time of the last look at the clock
        self.steps, self.seconds = 0, 0.0  # timed since the last report
        self.seconds_a_step: float | None = None
        self.told = False
        self.paused, self.pauses = 0.0, 0
        self.pause_began: float | None = None

    def is_due(self, step: int) -> bool:
        """Whether `take` should be called after this step, so that a first estimate can
        be told.
        """
        if self.mark is None:
            return True
        steps, seconds = step - self.mark[0], time.monotonic() - self.mark[1]
        return not self.told and self.is_enough(self.steps + steps, self.seconds + seconds)

    def is_enough(self, steps: int, seconds: float) -> bool:
        return steps >= TIMED_STEPS and (self.told or seconds >= TIMED_SECONDS)

    def take(self, step: int, report: bool) -> None:
        """`report`: later times are taken from here on."""
        now = time.monotonic()
        if self.mark is not None:
            self.steps, self.seconds = self.steps + step - self.mark[0], self.seconds + now - self.mark[1]
        self.mark = (step, now)
        if self.is_enough(self.steps, self.seconds):
            self.seconds_a_step = self.seconds / self.steps
            if report:
                self.steps, self.seconds = 0, 0.0

    def leave_out(self, seconds: float) -> None:
        """Time since the last look at the clock in which no step was taken."""
        if self.mark is not None:
            self.mark = (self.mark[0], self.mark[1] + seconds)

    def end_epoch(self) -> None:
        """Its last step was taken: a pause begins."""
        self.pause_began, self.pauses = time.monotonic(), self.pauses + 1

    def count_pause(self) -> None:
        """As much of it as has passed."""
        if self.pause_began is not None:
            now = time.monotonic()
            self.paused, self.pause_began = self.paused + now - self.pause_began, now

    def start_epoch(self, step: int) -> None:
        self.count_pause()
        self.pause_began = None
        if self.mark is not None:
            self.mark = (step, time.monotonic())

    def left(self, steps: int, pauses: int) -> float | None:
        """Seconds, None where nothing is known. `pauses`: ends of epochs that are to
        come, which take as long as those before did on average.
        """
        if self.seconds_a_step is None:
            return None
        return steps * self.seconds_a_step + pauses * self.paused / max(self.pauses, 1)

    def tell(self, steps: int, epochs: int) -> None:
        """Once, as soon as it is known: the time that the steps that are left take."""
        if self.told or self.seconds_a_step is None or steps == 0:
            return
        self.told = True
        seconds = steps * self.seconds_a_step
        which = "this epoch" if epochs == 1 else f"the {epochs} epochs left"
        each = format_duration(self.seconds_a_step)
        log.info(
            f"time       about {format_duration(seconds)} for {which} ({each} a step, evaluation not "
            f"counted), done about {format_end(seconds)}"
        )


def format_epoch(
    train: Mapping[str, float], test: Mapping[str, float], width: int = WIDEST, remark: Remark | None = None
) -> list[str]:
    """A table of an epoch's figures, by their names in log.txt: those of training, and
    beside them those of `test`. One line, where there are none of `test` and all fit.
    """
    hidden = remark.hides if remark else ()
    measured = {name.removeprefix("test_"): value for name, value in test.items()}
    names = [name for name in {**train, **measured} if name not in hidden]
    kinds = {"train": train, "test": measured} if test else {"train": train}
    line = "  ".join(f"{name} {format_figure(train[name])}" for name in names if name in train)
    if not test and len(line) + 2 <= width:
        return [f"  {line}"] if line else []
    columns = [["", *names]]
    for kind, values in kinds.items():
        columns.append([kind, *(format_figure(values[name]) if name in values else "" for name in names)])
    rows = list(zip(*columns, strict=True))
    head, body = rows[0], rows[1:]
    widths = [max(map(len, column)) for column in columns]
    fitting = max(1, (width + 2) // (sum(widths) + 2 * len(widths) + 2))
    height = -(-len(body) // min(fitting, -(-len(body) // ROWS)))
    blocks = [[head, *body[start : start + height]] for start in range(0, len(body), height)]
    lines = []
    for row in range(height + 1):
        cells = [block[row] for block in blocks if row < len(block)]
        texts = [
            f"  {name:<{widths[0]}}" + "".join(f"  {v:>{w}}" for v, w in zip(values, widths[1:], strict=True))
            for name, *values in cells
        ]
        lines.append("  ".join(texts).rstrip())
    return lines


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

"""Which part of a step is being taken: for `profile`, and free when nothing is
profiled.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import record_function

DATA, COPY, FROZEN = "data wait", "copy", "frozen networks"
FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
OTHER = "other"
PHASES = (DATA, COPY, FROZEN, FORWARD, BACKWARD, OPTIMIZER, OTHER)

NOTHING = contextlib.nullcontext()
recorder: PhaseRecorder | None = None


def phase(name: str) -> contextlib.AbstractContextManager[Any]:
    """The context of one of PHASES; an inner one interrupts the outer one."""
    return NOTHING if recorder is None else recorder.phase(name)


class PhaseRecorder:
    """Between `start` and `stop` every moment belongs to one phase.

    On a GPU the moments are those in which the device gets there (events in its
    stream): the time that the host is ahead of it counts nowhere, and waiting for the
    host counts where the host is late. Nothing waits for the device before `stop`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open = [OTHER]
        self.marks: list[tuple[str, Any]] = []  # a phase, and when it begins or goes on

    def start(self) -> None:
        global recorder
        recorder = self
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self.device))
        else:
            moment = time.perf_counter()
        self.marks.append((self.open[-1], moment))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with record_function(name):
            self.open.append(name)
            self.mark()
            try:
                yield
            finally:
                self.open.pop()
                self.mark()

    def stop(self) -> dict[str, float]:
        """Seconds of each phase."""
        global recorder
        recorder = None
        self.mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: Counter[str] = Counter(dict.fromkeys(PHASES, 0.0))  # type: ignore[arg-type]
        for (name, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            seconds[name] += self.between(begin, end)  # type: ignore[assignment]
        return dict(seconds)

    def between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin

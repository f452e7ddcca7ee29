"""Being asked to stop: SIGTERM, SIGUSR1 or Ctrl-C let the step finish; all ranks stop after the same step."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

import distributed

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows has no SIGUSR1


class StopSignal:
    """Within the `with` block the signals are noted instead of ending the process; a second Ctrl-C ends it at once.

    `agreed`, called once a step on every rank, says whether any rank was asked. The question of one step is answered at
    the next, so that nobody waits for the answer.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.before: dict[int, Any] = {}
        self.flag: torch.Tensor | None = None
        self.question: Any = None
        # The GPUs' own group would put the question in line behind the gradients; the host's group does not.
        self.group: Any = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            try:
                self.before[number] = signal.signal(number, self.note)
            except ValueError:  # not the main thread: signals are somebody else's
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether to stop after this step; the same on all ranks."""
        if self.group is None:
            return self.received is not None
        stop = False
        if self.question is not None and self.flag is not None:
            self.question.wait()
            stop = bool(self.flag.item())
        self.flag = torch.tensor([float(self.received is not None)])
        self.question = None if stop else dist.all_reduce(self.flag, group=self.group, async_op=True)  # type: ignore[arg-type]
        return stop

    def settle(self) -> None:
        """Wait for a question still under way, when the run ends by itself."""
        if self.question is not None:
            self.question.wait()
            self.question = None

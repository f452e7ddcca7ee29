"""Being asked to stop: SIGTERM, SIGUSR1, SIGHUP or Ctrl-C let the step finish; all
ranks stop after the same step.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from runtime import distributed, terminal

# Windows has neither USR1 nor HUP (the terminal was closed).
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)
)


def handle(number: int, handler: Any) -> Any:
    """signal.signal, but a SIGHUP that is ignored stays so: nohup has asked for that.
    Returns the earlier handler, None: unchanged.
    """
    if signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
        return None
    return signal.signal(number, handler)


def end_between_steps() -> None:
    """From here to the first step, and after the last, a signal ends the process with
    success: there is nothing to save.
    """
    for number in SIGNALS:
        if number != signal.SIGINT:
            with contextlib.suppress(ValueError):  # only the main thread may handle signals
                handle(number, _end)


def _end(number: int, _: FrameType | None) -> None:
    terminal.log.info(f"stopped by {signal.Signals(number).name}: no step was under way, nothing is lost")
    raise SystemExit(0)


class StopSignal:
    """Within the `with` block the signals are noted instead of ending the process; a
    second Ctrl-C ends it at once.

    `requested`, called once a step on every rank, says whether any rank was asked. The
    question of one step is answered at the next, so that no rank waits for the answer.

    timeout_minutes: how long to wait for a rank that does not ask (`dist_timeout`).
    """

    def __init__(self, timeout_minutes: float = 30.0) -> None:
        self.received: str | None = None
        self.before: dict[int, Any] = {}
        self.flag: torch.Tensor | None = None
        self.question: Any = None
        # The GPUs' own group would put the question in line after the gradients; the
        # host's group does not.
        timeout = datetime.timedelta(minutes=timeout_minutes)
        several = distributed.world_size() > 1
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout) if several else None

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            try:
                self.before[number] = handle(number, self.note)
            except ValueError:  # not the main thread: signals belong to another thread
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            if handler is not None:
                signal.signal(number, handler)

    def note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            terminal.status.leave()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = signal.Signals(number).name

    def requested(self) -> bool:
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

    def finalize(self) -> None:
        """Wait for a question still under way, when the run ends by itself."""
        if self.question is not None:
            self.question.wait()
            self.question = None

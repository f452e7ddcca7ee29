"""Time and peak memory of contenders that take turns in one process.

The speed of a machine drifts by more than the differences to be measured. Each ratio is
therefore of two turns in the same round, which lie side by side.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

PHASES = ("data", "tokenizer", "forward", "backward", "optimizer")
Mark = Callable[[str], None]
Work = Callable[[dict[str, Any], Mark], Tensor]


class Clock:
    """Splits one step into phases: `mark(name)` names what the time since the last mark
    was spent on.

    On a GPU the marks are events that are read after the step, so that measuring does
    not delay it.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize(device)
        self.marks: list[tuple[str, Any]] = [("", self.now())]

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, phase: str) -> None:
        self.marks.append((phase, self.now()))

    def read_ms(self) -> dict[str, float]:
        """Milliseconds by phase."""
        if self.cuda:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:], strict=False):
            ms = before.elapsed_time(after) if self.cuda else 1000 * (after - before)
            spent[phase] = spent.get(phase, 0.0) + ms
        return spent


class Turn(NamedTuple):
    loss: float
    ms: dict[str, float]  # by phase
    cpu_ms: float = 0.0  # of the process, all threads together; 0: not measured

    @property
    def total(self) -> float:
        return sum(self.ms.values())


class Contender:
    """One way to do a piece of work. It shares nothing that it changes (weights,
    moments).
    """

    name: str
    # of its step, where contenders do not all do the contest's work
    images: int | None = None
    flops: int | None = None

    def turn(self, batch: dict[str, Any]) -> Turn:
        raise NotImplementedError

    def peak(self, batch: dict[str, Any]) -> int:
        """Bytes of tensors at the worst moment of a step, with what is kept between
        steps.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release what is not released by itself, such as another process."""


class Local(Contender):
    """Work done in this process: work(batch, mark) -> loss ().

    `keeps` gives the bytes that it holds between steps.
    """

    def __init__(
        self, name: str, work: Work, device: torch.device, keeps: Callable[[], int] = lambda: 0
    ) -> None:
        self.name, self.work, self.device, self.keeps = name, work, device, keeps

    def turn(self, batch: dict[str, Any]) -> Turn:
        clock, cpu_seconds = Clock(self.device), time.process_time()
        loss = self.work(batch, clock.mark)
        return Turn(float(loss), clock.read_ms(), 1000 * (time.process_time() - cpu_seconds))

    def peak(self, batch: dict[str, Any]) -> int:
        return self.keeps() + peak_growth(self.device, lambda: self.work(batch, lambda phase: None))


def peak_growth(device: torch.device, work: Callable[[], Any]) -> int:
    """The most bytes that `work` held at once beyond what was allocated before.

    On a CPU this is the allocator's own record (torch.profiler): the resident set would
    also count freed memory that the C library keeps. Neither includes the scratch space
    of oneDNN's kernels.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for _, size in sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    ):
        held += size
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Silence file descriptor 2, to which the profiler's libraries write lines of their
    own.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def bytes_of(*modules: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Of weights, buffers and the optimizer's moments. Gradients do not outlive a
    step.
    """
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    states = optimizer.state.values() if optimizer is not None else ()
    tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(unique.values())


@dataclass
class Contest:
    """Contenders for the same work on the same batch; the first one is ours."""

    name: str
    contenders: Sequence[Contender]
    batch: dict[str, Any]
    images: int
    # largest difference of losses in the first step; None: precision does not allow one
    tolerance: float | None = None
    flops: int = 0  # of the matrix products that one step needs; 0 where they are not the point
    absent: dict[str, str] = field(default_factory=dict)  # contenders that cannot run here, and why
    view: Any = None  # of transforms, if ours is to be fed from files by a loader too
    # what follows from the rows beside ratios: as plain data, and as lines of text
    conclude: Callable[[Sequence[Row]], tuple[dict[str, Any], list[str]]] | None = None


@dataclass
class Row:
    """What was measured of one contender; a ratio is its figure divided by ours."""

    name: str
    loss: float  # of the first step
    ms: dict[str, float]  # medians, and `step` for the whole
    step_ms: list[float]  # the whole, in each round
    cpu_ms: list[float]  # in each round
    images_per_s: float
    peak_bytes: int
    ratio: float
    ratio_min: float
    ratio_max: float
    peak_ratio: float
    utilization: float | None


def hold(contest: Contest, rounds: int, warmup: int, matmul_flops: float) -> list[Row]:
    """Warm up, take `rounds` turns A B C A B C ..., then measure each contender's peak
    memory.

    `matmul_flops`: FLOP/s of this machine in a large matrix product of the same dtype.
    RuntimeError if the first loss of a contender differs from ours.
    """
    turns: list[list[Turn]] = [[] for _ in contest.contenders]
    for _ in range(warmup + rounds):
        for taken, contender in zip(turns, contest.contenders, strict=True):
            taken.append(contender.turn(contest.batch))
    check_agreement(contest, [taken[0].loss for taken in turns])
    peaks = [contender.peak(contest.batch) for contender in contest.contenders]
    ours = turns[0][warmup:]
    rows = []
    for contender, taken, peak in zip(contest.contenders, turns, peaks, strict=True):
        measured = taken[warmup:]
        ratios = [theirs.total / own.total for theirs, own in zip(measured, ours, strict=True)]
        ms = {phase: statistics.median(turn.ms.get(phase, 0.0) for turn in measured) for phase in PHASES}
        ms["step"] = statistics.median(turn.total for turn in measured)
        seconds = ms["step"] / 1000
        images = contest.images if contender.images is None else contender.images
        flops = contest.flops if contender.flops is None else contender.flops
        rows.append(
            Row(
                contender.name,
                taken[0].loss,
                ms,
                [turn.total for turn in measured],
                [turn.cpu_ms for turn in measured],
                images / seconds,
                peak,
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                peak / peaks[0] if peaks[0] else 0.0,
                flops / seconds / matmul_flops if flops else None,
            )
        )
    return rows


def check_agreement(contest: Contest, losses: Sequence[float]) -> None:
    if contest.tolerance is None:
        return
    for contender, loss in zip(contest.contenders, losses, strict=True):
        if not abs(loss - losses[0]) <= contest.tolerance * max(1.0, abs(losses[0])):
            raise RuntimeError(
                f"{contest.name}: {contender.name} computes {loss:.6f}, ours {losses[0]:.6f}: not the same "
                "work"
            )


def matmul_speed(device: torch.device, dtype: torch.dtype, side: int, times: int = 5) -> float:
    """FLOP/s of a (side x side) matrix product, the best of several."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(times + 2):
        clock = Clock(device)
        _ = a @ b
        clock.mark("forward")
        best = min(best, clock.read_ms()["forward"])
    return 2 * side**3 / (best / 1000)


def format_rows(rows: Sequence[Row]) -> list[str]:
    """A table for the terminal.

    Times in ms; `x ours`: time divided by ours in the same round, median (min-max);
    peak memory in MiB.
    """
    lines = [
        f"{'':14}{'images/s':>9}{'ms':>9}"
        + "".join(f"{phase:>10}" for phase in PHASES)
        + f"{'of matmul':>10}{'peak':>9}"
    ]
    lines[0] += f"{'x ours':>20}{'peak x ours':>13}"
    for row in rows:
        share = "" if row.utilization is None else f"{row.utilization:.0%}"
        phases = "".join(f"{row.ms[phase]:10.1f}" for phase in PHASES)
        ratio = f"{row.ratio:.2f} ({row.ratio_min:.2f}-{row.ratio_max:.2f})"
        times = f"{row.name:14}{row.images_per_s:9.1f}{row.ms['step']:9.1f}{phases}{share:>10}"
        lines.append(f"{times}{row.peak_bytes / 2**20:9.0f} {ratio:>19}{row.peak_ratio:13.2f}")
    return lines

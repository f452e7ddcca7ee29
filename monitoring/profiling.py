"""Where the time of a step goes (`profile`), and what is in a GPU's memory
(`memory_snapshot`).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from errors import UserError, count
from runtime.phases import PHASES, PhaseRecorder
from runtime.terminal import log

FOLDER, TRACE, SUMMARY, MEMORY = "profile", "trace.json.gz", "summary.txt", "memory.pickle"
WARM_UP = 2  # steps
MEMORY_STEPS = 3  # the snapshot ends behind them, or behind the profile
MEMORY_ENTRIES = 200_000  # allocations and releases that are kept with their stacks


def check(profile: int, memory_snapshot: bool, output_dir: str, device: torch.device) -> None:
    """UserError where `profile` or `memory_snapshot` could not do what they are for."""
    if memory_snapshot and device.type != "cuda":
        raise UserError(
            "`memory_snapshot` records the memory of a GPU, and this run is on the CPU: leave it out "
            "(`profile` records times on a CPU too)"
        )
    if (profile or memory_snapshot) and not output_dir:
        name = "profile" if profile else "memory_snapshot"
        raise UserError(f"`{name}` writes to a folder in `output_dir`: name one")


class StepProfiler:
    """Records `steps` steps of this process behind two steps of warm-up, and then lets
    the run go on.

    Args:
        output_dir: files go to its folder `profile`; None: nothing is recorded.
        steps: 0: no profile.
        memory: also a snapshot of the GPU's memory, of the first steps.
    """

    def __init__(self, output_dir: Path | None, steps: int, memory: bool, device: torch.device) -> None:
        self.folder = None if output_dir is None or not (steps or memory) else output_dir / FOLDER
        self.steps, self.memory, self.device = steps, memory, device
        self.taken = 0
        self.phases: PhaseRecorder | None = None
        self.profile: Any = None
        if self.folder is None:
            self.steps, self.memory = 0, False
            return
        self.folder.mkdir(exist_ok=True)
        if self.memory:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_ENTRIES)
        if self.steps:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
            when = torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
            self.profile = torch.profiler.profile(
                activities=activities, schedule=when, on_trace_ready=self.write_trace
            )
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it calls it an error that there is no GPU
            self.profile.start()

    def end_step(self) -> float:
        """Behind each step; returns the seconds that writing took."""
        if self.profile is None and not self.memory:
            return 0.0
        started = time.monotonic()
        self.taken += 1
        if self.profile is not None:
            if self.taken == WARM_UP + self.steps:
                self.finish()
                log.info("           the run goes on")
            else:
                self.profile.step()
                if self.taken == WARM_UP:
                    self.phases = PhaseRecorder(self.device)
                    self.phases.start()
        if self.memory and self.taken == max(MEMORY_STEPS, self.steps and WARM_UP + self.steps):
            self.write_memory()
        return time.monotonic() - started

    def close(self) -> None:
        """At the end of the run, whatever ended it: what there is is written."""
        for is_due, write in ((self.profile is not None, self.finish), (self.memory, self.write_memory)):
            if is_due:
                try:
                    write()
                except Exception as error:  # it must not stand for what ended the run
                    log.warning(f"warning: {self.folder}: what was recorded cannot be written ({error})")

    def finish(self) -> None:
        """Stop recording, write the trace and the table."""
        assert self.folder is not None
        profile, self.profile = self.profile, None
        seconds = {} if self.phases is None else self.phases.stop()
        profile.stop()  # which writes the trace
        if self.taken <= WARM_UP:
            log.warning(
                f"warning: nothing was profiled: the run ended within its first {count(WARM_UP, 'step')}, "
                "which only warm up"
            )
            return
        lines = format_summary(seconds, self.taken - WARM_UP, self.steps)
        (self.folder / SUMMARY).write_text("\n".join(lines) + "\n", encoding="utf-8")
        for line in lines:
            log.info(line)
        log.info(f"           {self.folder / TRACE} shows each operation: open it in https://ui.perfetto.dev")

    def write_trace(self, profile: Any) -> None:
        assert self.folder is not None
        if self.taken > WARM_UP:
            profile.export_chrome_trace(str(self.folder / TRACE))

    def write_memory(self) -> None:
        assert self.folder is not None
        self.memory = False
        torch.cuda.memory._dump_snapshot(str(self.folder / MEMORY))
        torch.cuda.memory._record_memory_history(enabled=None)
        log.info(f"memory     {self.folder / MEMORY}: open it in https://pytorch.org/memory_viz")


def format_summary(seconds: dict[str, float], steps: int, asked: int) -> list[str]:
    """A table: seconds a step and share of each phase."""
    total, steps = sum(seconds.values()), max(steps, 1)
    some = "" if steps == asked else f" of {asked}: the run ended"
    lines = [f"profile    {count(steps, 'step')}{some}, {total / steps:.4g} s each, recording included"]
    for name in PHASES:
        share = 100 * seconds[name] / max(total, 1e-12)
        lines.append(f"           {name:<16}{seconds[name] / steps:10.4f} s {share:6.1f}%")
    return lines

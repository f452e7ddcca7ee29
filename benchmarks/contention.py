"""Training on CPU cores that other processes need too: pretraining steps with and
without them, in turns.
"""

from __future__ import annotations

import openmp_spin

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Contender, Contest, Turn
from benchmarks.training_steps import Workload
from errors import UserError
from run_state import Run

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3  # of a turn
GNU_SPINS = "300000"  # what GNU's OpenMP does unless it is told
WAYS: dict[str, dict[str, str]] = {
    "ours": {},
    "torch": {"GOMP_SPINCOUNT": GNU_SPINS},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
}


def list_cores() -> list[int]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """`count` processes that compute without a pause."""
    code = "print(flush=True)\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it runs
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class StepProcess:
    """A process that takes training steps when asked, with these environment
    variables, and on one core alone if one is given.
    """

    def __init__(self, words: list[str], environ: Mapping[str, str], core: int | None = None) -> None:
        inherited = {key: value for key, value in os.environ.items() if key not in openmp_spin.USERS_CHOICE}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step_process", *words],
            cwd=ROOT,
            env=inherited | environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if core is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, [core])

    def ask(self, question: str = "steps") -> None:
        """Or for the `peak` of a step's memory. `answer` waits for it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError("the process that takes the steps ended; what it said is above")
        return json.loads(line)

    def end(self) -> None:
        """`close` waits for it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        self.end()
        self.process.wait()


class BesideOthers(Contender):
    """Steps of one process while `busy` others compute."""

    def __init__(self, name: str, process: StepProcess, busy: int) -> None:
        self.name, self.process, self.busy = name, process, busy

    def turn(self, batch: dict[str, Any]) -> Turn:
        with busy_processes(self.busy):
            self.process.ask()
            reply = self.process.answer()
        return Turn(reply["loss"], {"forward": reply["ms"]})

    def peak(self, batch: dict[str, Any]) -> int:
        return 0  # not the point


def contention(workload: Workload, run: Run) -> Iterator[Contest]:
    """Pretraining steps on the CPU, alone and beside as many busy processes as there
    are cores. `ours`: the step of a quiet machine.
    """
    amp_dtype = "bf16" if run.precision.dtype is torch.bfloat16 else "fp32"
    words = [workload.model, str(workload.batch_size), amp_dtype, str(STEPS)]
    processes, cores = {way: StepProcess(words, environ) for way, environ in WAYS.items()}, len(list_cores())
    try:
        contenders = [
            BesideOthers(f"{way}{', busy' if busy else ''}", process, busy)
            for busy in (0, cores)
            for way, process in processes.items()
        ]
        name = f"contention: {workload.model} pretraining on a CPU, and beside {cores} busy processes"
        yield Contest(name, contenders, {}, workload.batch_size)
    finally:
        for process in processes.values():
            process.close()

"""Runs, started one after another or several at a time, each in a process of its own.

The processes are forks of this one, which has imported the entry scripts: that saves
each the seconds it takes to import them. What was killed goes on where it was.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errors import UserError
from evidence import photos
from evidence.results import summarize
from evidence.runs import SCRIPTS, Run, read_result, with_inputs, write_result
from monitoring import environment
from runtime.terminal import format_duration

THREADS = 1  # of a run


@dataclass(frozen=True)
class Workplace:
    """Where photos and runs are, and where their results go."""

    folder: Path
    results: Path

    def folder_of(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.name}-{run.id}"

    def photos_of(self, run: Run) -> Path:
        return self.folder / "photos" / run.photos

    def checkpoint(self, run: Run) -> Path:
        return self.folder_of(run) / "checkpoint.pth"

    def is_done(self, run: Run) -> bool:
        return read_result(self.results, run) is not None


def list_missing(work: Workplace, runs: Sequence[Run]) -> list[Run]:
    """What must be run for the results of `runs`, in order. A result without a
    checkpoint, as in a fresh clone, is run again where another run starts from it.
    """
    needed: dict[str, Run] = {}

    def need(run: Run) -> None:
        for _, each in run.inputs:
            if not (work.checkpoint(each).exists() and work.is_done(each)):
                need(each)
        needed.setdefault(run.name, run)

    for run in runs:
        if not work.is_done(run):
            need(run)
    return list(needed.values())


def execute(work: Workplace, runs: Sequence[Run], jobs: int, until: float, say: Callable[[str], None]) -> int:
    """The missing ones; how many are left when the time is `until` (of time.monotonic).
    UserError for one that fails.
    """
    waiting, running = list_missing(work, runs), dict[int, tuple[Run, float]]()
    count, done = len(waiting), 0
    for name in {run.photos for run in waiting}:
        photos.prepare(name, work.folder / "photos")
    modules = {stage: importlib.import_module(script[:-3]) for stage, script in SCRIPTS.items()}
    torch.set_num_threads(THREADS)
    try:
        while running or waiting:
            pending = {run.name for run in waiting} | {run.name for run, _ in running.values()}
            ready = [run for run in waiting if not pending & {each.name for _, each in run.inputs}]
            if ready and len(running) < jobs and time.monotonic() < until:
                waiting.remove(ready[0])
                running[start(work, ready[0], modules[ready[0].stage])] = (ready[0], time.monotonic())
                continue
            if not running:
                break
            process, status, usage = os.wait4(-1, 0)
            run, started = running.pop(process)
            if status:
                raise UserError(f"{run.name} failed: its output is in {work.folder_of(run) / 'output.txt'}")
            finish(work, run, usage.ru_utime + usage.ru_stime)
            done += 1
            say(f"{done:>4} of {count}  {run.name:<44}{format_duration(time.monotonic() - started)}")
    finally:
        stop(running)
    return len(waiting)


def stop(processes: Iterable[int]) -> None:
    """They write a checkpoint, from which the same command goes on."""
    for process in processes:
        os.kill(process, signal.SIGTERM)
    for process in processes:
        os.waitpid(process, 0)


def start(work: Workplace, run: Run, module: Any) -> int:
    """The process that runs it."""
    folder = work.folder_of(run)
    if run.stage in ("finetune", "linear", "segment"):  # short: begun again
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = {each.id: work.checkpoint(each) for _, each in run.inputs}
    words = [*run.words(work.photos_of(run), checkpoints), "--output_dir", str(folder)]
    (folder / "resumed").write_text("1") if work.checkpoint(run).exists() else None
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    status = 1
    try:
        with open(folder / "output.txt", "a", encoding="utf-8") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.argv = [SCRIPTS[run.stage], *words]
        module.main(words)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(work: Workplace, run: Run, seconds: float) -> None:
    folder = work.folder_of(run)
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    epochs = run.log_lines
    if len(log) < epochs:
        raise UserError(
            f"{run.name} was stopped after {len(log)} of {epochs} epochs; the same command goes on"
        )
    results = summarize(run, log, work.photos_of(run))
    known = read_result(work.results, run)
    if known is None or known["results"] != results:  # else the file keeps its commit
        write_result(work.results, describe(work, run, seconds) | {"results": results})


def describe(work: Workplace, run: Run, seconds: float) -> dict[str, Any]:
    """`seconds` of the processor, the imports left out."""
    code = environment.describe_code()
    machine = environment.describe_machine()
    return {
        "name": run.name,
        "id": run.id,
        "photos": run.photos,
        "stage": run.stage,
        "variant": run.variant,
        "seed": run.seed,
        "script": SCRIPTS[run.stage],
        "flags": " ".join(run.flags),
        "inputs": {flag: each.name for flag, each in run.inputs},
        "photos_digest": photos.prepare(run.photos, work.folder / "photos"),
        "commit": code["commit"],
        "changed": bool(environment.git("diff", "HEAD", "--", "*.py")),
        # sums are rounded in another order with other instructions
        "machine": {
            **{key: machine[key] for key in ("cpu", "cores")},
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        },
        "threads": THREADS,
        "seconds": round(seconds, 1),
        "resumed": (work.folder_of(run) / "resumed").exists(),
    }


__all__ = ["Workplace", "execute", "list_missing", "with_inputs"]

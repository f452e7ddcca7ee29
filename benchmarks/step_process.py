"""Pretraining steps in a process of its own: python -m benchmarks.step_process MODEL
BATCH_SIZE AMP_DTYPE STEPS.

Each line on stdin asks for STEPS steps and is answered with a line of JSON: the loss of
the last one and the milliseconds of a step.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import json
import sys
import time

import torch

from benchmarks.contests import Workload, pretraining
from run_state import Run, RunOptions
from runtime.device import choose_precision
from runtime.distributed import Launch


def main(model: str, batch_size: str, amp_dtype: str, steps: str) -> None:
    cpu = torch.device("cpu")
    run = Run(RunOptions(), Launch(0, 0, 1), cpu, choose_precision(amp_dtype, cpu))
    contest = next(pretraining(Workload(model, int(batch_size)), run))
    ours = contest.contenders[0]
    for _ in sys.stdin:
        started = time.perf_counter()
        losses = [ours.turn(contest.batch).loss for _ in range(int(steps))]
        ms = 1000 * (time.perf_counter() - started) / int(steps)
        print(json.dumps({"loss": losses[-1], "ms": ms}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

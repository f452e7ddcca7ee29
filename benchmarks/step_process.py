"""Pretraining steps in a process of its own: python -m benchmarks.step_process MODEL
BATCH_SIZE AMP_DTYPE STEPS.

A line on stdin that says `steps` is answered with a line of JSON: after STEPS steps the
loss of the last one and the milliseconds of a step, also of CPU time. To one that says `peak` the answer
is the bytes of tensors at the worst moment of a step, and how many of them are DDP's
buckets. Where the environment names other ranks, each must be asked the same.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import json
import os
import sys
import time
from typing import Any, cast

from benchmarks.contests import Workload, pretraining
from benchmarks.timing import Local
from benchmarks.training_steps import Ours
from run_state import Run, RunOptions
from runtime import distributed
from runtime.device import choose_precision


def main(model: str, batch_size: str, amp_dtype: str, steps: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is said
    launch, cpu = distributed.start("cpu")
    run = Run(RunOptions(), launch, cpu, choose_precision(amp_dtype, cpu))
    contest = next(pretraining(Workload(model, int(batch_size)), run))
    ours, batch = cast(Local, contest.contenders[0]), contest.batch
    weights = cast(Ours, ours.work).state.parameters
    buckets = sum(weight.nbytes for weight in weights) if launch.world_size > 1 else 0
    del contest  # and the other contenders
    distributed.end_set_up()
    for question in sys.stdin:
        if question.strip() == "peak":
            reply: dict[str, Any] = {"peak": ours.peak(batch) + buckets, "buckets": buckets}
        else:
            started, started_cpu = time.perf_counter(), time.process_time()
            losses = [ours.turn(batch).loss for _ in range(int(steps))]
            ms, cpu_ms = (
                1000 * seconds / int(steps)
                for seconds in (time.perf_counter() - started, time.process_time() - started_cpu)
            )
            reply = {"loss": losses[-1], "ms": ms, "cpu_ms": cpu_ms}
        print(json.dumps(reply), file=answers, flush=True)
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])

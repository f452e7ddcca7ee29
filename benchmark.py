"""How fast the stages are, compared with the textbook way and with other libraries.

python benchmark.py --stage pretrain --rounds 10 --output pretrain.json

What the figures mean: docs/performance.md.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import contextlib
import dataclasses
import json
import platform
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import arguments
import engine
from benchmarks import contests
from benchmarks.contention import contention
from benchmarks.growth import growth
from benchmarks.input_images import CLASSES, write_photos
from benchmarks.timing import PHASES, Clock, Contest, format_rows, hold, matmul_speed
from benchmarks.training_steps import Workload
from checkpoint_io import checkpoints
from data_pipeline.samplers import ResumableSampler, build_loader, close
from datasets import ImageFiles
from errors import UserError, report_user_errors
from run_state import Run, RunOptions
from runtime import distributed
from runtime.device import choose_precision, cpu_computes_in_bf16
from runtime.seeding import seed_all
from runtime.terminal import log
from vit_backbone import SIZES

CONTESTS = {
    "pretrain": contests.pretraining,
    "vqkd": contests.vqkd,
    "finetune": contests.finetuning,
    "quantizer": contests.quantizer,
    "data": contests.data,
    "contention": contention,
    "growth": growth,
}
STAGES = ["pretrain", "vqkd", "finetune", "quantizer", "data"]  # unless others are asked for


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(
        "Speed of the stages, compared with plain PyTorch and with other libraries",
        "--stage pretrain --rounds 10 --output pretrain.json",
    )
    add = parser.add_argument
    add("--stage", nargs="+", default=STAGES, choices=list(CONTESTS), help="what to measure")
    add("--device", default="cuda", help="cuda (falls back to cpu) or cpu")
    add("--model", default="base", choices=list(SIZES), help="size of the model in all stages")
    add(
        "--batch_size",
        default=8,
        type=arguments.large_count,
        help="images per step; the quantizer's stage takes 8 times as many, growth also 2, 4 and 8 times",
    )
    add(
        "--amp_dtype",
        default="auto",
        choices=["auto", "bf16", "fp32"],
        help="auto: bf16 where the device computes in it",
    )
    add(
        "--rounds",
        default=8,
        type=arguments.positive,
        help="how often each contender is timed; medians and ranges are over these",
    )
    add("--warmup", default=2, type=arguments.positive, help="rounds before those, not counted")
    add("--teacher", default="hog", help="teacher of the vqkd stage: hog, or timm:<name> with random weights")
    add(
        "--num_workers",
        default=0,
        type=arguments.not_negative,
        help="data processes of the loader whose waiting time is measured",
    )
    add("--compile", action="store_true", help="torch.compile for our model, not for the others")
    add("--output", default="", type=arguments.expand_home, help="JSON file for everything that was measured")
    add("--seed", default=0, type=arguments.seed, help="of weights, images and masks")
    return parser


def time_through_loader(contest: Contest, args: argparse.Namespace, run: Run) -> dict[str, float]:
    """Our step, fed from files by the loader of training: median milliseconds by phase.

    Only this shows the wait for data: between turns, workers would read on while the
    other contenders compute.
    """
    assert contest.view is not None
    step = contest.contenders[0]
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), 2 * args.batch_size)
        files = ImageFiles(
            [(path, index % CLASSES) for index, path in enumerate(paths)], contest.view, args.seed
        )
        sampler = ResumableSampler(len(files), args.batch_size, 1, 0, 1, args.seed)
        loader = build_loader(files, sampler, args.num_workers, run.device.type == "cuda", persistent=True)
        taken = []
        for epoch in range(1 + -(-args.rounds // 2)):
            sampler.set_position(epoch)
            batches = iter(loader)
            for _ in range(sampler.steps_per_epoch):
                clock = Clock(run.device)
                batch = files.device_transform(engine.to_device(next(batches), run.device))
                clock.mark("data")
                taken.append(clock.read_ms() | step.turn(batch).ms)
        close(loader)
    return {phase: statistics.median(ms.get(phase, 0.0) for ms in taken[2:]) for phase in PHASES}


# ── Report ──


def describe_machine(run: Run, side: int) -> tuple[dict[str, Any], float]:
    """What was measured on, and its speed in FLOP/s: that of a (side x side) matrix
    product.
    """
    dtype = run.precision.dtype or torch.float32
    speed = matmul_speed(run.device, dtype, side)
    device = f"{processor_name()}, {torch.get_num_threads()} threads"
    if run.device.type == "cuda":
        device = torch.cuda.get_device_name(run.device)
    facts = {
        "device": device,
        "precision": str(run.precision),
        "matmul_tflops": speed / 1e12,
        "matmul_side": side,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
    }
    return facts, speed


def processor_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def measure(contest: Contest, args: argparse.Namespace, run: Run, matmul: float) -> dict[str, Any]:
    """Hold the contest and log its table; the same as plain data. `matmul`: this
    machine's FLOP/s.
    """
    rows = hold(contest, args.rounds, args.warmup, matmul)
    log.info("")
    log.info(f"{contest.name}: {contest.images} images per step, {args.rounds} rounds")
    for line in format_rows(rows):
        log.info(line)
    for name, reason in contest.absent.items():
        log.info(f"{name:14}{reason}")
    result: dict[str, Any] = {name: getattr(contest, name) for name in ("name", "images", "flops", "absent")}
    result["rows"] = [dataclasses.asdict(row) for row in rows]
    if contest.conclude is not None:
        result["growth"], lines = contest.conclude(rows)
        for line in lines:
            log.info(line)
    if contest.view is not None:
        result["through_loader"] = ms = time_through_loader(contest, args, run)
        spent = ", ".join(f"{phase} {value:.1f}" for phase, value in ms.items())
        log.info(f"ours from files, {args.num_workers} workers, ms: {spent}")
    return result


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    launch, device = distributed.start(args.device)
    if launch.world_size > 1:
        raise UserError("the benchmark is for one process: start it without a launcher")
    run = Run(RunOptions(seed=args.seed), launch, device, choose_precision(args.amp_dtype, device))
    emulated = device.type == "cpu" and run.precision.dtype and not cpu_computes_in_bf16()
    facts, matmul = describe_machine(run, side=8192 if device.type == "cuda" else 256 if emulated else 2048)
    shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in facts.items()}
    log.info(", ".join(f"{key} {value}" for key, value in shown.items()))
    workload = Workload(args.model, args.batch_size, args.teacher, args.seed, args.compile)
    results = []
    for stage in args.stage:
        seed_all(args.seed, device)
        for contest in CONTESTS[stage](workload, run):
            results.append({"stage": stage, **measure(contest, args, run, matmul)})
    if args.output:
        report = {"machine": facts, "flags": checkpoints.to_plain_data(args.plain()), "contests": results}
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
        log.info("")
        log.info(f"written to {args.output}")


if __name__ == "__main__":
    main()

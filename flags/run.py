"""Flags of a run and of a step: where it writes, how it resumes, on what it
computes.
"""

from __future__ import annotations

import argparse

from arguments import (
    MOST,
    WEIGHTS,
    Number,
    above_zero,
    add_obsolete,
    add_switch,
    expand_home,
    not_negative,
    positive,
    seed,
)
from monitoring.trackers import NAMES


def add_run_flags(
    parser: argparse.ArgumentParser, save_ckpt_freq: int, looks_at_health: bool = False
) -> None:
    """Where a run writes, how often, how it resumes, on what it runs.
    `looks_at_health`: the stage has `health_freq`.
    """
    g = parser.add_argument_group("run")
    g.add_argument(
        "--output_dir",
        type=expand_home,
        default="",
        help="checkpoints, log.txt and pictures; empty: nothing is kept",
    )
    g.add_argument(
        "--log_dir", type=expand_home, default=None, help="TensorBoard files; default: --output_dir"
    )
    g.add_argument(
        "--track",
        nargs="+",
        choices=NAMES,
        default=["tensorboard"],
        metavar="NAME",
        help="where the run can be followed, besides output_dir: any of tensorboard, wandb, mlflow, trackio "
        "(docs/trackers.md), or none",
    )
    g.add_argument(
        "--device", default="cuda", help=("cuda (each process its own GPU; the CPU if there is none) or cpu")
    )
    g.add_argument("--seed", type=seed, default=0, help="samples, masks and initial weights derive from it")
    g.add_argument("--resume", type=expand_home, default="", help=f"checkpoint to go on from: {WEIGHTS}")
    add_switch(
        g, "auto_resume", "no_auto_resume", True, "go on from output_dir/checkpoint.pth if there is one"
    )
    g.add_argument(
        "--allow_changed_run",
        action="store_true",
        help="go on from a checkpoint of other images or another --seed, which is refused otherwise",
    )
    g.add_argument(
        "--start_epoch", type=not_negative, default=0, help="epoch to start at; a resumed run knows its own"
    )
    g.add_argument(
        "--save_ckpt_freq",
        type=positive,
        default=save_ckpt_freq,
        help="keep a checkpoint every N epochs",
    )
    g.add_argument(
        "--save_ckpt_steps",
        type=not_negative,
        default=0,
        help="also write checkpoint.pth every N optimizer steps",
    )
    g.add_argument(
        "--keep_ckpts", type=not_negative, default=0, help="of those, keep the last K as checkpoint-stepN.pth"
    )
    g.add_argument(
        "--detect_anomaly", action="store_true", help="stop at the operation that made a NaN (slow)"
    )
    g.add_argument("--print_freq", type=positive, default=20, help="optimizer steps between progress reports")
    g.add_argument(
        "--eval_freq",
        type=positive,
        default=1,
        help="epochs between evaluations; the last epoch is always evaluated",
    )
    g.add_argument("--image_freq", type=not_negative, default=5, help="epochs between pictures; 0: none")
    if looks_at_health:
        g.add_argument(
            "--health_freq",
            type=not_negative,
            default=None,
            help="epochs between figures that need no labels (docs/monitoring.md); 0: none; default: as few "
            "as take under 2%% of the run's time",
        )
    g.add_argument(
        "--num_workers",
        type=not_negative,
        default=10,
        help="data processes per training process; capped at the cores",
    )
    add_switch(g, "pin_mem", "no_pin_mem", True, "page-locked batches: faster copies to a GPU")
    g.add_argument(
        "--peak_tflops",
        type=above_zero,
        default=None,
        help="what one device computes at best in the run's precision, of its data sheet, for the MFU; "
        "default: of the table of known GPUs, of a CPU measured",
    )
    g.add_argument(
        "--profile",
        type=Number(int, 0, 1000),
        default=0,
        metavar="N",
        help="record N steps after two, show where their time goes, write output_dir/profile/, go on",
    )
    g.add_argument(
        "--memory_snapshot",
        action="store_true",
        help="write what lies in the GPU's memory in the first steps to output_dir/profile/",
    )
    g = parser.add_argument_group("processes (a launcher sets these; plain python needs none)")
    g.add_argument("--dist_url", default="env://", help="where the processes meet")
    g.add_argument(
        "--dist_timeout",
        type=Number(float, 0, 10**6, above=True),
        default=30.0,
        help="minutes to wait for another process",
    )
    g.add_argument(
        "--dist_on_itp", action="store_true", help="read rank and world size from Open MPI's variables"
    )
    add_obsolete(g, "--world_size", type=positive, default=1)
    add_obsolete(g, "--local_rank", "--local-rank", type=Number(int, -1, MOST), default=-1)


def add_step_flags(parser: argparse.ArgumentParser, can_shard: bool = False) -> None:
    """How a step is computed, not what; for the stages that train a ViT. `can_shard`:
    with --fsdp.
    """
    g = parser.add_argument_group("memory and speed")
    g.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="compute blocks again in the backward pass: less memory, about a third more computing",
    )
    g.add_argument(
        "--compile", action="store_true", help="torch.compile: a slow first step, then faster ones (GPU)"
    )
    if can_shard:
        g.add_argument(
            "--fsdp",
            action="store_true",
            help="each process keeps only its share of the weights, gradients and moments, and gathers the "
            "weights of a block when it needs them; for huge and giant on several GPUs, together with "
            "--grad_checkpointing; checkpoints are the same as without it",
        )

"""Flags of the optimizer and its schedule."""

from __future__ import annotations

import argparse
from typing import Any

from arguments import (
    MOST,
    Number,
    add_obsolete,
    below_one,
    large_count,
    not_negative,
    not_negative_number,
    positive,
)


def add_optimizer_flags(
    parser: argparse.ArgumentParser, lr: float, min_lr: float, weight_decay: float, epochs: int, lr_help: str
) -> None:
    g = add_optimizer(parser, lr, weight_decay, lr_help)
    g.add_argument(
        "--epochs",
        type=Number(int, 1, 10**5),
        default=epochs,
        help="passes over the training images; unless given, as for ImageNet",
    )
    g.add_argument(
        "--weight_decay_end",
        type=not_negative_number,
        default=None,
        help="final value of a cosine schedule; default: constant",
    )
    g.add_argument("--min_lr", type=not_negative_number, default=min_lr, help="the cosine schedule ends here")
    add_obsolete(g, "--warmup_lr", type=not_negative_number, default=1e-6)
    g.add_argument(
        "--warmup_epochs",
        type=Number(float, 0, 10**5),
        default=5,
        help="linear warm-up; in the recipes 10 for tokenizer and pretraining, 5 or 20 for fine-tuning",
    )
    g.add_argument(
        "--warmup_steps", type=Number(int, -1, MOST), default=-1, help="above 0: replaces --warmup_epochs"
    )


def add_poly_optimizer_flags(
    parser: argparse.ArgumentParser, lr: float, weight_decay: float, max_steps: int
) -> None:
    """For the stage that is counted in optimizer steps and whose learning rate falls
    along a polynomial.
    """
    g = add_optimizer(parser, lr, weight_decay, "of the heads; deeper layers by --layer_decay", batch_size=2)
    g.add_argument(
        "--max_steps", type=Number(int, 1, 10**7), default=max_steps, help="optimizer steps of the whole run"
    )
    g.add_argument(
        "--steps_per_epoch",
        type=positive,
        default=16000,
        help="steps between evaluations, checkpoints and lines of log.txt, rounded up to whole passes over "
        "the data; --save_ckpt_freq, --eval_freq and --image_freq count these",
    )
    g.add_argument("--min_lr", type=not_negative_number, default=0.0, help="the schedule ends here")
    g.add_argument("--warmup_steps", type=not_negative, default=1500, help="linear warm-up; 0: none")
    g.add_argument(
        "--poly_power",
        type=Number(float, 0, 100, above=True),
        default=1.0,
        help="of the decay; 1: a straight line",
    )


def add_optimizer(
    parser: argparse.ArgumentParser, lr: float, weight_decay: float, lr_help: str, batch_size: int = 64
) -> Any:
    """What every schedule shares; returns the group."""
    g = parser.add_argument_group("optimization")
    g.add_argument(
        "--batch_size", type=large_count, default=batch_size, help="images per process and micro-step"
    )
    g.add_argument(
        "--update_freq", type=large_count, default=1, help="micro-steps accumulated into one optimizer step"
    )
    g.add_argument("--opt", default="adamw", help="adamw, adam, sgd, or any name of timm's optimizers")
    g.add_argument(
        "--opt_eps",
        type=not_negative_number,
        default=1e-8,
        help="added to the denominator of the optimizer's update",
    )
    g.add_argument(
        "--opt_betas",
        type=below_one,
        nargs="+",
        default=None,
        help="default: the optimizer's own, for adamw 0.9 0.999",
    )
    g.add_argument("--momentum", type=below_one, default=0.9, help="for --opt sgd and momentum")
    g.add_argument(
        "--clip_grad",
        type=not_negative_number,
        default=None,
        help="clip the gradient to this norm; 3.0 in the recipes of pretraining, else not clipped",
    )
    g.add_argument(
        "--weight_decay",
        type=not_negative_number,
        default=weight_decay,
        help="weight decay of matrices and kernels; biases and norms have none",
    )
    g.add_argument("--lr", type=not_negative_number, default=lr, help=lr_help)
    g.add_argument(
        "--amp_dtype",
        default="auto",
        choices=("auto", "bf16", "fp16", "fp32"),
        help=(
            "auto: bf16 where the device computes in it, fp16 with a gradient scaler on older GPUs (V100), "
            "else fp32"
        ),
    )
    return g

"""Flags of the optimizer and its schedule."""

from __future__ import annotations

import argparse
from typing import Any

from arguments import (
    MOST,
    Number,
    add_obsolete,
    below_one,
    expand_home,
    large_count,
    not_negative,
    not_negative_number,
    positive,
)
from errors import UserError


def add_optimizer_flags(
    parser: argparse.ArgumentParser, lr: float, min_lr: float, weight_decay: float, epochs: int, lr_help: str
) -> None:
    g = add_optimizer(parser, lr, weight_decay, lr_help)
    g.add_argument(
        "--epochs",
        type=Number(int, 1, 10**5),
        default=epochs,
        help="passes over the training images; unless given, those of ImageNet's recipes",
    )
    g.add_argument(
        "--weight_decay_end",
        type=not_negative_number,
        default=None,
        help="final value of a cosine schedule; default: constant",
    )
    g.add_argument("--min_lr", type=not_negative_number, default=min_lr, help="learning rate at the end")
    g.add_argument(
        "--schedule",
        default="cosine",
        choices=("cosine", "wsd"),
        help="after the warm-up: cosine to --min_lr; wsd: constant, so that --epochs may be raised later, "
        "until a cool-down",
    )
    g.add_argument(
        "--cooldown_epochs",
        type=not_negative,
        default=0,
        help="--schedule wsd: the last epochs, in which the learning rate falls to --min_lr",
    )
    g.add_argument(
        "--cooldown_from",
        type=expand_home,
        default="",
        help="go on from this checkpoint of a run of --schedule wsd, in another --output_dir, while the "
        "learning rate falls up to --epochs, which count from the start of that run",
    )
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


def check_schedule(args: argparse.Namespace) -> None:
    """A UserError for flags of the schedule that cannot go together."""
    for name in ("cooldown_epochs", "cooldown_from"):
        if vars(args)[name] and args.schedule != "wsd":
            raise UserError(
                f"--{name} {vars(args)[name]} needs a learning rate that is constant before: --schedule wsd"
            )
    if args.cooldown_epochs and args.cooldown_from:
        raise UserError(
            "--cooldown_epochs and --cooldown_from contradict each other: a cool-down from a checkpoint "
            "lasts to the end of --epochs; leave --cooldown_epochs out"
        )
    if args.cooldown_epochs >= args.epochs:
        raise UserError(
            f"--cooldown_epochs {args.cooldown_epochs} is the whole run of --epochs {args.epochs}: give fewer"
        )
    if args.cooldown_from and args.resume:
        raise UserError(
            "--cooldown_from and --resume both name the checkpoint to go on from: leave --resume out (a "
            "cool-down that was stopped goes on from its --output_dir)"
        )
    if args.schedule == "wsd" and args.weight_decay_end is not None:
        raise UserError(
            f"--weight_decay_end {args.weight_decay_end} is the end of a cosine over the run, whose end "
            "--schedule wsd leaves open: leave it out"
        )


def find_idle_optimizer_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> why it does nothing beside the others."""
    opt = args.opt.lower()
    if opt in ("adam", "adamw"):
        return {"momentum": f"--opt {opt} has --opt_betas"}
    idle = ("opt_betas", "opt_eps") if opt in ("sgd", "momentum") else ()
    return dict.fromkeys(idle, f"--opt {opt} has none")


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
    g.add_argument("--min_lr", type=not_negative_number, default=0.0, help="learning rate at the end")
    g.add_argument("--warmup_steps", type=not_negative, default=1500, help="linear warm-up; 0: none")
    g.add_argument(
        "--poly_power",
        type=Number(float, 0, 100, above=True),
        default=1.0,
        help="power of the polynomial; 1: a straight line",
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

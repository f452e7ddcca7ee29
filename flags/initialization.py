"""Flags of a run that starts from weights: which, and how fast these change at
first.
"""

from __future__ import annotations

import argparse

from arguments import WEIGHTS, Number, expand_home, not_negative
from errors import UserError


def add_initialization_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """`what` starts from the weights."""
    g = parser.add_argument_group("start from weights")
    g.add_argument(
        "--init_from",
        type=expand_home,
        default="",
        help=f"{what} starts from a pretrained or fine-tuned BEiT or ViT, ours, timm's or Hugging Face's: "
        f"{WEIGHTS}, or a folder of the latter two; what the file lacks starts at random",
    )
    g.add_argument(
        "--layer_decay",
        type=Number(float, 0, 10, above=True),
        default=1.0,
        help="learning rate factor per layer down; with 0.8 early layers keep more of --init_from",
    )
    g.add_argument(
        "--freeze_epochs",
        type=not_negative,
        default=0,
        help="epochs at the start that train only what --init_from lacks",
    )


def check_initialization_flags(args: argparse.Namespace) -> None:
    if args.freeze_epochs and not args.init_from:
        raise UserError(
            f"--freeze_epochs {args.freeze_epochs} acts on the weights of --init_from: name them, or "
            "leave it out"
        )
    if args.freeze_epochs >= args.epochs:
        raise UserError(
            f"--freeze_epochs {args.freeze_epochs} is the whole run of --epochs {args.epochs}, in which the "
            "weights of --init_from would not change: give fewer"
        )

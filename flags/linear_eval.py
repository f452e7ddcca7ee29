"""Flags of the linear probe and of k-NN: what they are, and which cannot go
together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from arguments import (
    WEIGHTS,
    Flags,
    above_zero,
    changed_flags,
    crop_share,
    expand_home,
    new_parser,
    parse,
    positive,
    small_count,
)
from errors import UserError
from flags.images import add_data_flags, add_label_flags
from flags.optimization import add_optimizer_flags, check_schedule
from flags.run import add_run_flags

EXAMPLE = """--knn --finetune pretrained/checkpoint.pth --data_set image_folder
--data_path photos/train --eval_data_path photos/val"""
CROPS = ("min_crop_scale", "color_jitter", "vflip", "train_interpolation")  # flags of random crops
# flags that --knn has no use for; --batch_size and --amp_dtype it has
TRAINING_FLAGS = """
    update_freq epochs opt opt_eps opt_betas momentum clip_grad weight_decay
    weight_decay_end lr min_lr warmup_epochs warmup_steps start_epoch resume save_ckpt_freq
    save_ckpt_steps keep_ckpts detect_anomaly print_freq eval_freq image_freq log_dir
    allow_changed_run schedule cooldown_epochs cooldown_from
""".split()


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser("BEiT linear probe and k-NN on frozen features", EXAMPLE)
    add_linear_eval_flags(parser)
    add_data_flags(parser, data_set="IMNET", color_jitter=0.0, any_shape=True)
    add_optimizer_flags(
        parser,
        lr=1e-3,
        min_lr=0.0,
        weight_decay=0.0,
        epochs=100,
        lr_help="for a total batch of 256; scaled by total / 256: 4e-3 for the recipe's 8 x 128",
    )
    add_run_flags(parser, save_ckpt_freq=20)
    parser.set_defaults(input_size=None, warmup_epochs=0)  # None: the backbone's own
    return parser


def add_linear_eval_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("what is evaluated")
    mode = g.add_mutually_exclusive_group()
    mode.add_argument(
        "--linear",
        dest="mode",
        action="store_const",
        const="linear",
        default="linear",
        help="train a linear classifier on every layer (the default)",
    )
    mode.add_argument(
        "--knn",
        dest="mode",
        action="store_const",
        const="knn",
        default="linear",
        help="k nearest neighbors among the training images; trains nothing",
    )
    g.add_argument("--finetune", type=expand_home, required=True, help=f"the frozen backbone: {WEIGHTS}")
    g.add_argument(
        "--num_heads",
        type=small_count,
        default=None,
        help="for files of an unknown size without position bias",
    )
    g.add_argument(
        "--features",
        default="auto",
        choices=("auto", "cls", "mean", "cls_mean"),
        help="CLS token, mean of the patch tokens, or both in a row; auto: cls for files of BEiT v2's "
        "pretraining, else cls_mean (--linear) or mean (--knn)",
    )
    add_label_flags(g)
    g.add_argument(
        "--crop_pct", type=crop_share, default=None, help="center crop; default 0.875, 1.0 from 384 pixels up"
    )
    g = parser.add_argument_group("linear probe")
    g.add_argument(
        "--cached_features",
        action="store_true",
        help="compute features once, from center crops, not random ones: fast, not the published way",
    )
    g = parser.add_argument_group("k-NN")
    g.add_argument(
        "--knn_k", type=positive, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbors"
    )
    g.add_argument(
        "--knn_layer",
        type=small_count,
        default=None,
        help="block whose output is compared, from 1; default: the last",
    )
    add_knn_flags(g)


def add_knn_flags(group: Any) -> None:
    group.add_argument(
        "--knn_temperature", type=above_zero, default=0.07, help="a neighbor's vote is exp(similarity / this)"
    )
    group.add_argument(
        "--knn_standardize",
        action="store_true",
        help="channels to mean 0 and std 1 over the training images before they are compared",
    )


def parse_flags(argv: Sequence[str] | None) -> Flags:
    """A UserError for flags that cannot go together."""
    parser = get_parser()
    args = parse(parser, argv)
    check_flags(parser, args)
    return args


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    changed = changed_flags(parser, args)
    check_schedule(args)
    center = "--knn" if args.mode == "knn" else "--cached_features" if args.cached_features else ""
    for name in changed:
        if center and name in CROPS:
            raise UserError(
                f"--{name} acts on random crops, and {center} takes center crops: leave one of them out"
            )
        if args.mode == "knn" and name == "cached_features":
            raise UserError(
                "--cached_features acts with --linear: --knn computes each feature once in any case"
            )
        if args.mode == "linear" and name.startswith("knn_"):
            raise UserError(f"--{name} acts with --knn alone: add --knn, or leave it out")
    if args.data_set == "image_folder" and not args.eval_data_path:
        raise UserError(
            "--eval_data_path is missing: name the folder of validation images, with the classes of "
            "--data_path"
        )


def idle_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> why it does nothing beside the others."""
    return dict.fromkeys(TRAINING_FLAGS, "--knn trains nothing") if args.mode == "knn" else {}

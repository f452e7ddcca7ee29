"""Flags of the augmentation with which a classifier is trained (timm's)."""

from __future__ import annotations

import argparse

from arguments import (
    add_obsolete,
    below_one,
    crop_share,
    not_negative_number,
    probability,
    small_count,
)


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("augmentation")
    g.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", help="timm's policy string; none: --color_jitter acts instead"
    )
    g.add_argument("--smoothing", type=below_one, default=0.1, help="label smoothing")
    g.add_argument(
        "--crop_pct",
        type=crop_share,
        default=None,
        help="share of the resized image in evaluation's center crop; default 0.875, 1.0 from 384 pixels up",
    )
    g.add_argument("--reprob", type=probability, default=0.25, help="random erasing: probability")
    g.add_argument(
        "--remode",
        default="pixel",
        choices=("const", "rand", "pixel"),
        help="random erasing: what fills an area",
    )
    g.add_argument("--recount", type=small_count, default=1, help="random erasing: number of areas")
    add_obsolete(g, "--resplit", action="store_true")
    g.add_argument("--mixup", type=not_negative_number, default=0.0, help="mixup alpha; 0.8 in the recipes")
    g.add_argument("--cutmix", type=not_negative_number, default=0.0, help="cutmix alpha; 1.0 in the recipes")
    g.add_argument(
        "--cutmix_minmax",
        type=probability,
        nargs="+",
        default=None,
        help="cutmix area range instead of alpha",
    )
    g.add_argument(
        "--mixup_prob",
        type=probability,
        default=1.0,
        help="probability that images are mixed, by --mixup or --cutmix",
    )
    g.add_argument(
        "--mixup_switch_prob",
        type=probability,
        default=0.5,
        help="with both --mixup and --cutmix: probability of cutmix",
    )
    g.add_argument(
        "--mixup_mode",
        default="batch",
        choices=("batch", "pair", "elem"),
        help="mixup and cutmix are drawn once for a batch, for each pair of images, or for each image",
    )

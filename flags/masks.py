"""Masks as the flags of pretraining ask for them."""

from __future__ import annotations

import argparse

from errors import UserError
from masking_generator import MASK_TYPES, MaskingGenerator, scaled_mask_count, scaled_min_block


def check_masks(args: argparse.Namespace, grid: int) -> None:
    masked = args.num_mask_patches
    if args.no_mask and masked:
        raise UserError(
            f"--num_mask_patches {masked} and --no_mask contradict each other: leave one of them out"
        )
    if args.no_mask and args.predict == "masked":
        raise UserError(
            "--no_mask leaves nothing for --predict masked: leave it out, then all patches are predicted"
        )
    if masked is not None and not args.no_mask and not 0 < masked <= grid * grid:
        raise UserError(
            f"--num_mask_patches {masked}: the image has {grid} x {grid} patches; leave the flag out to "
            "mask 38 %, or give --no_mask to mask none"
        )


def build_mask_generator(args: argparse.Namespace, grid: int) -> MaskingGenerator:
    """The masks that the flags ask for; empty ones with --no_mask."""
    count = scaled_mask_count(grid) if args.num_mask_patches is None else args.num_mask_patches
    smallest, largest = args.min_mask_patches_per_block, args.max_mask_patches_per_block
    smallest = scaled_min_block(grid) if smallest is None else smallest
    if args.mask_type == "block" and not args.no_mask and largest is not None and 0 <= largest < smallest:
        raise UserError(
            f"--max_mask_patches_per_block {largest} is below --min_mask_patches_per_block {smallest}: give "
            "the smallest block and a larger one"
        )
    try:
        return MASK_TYPES[args.mask_type](grid, 0 if args.no_mask else count, smallest, largest)
    except ValueError as error:
        raise UserError(f"--min_mask_patches_per_block, --max_mask_patches_per_block: {error}") from None

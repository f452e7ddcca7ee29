"""Flags of masked image modeling: what they are, and which cannot go together; those of
masks and of k-NN are checked in masks.py and declared in knn.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import modeling_dvae
import modeling_pretrain
import modeling_vqkd
from arguments import (
    WEIGHTS,
    Flags,
    Number,
    add_obsolete,
    expand_home,
    large_count,
    new_parser,
    not_negative,
    parse,
    pixels,
    true_or_false,
)
from data_pipeline.crops import PretrainingViews
from errors import UserError, pick
from flags.beit_v1 import add_v1_flags, translate_v1_flags
from flags.images import add_data_flags, add_pipeline_flags, add_vit_flags, mean_and_std
from flags.initialization import add_initialization_flags, check_initialization_flags
from flags.knn import add_knn_monitor_flags
from flags.masks import build_mask_generator, check_masks
from flags.optimization import add_optimizer_flags, check_schedule, find_idle_optimizer_flags
from flags.pixel_format import add_teacher_channels, check_pixel_flags, pixel_format
from flags.run import add_run_flags, add_step_flags
from vit_backbone import SIZES

EXAMPLE = """--data_path photos/train --model beit_small_patch16_224_8k_vocab_cls_pt --output_dir pretrained
--tokenizer_model vqkd_encoder_small_decoder_1x384x6_clip --tokenizer_weight vqkd.pth --codebook_size 1024"""
DALL_E = ("dall-e", "dall_e")
# pixels of the tokenizer's view for each patch
STRIDES = dict.fromkeys(modeling_vqkd.MODELS, modeling_vqkd.PATCH_SIZE) | dict.fromkeys(
    DALL_E, modeling_dvae.PATCH_SIZE
)
OF_THE_TOKENIZER = (
    *("tokenizer_model", "tokenizer_weight", "second_input_size", "second_interpolation"),
    *("codebook_size", "codebook_dim", "teacher_channels", "crop_cycle"),
)
# what the codes of an image depend on, beside the tokenizer's weights, the images and the seed
OF_THE_CROP = (
    *("input_size", "second_interpolation", "min_crop_scale", "color_jitter", "vflip", "data_pipeline"),
    *("augment_on_device", "in_chans", "image_range", "teacher_channels"),
)


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser("BEiT v2 pretraining", EXAMPLE)
    add_pretraining_flags(parser)
    add_initialization_flags(parser, "the model")
    add_vit_flags(parser)
    add_data_flags(parser, data_set="image_folder", color_jitter=0.4)
    add_pipeline_flags(parser)
    add_optimizer_flags(
        parser,
        lr=5e-4,
        min_lr=1e-5,
        weight_decay=0.05,
        epochs=300,
        lr_help="not scaled by the batch; 1.5e-3 for a total batch of 2048 in the recipes",
    )
    add_knn_monitor_flags(parser)
    add_step_flags(parser, can_shard=True)
    add_run_flags(parser, save_ckpt_freq=20, looks_at_health=True)
    add_v1_flags(parser)
    return parser


def add_pretraining_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("masked image modeling")
    g.add_argument(
        "--model", default="beit_base_patch16_224_8k_vocab", help="..._cls_pt adds the CLS head of BEiT v2"
    )
    g.add_argument(
        "--num_mask_patches",
        type=not_negative,
        default=None,
        help="masked patches; default: 75 of 196, scaled to the grid",
    )
    g.add_argument(
        "--max_mask_patches_per_block", type=not_negative, default=None, help="largest area of a rectangle"
    )
    g.add_argument(
        "--min_mask_patches_per_block",
        type=not_negative,
        default=None,
        help="smallest area of a masked rectangle in patches; default: 16 of 14 x 14, scaled to the grid",
    )
    g.add_argument(
        "--mask_type", default="block", choices=("block", "random"), help="rectangles, or single patches"
    )
    g.add_argument("--no_mask", action="store_true", help="mask nothing, predict every patch")
    g.add_argument(
        "--predict",
        default=None,
        choices=("masked", "all"),
        help="the patches that count in the loss; default: masked, with --no_mask all",
    )
    g.add_argument(
        "--target",
        default="tokens",
        choices=("tokens", "pixels"),
        help=("what a patch predicts: its code, or its normalized pixels (then no tokenizer is needed)"),
    )
    g.add_argument(
        "--early_layers",
        type=not_negative,
        default=9,
        help="CLS head: patch tokens come from this block; large: 21",
    )
    g.add_argument("--head_layers", type=not_negative, default=2, help="CLS head: blocks of the head")
    g.add_argument(
        "--shared_lm_head",
        type=true_or_false,
        default=True,
        help="CLS head: predict with the main branch's head",
    )
    add_obsolete(g, "--decoupling_aug", type=true_or_false, default=False)
    add_tokenizer_flags(parser)


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("tokenizer")
    g.add_argument(
        "--tokenizer_model",
        default="vqkd_encoder_base_decoder_3x768x12_clip",
        help="name of a VQ-KD tokenizer (docs/tokenizer.md), or dall-e: BEiT v1's dVAE",
    )
    g.add_argument(
        "--tokenizer_weight", type=expand_home, default=None, help=f"{WEIGHTS}; default: the published file"
    )
    g.add_argument(
        "--second_input_size",
        type=pixels,
        default=None,
        help=("side of the tokenizer's view; default: what gives the model's grid, 224 (dall-e: 112)"),
    )
    g.add_argument("--second_interpolation", default="bicubic", help="how the tokenizer's view is resized")
    g.add_argument("--codebook_size", type=large_count, default=8192, help="the tokenizer's --codebook_n_emd")
    g.add_argument(
        "--codebook_dim", type=large_count, default=32, help="its --codebook_emd_dim; dall-e has none"
    )
    add_teacher_channels(g, of="the tokenizer")
    g.add_argument(
        "--crop_cycle",
        type=Number(int, 0, 1000),
        default=0,
        metavar="K",
        help="K crops of each image, again and again: from the K-th epoch on their codes come from "
        "output_dir/codes, and the tokenizer is not run; 0: every epoch has new crops",
    )


def parse_flags(argv: Sequence[str] | None) -> Flags:
    """A UserError for flags that cannot go together."""
    args = translate_v1_flags(parse(get_parser(), argv))
    check_flags(args)
    return args


def student_grid(args: argparse.Namespace) -> int:
    """Patches of the student along a side."""
    return args.input_size // modeling_pretrain.MODELS[args.model].patch_size


def check_flags(args: argparse.Namespace) -> None:
    variant = pick(modeling_pretrain.MODELS, args.model, "pretraining model")
    patch_size = variant.patch_size
    if args.input_size % patch_size:
        raise UserError(
            f"--input_size {args.input_size} is not a multiple of {args.model}'s patch size {patch_size}"
        )
    check_initialization_flags(args)
    check_schedule(args)
    grid = student_grid(args)
    check_tokenizer_view(args, grid)
    check_pixel_flags(args)
    check_tokenizer_channels(args)
    check_masks(args, grid)
    if has_cls_head(args):
        check_cls_head(args, SIZES[variant.size].depth)
    if bool(args.knn_freq) != bool(args.knn_data_path):
        raise UserError(
            "--knn_freq (epochs, above 0) and --knn_data_path (labeled images) act together: give both or "
            "neither"
        )


def check_tokenizer_view(args: argparse.Namespace, grid: int) -> None:
    stride = tokenizer_stride(args)
    if stride is not None and args.second_input_size not in (None, grid * stride):
        raise UserError(
            f"--second_input_size {args.second_input_size} gives the tokenizer another grid than the "
            f"model's {grid} x {grid}: use {grid * stride}, or leave it out"
        )


def check_tokenizer_channels(args: argparse.Namespace) -> None:
    if args.target == "tokens" and uses_dall_e(args) and tokenizer_channels(args) != 3:
        spelled = "--teacher_channels 0 1 2, or of gray images 0 0 0, names its channels"
        raise UserError(f"{args.tokenizer_model} reads RGB, of --in_chans {args.in_chans}: {spelled}")


def tokenizer_channels(args: argparse.Namespace) -> int:
    """How many channels the tokenizer sees."""
    return len(args.teacher_channels or range(args.in_chans))


def check_cls_head(args: argparse.Namespace, depth: int) -> None:
    if not 0 < args.early_layers <= depth:
        raise UserError(
            f"--early_layers {args.early_layers} must lie between 1 and {args.model}'s depth, {depth}"
        )
    if args.head_layers < 1:
        raise UserError(
            f"--head_layers {args.head_layers} must be 1 or more: the CLS token reaches the patches through "
            f"these blocks alone. Without the CLS head: --model {args.model.removesuffix('_cls_pt')}"
        )


def has_cls_head(args: argparse.Namespace) -> bool:
    return args.model.endswith("_cls_pt")


def uses_dall_e(args: argparse.Namespace) -> bool:
    return args.tokenizer_model in DALL_E


def predicts_all(args: argparse.Namespace) -> bool:
    return args.no_mask or args.predict == "all"


def tokenizer_stride(args: argparse.Namespace) -> int | None:
    """Pixels of the tokenizer's view for each patch; None where there is no
    tokenizer.
    """
    return None if args.target == "pixels" else pick(STRIDES, args.tokenizer_model, "tokenizer")


def idle_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> why it does nothing beside the others."""
    idle = find_idle_optimizer_flags(args)
    if not has_cls_head(args):
        idle |= dict.fromkeys(
            ("early_layers", "head_layers", "shared_lm_head"), f"{args.model} has no CLS head"
        )
    if args.no_mask or args.mask_type == "random":
        reason = "--no_mask" if args.no_mask else "--mask_type random"
        idle |= dict.fromkeys(
            ("min_mask_patches_per_block", "max_mask_patches_per_block"), f"{reason} has no blocks"
        )
    if args.no_mask:
        idle["mask_type"] = "--no_mask masks nothing"
    if args.target == "pixels":
        idle |= dict.fromkeys(OF_THE_TOKENIZER, "--target pixels has no tokenizer")
    elif uses_dall_e(args):
        idle["codebook_dim"] = f"the codes of {args.tokenizer_model} have no dimension"
    if not args.knn_freq:
        idle |= dict.fromkeys(("knn_temperature", "knn_standardize"), "without --knn_freq there is no k-NN")
    return idle


def describe_codes(args: argparse.Namespace) -> dict[str, Any]:
    """The flags on which the codes of an image depend."""
    size = build_pretraining_views(args).second[0]
    return {"second_input_size": size} | {name: getattr(args, name) for name in OF_THE_CROP}


def build_pretraining_views(args: argparse.Namespace) -> PretrainingViews:
    """The student's view, the tokenizer's view of the same crop, if there is a
    tokenizer, and the mask.
    """
    grid, stride = student_grid(args), tokenizer_stride(args)
    return PretrainingViews(
        args.input_size,
        None if stride is None else args.second_input_size or grid * stride,
        args.min_crop_scale,
        args.color_jitter,
        args.train_interpolation,
        args.second_interpolation,
        *mean_and_std(args),
        build_mask_generator(args, grid),
        args.vflip,
        args.data_pipeline,
        args.augment_on_device,
        pixel_format(args),
    )

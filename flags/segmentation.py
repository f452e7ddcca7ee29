"""Flags of semantic segmentation: what they are, and which cannot go together."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence

import modeling_segmentation
from arguments import (
    WEIGHTS,
    Flags,
    Number,
    add_switch,
    below_one,
    expand_home,
    fraction,
    new_parser,
    not_negative_number,
    parse,
    pixels,
    probability,
    scale,
)
from errors import UserError, pick
from flags.images import add_vit_flags, mean_and_std
from flags.optimization import add_poly_optimizer_flags, find_idle_optimizer_flags
from flags.pixel_format import add_pixel_flags, check_pixel_flags
from flags.run import add_run_flags, add_step_flags
from segmentation.joint_views import EvaluationView, TrainingView
from segmentation.sliding_window import SlidingWindow

EXAMPLE = """--data_path ade20k --model upernet_beit_small_patch16
--finetune pretrained/checkpoint.pth --output_dir segmentation"""
# flags that a finished model has no use for
TRAINING_FLAGS = """
    model nb_classes aux_weight head_drop layer_decay rel_pos_bias abs_pos_emb
    layer_scale_init_value drop_path scale_range max_class_share hflip photometric
    batch_size update_freq opt opt_eps opt_betas momentum clip_grad weight_decay lr
    max_steps steps_per_epoch min_lr warmup_steps poly_power grad_checkpointing compile
    save_ckpt_freq save_ckpt_steps keep_ckpts print_freq eval_freq image_freq disable_eval
    allow_changed_run auto_resume log_dir track
    memory_snapshot peak_tflops profile
""".split()


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser("BEiT fine-tuning for semantic segmentation", EXAMPLE)
    add_segmentation_flags(parser)
    add_vit_flags(parser)
    add_poly_optimizer_flags(parser, lr=5e-5, weight_decay=0.05, max_steps=160000)
    add_step_flags(parser)
    add_run_flags(parser, save_ckpt_freq=1)
    return parser


def add_segmentation_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("segmentation model")
    g.add_argument(
        "--model", default="upernet_beit_base_patch16", help="upernet_ or setr_pup_beit_<size>_patch16"
    )
    g.add_argument(
        "--finetune",
        type=expand_home,
        default="",
        help=f"pretrained backbone, or a segmentation model: {WEIGHTS}",
    )
    g.add_argument(
        "--nb_classes",
        type=Number(int, 0, 2**20),
        default=0,
        help="number of classes; 0: as many as there are names, or as the masks have",
    )
    g.add_argument(
        "--aux_weight", type=not_negative_number, default=0.4, help="weight of the auxiliary head's loss"
    )
    g.add_argument(
        "--head_drop",
        type=below_one,
        default=0.1,
        help="dropout of whole channels before the heads' last convolution",
    )
    g.add_argument(
        "--layer_decay",
        type=Number(float, 0, 10, above=True),
        default=0.75,
        help="learning rate factor per layer down; large: 0.9",
    )
    g = parser.add_argument_group("images and masks (docs/segmentation.md)")
    g.add_argument(
        "--data_path",
        type=expand_home,
        default="",
        help="folder of images/ and annotations/, each with training/ and validation/ (ADE20K), or train/ "
        "and val/",
    )
    g.add_argument(
        "--eval_data_path",
        type=expand_home,
        default="",
        help="another folder of images/ and annotations/ to evaluate on",
    )
    g.add_argument(
        "--class_names",
        type=expand_home,
        default=None,
        help="file of the classes' names, one per line; ADE20K's is found automatically",
    )
    g.add_argument(
        "--palette",
        type=expand_home,
        default=None,
        help="file of the classes' colors in pictures, one line 'r g b' per class, 0 to 255",
    )
    add_switch(
        g, "reduce_zero_label", "keep_zero_label", False, "label 0 is ignored, 1 is the first class (ADE20K)"
    )
    g.add_argument(
        "--input_size", type=pixels, default=512, help="side of the square crops, and of evaluation's windows"
    )
    g.add_argument(
        "--base_size",
        type=pixels,
        default=None,
        help="shorter side of an image at scale 1 (the longer one: at most 4 times that); default: "
        "--input_size",
    )
    g.add_argument(
        "--scale_range", type=scale, nargs=2, default=[0.5, 2.0], help="random scale of training images"
    )
    g.add_argument(
        "--max_class_share",
        type=fraction,
        default=0.75,
        help="crops are drawn again where one class covers more",
    )
    g.add_argument("--hflip", type=probability, default=0.5, help="probability of a mirror image")
    add_switch(
        g, "photometric", "no_photometric", True, "brightness, contrast, saturation and hue vary in training"
    )
    g.add_argument(
        "--imagenet_default_mean_and_std",
        action="store_true",
        help="normalize by ImageNet's mean and standard deviation, not 0.5 and 0.5",
    )
    add_pixel_flags(g)
    g = parser.add_argument_group("evaluation and prediction")
    g.add_argument("--eval", action="store_true", help="evaluate --resume (or --finetune) and stop")
    g.add_argument(
        "--predict",
        type=expand_home,
        default="",
        help="folder of images, or one image, to label with --resume (or --finetune); then stop",
    )
    add_switch(
        g,
        "whole_image",
        "sliding_windows",
        False,
        "the network sees whole images, not windows that slide over them",
    )
    g.add_argument(
        "--stride",
        type=pixels,
        default=None,
        help="pixels from one window to the next; default: 2/3 of --input_size (341 of 512)",
    )
    g.add_argument(
        "--eval_scales",
        type=scale,
        nargs="+",
        default=[1.0],
        help="sizes whose probabilities are averaged; multi-scale: 0.5 0.75 1.0 1.25 1.5 1.75",
    )
    g.add_argument("--tta_flip", action="store_true", help="also average with the mirror image")
    g.add_argument("--disable_eval", action="store_true", help="no evaluation during training")


def parse_flags(argv: Sequence[str] | None) -> Flags:
    """A UserError for flags that cannot go together."""
    args = parse(get_parser(), argv)
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    pick(modeling_segmentation.MODELS, args.model, "segmentation model")
    check_pixel_flags(args)
    if args.input_size % 16:
        raise UserError(f"--input_size {args.input_size} is not a multiple of the patch size 16")
    if (args.eval or args.predict) and not (args.resume or args.finetune):
        raise UserError(
            f"--{'eval' if args.eval else 'predict'} needs a trained model: --resume path/to/checkpoint.pth"
        )
    if args.predict and not args.output_dir:
        raise UserError("--predict writes pictures: name a folder for them, --output_dir")
    if not args.data_path and not args.predict and not (args.eval and args.eval_data_path):
        raise UserError(
            "--data_path is missing: name the folder of images/ and annotations/ (docs/segmentation.md)"
        )
    if args.eval and args.predict:
        raise UserError(
            "--eval scores a model against masks, --predict labels images without: give one of them"
        )
    if args.predict and not os.path.exists(args.predict):
        raise UserError(f"--predict {args.predict}: no such file or folder")
    build_training_view(args, fill=(0.5,) * args.in_chans)  # it checks its flags
    build_sliding_window(args)


def idle_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> why it does nothing beside the others."""
    if not (args.eval or args.predict):
        return find_idle_optimizer_flags(args)
    idle = dict.fromkeys(TRAINING_FLAGS, "the model is finished, and built from its file")
    if args.resume:
        idle["finetune"] = "--resume names the model"
    if args.predict:
        idle |= dict.fromkeys(("num_workers", "pin_mem"), "--predict reads one image after the other")
    return idle


def check_batch_norm(args: argparse.Namespace, world_size: int) -> None:
    """UPerNet norms a map that is pooled to one cell per image: one image alone has no
    variance.
    """
    if args.model.startswith("upernet") and args.batch_size * world_size == 1:
        raise UserError(
            "--batch_size 1: batch norm needs two images at once; use 2, several processes, or a setr_pup "
            "model"
        )


def build_sliding_window(args: argparse.Namespace) -> SlidingWindow:
    window = None if args.whole_image else args.input_size
    stride = args.stride or math.floor(args.input_size * 2 / 3)
    if args.stride and args.whole_image:
        raise UserError(
            f"--stride {args.stride} is of windows, --whole_image has none: leave one of them out"
        )
    if stride > args.input_size and not args.whole_image:
        raise UserError(
            f"--stride {stride} is larger than the windows of --input_size {args.input_size}: pixels would "
            "be missed"
        )
    return SlidingWindow(window, stride, args.eval_scales, args.tta_flip)


def build_training_view(args: argparse.Namespace, fill: tuple[float, ...] | None = None) -> TrainingView:
    """`fill`: what lies beyond an image, in [0, 1]; default: the mean."""
    return TrainingView(
        args.input_size,
        args.base_size or args.input_size,
        args.scale_range,
        args.max_class_share,
        args.hflip,
        args.photometric,
        fill=fill or mean_and_std(args)[0],
    )


def build_evaluation_view(args: argparse.Namespace) -> EvaluationView:
    return EvaluationView(args.base_size or args.input_size)

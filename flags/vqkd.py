"""Flags of tokenizer training: what they are, and which cannot go together."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import modeling_vqkd
from arguments import (
    FILE_OR_URL,
    WEIGHTS,
    Flags,
    add_obsolete,
    below_one,
    changed_flags,
    expand_home,
    large_count,
    new_parser,
    not_negative,
    parse,
    pixels,
    small_count,
)
from data_pipeline.crops import TokenizerViews
from errors import UserError, count
from flags.images import add_data_flags, add_pipeline_flags
from flags.initialization import add_initialization_flags, check_initialization_flags
from flags.optimization import add_optimizer_flags, check_schedule, find_idle_optimizer_flags
from flags.pixel_format import add_teacher_channels, check_pixel_flags, pixel_format
from flags.run import add_run_flags, add_step_flags
from norm_ema_quantizer import FEATURES_PER_CODE
from visualization import pixel_decoder
from vqkd_teachers import find_teacher

EXAMPLE = """--data_path photos/train --output_dir vqkd --codebook_n_emd 1024 --revive_dead_codes
--model vqkd_encoder_small_decoder_1x384x6_clip --teacher_model_type hog --quantizer_warmup_steps 200"""
# not the tokenizer's
PIXEL_DECODER_DEFAULTS = {"lr": 2e-3, "min_lr": 1e-5, "epochs": 20, "warmup_epochs": 1.0}
ONLY_FOR_THE_PIXEL_DECODER = ("tokenizer_weight", "pixel_decoder_depth", "pixel_decoder_dim")
NOT_FOR_THE_PIXEL_DECODER = (
    "model",
    "codebook_n_emd",
    "codebook_emd_dim",
    "ema_decay",
    "quantize_kmeans_init",
    "quantizer_warmup_steps",
    "revive_dead_codes",
    "process_type",
    "teacher_model_type",
    "teacher_weight",
    "teacher_input_size",
    "teacher_channels",
    "standardize_teacher",
    "decoder_depth",
    "eval",
    "calculate_codebook_usage",
    "health_freq",
    "init_from",
    "layer_decay",
    "freeze_epochs",
    "imagenet_default_mean_and_std",
    "mean_std",
)
# flags that --eval has no use for
TRAINING_FLAGS = """
    allow_changed_run augment_on_device auto_resume clip_grad color_jitter cooldown_epochs
    cooldown_from data_pipeline disable_eval epochs eval_freq freeze_epochs grad_checkpointing
    health_freq image_freq keep_ckpts layer_decay log_dir lr min_crop_scale min_lr momentum opt opt_betas
    opt_eps print_freq revive_dead_codes save_ckpt_freq save_ckpt_steps schedule start_epoch
    track train_interpolation update_freq vflip warmup_epochs warmup_steps weight_decay
    weight_decay_end ema_decay compile detect_anomaly
    memory_snapshot peak_tflops profile
""".split()


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser("VQ-KD tokenizer training", EXAMPLE)
    add_vqkd_flags(parser)
    add_initialization_flags(parser, "the encoder")
    add_data_flags(parser, data_set="image_folder", color_jitter=0.0)
    add_pipeline_flags(parser)
    add_optimizer_flags(
        parser,
        lr=5e-5,
        min_lr=1e-5,
        weight_decay=1e-4,
        epochs=100,
        lr_help="for a total batch of 128; scaled by total / 128",
    )
    add_step_flags(parser)
    add_run_flags(parser, save_ckpt_freq=20, looks_at_health=True)
    return parser


def add_vqkd_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("tokenizer")
    g.add_argument(
        "--model",
        default="vqkd_encoder_base_decoder_3x768x12_clip",
        help="vqkd_encoder_<size>_decoder_<blocks>x<width>x<heads>_<teacher> (names: docs/tokenizer.md)",
    )
    g.add_argument(
        "--decoder_depth",
        type=small_count,
        default=None,
        help="blocks of the decoder; default: the model name's",
    )
    g.add_argument(
        "--codebook_n_emd",
        type=large_count,
        default=8192,
        help="number of codes; 1024 for tens of thousands of images, 256 for thousands",
    )
    g.add_argument("--codebook_emd_dim", type=large_count, default=32, help="dimension of a code")
    g.add_argument("--ema_decay", type=below_one, default=0.99, help="decay of the codebook's moving average")
    g.add_argument(
        "--quantize_kmeans_init",
        action="store_true",
        help="k-means on the features of the first batch, as in the recipes",
    )
    g.add_argument(
        "--quantizer_warmup_steps",
        type=not_negative,
        default=0,
        help="N steps without the quantizer, then k-means: keeps the codebook in use on small data",
    )
    g.add_argument(
        "--revive_dead_codes", action="store_true", help="codes unused for an epoch move to live features"
    )
    g.add_argument(
        "--process_type", default="default", choices=("default", "imagenet_norm"), help="input normalization"
    )
    g.add_argument(
        "--rec_loss_type", default="cosine", choices=("cosine",), help="distance to the teacher's features"
    )
    g = parser.add_argument_group("teacher")
    g.add_argument(
        "--teacher_model_type",
        default=None,
        help="clip, dino, hog, efficientnet_lite0 or timm:<name>; default: the teacher in the name of "
        "--model, which this flag overrides",
    )
    g.add_argument(
        "--teacher_weight",
        type=expand_home,
        default=None,
        help=f"the teacher's weights: {FILE_OR_URL}; default: timm downloads its own",
    )
    g.add_argument(
        "--teacher_input_size",
        type=pixels,
        default=224,
        help="side of the teacher's view; it must give the tokenizer's grid of patches",
    )
    add_teacher_channels(g, of="the teacher")
    g.add_argument(
        "--standardize_teacher",
        default="auto",
        choices=("auto", "on", "off"),
        help="give each channel of the target mean 0 and std 1; auto: for CNN teachers",
    )
    g = parser.add_argument_group("pixel decoder (a look at what the tokens keep; nothing else uses it)")
    g.add_argument(
        "--train_pixel_decoder",
        action="store_true",
        help="train a decoder from the codes of the frozen --tokenizer_weight to pixels, "
        "which changes these defaults: --lr 2e-3, --min_lr 1e-5, --epochs 20, --warmup_epochs 1",
    )
    g.add_argument(
        "--tokenizer_weight", type=expand_home, default=None, help=f"the trained tokenizer: {WEIGHTS}"
    )
    g.add_argument("--pixel_decoder_depth", type=small_count, default=2, help="blocks of the pixel decoder")
    g.add_argument("--pixel_decoder_dim", type=large_count, default=256, help="its width, a multiple of 32")
    g = parser.add_argument_group("evaluation")
    g.add_argument("--eval", action="store_true", help="evaluate --resume and stop")
    g.add_argument("--disable_eval", action="store_true", help="no evaluation during training")
    add_obsolete(g, "--dist_eval", action="store_true", default=True)
    g.add_argument(
        "--calculate_codebook_usage",
        action="store_true",
        help="evaluate --resume: usage of the codebook, code by code",
    )


def get_pixel_decoder_parser() -> argparse.ArgumentParser:
    """The same flags with other defaults, for --train_pixel_decoder."""
    parser = get_parser()
    parser.description = "Pixel decoder training"
    parser.set_defaults(**PIXEL_DECODER_DEFAULTS)
    return parser


def parse_flags(argv: Sequence[str] | None) -> Flags:
    """A UserError for flags that cannot go together."""
    parser = get_parser()
    args = parse(parser, argv)
    if args.train_pixel_decoder:
        parser = get_pixel_decoder_parser()
        args = parse(parser, argv)
    check_flags(parser, args)
    return args


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    without_effect = NOT_FOR_THE_PIXEL_DECODER if args.train_pixel_decoder else ONLY_FOR_THE_PIXEL_DECODER
    check_schedule(args)
    idle = [name for name in changed_flags(parser, args) if name in without_effect]
    if idle:
        word = "with" if args.train_pixel_decoder else "without"
        raise UserError(f"--{idle[0]} has no effect {word} --train_pixel_decoder: leave it out")
    check_pixel_flags(args)
    if args.mean_std is not None and args.process_type != "default":
        raise UserError(
            f"--mean_std and --process_type {args.process_type} both say how images are normalized: leave "
            "one out"
        )
    if args.train_pixel_decoder:
        if args.pixel_decoder_dim % pixel_decoder.HEAD_DIM:
            raise UserError(
                f"--pixel_decoder_dim {args.pixel_decoder_dim}: give a multiple of "
                f"{pixel_decoder.HEAD_DIM}, the width of a head"
            )
        if not args.tokenizer_weight:
            raise UserError(
                "--train_pixel_decoder needs a trained tokenizer: --tokenizer_weight path/to/checkpoint.pth"
            )
        return
    if args.input_size % modeling_vqkd.PATCH_SIZE:
        raise UserError(
            f"--input_size {args.input_size} is not a multiple of the patch size {modeling_vqkd.PATCH_SIZE}"
        )
    find_teacher(args.teacher_model_type or modeling_vqkd.default_teacher(args.model))
    if evaluates_only(args) and not args.resume:
        raise UserError("--eval needs the tokenizer to evaluate: --resume path/to/checkpoint.pth")
    if evaluates_only(args) and args.init_from:
        raise UserError("--init_from starts a training, and --eval trains nothing: leave one of them out")
    check_initialization_flags(args)


def idle_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> why it does nothing beside the others."""
    idle = find_idle_optimizer_flags(args)
    if evaluates_only(args):
        idle |= dict.fromkeys(TRAINING_FLAGS, "--eval trains nothing")
    process_type = "the tokenizer has --process_type imagenet_norm for it"
    return idle | {"imagenet_default_mean_and_std": process_type}


def evaluates_only(args: argparse.Namespace) -> bool:
    return args.eval or args.calculate_codebook_usage


def check_warmup(args: argparse.Namespace, steps: int, images_per_step: int) -> None:
    """The codebook must be there, and have been trained for a while, before the run
    ends.
    """
    tokens_per_step = images_per_step * (args.input_size // modeling_vqkd.PATCH_SIZE) ** 2
    collecting = math.ceil(FEATURES_PER_CODE * args.codebook_n_emd / tokens_per_step)
    if args.quantizer_warmup_steps > 0 and args.quantizer_warmup_steps + collecting >= steps:
        raise UserError(
            f"--quantizer_warmup_steps {args.quantizer_warmup_steps}, and then {count(collecting, 'step')} "
            f"of collecting features for k-means, leave nothing of a run of {count(steps, 'step')}: shorten "
            "the warm-up or raise --epochs"
        )


def build_tokenizer_views(args: argparse.Namespace) -> TokenizerViews:
    return TokenizerViews(
        args.input_size,
        args.min_crop_scale,
        args.color_jitter,
        args.train_interpolation,
        args.vflip,
        args.data_pipeline,
        args.augment_on_device,
        pixel_format(args),
    )

"""Flags of fine-tuning for classification: what they are, and which cannot go
together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import modeling_finetune
from arguments import (
    WEIGHTS,
    Flags,
    Number,
    add_obsolete,
    add_switch,
    below_one,
    expand_home,
    new_parser,
    not_negative_number,
    parse,
)
from errors import UserError, pick
from flags.augmentation import add_augmentation_flags
from flags.images import add_data_flags, add_label_flags, add_vit_flags
from flags.optimization import add_optimizer_flags, check_schedule, find_idle_optimizer_flags
from flags.pixel_format import check_pixel_flags
from flags.run import add_run_flags, add_step_flags
from flags.trained_classifier import add_trained_model_flags, check_evaluation, find_idle_flags
from layers.rel_pos_bias import as_pair
from runtime.terminal import log

EXAMPLE = """--data_set image_folder --data_path photos/train --output_dir ft
--eval_data_path photos/val --model beit_small_patch16_224 --finetune pretrained/checkpoint.pth"""


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser("BEiT fine-tuning for classification", EXAMPLE)
    add_finetuning_flags(parser)
    add_vit_flags(parser)
    add_data_flags(parser, data_set="IMNET", color_jitter=0.4, needs_training_data=False, any_shape=True)
    add_optimizer_flags(
        parser,
        lr=5e-4,
        min_lr=1e-6,
        weight_decay=0.05,
        epochs=30,
        lr_help="learning rate of the head; --layer_decay lowers that of the layers below it",
    )
    add_step_flags(parser, can_shard=True)
    add_run_flags(parser, save_ckpt_freq=5)
    return parser


def add_finetuning_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("classifier")
    g.add_argument(
        "--model",
        default="beit_base_patch16_224",
        help="beit_<size>_patch16_<pixels>, of the size that was pretrained (docs/pretraining.md: the sizes)",
    )
    add_label_flags(g)
    g.add_argument("--finetune", type=expand_home, default="", help=f"pretrained weights: {WEIGHTS}")
    g.add_argument(
        "--model_key",
        default="model|module",
        help="keys of that file that may hold the weights; the first one it has counts",
    )
    g.add_argument(
        "--model_prefix",
        default="",
        help="take only the keys that begin with it, and strip it; needed where a file holds several models",
    )
    g.add_argument("--model_filter_name", default="", help="the published name of --model_prefix")
    g.add_argument(
        "--init_scale", type=not_negative_number, default=0.001, help="factor on the head's initial weights"
    )
    add_switch(
        g, "use_mean_pooling", "use_cls", True, "classify the mean of the patch tokens, not the CLS token"
    )
    add_switch(g, "qkv_bias", "disable_qkv_bias", True, "bias of query and value")
    g.add_argument("--drop", type=below_one, default=0.0, help="dropout of tokens, projections and MLPs")
    g.add_argument("--attn_drop_rate", type=below_one, default=0.0, help="dropout of attention weights")
    g.add_argument(
        "--layer_decay",
        type=Number(float, 0, 10, above=True),
        default=0.9,
        help="learning rate factor per layer down; 0.6 to 0.9 in the recipes, 1.0 from scratch",
    )
    g.add_argument(
        "--disable_weight_decay_on_rel_pos_bias",
        action="store_true",
        help="no weight decay on the tables of relative position bias",
    )
    g.add_argument(
        "--model_ema",
        action="store_true",
        help="also keep and evaluate a moving average of the weights; with --eval, --predict: use it",
    )
    g.add_argument(
        "--model_ema_decay",
        type=below_one,
        default=0.9999,
        help="decay of that average per step; 0.9999 averages about the last 10,000 steps",
    )
    g.add_argument("--model_ema_force_cpu", action="store_true", help="keep the average in main memory")
    add_augmentation_flags(parser)
    g = parser.add_argument_group("imbalanced classes (docs/fine-tuning.md)")
    g.add_argument(
        "--class_weights",
        default="none",
        choices=("none", "balanced"),
        help="balanced: a class's images weigh in the loss in inverse proportion to their number",
    )
    g.add_argument(
        "--balanced_sampler",
        action="store_true",
        help="draw all classes equally often; an epoch has as many images as without it",
    )
    g.add_argument(
        "--best_metric",
        default="acc1",
        choices=("acc1", "balanced_acc", "f1"),
        help="chooses checkpoint-best.pth by its highest value on the validation images: accuracy, its "
        "mean over the classes, or macro F1",
    )
    add_trained_model_flags(parser)
    g = parser.add_argument_group("checkpoints and evaluation during training")
    g.add_argument(
        "--disable_eval_during_finetuning",
        action="store_true",
        help="no evaluation during training, and no checkpoint-best.pth",
    )
    add_obsolete(g, "--dist_eval", action="store_true", default=False)
    add_switch(g, "save_ckpt", "no_save_ckpt", True, "write checkpoints")
    add_obsolete(g, "--enable_deepspeed", action="store_true")
    add_obsolete(g, "--load-tar", action="store_true")


def parse_flags(argv: Sequence[str] | None) -> Flags:
    """A UserError for flags that cannot go together."""
    args = parse(get_parser(), argv)
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    patch_size = pick(modeling_finetune.MODELS, args.model, "fine-tuning model").patch_size
    finished = args.eval or args.predict  # then the file says which model it is
    if not finished and any(side % patch_size for side in as_pair(args.input_size)):
        raise UserError(
            f"--input_size {args.input_size} is not a multiple of {args.model}'s patch size {patch_size}"
        )
    check_pixel_flags(args)
    check_evaluation(args)
    check_schedule(args)
    if args.class_weights == "balanced" and args.balanced_sampler:
        raise UserError(
            "--class_weights balanced and --balanced_sampler both make up for rare classes, together twice: "
            "give one of them"
        )
    shares = args.cutmix_minmax
    if shares is not None and not (len(shares) == 2 and shares[0] <= shares[1]):
        raise UserError(
            "--cutmix_minmax takes two numbers, the smallest and then the largest share of the image"
        )


def idle_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> why it does nothing beside the others."""
    if args.eval or args.predict:
        return find_idle_flags(args)
    idle = find_idle_optimizer_flags(args)
    unmeasured = "--disable_eval_during_finetuning measures nothing"
    if args.disable_eval_during_finetuning:
        idle["best_metric"] = unmeasured
    if not args.model_ema:
        idle |= dict.fromkeys(
            ("model_ema_decay", "model_ema_force_cpu"), "without --model_ema no average is kept"
        )
    if not args.finetune:
        idle |= dict.fromkeys(("model_key", "model_prefix", "model_filter_name"), "there is no --finetune")
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        names = ("mixup_prob", "mixup_switch_prob", "mixup_mode")
        idle |= dict.fromkeys(names, "without --mixup and --cutmix no images are mixed")
    if not args.reprob:
        idle |= dict.fromkeys(("remode", "recount"), "--reprob 0 erases nothing")
    return idle


def warn_of_input_size(args: argparse.Namespace) -> None:
    made_for = modeling_finetune.MODELS[args.model].img_size
    if made_for >= 224 and as_pair(args.input_size) != as_pair(made_for):
        log.warning(
            f"warning: {args.model} is used at --input_size {args.input_size}; the {made_for} in its name "
            "is not read"
        )

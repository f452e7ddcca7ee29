"""Flags of fine-tuning for classification: what they are, and which cannot go
together.
"""

from __future__ import annotations

import argparse
import os
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
    not_negative,
    not_negative_number,
    parse,
)
from data_pipeline import imagenet_classes
from errors import UserError, pick
from flags.augmentation import add_augmentation_flags
from flags.images import add_data_flags, add_label_flags, add_vit_flags
from flags.optimization import add_optimizer_flags
from flags.pixel_format import check_pixel_flags
from flags.run import add_run_flags, add_step_flags
from layers.rel_pos_bias import as_pair
from runtime.terminal import log

EXAMPLE = """--data_set image_folder --data_path photos/train --output_dir ft
--eval_data_path photos/val --model beit_small_patch16_224 --finetune pretrained/checkpoint.pth"""
WORST_CLASSES = 10
# flags that a finished model has no use for
TRAINING_FLAGS = """
    label_fraction init_scale drop attn_drop_rate drop_path layer_decay
    disable_weight_decay_on_rel_pos_bias model_ema_decay model_ema_force_cpu aa smoothing
    reprob remode recount mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode
    disable_eval_during_finetuning save_ckpt min_crop_scale color_jitter vflip
    class_weights balanced_sampler best_metric
    train_interpolation opt opt_eps opt_betas momentum clip_grad weight_decay
    weight_decay_end lr min_lr warmup_epochs warmup_steps epochs update_freq
    grad_checkpointing compile fsdp auto_resume allow_changed_run start_epoch save_ckpt_freq
    save_ckpt_steps keep_ckpts detect_anomaly print_freq eval_freq image_freq log_dir
""".split()
LABELED_IMAGES = "data_path eval_data_path data_set image_folder_class_index_file download nb_classes".split()


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
        lr_help="of the head; deeper layers by --layer_decay",
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
        "--model_key", default="model|module", help="where the weights are in that file, first hit wins"
    )
    g.add_argument(
        "--model_prefix",
        default="",
        help="take only the keys that begin so, without it; needed where a file holds several models",
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
        help="an epoch has as many images as before, of each class equally many",
    )
    g.add_argument(
        "--best_metric",
        default="acc1",
        choices=("acc1", "balanced_acc", "f1"),
        help="what checkpoint-best.pth has the highest of on the validation images: accuracy, its mean "
        "over the classes, or macro F1",
    )
    g = parser.add_argument_group("evaluation and checkpoints")
    g.add_argument(
        "--eval",
        action="store_true",
        help="evaluate --resume (or --finetune), which is used as it was trained, and stop",
    )
    g.add_argument(
        "--predict",
        type=expand_home,
        default="",
        help="folder of images, or one image, to classify with --resume (or --finetune); then stop",
    )
    g.add_argument(
        "--disable_eval_during_finetuning",
        action="store_true",
        help="no evaluation during training, and no checkpoint-best.pth",
    )
    add_obsolete(g, "--dist_eval", action="store_true", default=False)
    g.add_argument(
        "--robust_test",
        default=None,
        help="--eval_data_path is ImageNet-A, ImageNet-R or ImageNet-Sketch, of a 1000-class model",
    )
    g.add_argument(
        "--tta_flip",
        action="store_true",
        help="--eval, --predict: mean probability of each image and its mirror image",
    )
    g.add_argument(
        "--worst_classes",
        type=not_negative,
        default=WORST_CLASSES,
        help="--eval: show this many classes of lowest recall and what they are taken for; 0: none",
    )
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


def check_evaluation(args: argparse.Namespace) -> None:
    if args.eval and args.predict:
        raise UserError(
            "--eval scores a model against labels, --predict classifies images without: give one of them"
        )
    if (args.eval or args.predict) and not (args.resume or args.finetune):
        raise UserError(
            f"--{'eval' if args.eval else 'predict'} needs a trained model: --resume "
            "path/to/checkpoint.pth, or --finetune and a published name"
        )
    if args.predict and not args.output_dir:
        raise UserError("--predict writes predictions.csv: name a folder for it, --output_dir")
    if args.predict and not os.path.exists(args.predict):
        raise UserError(f"--predict {args.predict}: no such file or folder")
    if not (args.data_path or args.predict) and not (
        args.eval and args.eval_data_path and args.data_set != "CIFAR"
    ):
        raise UserError(
            "--data_path is missing: name the folder of the images (--eval needs --eval_data_path alone)"
        )
    if args.tta_flip and not (args.eval or args.predict):
        raise UserError(
            "--tta_flip acts on a finished model: add --eval or --predict and --resume "
            "path/to/checkpoint.pth, or leave it out"
        )
    used = {"robust_test": args.robust_test, "worst_classes": args.worst_classes != WORST_CLASSES}
    for name, given in used.items():
        if given and not args.eval:
            raise UserError(
                f"--{name} acts on a finished model: add --eval --resume path/to/checkpoint.pth, or leave "
                "it out"
            )
    if args.robust_test:
        robust = imagenet_classes.robust_set(args.robust_test)
        if not args.eval_data_path or args.data_set == "CIFAR":
            raise UserError(
                f"--robust_test {args.robust_test}: give the folder of {robust.name}'s class folders as "
                "--eval_data_path (and not --data_set CIFAR)"
            )


def idle_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> why it does nothing beside the others."""
    if args.eval or args.predict:
        idle = dict.fromkeys(TRAINING_FLAGS, "the model is finished, and built from its file")
        if args.predict:
            idle |= dict.fromkeys(LABELED_IMAGES, "--predict names the images, which have no labels")
        return idle
    unmeasured = "--disable_eval_during_finetuning measures nothing"
    return {"best_metric": unmeasured} if args.disable_eval_during_finetuning else {}


def warn_of_input_size(args: argparse.Namespace) -> None:
    made_for = modeling_finetune.MODELS[args.model].img_size
    if made_for >= 224 and as_pair(args.input_size) != as_pair(made_for):
        log.warning(
            f"warning: {args.model} is used at --input_size {args.input_size}; the {made_for} in its name "
            "is not read"
        )

"""Flags of a finished classifier, evaluated or asked: what they are, and which cannot
go together.
"""

from __future__ import annotations

import argparse
import os

from arguments import expand_home, not_negative
from data_pipeline import imagenet_classes
from errors import UserError

WORST_CLASSES = 10
# flags that a finished model has no use for
TRAINING_FLAGS = """
    label_fraction init_scale drop attn_drop_rate drop_path layer_decay
    disable_weight_decay_on_rel_pos_bias model_ema_decay model_ema_force_cpu aa smoothing
    reprob remode recount mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode
    class_weights balanced_sampler best_metric disable_eval_during_finetuning save_ckpt
    min_crop_scale color_jitter vflip train_interpolation opt opt_eps opt_betas momentum
    clip_grad weight_decay weight_decay_end lr min_lr warmup_epochs warmup_steps epochs update_freq
    grad_checkpointing compile fsdp auto_resume allow_changed_run start_epoch save_ckpt_freq
    save_ckpt_steps keep_ckpts detect_anomaly print_freq eval_freq image_freq log_dir track
    memory_snapshot peak_tflops profile
    schedule cooldown_epochs cooldown_from
""".split()
LABELED_IMAGES = "data_path eval_data_path data_set image_folder_class_index_file download nb_classes".split()


def add_trained_model_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("a finished model: --resume (or --finetune) is used as it was trained")
    g.add_argument("--eval", action="store_true", help="evaluate it on labeled images, and stop")
    g.add_argument(
        "--predict",
        type=expand_home,
        default="",
        help="folder of images, or one image, to classify; then stop",
    )
    g.add_argument(
        "--robust_test",
        default=None,
        help="--eval_data_path is ImageNet-A, -R or -Sketch, and the model knows ImageNet's 1000 classes",
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


def find_idle_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> why it does nothing beside --eval or --predict."""
    idle = dict.fromkeys(TRAINING_FLAGS, "the model is finished, and built from its file")
    if args.resume:
        idle["finetune"] = "--resume names the model"
    if args.predict:
        idle |= dict.fromkeys(LABELED_IMAGES, "--predict names the images, which have no labels")
    return idle

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
    Number,
    changed_flags,
    crop_share,
    expand_home,
    large_count,
    new_parser,
    not_negative_number,
    parse,
    positive,
    small_count,
    true_or_false,
)
from errors import UserError
from flags.images import add_center_view_flags, add_data_flags, add_label_flags
from flags.knn import add_knn_flags
from flags.optimization import add_optimizer_flags, check_schedule, find_idle_optimizer_flags
from flags.pixel_format import check_pixel_flags
from flags.run import add_run_flags

EXAMPLE = """--knn --finetune pretrained/checkpoint.pth --data_set image_folder
--data_path photos/train --eval_data_path photos/val"""
CROPS = ("min_crop_scale", "color_jitter", "vflip", "train_interpolation")  # flags of random crops
# BEiT v1's linear probe; its rate is base_lr x batch / 256 unless --lr says another one
PUBLISHED_DEFAULTS: dict[str, Any] = dict(
    protocol="published",
    features="cls_mean",
    batch_size=128,
    checkpoint_key="model|module|teacher",
    lr=None,
    train_interpolation="bilinear",
)
# flags that --knn has no use for; --batch_size and --amp_dtype it has
TRAINING_FLAGS = """
    update_freq epochs opt opt_eps opt_betas momentum clip_grad weight_decay
    weight_decay_end lr min_lr warmup_epochs warmup_steps start_epoch resume save_ckpt_freq
    save_ckpt_steps keep_ckpts detect_anomaly print_freq eval_freq image_freq log_dir track
    memory_snapshot peak_tflops profile
    allow_changed_run base_lr schedule cooldown_epochs cooldown_from auto_resume
""".split()
FROM_THE_FILE = ("rel_pos_bias", "abs_pos_emb", "layer_scale_init_value", "patch_size")


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser("BEiT linear probe and k-NN on frozen features", EXAMPLE)
    add_linear_eval_flags(parser)
    add_data_flags(parser, data_set="IMNET", color_jitter=0.0, any_shape=True, in_chans=None)
    add_optimizer_flags(
        parser,
        lr=1e-3,
        min_lr=0.0,
        weight_decay=0.0,
        epochs=100,
        lr_help="for a total batch of 256; scaled by total / 256: 4e-3 for the recipe's 8 x 128",
    )
    add_run_flags(parser, save_ckpt_freq=20)
    add_published_flags(parser)
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
    g.add_argument(
        "--finetune",
        "--pretrained_weights",
        action=Published,
        type=expand_home,
        required=True,
        help=f"the frozen backbone: {WEIGHTS}, or timm:<name> for any network of timm",
    )
    g.add_argument(
        "--num_heads",
        type=small_count,
        default=None,
        help="heads of a model of unknown size without relative position bias",
    )
    g.add_argument(
        "--features",
        default="auto",
        choices=("auto", "cls", "mean", "cls_mean"),
        help="CLS token, mean of the patch tokens, or both concatenated; auto: cls for files of BEiT v2's "
        "pretraining, what timm pools for timm:<name>, else cls_mean (--linear) or mean (--knn)",
    )
    add_label_flags(g)
    g.add_argument(
        "--crop_pct", type=crop_share, default=None, help="center crop; default 0.875, 1.0 from 384 pixels up"
    )
    add_center_view_flags(g)
    g = parser.add_argument_group("linear probe")
    g.add_argument(
        "--cached_features",
        action="store_true",
        help="compute features once, from center crops, not random ones: fast, not the published way",
    )
    g = parser.add_argument_group("k-NN")
    g.add_argument(
        "--compare",
        type=expand_home,
        nargs="*",
        default=[],
        help="other backbones, as in --finetune, on the same images, as rows of one table",
    )
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


class Published(argparse.Action):
    """Stores a value, or the constant of a switch, and that the published linear
    probe's name of the flag was used.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        if option_string != "--finetune":
            vars(namespace)["_published"] = True


def add_published_flags(parser: argparse.ArgumentParser) -> None:
    """Behind the flags that some of these are second names of."""
    g = parser.add_argument_group("the published linear probe (docs/probing.md)", conflict_handler="resolve")
    g.add_argument(
        "--protocol",
        default="ours",
        choices=("ours", "published"),
        help="published: BEiT v1's, the default where one of the next flags is given",
    )

    def add(*names: str, **settings: Any) -> None:
        g.add_argument(*names, action=Published, **settings)

    same: Any = argparse.SUPPRESS  # the default is the other name's
    add("--batch_size_per_gpu", dest="batch_size", type=large_count, default=same, help="as --batch_size")
    add("--optimizer", dest="opt", choices=("adamw", "sgd"), default=same, help="as --opt")
    add("--val_freq", dest="eval_freq", type=positive, default=same, help="as --eval_freq")
    add("--num_labels", dest="nb_classes", type=Number(int, 0, 2**20), default=same, help="as --nb_classes")
    add("--base_lr", type=not_negative_number, default=1e-3, help="for a total batch of 256; --lr: as it is")
    add("--checkpoint_key", default="model|module", help="keys of the file that may hold the weights")
    add("--amp_forward", type=true_or_false, default=True, help="False: --amp_dtype fp32")
    add(
        "--avgpool_patchtokens",
        type=true_or_false,
        default=True,
        help="must be True, which is --features cls_mean",
    )
    add("--model", default=None, help="size that the file must have, such as beit_base_patch16_224")
    ignored = "not needed: the file tells"
    add("--rel_pos_bias", nargs=0, const=True, default=True, help=ignored)
    add("--disable_rel_pos_bias", dest="rel_pos_bias", nargs=0, const=False, default=True, help=ignored)
    add("--abs_pos_emb", nargs=0, const=True, default=False, help=ignored)
    add("--layer_scale_init_value", type=not_negative_number, default=0.1, help=ignored)
    add("--patch_size", type=small_count, default=16, help=ignored)
    g.add_argument(
        "--imagenet_default_mean_and_std",
        nargs="?",
        type=true_or_false,
        const=True,
        default=False,
        help="normalize by ImageNet's statistics, not 0.5/0.5",
    )


def parse_flags(argv: Sequence[str] | None) -> Flags:
    """A UserError for flags that cannot go together."""
    args = parse(get_parser(), argv)
    parser = get_parser_for(args)
    args = parse(parser, argv)
    check_flags(parser, args)
    return args


def get_parser_for(args: Flags) -> argparse.ArgumentParser:
    """The parser with the defaults of the protocol that `args` ask for."""
    parser = get_parser()
    named = "_published" in vars(args) and "protocol" not in args.given and args.mode == "linear"
    if args.protocol == "published" or named:
        parser.set_defaults(**PUBLISHED_DEFAULTS, weight_decay=0.0 if args.opt == "sgd" else 1e-4)
    if not args.amp_forward:
        parser.set_defaults(amp_dtype="fp32")
    return parser


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_pixel_flags(args)
    check_protocol(args)
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
        if args.mode == "linear" and name.startswith(("knn_", "compare")):
            raise UserError(f"--{name} acts with --knn alone: add --knn, or leave it out")
    if args.data_set == "image_folder" and not args.eval_data_path:
        raise UserError(
            "--eval_data_path is missing: name the folder of validation images, with the classes of "
            "--data_path"
        )


def check_protocol(args: argparse.Namespace) -> None:
    if not args.avgpool_patchtokens:
        raise UserError(
            "--avgpool_patchtokens False was never supported: --features cls is the CLS token alone"
        )
    if not args.amp_forward and args.amp_dtype not in ("auto", "fp32"):
        raise UserError(
            f"--amp_forward False asks for fp32, --amp_dtype for {args.amp_dtype}: leave one of them out"
        )
    if args.protocol == "ours":
        return
    if args.mode == "knn":
        raise UserError("--protocol published is a linear probe: leave it out, or --knn")
    if args.cached_features:
        raise UserError(
            "--cached_features takes center crops, --protocol published random ones: leave one of them out "
            "(--protocol ours has --pretrained_weights and the other names too)"
        )
    if args.warmup_steps > 0:
        raise UserError(
            "--warmup_steps: the rate of --protocol published changes once an epoch; give --warmup_epochs"
        )


def idle_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flag -> why it does nothing beside the others."""
    idle = dict.fromkeys(FROM_THE_FILE, "the backbone is built from what its file holds")
    if args.mode == "knn":
        return idle | dict.fromkeys((*TRAINING_FLAGS, "base_lr"), "--knn trains nothing")
    idle |= find_idle_optimizer_flags(args)
    if args.protocol == "ours":
        idle["base_lr"] = "--protocol ours has --lr, for a total batch of 256"
    elif args.lr is not None:
        idle["base_lr"] = "--lr says the rate"
    return idle

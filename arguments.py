"""Command-line flags, each declared once, in groups that the scripts compose. Help says
what a flag does and what the recipes use. Published names and defaults are kept
(docs/deviations.md lists the exceptions); flags that lost their meaning are accepted
and say so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from data_pipeline.samplers import LoaderSettings
from datasets import ImageSource
from errors import ArgumentParser, UserError
from masking_generator import MASK_TYPES, MaskingGenerator, scaled_mask_count, scaled_min_block
from transforms import (
    ImageOnly,
    PretrainingViews,
    TokenizerViews,
    eval_view,
    finetuning_view,
    normalization,
)

# Accepted so that old command lines run; a warning says what replaces them.
OBSOLETE = {
    "warmup_lr": "the warm-up starts at 0; its length is --warmup_epochs or --warmup_steps",
    "decoupling_aug": "both views always share one crop and flip",
    "resplit": "random erasing never splits the augmentations here",
    "enable_deepspeed": "mixed precision (--amp_dtype) and DDP take its place",
    "load_tar": "tar files are read with --data_set webdataset (scripts/make_shards.py writes them)",
    "world_size": "the launcher (torchrun, torch.distributed.launch, srun) says how many processes there are",
    "local_rank": "",  # torch.distributed.launch passes it on its own: nothing to say
    "dist_eval": "evaluation is always shared by all processes, and every image counts once",
}
WORST_CLASSES = 10
# What flags for weights take. Everywhere downloads.fetch reads it; of teachers and
# pixel decoders nothing was published.
FILE_OR_URL = "path or URL (in quotes)"
WEIGHTS = "path, URL (in quotes) or published name"


T = TypeVar("T", bound=Any)  # a dataclass


class Flags(argparse.Namespace):
    """Parsed flags; read-only once `freeze` was called, so that what is logged is what ran."""

    def freeze(self) -> Flags:
        self.__dict__["_frozen"] = True
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_frozen"):
            raise AttributeError(f"flags are read-only: derive a local value instead of setting {name}")
        super().__setattr__(name, value)

    def plain(self) -> dict[str, Any]:
        """For checkpoints and logs."""
        return {key: value for key, value in sorted(vars(self).items()) if not key.startswith("_")}


def new_parser(description: str) -> argparse.ArgumentParser:
    return ArgumentParser(
        usage="%(prog)s [flags]",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def words_of(argv: Sequence[str] | None) -> list[str]:
    """A blank behind a line's closing backslash reaches a script as an argument of its own; nobody means one."""
    return [word for word in (sys.argv[1:] if argv is None else argv) if not word or word.strip()]


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> Flags:
    args = parser.parse_args(words_of(argv), namespace=Flags())
    betas, opt = getattr(args, "opt_betas", None), getattr(args, "opt", "").lower()
    if betas and len(betas) != 2 and not (len(betas) == 3 and ("adan" in opt or "ademamix" in opt)):
        parser.error(f"--opt_betas takes two numbers for {args.opt}, such as 0.9 0.999")
    return args.freeze()


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> set[str]:
    """The flags that the command line names, also those that it gives their default."""
    silent = copy.deepcopy(parser)
    for action in silent._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return set(vars(silent.parse_args(words_of(argv))))


def changed_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """The flags that differ from their defaults."""
    return {
        k: v for k, v in sorted(vars(args).items()) if not k.startswith("_") and v != parser.get_default(k)
    }


def warn_of_obsolete_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in changed_flags(parser, args):
        if OBSOLETE.get(name):
            logging.getLogger("beit").warning(f"warning: --{name} does nothing: {OBSOLETE[name]}")


def spelled(parser: argparse.ArgumentParser, name: str, value: Any) -> str:
    """How a command line asks for this value of a flag: --input_size 224, --use_cls, no --abs_pos_emb."""
    if isinstance(value, (list, tuple)):
        return f"--{name} {('x' if name == 'input_size' else ' ').join(map(str, value))}"
    if not isinstance(value, bool):
        return f"no --{name}" if value is None else f"--{name} {value}"
    options = [
        action.option_strings[0]
        for action in parser._actions
        if action.dest == name and action.const is value
    ]
    return options[0] if options else f"no --{name}"


def warn_of_idle_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, idle: dict[str, str]
) -> None:
    """`idle`: name of a flag -> why it does nothing beside the other flags. One warning a
    reason, of what was set.
    """
    by_reason: dict[str, list[str]] = {}
    for name in changed_flags(parser, args):
        if name in idle:
            by_reason.setdefault(idle[name], []).append(f"--{name}")
    for reason, names in by_reason.items():
        verb = "do" if len(names) > 1 else "does"
        logging.getLogger("beit").warning(f"warning: {', '.join(names)} {verb} nothing here: {reason}")


def true_or_false(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{shorten(text)} is neither True nor False")


@dataclass(frozen=True)
class Number:
    """The type of a numeric flag: a finite number from `low` to `high`; `above`, `below`:
    without that end itself.
    """

    kind: type[int] | type[float]
    low: float
    high: float
    above: bool = False
    below: bool = False

    def __call__(self, text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = self.kind(text)
            if (self.low < value if self.above else self.low <= value) and (
                value < self.high if self.below else value <= self.high
            ):
                return value
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not {self}")

    def __str__(self) -> str:
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        ends = f"{'above' if self.above else 'from'} {low} {'and below' if self.below else 'to'} {high}"
        return f"a {'whole ' if self.kind is int else ''}number {ends}"


def shorten(text: str) -> str:
    """What a user typed, in quotes and on one line, for a message."""
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


# What is above these is a slip of the keyboard, or a number that no memory holds.
MOST = 10**9
LARGEST = 1e9
positive, not_negative = Number(int, 1, MOST), Number(int, 0, MOST)
small_count = Number(int, 1, 1000)  # layers, heads, repetitions
large_count = Number(int, 1, 2**20)  # codes, channels, images of a batch
seed = Number(int, 0, 2**32 - 1)  # what NumPy's generator takes
above_zero, not_negative_number = Number(float, 0, LARGEST, above=True), Number(float, 0, LARGEST)
probability = Number(float, 0, 1)
below_one = Number(float, 0, 1, below=True)
fraction = Number(float, 0, 1, above=True)
crop_share = Number(float, 0.05, 1)  # the image is enlarged to the input's size over this
scale = Number(float, 0.01, 100)
pixels = Number(int, 1, 2**14)  # side of an image


def image_size(text: str) -> int | tuple[int, int]:
    """`224`: a square's side; `384x512`: height x width."""
    sides = [pixels(part) for part in text.lower().split("x", 2)]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(
            f"{shorten(text)} is neither a side in pixels nor height x width, such as 384x512"
        )
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])


def expand_home(text: str) -> str:
    """The type of a flag for a path (or several, joined by ::): the shell leaves ~ as it is behind a `=`."""
    parts = [os.path.expanduser(part) for part in text.split("::")]
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{shorten(text)} holds a NUL character, which no path can")
    for part in parts:
        if part.startswith("~") and not os.path.lexists(part):
            raise argparse.ArgumentTypeError(
                f"{shorten(part)}: there is no such user; write ./{shorten(part)[1:-1]} for a name"
            )
    return "::".join(parts)


def add_switch(group: Any, name: str, off: str, default: bool, help: str) -> None:
    """A pair of flags for one value: --name turns it on, --off turns it off."""
    group.add_argument(f"--{name}", action="store_true", default=default, help=help)
    group.add_argument(
        f"--{off}", action="store_false", dest=name, default=default, help=f"turns --{name} off"
    )


def add_run_flags(parser: argparse.ArgumentParser, save_ckpt_freq: int) -> None:
    """Where a run writes, how often, how it resumes, on what it runs."""
    g = parser.add_argument_group("run")
    g.add_argument(
        "--output_dir",
        type=expand_home,
        default="",
        help="checkpoints, log.txt and pictures; empty: nothing is kept",
    )
    g.add_argument(
        "--log_dir", type=expand_home, default=None, help="TensorBoard files; default: --output_dir"
    )
    g.add_argument(
        "--device", default="cuda", help=("cuda (each process its own GPU; the CPU if there is none) or cpu")
    )
    g.add_argument("--seed", type=seed, default=0, help="samples, masks and initial weights derive from it")
    g.add_argument("--resume", type=expand_home, default="", help=f"checkpoint to go on from: {WEIGHTS}")
    add_switch(
        g, "auto_resume", "no_auto_resume", True, "go on from output_dir/checkpoint.pth if there is one"
    )
    g.add_argument(
        "--allow_changed_run",
        action="store_true",
        help=("go on from a checkpoint of other images or another --seed, which is refused otherwise"),
    )
    g.add_argument(
        "--start_epoch", type=not_negative, default=0, help="epoch to start at; a resumed run knows its own"
    )
    g.add_argument(
        "--save_ckpt_freq",
        type=positive,
        default=save_ckpt_freq,
        help="keep a checkpoint every so many epochs",
    )
    g.add_argument(
        "--save_ckpt_steps",
        type=not_negative,
        default=0,
        help="also write checkpoint.pth every N optimizer steps",
    )
    g.add_argument(
        "--keep_ckpts", type=not_negative, default=0, help="of those, keep the last K as checkpoint-stepN.pth"
    )
    g.add_argument(
        "--detect_anomaly", action="store_true", help="stop at the operation that made a NaN (slow)"
    )
    g.add_argument("--print_freq", type=positive, default=20, help="optimizer steps between progress reports")
    g.add_argument(
        "--eval_freq",
        type=positive,
        default=1,
        help=("epochs between evaluations; the last epoch is always evaluated"),
    )
    g.add_argument("--image_freq", type=not_negative, default=5, help="epochs between pictures; 0: none")
    g.add_argument(
        "--num_workers",
        type=not_negative,
        default=10,
        help="data processes per training process; capped at the cores",
    )
    add_switch(g, "pin_mem", "no_pin_mem", True, "page-locked batches: faster copies to a GPU")
    g = parser.add_argument_group("processes (a launcher sets these; plain python needs none)")
    g.add_argument("--dist_url", default="env://", help="where the processes meet")
    g.add_argument(
        "--dist_timeout",
        type=Number(float, 0, 10**6, above=True),
        default=30.0,
        help="minutes to wait for another process",
    )
    g.add_argument(
        "--dist_on_itp", action="store_true", help="read rank and world size from Open MPI's variables"
    )
    g.add_argument("--world_size", type=positive, default=1, help="does nothing")
    g.add_argument(
        "--local_rank", "--local-rank", type=Number(int, -1, MOST), default=-1, help="does nothing"
    )


def add_step_flags(parser: argparse.ArgumentParser, can_shard: bool = False) -> None:
    """How a step is computed, not what; for the stages that train a ViT. `can_shard`: with --fsdp."""
    g = parser.add_argument_group("memory and speed")
    g.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help=("keep less for the backward pass and compute it again: less memory, a third more time"),
    )
    g.add_argument(
        "--compile", action="store_true", help="torch.compile: a slow first step, then faster ones (GPU)"
    )
    if can_shard:
        g.add_argument(
            "--fsdp",
            action="store_true",
            help="each process keeps its share of weights, gradients and moments alone, "
            "and gathers a block's when "
            "it computes: huge and giant on several GPUs, beside --grad_checkpointing; "
            "the checkpoints stay as "
            "they are",
        )


def add_optimizer_flags(
    parser: argparse.ArgumentParser, lr: float, min_lr: float, weight_decay: float, epochs: int, lr_help: str
) -> None:
    g = add_optimizer(parser, lr, weight_decay, lr_help)
    g.add_argument("--epochs", type=Number(int, 1, 10**5), default=epochs)
    g.add_argument(
        "--weight_decay_end",
        type=not_negative_number,
        default=None,
        help="final value of a cosine schedule; default: constant",
    )
    g.add_argument("--min_lr", type=not_negative_number, default=min_lr, help="the cosine schedule ends here")
    g.add_argument("--warmup_lr", type=not_negative_number, default=1e-6, help="does nothing")
    g.add_argument(
        "--warmup_epochs",
        type=Number(float, 0, 10**5),
        default=5,
        help="linear warm-up; 10 in the pretraining recipes",
    )
    g.add_argument(
        "--warmup_steps", type=Number(int, -1, MOST), default=-1, help="above 0: replaces --warmup_epochs"
    )


def add_poly_optimizer_flags(
    parser: argparse.ArgumentParser, lr: float, weight_decay: float, max_steps: int
) -> None:
    """For the stage that is counted in optimizer steps and whose learning rate falls along a polynomial."""
    g = add_optimizer(parser, lr, weight_decay, "of the heads; deeper layers by --layer_decay", batch_size=2)
    g.add_argument(
        "--max_steps", type=Number(int, 1, 10**7), default=max_steps, help="optimizer steps of the whole run"
    )
    g.add_argument(
        "--steps_per_epoch",
        type=positive,
        default=16000,
        help="steps between evaluations, checkpoints and lines of log.txt, rounded up to "
        "whole passes over the "
        "data; --save_ckpt_freq, --eval_freq and --image_freq count these",
    )
    g.add_argument("--min_lr", type=not_negative_number, default=0.0, help="the schedule ends here")
    g.add_argument("--warmup_steps", type=not_negative, default=1500, help="linear warm-up; 0: none")
    g.add_argument(
        "--poly_power",
        type=Number(float, 0, 100, above=True),
        default=1.0,
        help="of the decay; 1: a straight line",
    )


def add_optimizer(
    parser: argparse.ArgumentParser, lr: float, weight_decay: float, lr_help: str, batch_size: int = 64
) -> Any:
    """What every schedule shares; returns the group."""
    g = parser.add_argument_group("optimization")
    g.add_argument(
        "--batch_size", type=large_count, default=batch_size, help="images per process and micro-step"
    )
    g.add_argument(
        "--update_freq", type=large_count, default=1, help="micro-steps accumulated into one optimizer step"
    )
    g.add_argument("--opt", default="adamw", help="adamw, adam, sgd, or any name of timm's optimizers")
    g.add_argument("--opt_eps", type=not_negative_number, default=1e-8)
    g.add_argument(
        "--opt_betas", type=below_one, nargs="+", default=None, help="default: the optimizer's, 0.9 0.999"
    )
    g.add_argument("--momentum", type=below_one, default=0.9, help="for --opt sgd and momentum")
    g.add_argument(
        "--clip_grad",
        type=not_negative_number,
        default=None,
        help="clip the gradient to this norm; pretraining uses 3.0",
    )
    g.add_argument("--weight_decay", type=not_negative_number, default=weight_decay)
    g.add_argument("--lr", type=not_negative_number, default=lr, help=lr_help)
    g.add_argument(
        "--amp_dtype",
        default="auto",
        choices=("auto", "bf16", "fp16", "fp32"),
        help=(
            "auto: bf16 where the device computes in it, fp16 with a gradient scaler on older GPUs "
            "(V100), else fp32"
        ),
    )
    return g


def add_data_flags(
    parser: argparse.ArgumentParser,
    data_set: str,
    color_jitter: float,
    needs_training_data: bool = True,
    any_shape: bool = False,
) -> None:
    """`any_shape`: the stage also takes images that are not square."""
    g = parser.add_argument_group("data")
    g.add_argument(
        "--data_path",
        type=expand_home,
        required=needs_training_data,
        help="folder of images (flat, nested or one folder a class); "
        "webdataset: 'shards/{000000..000146}.tar'",
    )
    g.add_argument(
        "--eval_data_path", type=expand_home, default="", help="held-out images, laid out like --data_path"
    )
    g.add_argument(
        "--data_set",
        default=data_set,
        choices=("image_folder", "IMNET", "CIFAR", "webdataset"),
        help="image_folder: a folder; IMNET: train/ and val/ below data_path; CIFAR: CIFAR-100; "
        "webdataset: tar shards (docs/data.md)",
    )
    g.add_argument(
        "--image_folder_class_index_file",
        type=expand_home,
        default=None,
        help='JSON lines, one {"class": name, "files": [paths below data_path]} a line',
    )
    g.add_argument("--download", action="store_true", help="let torchvision download CIFAR-100")
    shape = "side of the square input in pixels" + (
        ", or height x width, such as 384x512" if any_shape else ""
    )
    g.add_argument("--input_size", type=image_size if any_shape else pixels, default=224, help=shape)
    g.add_argument(
        "--min_crop_scale",
        type=fraction,
        default=0.08,
        help="smallest share of the image a crop covers; BEiT v2: 0.2",
    )
    g.add_argument(
        "--color_jitter",
        type=not_negative_number,
        default=color_jitter,
        help="brightness, contrast and saturation jitter",
    )
    g.add_argument(
        "--vflip",
        type=probability,
        default=0.0,
        help="probability of a vertical flip, for images without an up",
    )
    g.add_argument("--train_interpolation", default="bicubic", help="bicubic, bilinear or lanczos")
    g.add_argument(
        "--imagenet_default_mean_and_std",
        action="store_true",
        help="normalize by ImageNet's statistics, not 0.5/0.5",
    )


def add_pipeline_flags(parser: argparse.ArgumentParser) -> None:
    """Of the stages that train on one random crop (pretraining, the tokenizer);
    fine-tuning has timm's augmentation.
    """
    g = parser.add_argument_group("speed of the data")
    g.add_argument(
        "--data_pipeline",
        default="exact",
        choices=("exact", "fast"),
        help="exact: torchvision's transforms, bit for bit; fast: colors jittered behind "
        "the resize, and large "
        "JPEGs decoded at a reduced size (docs/performance.md: times, and how far pixels "
        "differ)",
    )
    g.add_argument(
        "--augment_on_device",
        action="store_true",
        help=("with --data_pipeline fast: jitter and flip batches on the device, with the same result"),
    )


def add_vit_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("backbone")
    add_switch(g, "rel_pos_bias", "disable_rel_pos_bias", True, "relative position bias")
    g.add_argument("--abs_pos_emb", action="store_true", help="absolute position embedding")
    g.add_argument(
        "--layer_scale_init_value",
        type=not_negative_number,
        default=0.1,
        help="0.1 for base, 1e-5 for large; 0: none",
    )
    g.add_argument(
        "--drop_path",
        type=below_one,
        default=0.1,
        help="stochastic depth of the last block; 0 for 300 epochs of pretraining",
    )


def add_pretraining_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("masked image modeling")
    g.add_argument(
        "--model", default="beit_base_patch16_224_8k_vocab", help="..._cls_pt adds BEiT v2's CLS head"
    )
    g.add_argument(
        "--num_mask_patches",
        type=not_negative,
        default=None,
        help="masked patches; default: 75 of 196, scaled to the grid",
    )
    g.add_argument("--max_mask_patches_per_block", type=not_negative, default=None)
    g.add_argument(
        "--min_mask_patches_per_block",
        type=not_negative,
        default=None,
        help="default: 16 on a 14 x 14 grid, scaled",
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
    g.add_argument("--decoupling_aug", type=true_or_false, default=False, help="does nothing")
    g = parser.add_argument_group("tokenizer")
    g.add_argument(
        "--tokenizer_model",
        default="vqkd_encoder_base_decoder_3x768x12_clip",
        help="or dall-e: BEiT v1's dVAE",
    )
    g.add_argument(
        "--tokenizer_weight", type=expand_home, default=None, help=f"{WEIGHTS}; default: the model's name"
    )
    g.add_argument(
        "--second_input_size",
        type=pixels,
        default=None,
        help=("side of the tokenizer's view; default: what gives the model's grid, 224 (dall-e: 112)"),
    )
    g.add_argument("--second_interpolation", default="bicubic", help="how the tokenizer's view is resized")
    g.add_argument("--codebook_size", type=large_count, default=8192, help="codes of the tokenizer")
    g.add_argument("--codebook_dim", type=large_count, default=32, help="their dimension; dall-e has none")


def add_knn_monitor_flags(parser: argparse.ArgumentParser) -> None:
    """k-NN accuracy while a model pretrains (evaluation/knn.py)."""
    g = parser.add_argument_group("k-NN during pretraining")
    g.add_argument(
        "--knn_freq",
        type=not_negative,
        default=0,
        help="epochs between k-NN evaluations of the student; 0: none",
    )
    g.add_argument(
        "--knn_data_path",
        type=expand_home,
        default="",
        help="labeled images for it: train/class/image and val/class/image",
    )
    add_knn_flags(g)


def add_knn_flags(group: Any) -> None:
    group.add_argument(
        "--knn_temperature", type=above_zero, default=0.07, help="a neighbor's vote is exp(similarity / this)"
    )
    group.add_argument(
        "--knn_standardize",
        action="store_true",
        help=("channels to mean 0 and std 1 over the training images before they are compared"),
    )


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
        help="CLS token, mean of the patch tokens, or both in a row; auto: cls for files "
        "of BEiT v2's "
        "pretraining, else cls_mean (--linear) or mean (--knn)",
    )
    g.add_argument("--nb_classes", type=Number(int, 0, 2**20), default=0, help="0: as many as the data has")
    g.add_argument(
        "--label_fraction",
        type=fraction,
        default=1.0,
        help="train on a fixed, class-balanced share of the labels",
    )
    g.add_argument(
        "--crop_pct", type=crop_share, default=None, help="center crop; default 0.875, 1.0 from 384 pixels up"
    )
    g = parser.add_argument_group("linear probe")
    g.add_argument(
        "--cached_features",
        action="store_true",
        help=("compute features once, from center crops, not random ones: fast, not the published way"),
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


def add_shown_image_flags(parser: argparse.ArgumentParser) -> None:
    """Which images a script draws (visualization/inputs.py)."""
    parser.add_argument(
        "--image", type=expand_home, required=True, nargs="+", help="image files, or folders of images"
    )
    parser.add_argument("--count", type=positive, default=8, help="images of each folder, evenly spread")


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """One view of an image in all scripts that look at it, so that its tokens are the same in each."""
    parser.add_argument(
        "--crop_pct",
        type=crop_share,
        default=None,
        help="share of the shorter side in the center crop; default: evaluation's, "
        "0.875 (1.0 from 384 pixels "
        "up and at 32)",
    )
    parser.add_argument(
        "--device", default="cuda", help=("cuda (each process its own GPU; the CPU if there is none) or cpu")
    )


def add_vqkd_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("tokenizer")
    g.add_argument("--model", default="vqkd_encoder_base_decoder_3x768x12_clip")
    g.add_argument(
        "--decoder_depth",
        type=small_count,
        default=None,
        help="blocks of the decoder; default: the model name's",
    )
    g.add_argument("--codebook_n_emd", type=large_count, default=8192, help="codes; fewer for small data")
    g.add_argument("--codebook_emd_dim", type=large_count, default=32, help="dimension of a code")
    g.add_argument("--ema_decay", type=below_one, default=0.99, help="decay of the codebook's moving average")
    g.add_argument(
        "--quantize_kmeans_init",
        action="store_true",
        help="k-means on the first features; the recipe uses it",
    )
    g.add_argument(
        "--quantizer_warmup_steps",
        type=not_negative,
        default=0,
        help=("N steps without the quantizer, then k-means: keeps the codebook in use on small data"),
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
        help=("clip, dino, hog, efficientnet_lite0 or timm:<name>; default: the one in the model's name"),
    )
    g.add_argument(
        "--teacher_weight",
        type=expand_home,
        default=None,
        help=f"the teacher's weights: {FILE_OR_URL}; default: timm downloads its own",
    )
    g.add_argument("--teacher_input_size", type=pixels, default=224)
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
        help="train a decoder from the codes of the frozen --tokenizer_weight to pixels; "
        "of these flags, "
        "--lr is then 2e-3 unless given, --min_lr 1e-5, --epochs 20, --warmup_epochs 1",
    )
    g.add_argument(
        "--tokenizer_weight", type=expand_home, default=None, help=f"the trained tokenizer: {WEIGHTS}"
    )
    g.add_argument("--pixel_decoder_depth", type=small_count, default=2, help="blocks of the pixel decoder")
    g.add_argument("--pixel_decoder_dim", type=large_count, default=256, help="its width, a multiple of 32")
    g = parser.add_argument_group("evaluation")
    g.add_argument("--eval", action="store_true", help="evaluate --resume and stop")
    g.add_argument("--disable_eval", action="store_true", help="no evaluation during training")
    g.add_argument("--dist_eval", action="store_true", default=True, help="does nothing: always on")
    g.add_argument(
        "--calculate_codebook_usage",
        action="store_true",
        help="evaluate --resume: usage of the codebook, code by code",
    )


def add_finetuning_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("classifier")
    g.add_argument("--model", default="beit_base_patch16_224")
    g.add_argument("--nb_classes", type=Number(int, 0, 2**20), default=0, help="0: as many as the data has")
    g.add_argument("--finetune", type=expand_home, default="", help=f"pretrained weights: {WEIGHTS}")
    g.add_argument(
        "--model_key", default="model|module", help="where the weights are in that file, first hit wins"
    )
    g.add_argument(
        "--model_prefix",
        default="",
        help="take only the keys that begin so, without it; needed where a file holds several models",
    )
    g.add_argument("--model_filter_name", default="", help="as --model_prefix")
    g.add_argument(
        "--init_scale", type=not_negative_number, default=0.001, help="factor on the head's initial weights"
    )
    add_switch(
        g, "use_mean_pooling", "use_cls", True, "classify the mean of the patch tokens, not the CLS token"
    )
    add_switch(g, "qkv_bias", "disable_qkv_bias", True, "bias of query and value")
    g.add_argument("--drop", type=below_one, default=0.0, help="dropout")
    g.add_argument("--attn_drop_rate", type=below_one, default=0.0, help="dropout of attention weights")
    g.add_argument(
        "--layer_decay",
        type=Number(float, 0, 10, above=True),
        default=0.9,
        help="learning rate factor per layer down; see docs/recipes",
    )
    g.add_argument("--disable_weight_decay_on_rel_pos_bias", action="store_true")
    g.add_argument(
        "--label_fraction",
        type=fraction,
        default=1.0,
        help="train on a fixed, class-balanced share of the labels",
    )
    g.add_argument(
        "--model_ema",
        action="store_true",
        help="also keep and evaluate a moving average of the weights; with --eval: evaluate it",
    )
    g.add_argument("--model_ema_decay", type=below_one, default=0.9999)
    g.add_argument("--model_ema_force_cpu", action="store_true", help="keep it in main memory")
    g = parser.add_argument_group("augmentation")
    g.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", help="timm's policy string; none: --color_jitter acts instead"
    )
    g.add_argument("--smoothing", type=below_one, default=0.1, help="label smoothing")
    g.add_argument(
        "--crop_pct",
        type=crop_share,
        default=None,
        help="evaluation crop; default 0.875, 1.0 from 384 pixels up",
    )
    g.add_argument("--reprob", type=probability, default=0.25, help="random erasing: probability")
    g.add_argument(
        "--remode", default="pixel", choices=("const", "rand", "pixel"), help="random erasing: fill"
    )
    g.add_argument("--recount", type=small_count, default=1, help="random erasing: areas")
    g.add_argument("--resplit", action="store_true", help="does nothing")
    g.add_argument("--mixup", type=not_negative_number, default=0.0, help="mixup alpha; 0.8 in the recipes")
    g.add_argument("--cutmix", type=not_negative_number, default=0.0, help="cutmix alpha; 1.0 in the recipes")
    g.add_argument(
        "--cutmix_minmax",
        type=probability,
        nargs="+",
        default=None,
        help="cutmix area range instead of alpha",
    )
    g.add_argument("--mixup_prob", type=probability, default=1.0)
    g.add_argument("--mixup_switch_prob", type=probability, default=0.5)
    g.add_argument("--mixup_mode", default="batch", choices=("batch", "pair", "elem"))
    g = parser.add_argument_group("evaluation and checkpoints")
    g.add_argument("--eval", action="store_true", help="evaluate --resume (or --finetune) and stop")
    g.add_argument("--disable_eval_during_finetuning", action="store_true")
    g.add_argument("--dist_eval", action="store_true", default=False, help="does nothing: always on")
    g.add_argument(
        "--robust_test",
        default=None,
        help=("--eval_data_path is ImageNet-A, ImageNet-R or ImageNet-Sketch, of a 1000-class model"),
    )
    g.add_argument(
        "--tta_flip", action="store_true", help="--eval: mean probability of each image and its mirror image"
    )
    g.add_argument(
        "--worst_classes",
        type=not_negative,
        default=WORST_CLASSES,
        help=("--eval: show so many classes of lowest recall and what they are taken for; 0: none"),
    )
    add_switch(g, "save_ckpt", "no_save_ckpt", True, "write checkpoints")
    g.add_argument("--enable_deepspeed", action="store_true", help="does nothing")
    g.add_argument("--load-tar", action="store_true", help="does nothing")


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
        help="0: as many as there are names, or as the masks have",
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
        help="folder of images/ and annotations/, each with training/ and validation/ "
        "(ADE20K), or train/ "
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
        help="file of the classes' names, one a line; ADE20K's is found by itself",
    )
    g.add_argument(
        "--palette",
        type=expand_home,
        default=None,
        help="file of the classes' colors in pictures, a line 'r g b' each, 0 to 255",
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
        help="shorter side of an image at scale 1 (the longer one: at most 4 times that); "
        "default: "
        "--input_size",
    )
    g.add_argument(
        "--scale_range", type=scale, nargs=2, default=[0.5, 2.0], help="random scale of training images"
    )
    g.add_argument(
        "--max_class_share",
        type=fraction,
        default=0.75,
        help="crops are drawn anew where one class covers more",
    )
    g.add_argument("--hflip", type=probability, default=0.5, help="probability of a mirror image")
    add_switch(
        g, "photometric", "no_photometric", True, "brightness, contrast, saturation and hue vary in training"
    )
    g.add_argument(
        "--imagenet_default_mean_and_std",
        action="store_true",
        help="normalize by ImageNet's statistics, not 0.5/0.5",
    )
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
        help="of the windows; default: 2/3 of --input_size (341 of 512)",
    )
    g.add_argument(
        "--eval_scales",
        type=scale,
        nargs="+",
        default=[1.0],
        help=("sizes whose probabilities are averaged; multi-scale: 0.5 0.75 1.0 1.25 1.5 1.75"),
    )
    g.add_argument("--tta_flip", action="store_true", help="also average with the mirror image")
    g.add_argument("--disable_eval", action="store_true", help="no evaluation during training")


# ── What the flags say, as the values that the library takes ──


def options(kind: type[T], args: argparse.Namespace) -> T:
    """The flags that bear the names of a dataclass's fields, as such an object; what is no
    flag of this command keeps the field's default.
    """
    return kind(**{field.name: vars(args)[field.name] for field in fields(kind) if field.name in vars(args)})


def image_source(args: argparse.Namespace) -> ImageSource:
    return ImageSource(
        args.data_path,
        args.eval_data_path,
        args.data_set,
        args.image_folder_class_index_file,
        args.download,
    )


def loader_settings(args: argparse.Namespace, batch_size: int | None = None) -> LoaderSettings:
    """`batch_size`: where it is not --batch_size, such as 1 where images differ in size."""
    return LoaderSettings(batch_size or args.batch_size, args.num_workers, args.pin_mem)


def mean_and_std(args: argparse.Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return normalization(args.imagenet_default_mean_and_std)


def build_tokenizer_views(args: argparse.Namespace) -> TokenizerViews:
    return TokenizerViews(
        args.input_size,
        args.min_crop_scale,
        args.color_jitter,
        args.train_interpolation,
        args.vflip,
        args.data_pipeline,
        args.augment_on_device,
    )


def build_pretraining_views(
    args: argparse.Namespace, grid: int, tokenizer_stride: int | None = 16
) -> PretrainingViews:
    """`grid`: patches of the model along a side. `tokenizer_stride`: pixels of the
    tokenizer's view for each patch, where --second_input_size is not given; None: there
    is no such view.
    """
    return PretrainingViews(
        args.input_size,
        None if tokenizer_stride is None else args.second_input_size or grid * tokenizer_stride,
        args.min_crop_scale,
        args.color_jitter,
        args.train_interpolation,
        args.second_interpolation,
        *mean_and_std(args),
        build_mask_generator(args, grid),
        args.vflip,
        args.data_pipeline,
        args.augment_on_device,
    )


def build_mask_generator(args: argparse.Namespace, grid: int) -> MaskingGenerator:
    """The masks that the flags ask for; empty ones with --no_mask."""
    count = scaled_mask_count(grid) if args.num_mask_patches is None else args.num_mask_patches
    smallest, largest = args.min_mask_patches_per_block, args.max_mask_patches_per_block
    smallest = scaled_min_block(grid) if smallest is None else smallest
    if args.mask_type == "block" and not args.no_mask and largest is not None and 0 <= largest < smallest:
        raise UserError(
            f"--max_mask_patches_per_block {largest} is below --min_mask_patches_per_block {smallest}: "
            "give the smallest block and a larger one"
        )
    try:
        return MASK_TYPES[args.mask_type](grid, 0 if args.no_mask else count, smallest, largest)
    except ValueError as error:
        raise UserError(f"--min_mask_patches_per_block, --max_mask_patches_per_block: {error}") from None


def build_finetuning_view(args: argparse.Namespace) -> ImageOnly:
    return finetuning_view(
        args.input_size,
        *mean_and_std(args),
        aa=args.aa,
        color_jitter=args.color_jitter,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        train_interpolation=args.train_interpolation,
        min_crop_scale=args.min_crop_scale,
        vflip=args.vflip,
    )


def build_eval_view(args: argparse.Namespace) -> ImageOnly:
    """The center of an image, as a classifier is evaluated on it."""
    mean, std = mean_and_std(args)
    return eval_view(args.input_size, args.crop_pct, mean=mean, std=std)

"""Flags of images and of the backbone that sees them, and the values that the library
takes for them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from arguments import (
    Number,
    add_switch,
    below_one,
    crop_share,
    expand_home,
    fraction,
    image_size,
    large_count,
    not_negative,
    not_negative_number,
    pixels,
    positive,
    probability,
    small_count,
)
from data_pipeline.image_lists import Samples
from data_pipeline.samplers import LoaderSettings
from datasets import ImageSource, find_unlabeled
from flags.pixel_format import add_pixel_flags, image_endings, pixel_format
from runtime.terminal import log_once
from transforms import ImageOnly, eval_view, finetuning_view, normalization_of


def add_data_flags(
    parser: argparse.ArgumentParser,
    data_set: str,
    color_jitter: float,
    needs_training_data: bool = True,
    any_shape: bool = False,
    in_chans: int | None = 3,
) -> None:
    """`any_shape`: the stage also takes images that are not square. `in_chans`: as in
    add_pixel_flags.
    """
    g = parser.add_argument_group("data")
    g.add_argument(
        "--data_path",
        type=expand_home,
        required=needs_training_data,
        help="folder of images (flat, nested or one folder per class); webdataset: "
        "'shards/{000000..000146}.tar'",
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
        help='JSON lines, one {"class": name, "files": [paths below data_path]} per line',
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
        help="smallest share of the image that a random crop covers; 0.2 in BEiT v2's pretraining, else 0.08",
    )
    g.add_argument(
        "--color_jitter",
        type=not_negative_number,
        default=color_jitter,
        help="strength of random brightness, contrast and saturation; 0: none",
    )
    g.add_argument(
        "--vflip",
        type=probability,
        default=0.0,
        help="probability of a vertical flip, for images that have no top and bottom",
    )
    g.add_argument(
        "--train_interpolation", default="bicubic", help="how crops are resized: bicubic, bilinear or lanczos"
    )
    g.add_argument(
        "--imagenet_default_mean_and_std",
        action="store_true",
        help="normalize by ImageNet's mean and standard deviation, not 0.5 and 0.5",
    )
    add_pixel_flags(g, in_chans)


def add_pipeline_flags(parser: argparse.ArgumentParser) -> None:
    """Of the stages that train on one random crop (pretraining, the tokenizer);
    fine-tuning has timm's augmentation.
    """
    g = parser.add_argument_group("speed of the data")
    g.add_argument(
        "--data_pipeline",
        default="exact",
        choices=("exact", "fast"),
        help="exact: torchvision's transforms, bit for bit; fast: colors jittered after the resize, and "
        "large JPEGs decoded at a reduced size (docs/performance.md: times, and how far pixels differ)",
    )
    g.add_argument(
        "--augment_on_device",
        action="store_true",
        help="with --data_pipeline fast: jitter and flip batches on the device, with the same result",
    )


def add_vit_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("backbone")
    add_switch(g, "rel_pos_bias", "disable_rel_pos_bias", True, "relative position bias")
    g.add_argument("--abs_pos_emb", action="store_true", help="absolute position embedding")
    g.add_argument(
        "--layer_scale_init_value",
        type=not_negative_number,
        default=0.1,
        help="initial layer scale, as in pretraining: 0.1 up to base, 1e-5 for large; 0: no layer scale",
    )
    g.add_argument(
        "--drop_path",
        type=below_one,
        default=0.1,
        help="stochastic depth of the last block; recipes: 0 or 0.1 in pretraining, 0.1 to 0.4 afterwards",
    )


def add_label_flags(group: Any) -> None:
    """Which labels a classifier learns."""
    group.add_argument(
        "--nb_classes",
        type=Number(int, 0, 2**20),
        default=0,
        help="number of classes; 0: as many as the data has",
    )
    group.add_argument(
        "--label_fraction",
        type=fraction,
        default=1.0,
        help="train on a fixed, class-balanced share of the labels",
    )


def add_opened_model_flags(parser: argparse.ArgumentParser) -> None:
    """What a file of weights may leave open, for the scripts that build the model from
    it.
    """
    parser.add_argument(
        "--input_size", type=image_size, default=None, help="side, or height x width; default: the model's"
    )
    parser.add_argument(
        "--num_heads",
        type=small_count,
        default=None,
        help="heads of a model of unknown size without relative position bias",
    )
    parser.add_argument(
        "--imagenet_default_mean_and_std",
        action="store_true",
        help="the checkpoint's own setting if it has one",
    )


def add_shown_image_flags(parser: argparse.ArgumentParser, output: str) -> None:
    """Which images a script draws (visualization/inputs.py), and where to: `output`
    unless the user says otherwise.
    """
    parser.add_argument(
        "--image", type=expand_home, required=True, nargs="+", help="image files, or folders of images"
    )
    parser.add_argument(
        "--count", type=positive, default=8, help="images to show of each folder, evenly spread"
    )
    parser.add_argument("--output", type=expand_home, default=output, help="picture to write, preferably PNG")


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """One view of an image in all scripts that look at it, so that its tokens are the
    same in each.
    """
    parser.add_argument(
        "--crop_pct",
        type=crop_share,
        default=None,
        help="share of the shorter side in the center crop; default: evaluation's, 0.875 (1.0 from 384 "
        "pixels up and at 32)",
    )
    parser.add_argument(
        "--device", default="cuda", help=("cuda (each process its own GPU; the CPU if there is none) or cpu")
    )


def add_center_view_flags(parser: Any) -> None:
    """How the center of an image is read, where features are measured or written."""
    parser.add_argument(
        "--data_pipeline",
        default="exact",
        choices=("exact", "fast"),
        help="fast: large JPEGs are decoded at a reduced size, except for random crops",
    )


def add_inference_flags(parser: argparse.ArgumentParser, half_precision: str) -> None:
    """How a network runs over a folder of images. `half_precision`: what that
    changes.
    """
    parser.add_argument("--batch_size", type=large_count, default=64, help="images per process and step")
    parser.add_argument(
        "--amp_dtype",
        default="fp32",
        choices=("fp32", "bf16", "fp16", "auto"),
        help=f"fp32: exact; {half_precision}",
    )
    parser.add_argument(
        "--num_workers",
        type=not_negative,
        default=10,
        help="data processes per process; capped at the cores",
    )
    add_switch(parser, "pin_mem", "no_pin_mem", True, "page-locked batches: faster copies to a GPU")


def image_source(args: argparse.Namespace) -> ImageSource:
    return ImageSource(
        args.data_path,
        args.eval_data_path,
        args.data_set,
        args.image_folder_class_index_file,
        args.download,
        image_endings(args),
    )


def find_training_images(args: argparse.Namespace) -> Samples:
    """Of the stages that look at no label."""
    return find_unlabeled(image_source(args), train=True)


def loader_settings(args: argparse.Namespace, batch_size: int | None = None) -> LoaderSettings:
    """`batch_size`: where it is not --batch_size, such as 1 where images differ in
    size.
    """
    return LoaderSettings(batch_size or args.batch_size, args.num_workers, args.pin_mem)


def mean_and_std(args: argparse.Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return normalization_of(vars(args))


Statistics = tuple[Sequence[float], Sequence[float]]  # mean and std of the channels


def build_finetuning_view(args: argparse.Namespace, statistics: Statistics | None = None) -> ImageOnly:
    """`statistics`: default, those of the flags."""
    pixels = pixel_format(args)
    if not pixels.is_rgb8 and args.aa not in ("", "none", None):
        log_once(
            f"augment    `aa` {args.aa} is of 8-bit RGB: here brightness and contrast vary by `color_jitter` "
            f"{args.color_jitter:g}"
        )
    return finetuning_view(
        args.input_size,
        *(statistics or mean_and_std(args)),
        aa=args.aa,
        color_jitter=args.color_jitter,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        train_interpolation=args.train_interpolation,
        min_crop_scale=args.min_crop_scale,
        vflip=args.vflip,
        pixels=pixels,
    )


def build_eval_view(
    args: argparse.Namespace, statistics: Statistics | None = None, interpolation: str = "bicubic"
) -> ImageOnly:
    """The center of an image, as a classifier is evaluated on it; `statistics`:
    default, those of the flags.
    """
    mean, std = statistics or mean_and_std(args)
    pipeline = getattr(args, "data_pipeline", "exact")  # fine-tuning has no such flag
    return eval_view(
        args.input_size, args.crop_pct, interpolation, mean, std, pixel_format(args), data_pipeline=pipeline
    )

"""Features of a folder of images, for whatever comes after: python extract_features.py
pretrained/checkpoint.pth photos --output features.npy

Every process takes its share of the sorted files and writes it to a file of its own; the
first then joins them in order. Memory does not grow with the number of images, and a
file that has its final name is complete. docs/features.md has examples.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import os
from collections.abc import Sequence

import arguments
from data_pipeline.image_lists import find_images_or_file
from data_pipeline.pixel_format import endings_of
from data_pipeline.samplers import build_eval_loader
from datasets import ImageFiles
from errors import UserError, report_user_errors
from evaluation import feature_files
from evaluation.frozen_backbone import Backbone, FrozenBackbone, open_frozen
from flags.images import (
    add_center_view_flags,
    add_inference_flags,
    add_opened_model_flags,
    add_view_flags,
    loader_settings,
)
from runtime import distributed
from runtime.device import choose_precision
from runtime.distributed import Launch
from runtime.failures import explain_lost_process
from runtime.terminal import log
from transforms import eval_view

MINUTES_TO_WAIT = 24 * 60  # for the slowest process: shares are equal, machines may not be
POOLS = ("cls", "mean", "patches")


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(
        "Features of images", "pretrained/checkpoint.pth photos --output features.npy --pool cls"
    )
    parser.add_argument(
        "source",
        type=arguments.expand_home,
        help=f"the backbone: {arguments.WEIGHTS}, or timm:<name> for any network of timm",
    )
    parser.add_argument(
        "folder", type=arguments.expand_home, help="folder of images, however nested, or one image"
    )
    parser.add_argument(
        "--output",
        type=arguments.expand_home,
        required=True,
        help="file to write: .npy, float32, with the images' names in .paths.txt; or .parquet",
    )
    parser.add_argument(
        "--pool",
        default="auto",
        choices=("auto", *POOLS),
        help="CLS token, mean of the patch tokens, or all patch tokens; auto: cls for files of BEiT "
        "v2's pretraining, what timm pools for timm:<name>, else mean",
    )
    parser.add_argument(
        "--layer",
        type=arguments.Number(int, -1000, 1000),
        default=-1,
        help="block whose output is taken, from 1, or from the end: -1 is the last",
    )
    add_opened_model_flags(parser)
    add_view_flags(parser)
    add_center_view_flags(parser)
    add_inference_flags(parser, "half precision is faster on GPUs, and on CPUs that compute in it")
    return parser


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)

    # ── Setup ──
    feature_files.check_output(args.output)
    launch, device = distributed.start(args.device, timeout_minutes=MINUTES_TO_WAIT)
    backbone = open_frozen(
        args.source, args.input_size, args.num_heads, args.imagenet_default_mean_and_std, "SOURCE"
    )
    paths = find_images_or_file(args.folder, "FOLDER", endings_of(backbone.pixels))
    backbone.model.to(device)
    layer = count_layer(args.layer, backbone)
    pool = (backbone.summary or "mean") if args.pool == "auto" else args.pool
    try:
        encode = FrozenBackbone(backbone, pool, choose_precision(args.amp_dtype, device), layer)
    except UserError as error:
        raise UserError(f"--pool {error}") from None
    log.info(
        f"features   {pool} of layer {layer} of {encode.layers}; images of "
        f"{' x '.join(map(str, backbone.img_size))} pixels, normalized by {backbone.describe_statistics()}"
    )

    # ── Features of this process's share ──
    start, stop = (len(paths) * rank // launch.world_size for rank in (launch.rank, launch.rank + 1))
    view = eval_view(
        backbone.img_size,
        args.crop_pct or backbone.crop_pct,
        backbone.interpolation,
        backbone.mean,
        backbone.std,
        backbone.pixels,
        args.data_pipeline,
    )
    parts = feature_files.Parts(args.output, launch.rank, launch.world_size)
    try:
        with parts.open_own() as add:
            if start < stop:
                images = ImageFiles([(path, None) for path in paths[start:stop]], view)
                for batch in build_eval_loader(images, loader_settings(args), Launch(), device):
                    if "image" in batch:
                        features = encode(batch["image"].to(device, non_blocking=True))
                        add(features, [paths[start + index] for index in batch["index"].tolist()])
                    parts.failed += batch["failed"]

        # ── Join ──
        root = args.folder if os.path.isdir(args.folder) else os.path.dirname(args.folder) or "."
        parts.join(root)
    except RuntimeError as error:
        raise explain_lost_process(error) from None
    finally:
        parts.remove()
    distributed.stop()


def count_layer(asked: int, backbone: Backbone) -> int:
    """From 1; -1 is the last."""
    depth = backbone.model.get_num_layers()
    layer = asked + depth + 1 if asked < 0 else asked
    if not 1 <= layer <= depth:
        raise UserError(f"--layer {asked}: this network has layers 1 to {depth}, or -{depth} to -1")
    return layer


if __name__ == "__main__":
    main()

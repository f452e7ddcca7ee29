"""What a patch attends to.

python visualize_attention.py --checkpoint out/checkpoint.pth --image photo.jpg

Shapes: H heads, h x w grid of N patches, T = 1 + N tokens with CLS in front, L blocks,
Q queries.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

import arguments
import modeling_finetune
import pretrained
from data_pipeline.pixel_format import PixelFormat
from errors import UserError, report_user_errors
from flags.images import add_opened_model_flags, add_shown_image_flags, add_view_flags
from layers.rel_pos_bias import as_pair
from modeling_finetune import VisionTransformer
from runtime import terminal
from runtime.device import pick_device
from runtime.terminal import log
from transforms import eval_view, normalization_of
from visualization import drawing, inputs

# Attention takes T x T numbers in every block and H x T x T in one of them: about 4 GB
# for a base model with patches of 16 pixels.
MOST_PIXELS = 1024 * 1024


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(
        "Attention maps", "--checkpoint pretrained/checkpoint.pth --image photo.jpg"
    )
    parser.add_argument(
        "--checkpoint",
        type=arguments.expand_home,
        required=True,
        help=f"of pretraining or fine-tuning: {arguments.WEIGHTS}",
    )
    add_shown_image_flags(parser, output="attention.png")
    parser.add_argument(
        "--layer",
        type=block_or_all,
        default=-1,
        help=("block to look at, -1: the last; all: each block's mean over heads"),
    )
    parser.add_argument(
        "--query",
        nargs="+",
        default=["cls"],
        help="which tokens attend: cls, or row,column of a patch; each gets a row",
    )
    parser.add_argument(
        "--mean_only",
        action="store_true",
        help=("no single heads: one row per image, the mean over heads for each query"),
    )
    parser.add_argument(
        "--threshold",
        type=arguments.fraction,
        default=None,
        help="show the fewest patches that hold this share of the attention, such as 0.6, not a heat map",
    )
    parser.add_argument(
        "--keep_aspect",
        action="store_true",
        help=("whole images, --input_size is their shorter side; else a center crop"),
    )
    parser.add_argument("--columns", type=arguments.small_count, default=8, help="pictures side by side")
    add_opened_model_flags(parser)
    add_view_flags(parser)
    return parser


def block_or_all(text: str) -> int | None:
    """The number of a block, or None for `all`."""
    return None if text == "all" else arguments.Number(int, -1, 1000)(text)


def check_attention_flags(args: argparse.Namespace) -> None:
    if args.mean_only and args.layer is None:
        raise UserError("--layer all shows means over heads already: leave --mean_only out")
    if args.keep_aspect and not isinstance(args.input_size, int | None):
        raise UserError("--keep_aspect takes the shorter side alone, such as --input_size 384")
    if args.keep_aspect and args.crop_pct is not None:
        raise UserError(
            "--crop_pct has no effect with --keep_aspect, which shows whole images: leave one out"
        )
    for query in args.query:
        query_token(query, None)
    if args.input_size is not None:
        check_size(as_pair(args.input_size))


def check_size(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MOST_PIXELS:
        raise UserError(
            f"--input_size: attention at {size[0]} x {size[1]} pixels does not fit into memory; choose a "
            "smaller one"
        )


def query_token(query: str, grid: tuple[int, int] | None) -> int:
    """Token number of `cls` or `row,column`; without a grid only the form is
    checked.
    """
    if query == "cls":
        return 0
    try:
        row, column = (int(part) for part in query.split(","))
    except ValueError:
        raise UserError(f"--query {query}: give cls or row,column, such as 3,5") from None
    if grid is None:
        return -1
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise UserError(f"--query {query}: the grid has {grid[0]} rows and {grid[1]} columns, counted from 0")
    return 1 + row * grid[1] + column


def blocks_to_show(layer: int | None, depth: int) -> list[int]:
    if layer is None:
        return list(range(depth))
    if not -depth <= layer < depth:
        raise UserError(f"--layer {layer}: the model has {depth} blocks, 0 to {depth - 1}")
    return [layer % depth]


# ── At the size of an image ──


def whole_image_size(image: Image.Image | Tensor, shorter: int, patch: int) -> tuple[int, int]:
    """(height, width) in the image's aspect ratio, to the nearest patch, of which one
    is `shorter`.
    """
    sides = F.get_image_size(image)  # width, height
    scale = shorter / min(sides)
    width, height = (max(shorter, round(side * scale / patch) * patch) for side in sides)
    check_size((height, width))
    return height, width


def resize_model(model: VisionTransformer, size: tuple[int, int]) -> VisionTransformer:
    """The model for images of (height, width), with resized position tables.

    `model` itself if it has that size.
    """
    if model.patch_embed.img_size == size:
        return model
    weights = model.state_dict()
    first: Any = model.blocks[0]
    settings = pretrained.infer_architecture(weights, {}, first.attn.num_heads)
    other = VisionTransformer(**settings | {"img_size": size})
    other.load_state_dict(modeling_finetune.remap_pretrained(weights, other), strict=False)
    return other.to(model.cls_token.device).eval().requires_grad_(False)


def compute_attention(
    model: VisionTransformer, image: Tensor, blocks: list[int], tokens: list[int]
) -> Tensor:
    """The attention of Q tokens to every patch, without CLS: (L, H, Q, h, w) on the
    CPU.
    """
    maps = [model.attention_maps(image[None], block)[0][:, tokens, 1:].cpu() for block in blocks]
    return torch.stack(maps).unflatten(-1, model.patch_embed.patch_shape)


# ── Drawing ──


def mark_queries(image: Tensor, tokens: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Draw a frame around the patch of every token but CLS; the image may be
    enlarged.
    """
    patch = image.shape[1] // grid[0], image.shape[2] // grid[1]
    for index in (token - 1 for token in tokens if token > 0):
        image = drawing.draw_frame(image, index // grid[1] * patch[0], index % grid[1] * patch[1], *patch)
    return image


def draw(
    image: Tensor, heat: Tensor, caption: str, threshold: float | None, tokens: Sequence[int] = ()
) -> Tensor:
    """One captioned picture: a heat map (h, w) over the image, or its largest patches.

    The latter are the fewest that hold `threshold` of the sum.
    """
    if threshold is None:
        picture = drawing.heat_overlay(image, heat)
    else:
        kept = drawing.keep_most(heat, threshold)
        picture, caption = drawing.spotlight(image, kept), f"{caption}: {int(kept.sum())} of {kept.numel()}"
    return drawing.add_caption(mark_queries(picture, tokens, heat.shape), caption)


def name_maps(maps: Tensor, blocks: list[int]) -> list[tuple[str, Tensor]]:
    """The maps of one query (L, H, h, w) as (caption, (h, w)).

    The means of several blocks, or the mean and the heads of a single one.
    """
    if len(blocks) > 1:
        return [(f"block {block}", heat) for block, heat in zip(blocks, maps.mean(1), strict=True)]
    return [("mean", maps[0].mean(0)), *((f"head {number}", heat) for number, heat in enumerate(maps[0]))]


def draw_image(
    name: str, image: Tensor, model: VisionTransformer, shown: Tensor, args: argparse.Namespace
) -> list[Tensor]:
    """The rows of the figure for one image.

    `image`: normalized (3, height, width), for the model; `shown`: the same in [0, 1].
    """
    blocks, grid = blocks_to_show(args.layer, len(model.blocks)), model.patch_embed.patch_shape
    queries = {query: query_token(query, grid) for query in args.query}
    maps = dict(
        zip(queries, compute_attention(model, image, blocks, list(queries.values())).unbind(2), strict=True)
    )
    shown = drawing.enlarge(shown)  # room for a caption
    if args.mean_only:
        title = drawing.add_caption(mark_queries(shown, list(queries.values()), grid), name)
        means = [
            draw(shown, maps[query][0].mean(0), f"query {query}", args.threshold, [token])
            for query, token in queries.items()
        ]
        return [drawing.gallery([title, *means], args.columns)]
    rows = []
    for query, token in queries.items():
        title = drawing.add_caption(mark_queries(shown, [token], grid), f"{name}, query {query}")
        pictures = [
            draw(shown, heat, caption, args.threshold) for caption, heat in name_maps(maps[query], blocks)
        ]
        rows.append(drawing.gallery([title, *pictures], args.columns))
    return rows


@report_user_errors
@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    check_attention_flags(args)
    terminal.set_up_logging(0)
    inputs.check_shown(args.image, "--image")
    inputs.prepare_output(args.output, inputs.PICTURES, "--output")
    device = pick_device(args.device)
    model, flags = pretrained.open_backbone(args.checkpoint, args.input_size, args.num_heads)
    pixels = PixelFormat.of_flags(flags | {"in_chans": model.patch_embed.proj.in_channels})
    paths = inputs.find_shown(args.image, args.count, "--image", pixels)
    own = resized = model.to(device)
    blocks_to_show(args.layer, len(model.blocks))
    imagenet = pretrained.uses_imagenet_statistics(flags, args.imagenet_default_mean_and_std, args.checkpoint)
    mean, std = normalization_of(flags | {"in_chans": pixels.in_chans}, imagenet)
    rows = []
    for path, picture in inputs.read_shown(paths, pixels):
        size = own.patch_embed.img_size
        if args.keep_aspect:
            size = whole_image_size(picture, min(size), own.patch_size)
        if resized.patch_embed.img_size != size:
            resized = resize_model(own, size)
        crop_pct = 1.0 if args.keep_aspect else args.crop_pct
        image = eval_view(size, crop_pct, mean=mean, std=std, pixels=pixels)(picture)["image"]
        shown = drawing.as_rgb(drawing.denormalize(image, mean, std))
        rows += draw_image(Path(path).name, image.to(device), resized, shown, args)
    inputs.save_picture(drawing.stack_rows(rows), args.output, "--output")
    which = "every block, mean over heads" if args.layer is None else f"block {args.layer}"
    log.info(f"{args.output}: {len(rows)} rows, {which}, query {' '.join(args.query)}")


if __name__ == "__main__":
    main()

"""What a patch attends to: python visualize_attention.py --checkpoint out/checkpoint.pth --image photo.jpg"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

import arguments
import distributed
import pretrained
import visualization
from distributed import log
from errors import UserError, tells_the_user
from transforms import eval_view, load_image, normalisation


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Attention maps")
    parser.add_argument("--checkpoint", required=True, help="of pretraining or fine-tuning: path, URL or published name")
    parser.add_argument("--image", required=True, nargs="+", help="image files, one row each")
    parser.add_argument("--output", default="attention.png", help="PNG to write")
    parser.add_argument("--num_heads", type=int, default=None, help="for files of an unknown size without position bias")
    parser.add_argument("--layer", type=int, default=-1, help="block to look at, -1: the last")
    parser.add_argument("--query", default="cls", help="cls, or row,column of a patch")
    parser.add_argument(
        "--input_size", type=arguments.image_size, default=None, help="side, or height x width; default: the model's"
    )
    parser.add_argument(
        "--imagenet_default_mean_and_std", action="store_true", help="the checkpoint's own setting if it has one"
    )
    parser.add_argument("--device", default="cpu")
    return parser


def query_row(query: str, grid: tuple[int, int]) -> int:
    """Token number of `cls` or `row,column`."""
    if query == "cls":
        return 0
    try:
        row, column = (int(part) for part in query.split(","))
    except ValueError:
        raise UserError(f"--query {query}: give cls or row,column, such as 3,5") from None
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise UserError(f"--query {query}: the grid has {grid[0]} rows and {grid[1]} columns")
    return 1 + row * grid[1] + column


def attention_row(image: Tensor, maps: Tensor, grid: tuple[int, int], token: int) -> Tensor:
    """The image, the mean over heads, then each head: what `token` gives to every patch. maps: (H, T, T)."""
    heads = maps[:, token, 1:].reshape(-1, *grid)
    shown = [visualization.heat_overlay(image, heat) for heat in (heads.mean(0), *heads)]
    return visualization.side_by_side([image, *shown])


@tells_the_user
@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    distributed.set_up_logging(0)
    device = distributed.pick_device(args.device)
    model, flags = pretrained.open_backbone(args.checkpoint, args.input_size, args.num_heads)
    model.to(device)
    if not -len(model.blocks) <= args.layer < len(model.blocks):
        raise UserError(f"--layer {args.layer}: the model has {len(model.blocks)} blocks, 0 to {len(model.blocks) - 1}")
    mean, std = normalisation(flags.get("imagenet_default_mean_and_std", args.imagenet_default_mean_and_std))
    view = eval_view(model.patch_embed.img_size, crop_pct=1.0, mean=mean, std=std)
    token = query_row(args.query, model.patch_embed.patch_shape)
    rows = []
    for path in args.image:
        try:
            image = view(load_image(path))["image"]
        except OSError as error:
            raise UserError(f"--image {path}: cannot be read ({error})") from None
        maps = model.attention_maps(image[None].to(device), args.layer)[0].cpu()
        rows.append(attention_row(visualization.denormalise(image, mean, std), maps, model.patch_embed.patch_shape, token))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    save_image(visualization.stacked(rows), args.output)
    log.info(
        f"{args.output}: each row the image, the mean over heads, then the heads of block {args.layer}, query {args.query}"
    )


if __name__ == "__main__":
    main()

"""What a patch attends to: python visualize_attention.py --checkpoint out/checkpoint.pth --image photo.jpg"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

import arguments
import checkpointing
import distributed
import model_zoo
import modeling_finetune
import modeling_pretrain
import visualization
from distributed import log
from errors import UserError, tells_the_user
from transforms import eval_view, load_image, normalisation


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Attention maps")
    parser.add_argument("--checkpoint", required=True, help="of pretraining or fine-tuning: path, URL or published name")
    parser.add_argument("--image", required=True, nargs="+", help="image files, one row each")
    parser.add_argument("--output", default="attention.png", help="PNG to write")
    parser.add_argument("--model", default=None, help="for files that do not say which model they hold")
    parser.add_argument("--layer", type=int, default=-1, help="block to look at, -1: the last")
    parser.add_argument("--query", default="cls", help="cls, or row,column of a patch")
    parser.add_argument("--input_size", type=int, default=None, help="default: the checkpoint's")
    parser.add_argument(
        "--imagenet_default_mean_and_std", action="store_true", help="the checkpoint's own setting if it has one"
    )
    parser.add_argument("--device", default="cpu")
    return parser


def load_backbone(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model that a checkpoint holds, and the flags it was trained with ({} for published files)."""
    content = checkpointing.read(model_zoo.fetch(args.checkpoint))
    weights, flags = content["model"], content.get("args") or {}
    name = args.model or flags.get("model")
    if name is None:
        raise UserError(f"--checkpoint {args.checkpoint} does not say which model it holds: name it with --model")
    settings: dict[str, Any] = {
        "init_values": 0.1 if "blocks.0.gamma_1" in weights else 0,
        "use_abs_pos_emb": "pos_embed" in weights,
        "use_shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in weights,
    }
    size = args.input_size or flags.get("input_size")
    if size:
        settings["img_size"] = size
    if name in modeling_pretrain.MODELS:
        name = name.removesuffix("_cls_pt")  # the CLS head comes after the blocks
        model: Any = modeling_pretrain.create_model(name, vocab_size=1, **settings)
    else:
        own_bias = "blocks.0.attn.relative_position_bias_table" in weights
        model = modeling_finetune.create_model(name, num_classes=0, use_rel_pos_bias=own_bias, **settings)
    fitting = modeling_finetune.remap_pretrained(weights, model)
    if not any(key.startswith("blocks.") for key in fitting):
        raise UserError(f"--checkpoint {args.checkpoint} does not fit --model {name}")
    model.load_state_dict(fitting, strict=False)
    return model.eval(), flags


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
    model, flags = load_backbone(args)
    model.to(device)
    if not -len(model.blocks) <= args.layer < len(model.blocks):
        raise UserError(f"--layer {args.layer}: the model has {len(model.blocks)} blocks, 0 to {len(model.blocks) - 1}")
    mean, std = normalisation(flags.get("imagenet_default_mean_and_std", args.imagenet_default_mean_and_std))
    view = eval_view(model.patch_embed.img_size[0], crop_pct=1.0, mean=mean, std=std)
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

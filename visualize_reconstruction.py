"""What tokens keep: python visualize_reconstruction.py --checkpoint out/pixels/checkpoint.pth --image photo.jpg"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

import arguments
import distributed
import visualization
from datasets import find_images
from distributed import log
from errors import UserError, tells_the_user
from metrics import psnr
from modeling_pixel_decoder import open_reconstructor
from transforms import eval_view, load_image


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Reconstructions from tokens")
    parser.add_argument(
        "--checkpoint", required=True, help=f"of run_vqkd_training.py --train_pixel_decoder: {arguments.FILE_OR_URL}"
    )
    parser.add_argument("--image", required=True, nargs="+", help="image files, or folders of them")
    parser.add_argument("--most", type=arguments.positive, default=16, help="of a folder: so many images, evenly spread")
    parser.add_argument("--output", default="reconstruction.png", help="PNG to write")
    parser.add_argument("--device", default="cpu")
    return parser


def paths_of(names: Sequence[str], most: int) -> list[str]:
    """The files among `names`, and `most` files of each folder."""
    paths: list[str] = []
    for name in names:
        if os.path.isdir(name):
            found = [str(path) for path, _ in find_images(name, flag="--image")[0]]
            count = min(most, len(found))
            paths += [found[number * len(found) // count] for number in range(count)]
        else:
            paths.append(name)
    return paths


def read_images(paths: Sequence[str], side: int) -> list[Tensor]:
    """The square in the middle of each, (3, side, side) in [0, 1]."""
    view, images = eval_view(side, crop_pct=1.0), []
    for path in paths:
        try:
            images.append(view(load_image(path))["image"])
        except OSError as error:
            raise UserError(f"--image {path}: cannot be read ({error})") from None
    return images


@tells_the_user
@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    distributed.set_up_logging(0)
    device = distributed.pick_device(args.device)
    paths = paths_of(args.image, args.most)
    model = open_reconstructor(args.checkpoint).to(device)
    images = read_images(paths, model.image_size)
    codes, drawn = [], []
    for image in images:
        codes.append(model.encode(image[None].to(device)))
        drawn.append(model.decode(codes[-1])[0].cpu())
    stacked = torch.stack(images)
    own, trivial = psnr(torch.stack(drawn), stacked), psnr(stacked.mean(dim=(2, 3), keepdim=True), stacked)
    for path, ours, flat in zip(paths, own.tolist(), trivial.tolist(), strict=True):
        log.info(f"{ours:6.2f} dB (mean colour {flat:.2f})  {path}")
    log.info(f"{own.mean():6.2f} dB (mean colour {trivial.mean():.2f})  mean of {len(images)}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    save_image(visualization.reconstructions(images, torch.cat(codes), model.n_codes, drawn), args.output)
    log.info(f"{args.output}: images, their tokens (a colour a code), and what was drawn from the tokens alone")


if __name__ == "__main__":
    main()

"""What tokens keep of an image (docs/reconstruction.md)."""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import arguments
from errors import report_user_errors
from flags.images import add_shown_image_flags, add_view_flags
from runtime import terminal
from runtime.device import pick_device
from runtime.metrics import psnr
from runtime.terminal import log
from transforms import eval_view
from visualization import drawing, inputs
from visualization.pixel_decoder import open_reconstructor


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(
        "Reconstructions from tokens", "--checkpoint decoder/checkpoint.pth --image photo.jpg"
    )
    parser.add_argument(
        "--checkpoint",
        type=arguments.expand_home,
        required=True,
        help=f"of run_vqkd_training.py --train_pixel_decoder: {arguments.FILE_OR_URL}",
    )
    add_shown_image_flags(parser, output="reconstruction.png")
    add_view_flags(parser)
    return parser


@report_user_errors
@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    terminal.set_up_logging(0)
    inputs.check_shown(args.image, "--image")
    inputs.prepare_output(args.output, inputs.PICTURES, "--output")
    device = pick_device(args.device)
    model = open_reconstructor(args.checkpoint, "--checkpoint").to(device)
    found = inputs.find_shown(args.image, args.count, "--image", model.pixels)
    view = eval_view(model.image_size, args.crop_pct, pixels=model.pixels)
    paths, images, codes, drawn = [], [], [], []
    for path, picture in inputs.read_shown(found, model.pixels):
        paths.append(path)
        images.append(view(picture)["image"])
        codes.append(model.encode(images[-1][None].to(device)))
        drawn.append(model.decode(codes[-1])[0].cpu())
    stacked = torch.stack(images)
    own, trivial = psnr(torch.stack(drawn), stacked), psnr(stacked.mean(dim=(2, 3), keepdim=True), stacked)
    for path, ours, flat in zip(paths, own.tolist(), trivial.tolist(), strict=True):
        log.info(f"{ours:6.2f} dB (mean color {flat:.2f})  {path}")
    log.info(f"{own.mean():6.2f} dB (mean color {trivial.mean():.2f})  mean of {len(images)}")
    captions = [
        (Path(path).name, "tokens", f"drawn: {ours:.2f} dB")
        for path, ours in zip(paths, own.tolist(), strict=True)
    ]
    inputs.save_picture(
        drawing.draw_reconstructions(images, torch.cat(codes), model.n_codes, drawn, captions),
        args.output,
        "--output",
    )
    log.info(
        f"{args.output}: images, their tokens (one color per code), and what was drawn from the tokens alone"
    )


if __name__ == "__main__":
    main()

"""Images to visual tokens (docs/visualization.md).

Every process encodes its share of the sorted files and writes it to files of its own;
the first process then joins them in order. Memory does not grow with the number of
images, and a file that has its final name is complete.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import arguments
import modeling_dvae
import modeling_vqkd
import run_beitv2_pretraining
from checkpoint_io import checkpoints
from data_pipeline.image_lists import Samples, find_images_or_file
from data_pipeline.pixel_format import RGB8, PixelFormat, endings_of
from data_pipeline.samplers import build_eval_loader
from datasets import ImageFiles
from errors import UserError, report_user_errors
from flags.images import add_inference_flags, add_view_flags, loader_settings
from runtime import distributed
from runtime.device import choose_precision
from runtime.distributed import Launch
from runtime.failures import explain_lost_process
from runtime.terminal import log
from transforms import ImageOnly, describe_eval_view, eval_view
from visualization import code_files
from visualization.code_files import Parts

SECONDS_BETWEEN_LINES = 30
MINUTES_TO_WAIT = 24 * 60  # for the slowest process: shares are equal, machines may not be
FOR_PRETRAINING = "--for_pretraining"
NAMED = 5  # unreadable files that the message on the terminal names


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(
        "Images to visual tokens",
        "--tokenizer_weight vqkd/checkpoint.pth --data_path photos --output_dir codes",
    )
    parser.add_argument(
        "--tokenizer_model",
        default="vqkd",
        choices=("vqkd", "dall-e"),
        help="vqkd: built from what its file holds; dall-e: BEiT v1's dVAE",
    )
    parser.add_argument(
        "--tokenizer_weight",
        type=arguments.expand_home,
        default=None,
        help=f"{arguments.WEIGHTS}; dall-e alone has a default, OpenAI's file",
    )
    parser.add_argument(
        "--data_path",
        type=arguments.expand_home,
        required=True,
        help="folder of images, however nested, or one image",
    )
    parser.add_argument(
        "--output_dir",
        type=arguments.expand_home,
        required=True,
        help="folder for the codes; what an earlier run left there is replaced",
    )
    parser.add_argument(
        "--format",
        default="npy",
        choices=("npy", "jsonl"),
        help=("npy: codes.npy (images, patches), files.txt; jsonl: codes.jsonl, one object per image"),
    )
    parser.add_argument(
        "--maps", type=arguments.not_negative, default=0, help="draw the token maps of the first N images"
    )
    parser.add_argument(
        "--input_size",
        type=arguments.pixels,
        default=None,
        help=("side of the input in pixels: the tokenizer's own, VQ-KD takes no other; dall-e: 112"),
    )
    parser.add_argument(
        FOR_PRETRAINING,
        action="store_true",
        help="beside flags of run_beitv2_pretraining.py alone: the codes that this line's --crop_cycle "
        "will need (docs/performance.md)",
    )
    add_view_flags(parser)
    add_inference_flags(parser, "half precision is faster on GPUs and gives some patches another code")
    return parser


# ── Tokenizer and images ──


@dataclass(frozen=True)
class Tokenizer:
    """What encoding needs to know of a tokenizer of either kind.

    `grid`: rows and columns of patches.
    """

    model: Any
    source: str
    n_codes: int
    input_size: int
    grid: tuple[int, int]
    pixels: PixelFormat = RGB8  # of the images that it encodes


def load_tokenizer(args: argparse.Namespace) -> Tokenizer:
    if args.tokenizer_model == "dall-e":
        dvae = modeling_dvae.load_dall_e_encoder(args.tokenizer_weight)
        size = args.input_size or modeling_dvae.DALL_E_SIZE
        if size % modeling_dvae.PATCH_SIZE:
            raise UserError(
                f"--input_size {size} is not a multiple of the {modeling_dvae.PATCH_SIZE} pixels that "
                "DALL-E has for each token"
            )
        side = size // modeling_dvae.PATCH_SIZE
        return Tokenizer(
            dvae, args.tokenizer_weight or modeling_dvae.PUBLISHED, dvae.vocab_size, size, (side, side)
        )
    if not args.tokenizer_weight:
        raise UserError("--tokenizer_weight is missing: a checkpoint of VQ-KD training, or a published name")
    model, _ = modeling_vqkd.open_tokenizer(args.tokenizer_weight)
    size, grid = model.encoder.patch_embed.img_size[0], model.encoder.patch_embed.patch_shape
    if args.input_size not in (None, size):
        raise UserError(f"--input_size {args.input_size}: this tokenizer was trained on {size} pixels alone")
    return Tokenizer(model, args.tokenizer_weight, model.quantize.num_tokens, size, grid, model.pixels)


class EveryImage(ImageFiles):
    """One sample for every file, in order.

    A file that does not decode is not replaced by another one: its sample is black, and
    its `readable` is False.
    """

    def __init__(self, samples: Samples, view: ImageOnly, size: int) -> None:
        super().__init__(samples, view)
        self.most_failures, self.size = 1, size

    def __getitem__(self, key: Any) -> dict[str, Any]:
        sample = super().__getitem__(key)
        if "image" in sample:
            return {**sample, "readable": True}
        index = key[1] if isinstance(key, tuple) else key
        return {
            "image": torch.zeros(self.view.pixels.in_chans, self.size, self.size),
            "index": index,
            "failed": sample["failed"],
            "readable": False,
        }


# ── Encoding: this process's share ──


@torch.no_grad()
def encode_share(
    args: argparse.Namespace,
    files: list[str],
    tokenizer: Tokenizer,
    view: ImageOnly,
    launch: Launch,
    device: torch.device,
) -> Iterator[tuple[Tensor, list[str], list[str]]]:
    """Batch by batch: codes (images, N) of this rank's readable images, their names,
    the failures.
    """
    start, stop = (len(files) * rank // launch.world_size for rank in (launch.rank, launch.rank + 1))
    if start == stop:
        return
    dataset = EveryImage([(path, None) for path in files[start:stop]], view, tokenizer.input_size)
    precision = choose_precision(args.amp_dtype, device)
    model, root = tokenizer.model.to(device), root_of(args.data_path)
    done, started = 0, time.monotonic()
    reported = started
    settings = loader_settings(args)
    for batch in build_eval_loader(dataset, settings, Launch(), device):  # the files are this rank's alone
        readable = batch["readable"]
        with precision.autocast():
            codes = model.get_codebook_indices(batch["image"].to(device, non_blocking=True))
        names = [
            os.path.relpath(str(dataset.source(index)), root) for index in batch["index"][readable].tolist()
        ]
        yield codes.cpu()[readable], names, batch["failed"]
        done, now = done + len(readable), time.monotonic()
        if now - reported > SECONDS_BETWEEN_LINES:
            log.info(
                f"encoded    {done} of this process's {len(dataset)} images, {done / (now - started):.0f} "
                "images/s"
            )
            reported = now


def root_of(data_path: str) -> str:
    """The folder to which names of files are relative."""
    return os.path.abspath(data_path if os.path.isdir(data_path) else os.path.dirname(data_path))


def files_to_encode(data_path: str, pixels: PixelFormat = RGB8) -> list[str]:
    files = find_images_or_file(data_path, endings=endings_of(pixels))
    fine = [path for path in files if len(path.splitlines()) == 1]
    if len(fine) < len(files):  # files.txt has a line for each
        log.warning(f"left out   {len(files) - len(fine)} files with a line break in their name")
    return [os.path.abspath(path) for path in fine]


# ── What comes out ──


def join_shares(args: argparse.Namespace, parts: Parts, tokenizer: Tokenizer, view: ImageOnly) -> None:
    """Join the shares into the finished folder, and say what is in it."""
    about = {
        "data_path": root_of(args.data_path),
        "tokenizer_weight": tokenizer.source,
        "input_size": tokenizer.input_size,
        "crop_pct": args.crop_pct,
        "view": describe_eval_view(view),
        "in_chans": view.pixels.in_chans,
        "image_range": view.pixels.image_range,
        "amp_dtype": args.amp_dtype,
    }
    try:
        about = code_files.join_parts(parts, args.format, about)
    except UserError as error:
        raise UserError(f"--data_path {args.data_path}: {error}") from None
    if about["skipped"]:
        named = ", ".join(itertools.islice(parts.lines("skipped"), NAMED))
        log.warning(f"skipped    {about['skipped']} files that cannot be read, all in skipped.txt: {named}")
    log.info(
        f"codes      {about['images']} images in {parts.folder}/codes.{args.format}, {about['codes_used']} "
        f"of {parts.n_codes} codes used, perplexity {about['perplexity']:.1f}"
    )


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    words = arguments.words_of(argv)
    if FOR_PRETRAINING in words:
        run_beitv2_pretraining.fill_codes([word for word in words if word != FOR_PRETRAINING])
        return
    args = arguments.parse(get_parser(), words)

    # ── Setup ──
    launch, device = distributed.start(args.device, timeout_minutes=MINUTES_TO_WAIT)
    tokenizer = load_tokenizer(args)
    files = files_to_encode(args.data_path, tokenizer.pixels)
    view = eval_view(tokenizer.input_size, args.crop_pct, pixels=tokenizer.pixels)
    rows, columns = tokenizer.grid
    log.info(f"tokenizer  {tokenizer.source}: {tokenizer.n_codes} codes, {rows} x {columns} patches")
    log.info(f"images     {len(files)}: {describe_eval_view(view)}")
    parts = Parts(Path(args.output_dir), launch.world_size, tokenizer.n_codes, tokenizer.grid)

    try:
        # ── Encode: each process its share ──
        parts.folder.mkdir(parents=True, exist_ok=True)
        if distributed.is_main():
            parts.remove()  # what a killed run left
        distributed.barrier()
        with code_files.share_writer(parts, launch.rank) as add:
            for codes, names, skipped in encode_share(args, files, tokenizer, view, launch, device):
                add(codes, names, skipped)
        distributed.barrier()

        # ── Join ──
        if distributed.is_main():
            join_shares(args, parts, tokenizer, view)
            checkpoints.write_json(args.output_dir, "flags.json", args.to_config())
            code_files.draw_token_maps(parts, view, root_of(args.data_path), args.maps)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir}: cannot be written to ({error})") from None
    except RuntimeError as error:
        raise explain_lost_process(error) from None
    finally:
        if distributed.is_main():
            parts.remove()
    distributed.stop()


if __name__ == "__main__":
    main()

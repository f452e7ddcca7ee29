"""The patches behind each code of a tokenizer, as a page.

python visualize_codebook.py --encoded out/codes --output codebook.html

Reads the images and what encode_images.py wrote of them; no tokenizer is needed.
N patches per image, K codes.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import arguments
from data_pipeline.pixel_format import PixelFormat
from errors import UserError, report_user_errors
from runtime import terminal
from runtime.terminal import log
from transforms import eval_view
from visualization import code_files, drawing, html, inputs
from visualization.code_files import BLOCK, EncodedFolder

OUTSIDE = 0.85  # gray around the image, for patches at its border


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("The patches behind each code", "--encoded codes --output codebook.html")
    parser.add_argument(
        "--encoded",
        type=arguments.expand_home,
        required=True,
        help="--output_dir of encode_images.py (--format npy)",
    )
    parser.add_argument(
        "--data_path",
        type=arguments.expand_home,
        default=None,
        help="where the images are now; default: where they were encoded",
    )
    parser.add_argument(
        "--output",
        type=arguments.expand_home,
        default="codebook.html",
        help="page to write, one file with all pictures in it",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--codes",
        type=arguments.not_negative,
        nargs="+",
        default=None,
        help="show these codes, such as 3 17 99",
    )
    choice.add_argument("--top", type=arguments.positive, default=None, help="show the N most used codes")
    choice.add_argument(
        "--spread", type=arguments.positive, default=24, help="show N codes, from the most to the least used"
    )
    parser.add_argument(
        "--examples", type=arguments.positive, default=12, help="patches of each code, of different images"
    )
    parser.add_argument(
        "--context",
        type=arguments.small_count,
        default=3,
        help="side of what is shown of the image, in patches",
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of the random choice of examples")
    return parser


# ── Which codes, which patches ──


def iterate_blocks(codes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first image, codes of up to BLOCK images), block by block."""
    for start in range(0, len(codes), BLOCK):
        yield start, codes[start : start + BLOCK]


def count_codes(encoded: EncodedFolder) -> np.ndarray:
    """How many patches have each code, (K,)."""
    counts = np.zeros(encoded.about["n_codes"], dtype=np.int64)
    for _, block in iterate_blocks(encoded.codes):
        if block.min() < 0 or block.max() >= len(counts):
            raise UserError(
                f"{encoded.folder}/codes.npy: has codes beyond the {len(counts)} of about.json; encode the "
                "images again"
            )
        counts += np.bincount(block.ravel(), minlength=len(counts))
    return counts


def choose_codes(args: argparse.Namespace, counts: np.ndarray) -> tuple[list[int], str]:
    """The codes of the page in its order, and how they were chosen."""
    if args.codes is not None:
        for code in args.codes:
            if not 0 <= code < len(counts):
                raise UserError(
                    f"--codes {code}: the codebook has {len(counts)} codes, 0 to {len(counts) - 1}"
                )
        return list(dict.fromkeys(args.codes)), "The codes asked for."
    used = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    if args.top is not None:
        return used[: args.top].tolist(), (
            f"The {min(args.top, len(used))} most used codes, the most used first."
        )
    ranks = np.unique(np.linspace(0, len(used) - 1, args.spread).round().astype(int))
    return used[ranks].tolist(), (
        f"{len(ranks)} codes at even distances in the order from the most to the least used."
    )


@dataclass
class Sample:
    """A uniform sample of the images that have a code, and how many have it.

    Each image draws a random key; those with the smallest keys stay.
    """

    images: np.ndarray
    keys: np.ndarray
    found: int = 0

    def add(self, images: np.ndarray, most: int, rng: np.random.Generator) -> None:
        self.found += len(images)
        keys = np.concatenate((self.keys, rng.random(len(images))))
        kept = np.argsort(keys)[:most]
        self.images, self.keys = np.concatenate((self.images, images))[kept], keys[kept]


def sample_images(codes: np.ndarray, chosen: list[int], n_codes: int, most: int, seed: int) -> list[Sample]:
    """Up to `most` images for each chosen code, in one pass over the codes (images,
    N).
    """
    rng = np.random.default_rng(seed)
    row_of = np.full(n_codes, -1)
    row_of[chosen] = np.arange(len(chosen))
    samples = [Sample(np.zeros(0, dtype=np.int64), np.zeros(0)) for _ in chosen]
    for start, block in iterate_blocks(codes):
        rows = row_of[block]
        for number in np.unique(rows[rows >= 0]):
            samples[number].add(start + np.flatnonzero((rows == number).any(axis=1)), most, rng)
    return samples


def choose_patches(
    codes: np.ndarray, code: int, images: np.ndarray, most: int, seed: int
) -> list[tuple[int, int]]:
    """Up to `most` patches that have the code, as (image, patch).

    First a random patch of each image, then further ones of the same images.
    """
    rng = np.random.default_rng((seed, code))
    shuffled = [
        (int(image), rng.permutation(np.flatnonzero(codes[image] == code))) for image in np.sort(images)
    ]
    rounds = max((len(found) for _, found in shuffled), default=0)
    return [
        (image, int(found[turn])) for turn in range(rounds) for image, found in shuffled if turn < len(found)
    ][:most]


# ── The page ──


def cut_out(image: Tensor, row: int, column: int, patch: int, context: int) -> Tensor:
    """The patch, framed, in the middle of `context` x `context` patches, enlarged.

    What lies beyond the image is gray.
    """
    before, side = context // 2 * patch, context * patch
    margin = F.pad(image, (before, side, before, side), value=OUTSIDE)
    picture = drawing.enlarge(margin[:, row * patch :, column * patch :][:, :side, :side])
    if context == 1:
        return picture
    factor = picture.shape[1] // side
    return drawing.draw_frame(picture, before * factor, before * factor, patch * factor, patch * factor)


def summarize(encoded: EncodedFolder, counts: np.ndarray, root: str) -> str:
    """HTML: what was encoded, and how evenly the codes are used."""
    about, used, top = encoded.about, int((counts > 0).sum()), int(counts.argmax())
    height, width = about["grid"]
    histogram = drawing.usage_histogram(torch.from_numpy(counts))
    return "\n".join(
        [
            html.table(
                [
                    ("images", f"{about['images']:,} of {root}"),
                    ("patches", f"{counts.sum():,}, {height} x {width} per image"),
                    ("codes used", f"{used:,} of {len(counts):,} ({used / len(counts):.1%})"),
                    (
                        "perplexity",
                        f"{about['perplexity']:.1f}: as many codes, used equally, would be as hard to guess",
                    ),
                    ("most frequent code", f"{top}: {counts[top] / counts.sum():.1%} of the patches"),
                    ("view of an image", about["view"]),
                    ("tokenizer", about["tokenizer_weight"]),
                ]
            ),
            html.picture(
                histogram, "How often each code is used, most used first, on a logarithmic scale", "PNG"
            ),
            html.paragraph("How often each code is used: most used first, on a logarithmic scale."),
        ]
    )


def sections(
    args: argparse.Namespace, encoded: EncodedFolder, counts: np.ndarray, chosen: list[int], root: str
) -> Iterator[str]:
    """HTML of each chosen code: how often it occurs, and patches that have it."""
    about = encoded.about
    view = eval_view(about["input_size"], about["crop_pct"], pixels=PixelFormat.of_flags(about))
    patch, columns = about["input_size"] // about["grid"][0], about["grid"][1]
    samples = sample_images(encoded.codes, chosen, len(counts), args.examples, args.seed)
    examples = {
        code: choose_patches(encoded.codes, code, sample.images, args.examples, args.seed)
        for code, sample in zip(chosen, samples, strict=True)
    }
    names = encoded.names(image for patches in examples.values() for image, _ in patches)
    colors = drawing.code_colors(len(counts))
    broken: set[int] = set()
    for code, sample in zip(chosen, samples, strict=True):
        shown = []
        for image, index in examples[code]:
            path = os.path.join(root, names[image])
            opened = None if image in broken else inputs.read_or_leave_out(path, view.pixels)
            if opened is None:
                broken.add(image)
                continue
            row, column = divmod(index, columns)
            picture = cut_out(drawing.as_rgb(view(opened)["image"]), row, column, patch, args.context)
            shown.append(html.picture(picture, f"code {code}: patch {row},{column} of {names[image]}"))
        text = (
            f"{counts[code]:,} patches, {counts[code] / counts.sum():.2%} of all, in {sample.found:,} images."
        )
        if not counts[code]:
            text = "Does not occur in these images."
        parts = [html.paragraph(text), *([html.pictures(shown)] if shown else [])]
        yield html.section(f"Code {code}", *parts, anchor=f"code-{code}", color=colors[code].tolist())
    if broken and len(broken) == len(names):
        raise UserError(f"no image of {root} could be read: --data_path says where the images are now")


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    terminal.set_up_logging(0)
    if args.context % 2 == 0:
        raise UserError(
            f"--context {args.context}: give an odd number of patches, so that one is in the middle"
        )
    inputs.prepare_output(args.output, inputs.PAGES, "--output")
    encoded = code_files.read_codes(args.encoded, "--encoded")
    root = args.data_path or encoded.about["data_path"]
    if not os.path.isdir(root):
        raise UserError(
            f"{root}, the folder of the images, is not there: --data_path says where they are now"
        )
    counts = count_codes(encoded)
    chosen, how = choose_codes(args, counts)
    page = html.document(
        "Codebook",
        summarize(encoded, counts, root),
        html.paragraph(
            f"{how} Each picture is a patch, framed in red, in the {args.context} x {args.context} patches "
            "around it; gray lies outside the image. The patches of a code are drawn at random, from "
            "different images as far as there are any. The square before a code is its color in the token "
            "maps of encode_images.py."
        ),
        *sections(args, encoded, counts, chosen, root),
    )
    Path(args.output).write_text(page, encoding="utf-8", errors="backslashreplace")
    log.info(f"{args.output}: {len(chosen)} codes, {len(page) / 2**10:.0f} KiB")


if __name__ == "__main__":
    main()

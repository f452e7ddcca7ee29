"""What a sample of pretraining costs on one CPU core, step by step, and how far the
pixels of the pipelines differ.

    python scripts/measure_data.py folder_of_images [--input_size 224] [--rounds 20]
    [--no_jitter]

Three ways of making two views and a mask take turns within each round: `plain`
(torchvision's loader and transforms, one after the other, each view resized and turned
into floats), `exact` and `fast` (--data_pipeline). Times are medians over the rounds of
the mean over the images, in milliseconds of CPU time, as other programs may be running;
differences are in levels of 255, of the view that is not normalized.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import arguments
from data_pipeline.augmentation import (
    SampledImage,
    estimate_pivot,
    exact_crop,
    jitter_and_flip,
    pack_params,
    resize_fast,
    resize_to_square,
)
from data_pipeline.crops import ASPECT_RANGE, PretrainingViews
from data_pipeline.image_lists import find_images
from errors import report_user_errors
from masking_generator import MaskingGenerator
from runtime.device import keep_freed_memory
from runtime.seeding import seeded
from transforms import HALF_MEAN, HALF_STD

CROP, MODE, PATCH = [0.2, 1.0], InterpolationMode.BICUBIC, 16
Steps = Iterator[str]  # the name of each step once it is done


def views(size: int, jitter: float, pipeline: str, on_device: bool = False) -> PretrainingViews:
    masks = MaskingGenerator(size // PATCH, round(0.38 * (size // PATCH) ** 2))
    modes = ("bicubic", "bicubic")
    return PretrainingViews(
        size, size, CROP[0], jitter, *modes, HALF_MEAN, HALF_STD, masks, 0.0, pipeline, on_device
    )


def plain(size: int, jitter: float) -> Callable[[str, dict[str, Any]], Steps]:
    augment = T.Compose(
        [*([T.ColorJitter(jitter, jitter, jitter)] if jitter else []), T.RandomHorizontalFlip(0.5)]
    )
    flip = T.RandomVerticalFlip(0.0)
    masks = views(size, jitter, "exact").mask_generator

    def steps(file: str, sample: dict[str, Any]) -> Steps:
        image = pil_loader(file)
        yield "decode"
        image = flip(augment(image))
        yield "jitter, flip"
        top, left, height, width = T.RandomResizedCrop.get_params(image, CROP, ASPECT_RANGE)
        pair = [F.resized_crop(image, top, left, height, width, [size, size], MODE) for _ in range(2)]
        yield "crop, resize"
        first, second = (F.to_tensor(view) for view in pair)
        sample |= {"image": F.normalize(first, HALF_MEAN, HALF_STD), "tokenizer_image": second}
        yield "tensors"
        sample["mask"] = torch.as_tensor(masks(), dtype=torch.bool).flatten()
        yield "mask"

    return steps


def ours(
    size: int, jitter: float, pipeline: str, on_device: bool = False
) -> Callable[[str, dict[str, Any]], Steps]:
    """The same steps as PretrainingViews.load and .transform, which are timed as a
    whole too.
    """
    view = views(size, jitter, pipeline, on_device)

    def steps(file: str, sample: dict[str, Any]) -> Steps:
        image = view.load(file)
        if isinstance(image, Image.Image):
            yield "decode"
            crop = exact_crop(image, view.crop.sample_params(image.size))
            yield "jitter, flip"
            sample["image"] = resize_to_square(crop, size, MODE)
            yield "crop, resize"
        elif isinstance(image, SampledImage):
            yield "decode"
            params = image.params
            sample["image"] = resize_fast(image, size, MODE)
            yield "crop, resize"
            pivot = estimate_pivot(image.image, params.operations)
            if on_device:
                sample["params"] = pack_params(params, pivot)
            else:
                sample["image"] = jitter_and_flip(sample["image"], params, pivot)
            yield "jitter, flip"
        sample["mask"] = torch.as_tensor(view.mask_generator(), dtype=torch.bool).flatten()
        yield "mask"

    return steps


def measure(
    files: list[str], ways: dict[str, Callable[[str, dict[str, Any]], Steps]], rounds: int
) -> dict[str, Any]:
    """Way -> step -> milliseconds per image in each round."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            spent: dict[str, float] = {}
            for index, file in enumerate(files):
                with seeded(number, index):
                    last = time.thread_time()
                    for step in way(file, {}):
                        now = time.thread_time()
                        spent[step] = spent.get(step, 0.0) + now - last
                        last = now
            spent["sample"] = sum(spent.values())
            for step, seconds in spent.items():
                times[name].setdefault(step, []).append(1000 * seconds / len(files))
    return times


def differences(files: list[str], size: int, jitter: float, pipeline: str, seeds: int) -> str:
    one, other = plain(size, jitter), views(size, jitter, pipeline)
    found: list[Tensor] = []
    for seed in range(seeds):
        for index, file in enumerate(files):
            sample: dict[str, Any] = {}
            with seeded(seed, index):
                list(one(file, sample))
            with seeded(seed, index):
                theirs = other(other.load(file))
            found.append((255 * (sample["tokenizer_image"] - theirs["tokenizer_image"])).abs().flatten())
    levels = torch.stack(found)
    noise = levels.square().mean().clamp(min=1e-12)
    high = levels.flatten()[::7].kthvalue(int(0.99 * len(levels.flatten()[::7]))).values
    return (
        f"mean {levels.mean():.3f}, 99th percentile {high:.1f}, max {levels.max():.0f}; worst image's mean "
        f"{levels.mean(dim=1).max():.2f}; PSNR {10 * (255**2 / noise).log10():.1f} dB"
    )


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=arguments.expand_home, help="images to read, each in every round")
    parser.add_argument(
        "--input_size",
        type=arguments.pixels,
        default=224,
        help="side of both views in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=arguments.positive,
        default=20,
        help="of which the medians are taken (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=arguments.small_count,
        default=8,
        help="crops of each image that are compared (default: %(default)s)",
    )
    parser.add_argument("--no_jitter", action="store_true", help="crops and flips alone")
    return parser


@report_user_errors
def main() -> None:
    args = get_parser().parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in a data process
    files = [str(path) for path, _ in find_images(args.folder)[0]]
    size, jitter = args.input_size, 0.0 if args.no_jitter else 0.4
    ways = {"plain": plain(size, jitter)} | {name: ours(size, jitter, name) for name in ("exact", "fast")}
    ways["fast, augment_on_device"] = ours(size, jitter, "fast", on_device=True)
    measure(files, ways, 1)
    times = measure(files, ways, args.rounds)
    steps = list(times["plain"])
    print(
        f"{len(files)} images, {args.rounds} rounds, ms per image on one core (median; ratio: median of each "
        "round's)"
    )
    print("| | " + " | ".join(steps) + " | plain / this |\n|---|" + "---|" * (len(steps) + 1))
    for name, of in times.items():
        cells = [f"{statistics.median(of[step]):.2f}" if step in of else "-" for step in steps]
        pairs = zip(times["plain"]["sample"], of["sample"], strict=True)
        print(f"| {name} | " + " | ".join(cells) + f" | {statistics.median(a / b for a, b in pairs):.2f} |")
    for name in ("exact", "fast"):
        print(f"{name} differs from plain by {differences(files, size, jitter, name, args.seeds)}")


if __name__ == "__main__":
    main()

"""Flags of images that are not 8-bit RGB: channels, the range of their numbers, and
statistics of a data set (docs/channels.md).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from arguments import Flags, large_count, not_negative, shorten
from checkpoint_io import checkpoints, weight_source
from data_pipeline.array_files import ARRAY_EXTENSIONS
from data_pipeline.image_lists import Samples
from data_pipeline.pixel_format import (
    RGB8,
    SAMPLE_FILES,
    PixelFormat,
    PixelStatistics,
    endings_of,
    measure_pixels,
)
from datasets import open_evenly
from errors import UserError
from run_checkpoints import find_resumed
from run_state import Run
from runtime.terminal import log, say_if_slow
from transforms import normalization_of

AUTO = ["auto"]
STATISTICS = ("image_range", "mean_std")  # what `auto` measures
PIXEL_FLAGS = ("in_chans", *STATISTICS)
LOOKED_AT = 16  # files, where nothing is `auto`


def add_pixel_flags(group: Any, in_chans: int | None = 3) -> None:
    """`in_chans` None: the default of all three is what the weights were trained
    with.
    """
    theirs = "; default: as the backbone was trained" if in_chans is None else ""
    group.add_argument(
        "--in_chans",
        type=large_count,
        default=in_chans,
        help="channels of the images; other than 3: PNG, TIFF or .npy arrays (docs/channels.md)" + theirs,
    )
    group.add_argument(
        "--image_range",
        type=number_or("auto"),
        nargs="+",
        default=None,
        metavar="LOW HIGH",
        help="the numbers in the files that are black and white, such as 0 4095, or auto: from a sample of "
        "the files; default: " + ("as the backbone was trained" if theirs else "0 255 or 0 65535 by type"),
    )
    group.add_argument(
        "--mean_std",
        type=number_or("auto", "imagenet", "half"),
        nargs="+",
        default=None,
        metavar="M",
        help="normalization: auto (from a sample), imagenet, half (0.5), or each channel's mean and then "
        "each one's std, of pixels from 0 to 1; default: "
        + ("as the backbone was trained" if theirs else "half"),
    )


def add_teacher_channels(group: Any, of: str) -> None:
    group.add_argument(
        "--teacher_channels",
        type=not_negative,
        nargs="+",
        default=None,
        help=f"the channels that {of} sees, from 0; one that takes RGB needs three, such as 0 1 2 or 0 0 0; "
        "default: all",
    )


def number_or(*words: str) -> Callable[[str], float | str]:
    def convert(text: str) -> float | str:
        if text in words:
            return text
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{shorten(text)} is neither a number nor {' or '.join(words)}")
        return value

    return convert


def check_pixel_flags(args: argparse.Namespace) -> None:
    """UserError for values that do not belong together."""
    low_high, chosen, in_chans = args.image_range, args.mean_std, args.in_chans
    if low_high is not None and low_high != AUTO:
        numbers = len(low_high) == 2 and "auto" not in low_high
        if not numbers or low_high[0] >= low_high[1]:
            given = " ".join(str(value).removesuffix(".0") for value in low_high)
            raise UserError(
                f"--image_range {given}: give two numbers, black and then white, such as 0 4095, or auto"
            )
    if chosen is not None and getattr(args, "imagenet_default_mean_and_std", False):
        raise UserError(
            "--mean_std and --imagenet_default_mean_and_std both say how images are normalized: leave one out"
        )
    words = [value for value in chosen or () if isinstance(value, str)]
    if words and len(chosen) > 1:
        raise UserError(f"--mean_std {' '.join(map(str, chosen))}: give one word, or numbers")
    if in_chans is None:
        return
    if chosen is not None and not words and (len(chosen) != 2 * in_chans or min(chosen[in_chans:]) <= 0):
        raise UserError(
            f"--mean_std {' '.join(f'{value:g}' for value in chosen)}: --in_chans {in_chans} needs "
            f"{2 * in_chans} numbers, {in_chans} means and then as many standard deviations above 0"
        )
    seen = max(getattr(args, "teacher_channels", None) or [0])
    if seen >= in_chans:
        raise UserError(f"--teacher_channels {seen}: --in_chans {in_chans} are channels 0 to {in_chans - 1}")
    imagenet = getattr(args, "imagenet_default_mean_and_std", False) or chosen == ["imagenet"]
    if imagenet and in_chans != 3:
        raise UserError(
            f"ImageNet's mean and std are of 3 channels, --in_chans is {in_chans}: --mean_std half, auto or "
            "numbers"
        )


def pixel_format(args: argparse.Namespace) -> PixelFormat:
    return PixelFormat.of_flags(vars(args))


def reads_rgb8(args: argparse.Namespace) -> bool:
    """Also before `auto` has become numbers."""
    return (args.in_chans or 3) == 3 and args.image_range is None


def image_endings(args: argparse.Namespace) -> tuple[str, ...]:
    return endings_of(RGB8) if reads_rgb8(args) else ARRAY_EXTENSIONS


def is_of_channels(flags: Mapping[str, Any], in_chans: int) -> bool:
    """Whether a training with these flags saw so many channels; None: any number."""
    return flags.get("in_chans", 3) in (None, in_chans)


def take_pixel_flags(args: Flags, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the weights' training (`theirs`, {} where unknown) in place of what was
    not given. Of other channels than the run's, range and statistics are others'.
    """
    names = set(PIXEL_FLAGS) - args.given
    if args.imagenet_default_mean_and_std or getattr(args, "process_type", "default") != "default":
        names.discard("mean_std")
    if "in_chans" in args.given and not is_of_channels(theirs, args.in_chans):
        return {}
    return {name: theirs[name] for name in PIXEL_FLAGS if name in names and theirs.get(name) is not None}


# ── auto ──


def resolve_pixel_flags(
    args: Flags,
    run: Run,
    find: Callable[[Flags], Samples] | None,
    known: Sequence[tuple[Mapping[str, Any], str]] = (),
    take: bool = False,
) -> Flags:
    """The flags with numbers in place of each `auto`: those that the checkpoint to
    resume was trained with, else those of the weights that the run starts from, else
    of a sample of the images. They are logged, and kept with the run's flags.

    `find`: the training images that flags name; None for an evaluation. `known`: the flags that weights
    were trained with ({} where unknown), and what these are called. `take`: flags that
    were not given are those of the first of `known`; of a range that was given and is
    another one, a warning says so. UserError as check_pixel_flags.
    """
    taken = take_pixel_flags(args, known[0][0]) if take else {}
    args = args.replace(**{"in_chans": args.in_chans or 3, **taken})
    if take:
        check_pixel_flags(args)
        run.config |= {name: taken[name] for name in taken.keys() & run.config.keys()}
    if reads_rgb8(args) and args.mean_std is None:
        return args
    asked = [name for name in STATISTICS if getattr(args, name) == AUTO]
    resumed = find_resumed(run)[1].get("args", {}) if asked else {}
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name in asked:
        for flags, source in ((resumed, "the checkpoint"), *known):
            theirs = flags.get(name)
            if name not in found and theirs and is_of_channels(flags, args.in_chans):
                found[name], origin[name] = list(theirs), f" (of {source})"
    warning = ""
    if find is None and len(found) < len(asked):
        missing = next(name for name in asked if name not in found)
        raise UserError(f"--{missing} auto: the weights do not say what they were trained with; give numbers")
    if find is not None and not (resumed and len(found) == len(asked)):
        measured = measure(args, found, find)
        warning = measured.warning
        of_sample = f" (of {measured.files} images)"
        if "image_range" in asked and "image_range" not in found:
            found["image_range"], origin["image_range"] = list(measured.image_range or ()), of_sample
        if "mean_std" in asked and "mean_std" not in found:
            found["mean_std"], origin["mean_std"] = [*measured.mean, *measured.std], of_sample
    args = args.replace(**found)
    run.flags.update(checkpoints.to_plain_data({name: getattr(args, name) for name in PIXEL_FLAGS}))
    names = ", ".join(f"`{name}`" for name in taken)
    log_pixels(args, origin, f"; {names} of {known[0][1]}" if taken else "")
    if take and known[0][0].get("image_range") and is_of_channels(known[0][0], args.in_chans):
        warn_of_other_range(known[0][0]["image_range"], args.image_range, known[0][1])
    if warning:
        log.warning(
            f"warning: `image_range` may not be that of the images: {warning}; `image_range` auto measures it"
        )
    return args


def measure(args: Flags, found: Mapping[str, Any], find: Callable[[Flags], Samples]) -> PixelStatistics:
    low_high = found.get("image_range", args.image_range)
    auto = low_high == AUTO
    looked_at = SAMPLE_FILES if auto or args.mean_std == AUTO else LOOKED_AT
    bounds = None if auto or low_high is None else (low_high[0], low_high[1])
    images = open_evenly(find(args), looked_at)
    with say_if_slow(f"pixels     measuring up to {looked_at} images"):
        return measure_pixels(images, args.in_chans, bounds, auto)


def log_pixels(args: argparse.Namespace, origin: Mapping[str, str], taken: str) -> None:
    """One line: how the images are read and normalized. `taken`: which of it weights
    say.
    """
    flags = weight_source.translate_process_type(vars(args))
    mean, std = (" ".join(f"{value:g}" for value in each) for each in normalization_of(flags))
    log.info(
        f"pixels     {pixel_format(args)}{origin.get('image_range', '')}, mean {mean}, std {std}"
        f"{origin.get('mean_std', '')}{taken}"
    )


def warn_of_other_range(theirs: Sequence[float] | None, ours: Sequence[float] | None, weights: str) -> None:
    """What was trained on other numbers sees other images. None: by the files' type."""
    if theirs != ours:
        before, now = (
            "no `image_range`" if each is None else f"`image_range` {each[0]:g} {each[1]:g}"
            for each in (theirs, ours)
        )
        log.warning(f"warning: {weights} was trained with {before}, this run has {now}")

"""What a measured step means for the run: time, price, processor cores, disk."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import arguments
from estimation.measurement import Measured, PretendedRun
from estimation.stand_ins import Entry
from runtime.cards import CONTEXT, FRAGMENTS, GIB, Card, needed
from runtime.terminal import format_size

MIB = 2**20
# CPU time of one sample through the loader, in seconds (docs/lab/data-pipeline.md): two
# views of a JPEG of 500 x 375 pixels
SAMPLE_SECONDS = {"exact": 0.0054, "fast": 0.0043, "on the device": 0.0036}
# of batch sizes; batch norm and mixup want two images
CANDIDATES = [*range(2, 8), *range(8, 2**16 + 1, 8)]
TRIALS = 8  # along a line; then the rest is halved


@dataclass(frozen=True)
class Setting:
    """On what the run is to be. mfu: share of the peak. price: of an hour of a GPU."""

    card: Card
    gpus: int
    dtype: str
    mfu: float
    price: float | None

    @classmethod
    def of(cls, card: Card, gpus: int, dtype: str, mfu: float | None, price: float | None) -> Setting:
        return cls(card, gpus, dtype, mfu or card.assumed_mfu(dtype), price)

    def images_per_second(self, step: Measured) -> float:
        """Of all GPUs, where computing is all that takes time."""
        return step.images * self.card.peak_flops(self.dtype) * self.mfu / step.flops

    def hours(self, step: Measured) -> float:
        return step.steps * step.images / self.images_per_second(step) / 3600


@dataclass(frozen=True)
class Row:
    """A configuration, and how it is asked for."""

    flags: str
    step: Measured


def gflop_per_image(setting: Setting, step: Measured) -> float:
    return step.flops * setting.gpus / step.images / 1e9


def find_largest_batch(run: PretendedRun, card: Card, measured: Measured) -> int:
    """The largest batch size that fits, a multiple of 8 from 8 on; 0: not even the
    least one does. Memory grows all but linearly with it, so few are tried.
    """
    asked = run.args.batch_size
    peaks = {asked: measured.peak}
    low, high = 0, len(CANDIDATES)  # all candidates before `low` fit, none from `high` on does
    guess = bisect.bisect_left(CANDIDATES, asked // 2 if asked >= 4 else asked * 2)
    while low < high:
        size = CANDIDATES[guess]
        if size not in peaks:
            peaks[size] = run.measure(size).peak
        low, high = (guess + 1, high) if card.holds(peaks[size]) else (low, guess)
        # on the line through the two sizes that come nearest to the card's memory
        one, other = sorted(peaks, key=lambda tried: abs(needed(peaks[tried]) - card.memory))[:2]
        bytes_per_image = max(1.0, (needed(peaks[other]) - needed(peaks[one])) / (other - one))
        fitting = one + (card.memory - needed(peaks[one])) / bytes_per_image
        guess = bisect.bisect_right(CANDIDATES, fitting) - 1 if len(peaks) < TRIALS else (low + high) // 2
        guess = min(max(guess, low), high - 1)
    return CANDIDATES[low - 1] if low else 0


def data_cores(entry: Entry, args: arguments.Flags, images_per_second: float) -> float | None:
    """Cores that are busy with reading images, on all machines together; None where
    the time of a sample has not been measured.
    """
    if not entry.times_samples or args.in_chans != 3 or args.image_range is not None:
        return None
    pipeline = getattr(args, "data_pipeline", "exact")
    return images_per_second * SAMPLE_SECONDS["on the device" if on_device(args) else pipeline]


def on_device(args: arguments.Flags) -> bool:
    return bool(getattr(args, "augment_on_device", False))


def count_checkpoints(args: arguments.Flags, step: Measured) -> int:
    """Files that are there at the end, and one that is being written."""
    if not getattr(args, "save_ckpt", True):
        return 0
    epochs = math.ceil(step.steps / step.steps_per_epoch)
    best = any(hasattr(args, name) for name in ("best_metric", "steps_per_epoch"))
    kept = args.keep_ckpts if args.save_ckpt_steps else 0
    return math.ceil(epochs / args.save_ckpt_freq) + kept + best + 1


def disk_bytes(args: arguments.Flags, step: Measured) -> int:
    """Of the checkpoints, and of the codes that `crop_cycle` keeps."""
    return count_checkpoints(args, step) * step.checkpoint + step.codes


def format_disk(args: arguments.Flags, step: Measured) -> str:
    files = count_checkpoints(args, step)
    line = f"disk       {disk_bytes(args, step) / GIB:,.1f} GiB: {files} checkpoints of "
    line += f"{step.checkpoint / GIB:.2f} GiB"
    return line + (f", {format_size(step.codes)} of codes" if step.codes else "")


def format_memory(card: Card, step: Measured) -> list[str]:
    verdict = "it fits" if card.holds(step.peak) else "it does NOT fit"
    kinds = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in step.by_kind.items())
    return [
        f"memory     {step.peak / GIB:.1f} GiB a GPU at the peak; with {FRAGMENTS:.0%} between blocks and "
        f"{CONTEXT / GIB:.0f} GiB for CUDA itself {needed(step.peak) / GIB:.1f} of {card.memory / GIB:.0f}: "
        f"{verdict}",
        f"           GiB: {kinds}",
    ]


def format_rows(setting: Setting, rows: list[Row]) -> list[str]:
    """What other flags would change, the flags themselves first."""
    width = max(len(row.flags) for row in rows)
    lines = [f"{'':{width}}  GiB a GPU  fits  GFLOP an image  MiB exchanged    hours"]
    for row in rows:
        step, gflop = row.step, gflop_per_image(setting, row.step)
        fits = "yes" if setting.card.holds(step.peak) else "no"
        lines.append(
            f"{row.flags:{width}}  {step.peak / GIB:9.1f}  {fits:>4}  {gflop:14.1f}  "
            f"{step.exchanged / MIB:13.0f}  {setting.hours(step):7.1f}"
        )
    return lines

"""Collects what a run tells, and hands it to the terminal, the run's files and the
trackers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from monitoring.progress import Progress, Remark, RunTime, format_epoch, format_report, peak_memory
from monitoring.run_files import RunFiles, epoch_line, finite_only
from monitoring.trackers import Trackers
from runtime import distributed
from runtime.phases import DATA, phase
from runtime.terminal import format_duration, log, status

# what the test calls otherwise, and counts in percent
SAME_QUANTITY = {"class_acc": ("acc1", 100), "pixel_acc": ("aacc", 100)}


@dataclass(frozen=True)
class RunCounts:
    """How long a run is, and where in it this process starts or goes on."""

    epochs: int  # of the whole run
    first_epoch: int
    first_step: int  # optimizer steps that earlier parts of the run took
    images_per_step: int  # of all ranks together


class Reporter:
    """Progress on the terminal, files, trackers and pictures. Rank 0 reports; the
    others only time their loaders.

    Args:
        output_dir: of files and pictures; empty: there are none.
        print_freq: optimizer steps between two reports.
        remark: what must be said beside the figures after so many steps of the run.
    """

    def __init__(
        self,
        output_dir: str,
        print_freq: int,
        device: torch.device,
        counts: RunCounts,
        trackers: Trackers,
        remark: Callable[[int], Remark | None] = lambda step: None,
    ) -> None:
        self.device, self.counts, self.print_freq, self.remark = device, counts, print_freq, remark
        self.output_dir: Path | None = None
        self.files: RunFiles | None = None
        self.trackers = trackers
        self.reported: set[str] = set()  # quantities that each report has
        self.knows_waiting = False
        # for the MFU, where they are known: of a step in this process; of its device,
        # a second
        self.flops_per_step: int | None = None
        self.peak_flops: float | None = None
        self.progress, self.run_time, self.steps_left = Progress(), RunTime(), 0
        if distributed.is_main() and output_dir:
            self.output_dir = Path(output_dir)
            self.files = RunFiles(self.output_dir, counts.first_epoch, counts.first_step)

    @property
    def shows_pictures(self) -> bool:
        return bool(self.trackers.trackers) or self.output_dir is not None

    def start_epoch(self, epoch: int, done: int, steps_per_epoch: int, step: int) -> None:
        """done: steps of this epoch that were taken before. step: those of the whole
        run.
        """
        self.current_epoch = epoch
        self.title, self.steps_per_epoch = f"epoch {epoch + 1}/{self.counts.epochs}", steps_per_epoch
        self.steps_before_epoch, self.epochs_left = step - done, self.counts.epochs - epoch
        self.run_time.start_epoch(step)
        self.progress.start_epoch(f"{self.title} [{done}/{steps_per_epoch}]")
        self.epoch_started = self.last_report = time.monotonic()
        self.last_step, self.waited, self.waited_in_epoch = step, 0.0, 0.0

    def waiting_for(self, batches: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """The next `count` micro-batches; the time they take is the data-wait share."""
        asked = time.monotonic()
        with phase(DATA):
            group = [next(batches) for _ in range(count)]
        seconds = time.monotonic() - asked
        self.waited += seconds
        if self.knows_waiting:  # the first time, the data processes start
            self.waited_in_epoch += seconds
        self.knows_waiting = True
        return group

    def leave_out(self, seconds: float) -> None:
        """Time in which the run did something else than train: no part of the speed."""
        self.last_report += seconds
        self.run_time.leave_out(seconds)

    def is_due(self, step: int) -> bool:
        """Whether the user is to be told something, though `step` is none of
        `reports_at`.
        """
        return self.progress.is_due() or (distributed.is_main() and self.run_time.is_due(step))

    def reports_at(self, step: int) -> bool:
        """Whether `step` is followed by a report: the same steps in every rank and in a
        run that was resumed.
        """
        step_in_epoch = step - self.steps_before_epoch
        return step % self.print_freq == 0 or step_in_epoch == self.steps_per_epoch

    def step(
        self,
        means: dict[str, float],
        lr: float,
        step: int,
        steps_left: int,
        report: bool,
        more: dict[str, float] | None = None,
    ) -> None:
        """`means` since the last report. `report`: of a step of `reports_at`; otherwise
        only the terminal is told. `more` goes to files and trackers.
        """
        seconds, steps = max(time.monotonic() - self.last_report, 1e-9), max(step - self.last_step, 1)
        speed, data_wait = steps * self.counts.images_per_step / seconds, self.waited / seconds
        memory, mfu = peak_memory(self.device), self.mfu(steps / seconds)
        figures = format_report(means, lr, speed, data_wait, memory, self.remark(step), mfu)
        self.tell(step, figures, steps_left, report)
        if not report:
            return
        more = more or {}
        measured = {"lr": lr, "images_per_second": speed, "data_wait": data_wait, "memory": memory}
        measured["mfu"] = mfu
        if self.files is not None:
            line = {"step": step, "epoch": self.current_epoch}
            self.files.metrics.append_if_possible(finite_only(line | more | means | measured))
        known = {name: value for name, value in more.items() if math.isfinite(value) and name != "images"}
        self.reported |= means.keys() | more.keys() | {"lr"}
        scalars = name_scalars("train", means | known) | {"train/lr": lr}
        scalars |= {"speed/images_per_second": speed, "speed/data_wait": data_wait}
        if mfu is not None:
            scalars["speed/mfu"] = mfu
        self.trackers.scalars(scalars, step)
        self.last_report, self.last_step, self.waited = time.monotonic(), step, 0.0

    def seconds_of_epoch(self) -> float:
        """Since it started, or this process went on in its middle."""
        return time.monotonic() - self.epoch_started

    def mfu(self, steps_per_second: float) -> float | None:
        """Share of the device's peak that the steps reach."""
        if self.flops_per_step is None or self.peak_flops is None:
            return None
        return self.flops_per_step * steps_per_second / self.peak_flops

    def tell(self, step: int, figures: list[str], steps_left: int, report: bool) -> None:
        """At the terminal; once, as soon as it is known, with the time of the whole
        run.
        """
        step_in_epoch, self.steps_left = step - self.steps_before_epoch, steps_left
        self.run_time.take(step, report)
        self.run_time.tell(steps_left, self.epochs_left)
        title = f"{self.title} [{step_in_epoch}/{self.steps_per_epoch}]"
        self.progress.update(title, figures, self.run_time.left(steps_left, self.epochs_left), report)
        if step_in_epoch == self.steps_per_epoch:
            self.run_time.end_epoch()
            self.progress.say(f"{title}  evaluating and saving")

    def epoch(
        self,
        epoch: int,
        step: int,
        train: dict[str, float],
        test: dict[str, float],
        alarms: Sequence[str] = (),
    ) -> None:
        """One JSON object in log.txt, a table on the terminal. `step`: those of the
        whole run so far. `alarms`: those that hold.
        """
        seconds = round(self.seconds_of_epoch(), 2)
        line = epoch_line(epoch, train, test) | {"seconds": seconds}
        self.run_time.count_pause()
        left = self.run_time.left(self.steps_left, self.epochs_left - 1)
        log.info(
            f"{self.title} done in {format_duration(seconds)}"
            + (f", about {format_duration(left)} left" if left and self.epochs_left > 1 else "")
        )
        remark = self.remark(step)
        if remark is not None:
            log.info(f"  {remark.text}")
        # a figure of each block is for charts
        shown = {name: value for name, value in test.items() if "_block_" not in name}
        for row in format_epoch(train, shown, status.width, remark):
            log.info(row)
        if self.files is not None:
            self.files.log.append(line | ({"alarms": list(alarms)} if alarms else {}))
        # what reports told, an epoch's mean need not tell again
        of_epoch = {name: value for name, value in train.items() if name not in self.reported}
        self.trackers.scalars(name_scalars("train", of_epoch) | name_scalars("test", test), step)
        self.trackers.end_epoch()

    def pictures(self, epoch: int, step: int, images: dict[str, Tensor]) -> None:
        """Images (3, height, width) in [0, 1], by name."""
        self.trackers.pictures(images, step)
        if self.output_dir is not None:
            folder = self.output_dir / "pictures"
            folder.mkdir(exist_ok=True)
            for name, image in images.items():
                save_image(image, folder / f"{name}-{epoch:04d}.png")

    def close(self, outcome: str) -> None:
        """`outcome`: "finished", "stopped" or "failed"."""
        self.progress.close()
        self.trackers.close(outcome)


def name_scalars(split: str, values: dict[str, float]) -> dict[str, float]:
    """Names for trackers, the same for training and test where the quantity is:
    `train_class_acc` and `test_acc1` of log.txt are `train/acc1` and `test/acc1`, both
    in percent.
    """
    named = {}
    for name, value in values.items():
        if name in ("test_images", "unused_code"):  # a constant; codes_used says it
            continue
        part = split
        for prefix in ("test_ema_", "test_", "health_"):
            if name.startswith(prefix):
                part, name = prefix[:-1], name.removeprefix(prefix)
                break
        name, factor = SAME_QUANTITY.get(name, (name, 1)) if part == "train" else (name, 1)
        named[f"{part}/{name}"] = factor * value
    return named

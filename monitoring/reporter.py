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
from monitoring.run_files import RunFiles, finite_only
from monitoring.trackers import TensorBoard, Tracker
from runtime import distributed
from runtime.terminal import format_duration, log, status


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
        log_dir: of TensorBoard's files, if not output_dir.
        print_freq: optimizer steps between two reports.
        remark: what must be said beside the figures after so many steps of the run.
    """

    def __init__(
        self,
        output_dir: str,
        log_dir: str | None,
        print_freq: int,
        device: torch.device,
        counts: RunCounts,
        remark: Callable[[int], Remark | None] = lambda step: None,
    ) -> None:
        self.device, self.counts, self.print_freq, self.remark = device, counts, print_freq, remark
        self.output_dir: Path | None = None
        self.files: RunFiles | None = None
        self.trackers: list[Tracker] = []
        self.knows_waiting = False
        self.progress, self.run_time, self.steps_left = Progress(), RunTime(), 0
        if distributed.is_main():
            if output_dir:
                self.output_dir = Path(output_dir)
                self.files = RunFiles(self.output_dir, counts.first_epoch, counts.first_step)
            if log_dir or output_dir:
                self.trackers.append(TensorBoard(log_dir or output_dir, counts.first_step))

    @property
    def shows_pictures(self) -> bool:
        return bool(self.trackers) or self.output_dir is not None

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
        group = [next(batches) for _ in range(count)]
        seconds = time.monotonic() - asked
        self.waited += seconds
        if self.knows_waiting:  # the first time, the data processes start
            self.waited_in_epoch += seconds
        self.knows_waiting = True
        return group

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
        memory = peak_memory(self.device)
        self.tell(
            step, format_report(means, lr, speed, data_wait, memory, self.remark(step)), steps_left, report
        )
        if not report:
            return
        more = more or {}
        measured = {"lr": lr, "images_per_second": speed, "data_wait": data_wait, "memory": memory}
        if self.files is not None:
            line = {"step": step, "epoch": self.current_epoch}
            self.files.metrics.append(finite_only(line | more | means | measured))
        known = {name: value for name, value in more.items() if math.isfinite(value) and name != "images"}
        scalars = {f"train/{name}": value for name, value in (means | known).items()}
        scalars |= {"train/lr": lr, "speed/images_per_second": speed, "speed/data_wait": data_wait}
        for tracker in self.trackers:
            tracker.scalars(scalars, step)
        self.last_report, self.last_step, self.waited = time.monotonic(), step, 0.0

    def seconds_of_epoch(self) -> float:
        """Since it started, or this process went on in its middle."""
        return time.monotonic() - self.epoch_started

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
        line: dict[str, Any] = {
            "epoch": epoch,
            **{f"train_{name}": value for name, value in train.items()},
            **test,
            "seconds": seconds,
        }
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
        scalars = {f"epoch/{name}": value for name, value in line.items()}
        for tracker in self.trackers:
            tracker.scalars(scalars, step)
            tracker.flush()

    def pictures(self, epoch: int, step: int, images: dict[str, Tensor]) -> None:
        """Images (3, height, width) in [0, 1], by name."""
        for tracker in self.trackers:
            tracker.pictures(images, step)
        if self.output_dir is not None:
            folder = self.output_dir / "pictures"
            folder.mkdir(exist_ok=True)
            for name, image in images.items():
                save_image(image, folder / f"{name}-{epoch:04d}.png")

    def close(self) -> None:
        self.progress.close()
        for tracker in self.trackers:
            tracker.close()

"""What a run left in its output folder: flags.json, log.txt, and, from newer runs,
metrics.jsonl and environment.json.
"""

from __future__ import annotations

import functools
import json
import math
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from errors import UserError, count
from monitoring.run_files import LOG, METRICS
from runtime.run_lock import find_holder

FLAGS, ENVIRONMENT = "flags.json", "environment.json"
# a flag that only this stage has
STAGES = {
    "tokenizer": "codebook_n_emd",
    "pretraining": "num_mask_patches",
    "fine-tuning": "mixup",
    "segmentation": "steps_per_epoch",
    "linear probe": "base_lr",
}
# of environment.json, beside the flags: runs may differ in these too
SETTINGS = ("commit", "torch", "cuda", "gpu", "host")
NO_SCORES = re.compile(r"test_(images|layer)$")  # they describe a score, and have no best
LOWER_IS_BETTER = re.compile(r"loss|unused|dead")


@dataclass
class RunFolder:
    """`epochs`: the lines of log.txt, one an epoch; `reports`: those of metrics.jsonl;
    `unread`: what could not be read, in words.
    """

    folder: Path
    flags: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        if self.flags.get("train_pixel_decoder"):
            return "pixel decoder"
        return next((stage for stage, flag in STAGES.items() if flag in self.flags), "unknown stage")

    @property
    def settings(self) -> dict[str, Any]:
        """The flags, and of what machine and code they were given to."""
        known = {name: self.environment[name] for name in SETTINGS if name in self.environment}
        return self.flags | known

    @property
    def epochs_done(self) -> int:
        return self.epochs[-1]["epoch"] + 1 if self.epochs else 0

    @property
    def epochs_planned(self) -> int | None:
        """None: the run's flags are not known."""
        flags = self.flags
        try:
            return int(
                flags["epochs"]
                if "epochs" in flags
                else math.ceil(flags["max_steps"] / flags["steps_per_epoch"])
            )
        except (KeyError, TypeError, ValueError, ArithmeticError):
            return None

    @functools.cached_property
    def state(self) -> str:
        """done, running, running on HOST (as its lock says), stopped, unknown."""
        if self.epochs_planned is not None and self.epochs_done >= self.epochs_planned:
            return "done"
        holder = find_holder(self.folder)
        if holder:
            here = holder["host"] == socket.gethostname()
            return "running" if here else f"running on {holder['host']}"
        return "unknown" if self.epochs_planned is None else "stopped"

    @property
    def seconds(self) -> float:
        """Of the epochs in log.txt, evaluation included."""
        return math.fsum(finite(epoch.get("seconds", 0.0) for epoch in self.epochs))

    @property
    def figures(self) -> list[str]:
        """What log.txt tells of an epoch: names of the numbers in it, in its order."""
        names = {name: None for epoch in self.epochs for name, value in epoch.items() if is_number(value)}
        return [name for name in names if name not in ("epoch", "seconds", "step")]

    def last(self, figure: str) -> float | None:
        """Its value in the last epoch that has it; not every epoch is evaluated."""
        values = self.values(figure)
        return values[-1] if values else None

    def best(self, figure: str) -> float | None:
        """NaN only if no epoch has a finite value; None without one that has any."""
        values = self.values(figure)
        choose = min if LOWER_IS_BETTER.search(figure) else max
        return choose(finite(values), default=math.nan) if values else None

    def values(self, figure: str) -> list[float]:
        return [epoch[figure] for epoch in self.epochs if is_number(epoch.get(figure))]

    @functools.cached_property
    def epoch_ends(self) -> dict[int, dict[str, Any]]:
        """The last report of each epoch in log.txt: it is made after the last step."""
        done = {line["epoch"] for line in self.epochs}
        of_epochs = (report for report in self.reports if type(report.get("epoch")) is int)
        return {report["epoch"]: report for report in of_epochs if report["epoch"] in done}

    def epoch_at(self, report: dict[str, Any]) -> float | None:
        """Epochs that were done at a report, part of one included; None in a first
        epoch that is not over.
        """
        epoch, ends = report.get("epoch"), self.epoch_ends
        if type(epoch) is not int:
            return None
        if epoch in ends:
            end = ends[epoch]["step"]
            start = ends[epoch - 1]["step"] if epoch - 1 in ends else end * epoch / (epoch + 1)
        elif epoch - 1 in ends:  # as long as those before it
            start = ends[epoch - 1]["step"]
            end = start * (epoch + 1) / epoch
        else:
            return None
        return epoch + (report["step"] - start) / (end - start) if end > start else None


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(values: Iterable[Any]) -> list[float]:
    return [value for value in values if is_number(value) and math.isfinite(value)]


# ── Reading ──


def is_run(folder: Path) -> bool:
    """It has a log.txt, or flags.json of a training run whose first epoch is not over;
    those of an evaluation are fewer.
    """
    if (folder / LOG).is_file():
        return True
    return (folder / FLAGS).is_file() and RunFolder(
        folder, read_object(folder / FLAGS, [])
    ).epochs_planned is not None


def find_runs(paths: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The folders of runs among `paths` and, of a folder that is none, in it; each
    once. And the sentences about those that were skipped.

    UserError: a path is not there, or there is no run at all.
    """
    found: dict[Path, Path] = {}
    skipped = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such folder; name the output folders of runs, or a folder of them")
        try:
            runs = [path] if is_run(path) else []
            if not runs and path.is_dir():
                runs = sorted((child for child in path.iterdir() if is_run(child)), key=natural_order)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); leave it out") from None
        if not runs:
            skipped.append(f"skipped    {path}: no run is in it (neither {LOG} nor a run's {FLAGS})")
        for run in runs:
            found.setdefault(run.resolve(), run)
    if not found:
        raise UserError(
            f"no run in {', '.join(paths)}: name the output folders (`output_dir`) of runs, which hold {LOG}"
        )
    return list(found.values()), skipped


def natural_order(path: Path) -> list[tuple[int, str]]:
    """run2 before run10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def read_run(folder: Path) -> RunFolder:
    """Whatever can be read; `unread` says what could not."""
    unread: list[str] = []
    epochs = {
        line["epoch"]: line
        for line in read_lines(folder / LOG, "epoch", unread)  # the last line of an epoch counts
    }
    reports = {line["step"]: line for line in read_lines(folder / METRICS, "step", unread)}
    return RunFolder(
        folder,
        read_object(folder / FLAGS, unread),
        read_object(folder / ENVIRONMENT, unread),
        [epochs[epoch] for epoch in sorted(epochs)],
        [reports[step] for step in sorted(reports)],
        unread,
    )


def parse(text: bytes) -> Any:
    """JSON, with infinity for whole numbers that no count reaches and no float holds."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))


def read_object(path: Path, unread: list[str]) -> dict[str, Any]:
    """{} where there is no such file, or none that holds an object."""
    try:
        content = parse(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return content
    unread.append(f"{path} cannot be read")
    return {}


def read_lines(path: Path, number: str, unread: list[str]) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects that have `number`, a count from 0."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        unread.append(f"{path} cannot be read ({error.strerror})")
        return []
    objects, broken = [], 0
    for line in filter(bytes.strip, lines):
        try:
            content = parse(line)
            fine = type(content[number]) is int and content[number] >= 0
        except (ValueError, TypeError, KeyError, RecursionError):
            fine = False
        if fine:
            objects.append(content)
        else:
            broken += 1
    if broken:
        unread.append(f"{path}: {count(broken, 'line')} cannot be read, and left out")
    return objects

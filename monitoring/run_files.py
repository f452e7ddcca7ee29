"""Files of a run that outlive it: log.txt, a line an epoch; metrics.jsonl, a line a
report.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from runtime.terminal import log

LOG, METRICS = "log.txt", "metrics.jsonl"


class JsonLines:
    """A file with one JSON object a line, which a resumed run goes on with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed = False  # to write the line before

    def go_on_before(self, key: str, first: int) -> None:
        """Drop the lines whose `key` is `first` or more: a resumed run writes them
        again. Lines that are not ours stay.
        """
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and number_in(line, key) < first]
            # a full disk must not cost the old lines
            shorter = self.path.with_name(f".{self.path.name}.part")
            shorter.write_text("".join(kept), encoding="utf-8")
            shorter.replace(self.path)

    def read(self, key: str, last: int | None = None) -> list[dict[str, Any]]:
        """Our lines, those with a number `key`, among the `last` ones or all."""
        if not self.path.exists():
            return []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            lines = deque(file, last)
        return [json.loads(line) for line in lines if number_in(line, key) > -math.inf]

    def append(self, line: dict[str, Any]) -> None:
        """NaN and infinities are written as Python's reader takes them, which strict
        ones refuse: see finite_only. Behind a line that was cut it begins anew.
        """
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" * self.failed + json.dumps(line) + "\n")
        self.failed = False

    def append_if_possible(self, line: dict[str, Any]) -> None:
        """In the midst of an epoch, whose steps a full disk must not cost: it is warned of
        once.
        """
        try:
            self.append(line)
        except OSError as error:
            if not self.failed:
                log.warning(f"warning: {self.path} cannot be written ({error.strerror}): lines are missing")
            self.failed = True


def epoch_line(epoch: int, train: dict[str, float], test: dict[str, float]) -> dict[str, Any]:
    """What log.txt says of an epoch's figures."""
    return {"epoch": epoch, **{f"train_{name}": value for name, value in train.items()}, **test}


def set_aside(path: Path, when: str) -> None:
    """Another run's file gets another name."""
    if path.exists():
        path.replace(path.with_name(f"{path.stem}-until-{when}{path.suffix}"))


class RunFiles:
    """log.txt and metrics.jsonl in the folder of a run.

    Args:
        first_epoch, first_step: where this process starts or goes on.
    """

    def __init__(self, folder: Path, first_epoch: int, first_step: int) -> None:
        self.log, self.metrics = JsonLines(folder / LOG), JsonLines(folder / METRICS)
        if first_step > 0:
            self.log.go_on_before("epoch", first_epoch)
            self.metrics.go_on_before("step", first_step + 1)
        else:
            now = time.strftime("%Y%m%d-%H%M%S")
            set_aside(self.log.path, now)
            set_aside(self.metrics.path, now)


def last_step(folder: Path) -> int:
    """Of the last report in metrics.jsonl; 0 without one."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return int(max([0.0, *(number_in(line, "step") for line in lines[-2:])]))  # the last may be cut


def finite_only(line: dict[str, Any]) -> dict[str, Any]:
    """Figures that are not finite as null, which every reader of JSON takes."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }


def number_in(line: str, key: str) -> float:
    """-inf for a line that is none of ours: it is left as it is."""
    try:
        return int(json.loads(line)[key])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return -math.inf

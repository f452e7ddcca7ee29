"""Flags with values of every sort."""

from __future__ import annotations

import json
import random
from importlib import import_module
from pathlib import Path

import numpy as np

from fuzzing.runs import ENTRIES, SECRET, Case, valid_runs

NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "0.5",
    "1",
    "2",
    "1e30",
    "-1e-30",
    "1e400",
    str(10**30),
    "-9223372036854775809",
)
WORDS = (
    "",
    " ",
    "x",
    "None",
    "../..",
    "~",
    "a\x1b[31mb",
    "é",
    "http://[",
    f"https://h/f.pth?sig={SECRET}",
    "\udcff",
    "a" * 5000,
)
LEFT_ALONE = (
    "help",
    "download",
    "dist_url",
    "dist_on_itp",
    "device",
    "num_workers",
    "detect_anomaly",
    "compile",
)


def flag_case(draw: random.Random, shared: Path, folder: Path) -> Case:
    """One to three flags with values of every sort."""
    entry = draw.choice(ENTRIES)
    argv = valid_runs(shared, folder / "out")[entry]
    actions = [
        action
        for action in import_module(entry).get_parser()._actions
        if action.option_strings and action.dest not in LEFT_ALONE and action.nargs != 0
    ]
    given = []
    for action in draw.sample(actions, draw.choice((1, 1, 1, 2, 3))):
        values = (
            (*NUMBERS, *map(str, action.choices))
            if action.choices
            else NUMBERS
            if action.type
            else (*WORDS, *NUMBERS[:6])
        )
        count = draw.randint(1, 3) if action.nargs in ("+", 2) else 1
        given.append(f"{action.option_strings[0]}={draw.choice(values)}")
        given[-1:] = [action.option_strings[0], *draw.choices(values, k=count)] if count > 1 else given[-1:]
    return Case("flags", f"flags {given!a}", entry, [*argv, *given], check=finite_log)


def finite_log(folder: Path) -> str | None:
    """A run that succeeds has a loss."""
    log = folder / "out" / "log.txt"
    for line in log.read_text().splitlines() if log.is_file() else ():
        if not np.isfinite(json.loads(line).get("train_loss", 0.0)):
            return f"train_loss is {json.loads(line)['train_loss']}"
    return None

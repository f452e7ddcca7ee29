"""What a run is: its flags, the runs that it starts from, and its JSON."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = {
    "vqkd": "run_vqkd_training.py",
    "pretrain": "run_beitv2_pretraining.py",
    "finetune": "run_class_finetuning.py",
    "linear": "run_linear_eval.py",
    "segment": "run_segmentation_finetuning.py",
}
PHOTOS = "PHOTOS"  # in flags: the folder of the set of photos


@dataclass(frozen=True)
class Run:
    """One start of an entry script. `flags` have no path but PHOTOS; `inputs`: flag ->
    the run whose checkpoint is its value.
    """

    stage: str
    photos: str
    variant: str
    seed: int
    flags: tuple[str, ...]
    inputs: tuple[tuple[str, Run], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.photos}-{self.stage}-{self.variant}-s{self.seed}"

    @functools.cached_property
    def id(self) -> str:
        """Of all that decides what it computes, but for the code and the machine."""
        inputs = [(flag, run.id) for flag, run in self.inputs]
        content = json.dumps([SCRIPTS[self.stage], self.photos, self.seed, self.flags, inputs])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def value(self, flag: str) -> str:
        return self.flags[self.flags.index(f"--{flag}") + 1]

    @property
    def log_lines(self) -> int:
        """Of a finished run: one an epoch."""
        if self.stage == "segment":
            return int(self.value("max_steps")) // int(self.value("steps_per_epoch"))
        return int(self.value("epochs"))

    def words(self, photos: Path, checkpoints: dict[str, Path]) -> list[str]:
        """Of its command line but for the output; `checkpoints`: run id -> file."""
        words = [word.replace(PHOTOS, str(photos)) for word in self.flags]
        for flag, run in self.inputs:
            words += [f"--{flag}", str(checkpoints[run.id])]
        return [*words, "--seed", str(self.seed)]


def with_inputs(runs: Iterable[Run]) -> list[Run]:
    """Each once, after those that it starts from."""
    found: dict[str, Run] = {}

    def add(run: Run) -> None:
        for _, each in run.inputs:
            add(each)
        found.setdefault(run.name, run)

    for run in runs:
        add(run)
    return list(found.values())


# ── Results ──


def read_result(folder: Path, run: Run) -> dict[str, Any] | None:
    """None where there is none, or one of other flags."""
    path = folder / f"{run.name}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if content["id"] == run.id else None


def write_result(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['name']}.json"
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)


def read_results(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))

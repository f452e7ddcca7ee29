"""What trackers must know of a run."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_io.resumption import WITHOUT_EFFECT
from errors import hide_secrets
from monitoring.run_files import last_step

IDS = "trackers.json"  # in output_dir: by which id each service knows the run
PROJECT = "beit2"


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers see it.

    Args:
        output_dir: empty: nothing is kept, and a resumed run is a new one to a service.
        log_dir: of TensorBoard's files, if not output_dir.
        command: the command line.
        chosen: names of the flags that differ from their defaults and decide what is
            trained.
        first_step: optimizer steps that earlier parts of the run took.
        last_step: the last one of which the part before this one reported, which may
            be later: it was killed after its last checkpoint.
    """

    output_dir: str
    log_dir: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    first_step: int = 0
    last_step: int = 0
    chosen: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return Path(self.output_dir).resolve().name if self.output_dir else "run"

    def config(self) -> dict[str, Any]:
        """The flags as numbers, switches and texts without secrets, and the command."""
        plain = {
            name: value if isinstance(value, (bool, int, float)) else as_text(value)
            for name, value in self.flags.items()
        }
        return plain | {"command": hide_secrets(self.command)}

    def known_ids(self) -> dict[str, str]:
        """Of a run that goes on; a new run gets new ones."""
        if self.first_step and self.output_dir:
            with contextlib.suppress(OSError, ValueError):
                ids = json.loads((Path(self.output_dir) / IDS).read_text(encoding="utf-8"))
                return {str(name): str(known) for name, known in dict(ids).items()}
        return {}


def describe_run(
    output_dir: str, log_dir: str | None, flags: dict[str, Any], changed: Iterable[str], step: int
) -> TrackedRun:
    """Of this process, which starts or goes on after `step`. Before the run's files
    forget what an earlier part reported after that.
    """
    last = last_step(Path(output_dir)) if output_dir and step else 0
    chosen = frozenset(changed) - WITHOUT_EFFECT
    return TrackedRun(output_dir, log_dir, flags, shlex.join(sys.argv), step, last, chosen)


def as_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(as_text, value))
    return "none" if value is None else hide_secrets(str(value))


def new_id() -> str:
    return secrets.token_hex(4)


def project(variable: str) -> str:
    """The name of the project, from a service's own environment variable."""
    return os.environ.get(variable) or PROJECT

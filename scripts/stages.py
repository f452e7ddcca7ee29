"""What the demos share: an entry script run as a user would run it, and the log that it
writes.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from errors import UserError, printable

ROOT = Path(__file__).resolve().parent.parent


def run_entry(stage: str, script: str, flags: str, *more: str) -> float:
    """One entry script in a process of its own; its seconds. The demo stops if it
    fails.
    """
    command = [sys.executable, str(ROOT / script), *shlex.split(flags), *more]
    print("\n" + printable(f"[{stage}] $ python {shlex.join([script, *command[2:]])}"), flush=True)
    started = time.monotonic()
    status = subprocess.run(command, cwd=ROOT).returncode
    if status != 0:
        raise UserError(f"stage {stage} failed (status {status}); its output is above")
    return time.monotonic() - started


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.txt of a run that wrote to `folder`."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]

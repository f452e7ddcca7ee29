"""Small stateless helpers with two importers at least; no collectives and no file
formats here.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from seeding import derive_seed, seed_all, seeded

__all__ = ["derive_seed", "git_commit", "seed_all", "seeded"]


def git_commit() -> str:
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"

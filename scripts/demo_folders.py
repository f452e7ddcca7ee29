"""The folder that a demo writes to."""

from __future__ import annotations

from pathlib import Path


def make_empty(folder: Path) -> None:
    """Make `folder`; one of an earlier run is kept as folder-1, folder-2, ..."""
    if folder.exists():
        number = 1
        while (kept := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        folder.rename(kept)
        print(f"kept       {folder.name}/ of an earlier run, now {kept.name}/")
    folder.mkdir(parents=True)

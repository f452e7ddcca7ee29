"""What measurements on the demo's photos of solar cells share: the photos, the demo's
commands for them, and a run unless it is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from advice.command import Command
from demo_photos import plan_solar_cells, shrink, solar_cells
from stages import log_of, run_entry


def prepare(folder: Path, count: int = 2624) -> list[Command]:
    """`count` of the photos, evenly spread, in folder/data, and the demo's three
    commands for them.
    """
    for number, (source, label, validate) in enumerate(solar_cells()[:: max(1, 2624 // count)]):
        target = folder / "data" / ("val" if validate else "train") / label / f"{number:06d}.jpg"
        if not target.exists():
            shrink(source, target)
    return plan_solar_cells(folder)


def run(command: Command, out: Path, **changes: Any) -> None:
    """Unless it is done; one that was killed goes on."""
    epochs = int(changes.get("epochs") or command.value("epochs"))
    if (out / "log.txt").exists() and len(log_of(out)) >= epochs:
        return
    more: dict[str, Any] = {"output_dir": out, "device": "cpu", "image_freq": 0, "eval_freq": epochs}
    images = len(list(Path(command.value("data_path")).rglob("*.jpg")))
    steps = epochs * max(1, images // int(command.value("batch_size")))
    if steps < command.steps:  # the warm-up of a shorter run is shorter
        more["warmup_steps"] = max(1, steps // 6)
    run_entry(str(out), command.script, "", *command.words(**more | changes))

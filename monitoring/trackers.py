"""Where a run's figures are followed, beside its own files (`track`): TensorBoard, and
services whose packages are optional.

A tracker never ends a run that trains: what fails is said once.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Protocol

from torch import Tensor

from checkpoint_io.checkpoints import write_json
from errors import ParameterError, UserError
from monitoring.tensorboard_files import TensorBoard
from monitoring.tracked_run import IDS, TrackedRun
from monitoring.tracking_services import MLflow, Trackio, Wandb, keep_hooks
from runtime import distributed
from runtime.terminal import log

NONE = "none"
OF_REPORTS = ("train/", "speed/")  # figures of each report; the others are an epoch's
SERVICES: dict[str, Callable[[TrackedRun, str | None], Service]] = {
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}
NAMES = ("tensorboard", *SERVICES, NONE)


class Tracker(Protocol):
    """What a run tells. Every `step` counts the optimizer steps of the whole run."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """By name: `train/loss`, `test/loss`."""

    def pictures(self, images: dict[str, Tensor], step: int) -> None:
        """Images (3, height, width) in [0, 1], by name."""

    def flush(self) -> None:
        """At the end of an epoch."""

    def close(self, status: str) -> None:
        """`status`: "finished", "stopped" or "failed"."""


class Service(Tracker, Protocol):
    """A tracker that knows the run by an id, with which a resumed run goes on."""

    id: str


class Continued:
    """A service that knows the run already. What the part before this one told, up to
    `last_step`, is not told again: services keep both values, or complain.
    """

    def __init__(self, service: Service, last_step: int) -> None:
        self.service, self.last_step = service, last_step

    def scalars(self, values: dict[str, float], step: int) -> None:
        if step == self.last_step:  # killed between a report and the epoch's evaluation?
            values = {name: v for name, v in values.items() if not name.startswith(OF_REPORTS)}
        if step >= self.last_step and values:
            self.service.scalars(values, step)

    def pictures(self, images: dict[str, Tensor], step: int) -> None:
        if step >= self.last_step:
            self.service.pictures(images, step)

    def flush(self) -> None:
        self.service.flush()

    def close(self, status: str) -> None:
        self.service.close(status)


class Trackers:
    """All trackers of a run. One that fails is left alone to the end of the epoch."""

    def __init__(self, trackers: dict[str, Tracker] | None = None) -> None:
        self.trackers = trackers or {}
        self.failed: set[str] = set()  # in this epoch
        self.warned: set[str] = set()

    def tell(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in self.trackers.items():
            if name in self.failed:
                continue
            try:
                what(tracker)
            except Exception as error:  # of any library, and of its network
                self.failed.add(name)
                if name not in self.warned:
                    self.warned.add(name)
                    log.warning(
                        f"warning: {name} failed ({describe(error)}): training goes on, and what happens "
                        "until it answers again is in output_dir alone"
                    )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.tell(lambda tracker: tracker.scalars(values, step))

    def pictures(self, images: dict[str, Tensor], step: int) -> None:
        self.tell(lambda tracker: tracker.pictures(images, step))

    def end_epoch(self) -> None:
        self.tell(lambda tracker: tracker.flush())
        self.failed.clear()

    def close(self, status: str) -> None:
        self.failed.clear()
        self.tell(lambda tracker: tracker.close(status))


def check_trackers(names: Sequence[str]) -> None:
    """Whether the packages of `track` are there, before anything else takes time."""
    for name in names:
        if name not in NAMES:
            raise ParameterError(f"`track` {name}: choose from {', '.join(NAMES)}")
        if name == NONE and len(names) > 1:
            raise ParameterError(f"`track` {' '.join(names)}: none goes with no other name")
        if name not in SERVICES or not distributed.is_main():
            continue
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            missing = error.name == name
            why = "is not installed" if missing else f"cannot be imported ({describe(error)})"
            raise UserError(
                f"`track` {name}: the package {name} {why}: pip install {name}, or leave the name out"
            ) from None
        logging.getLogger(name).setLevel(logging.WARNING)
        if name == "wandb":
            check_wandb_key(module)


def check_wandb_key(wandb: ModuleType) -> None:
    """Without one wandb would ask at the terminal."""
    with keep_hooks():
        offline = wandb.setup().settings.mode not in (None, "online")
        known = offline or wandb.login(prompt=False, verify=False)
    if not known:
        raise UserError(
            "`track` wandb: no API key of wandb is known here: run `wandb login` once, or set "
            "WANDB_MODE=offline and send the files later with `wandb sync`"
        )


def open_trackers(names: Sequence[str], run: TrackedRun) -> Trackers:
    """Those of `track`; rank 0 alone has any. One that does not open ends a new run,
    which has lost nothing; a resumed run goes on without it.
    """
    trackers: dict[str, Tracker] = {}
    if not distributed.is_main():
        return Trackers()
    if "tensorboard" in names and (run.log_dir or run.output_dir):
        trackers["tensorboard"] = TensorBoard(run)
    known, ids = run.known_ids(), {}
    for name in SERVICES:
        if name not in names:
            continue
        try:
            service = SERVICES[name](run, known.get(name))
        except Exception as error:
            if not run.first_step:
                raise UserError(
                    f"`track` {name}: it cannot be opened ({describe(error)}). Put that right, or leave "
                    "the name out"
                ) from None
            log.warning(f"warning: {name} cannot be opened ({describe(error)}): the run goes on without it")
        else:
            # wandb asks its server what it has; offline, a killed part may lack its last seconds
            skips = name in known and name != "wandb"
            trackers[name] = Continued(service, run.last_step) if skips else service
            ids[name] = service.id
    if ids and run.output_dir:
        write_json(run.output_dir, IDS, known | ids)
    return Trackers(trackers)


def describe(error: Exception) -> str:
    """Its first line; the whole may be a page of a server's."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]

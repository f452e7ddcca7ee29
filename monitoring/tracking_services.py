"""Weights & Biases, MLflow and trackio. Their packages are imported when they are named
(`track`); project, server and the like come from their own environment variables.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from monitoring.tracked_run import TrackedRun, new_id, project

LONGEST_PARAM = 6000  # characters that MLflow keeps
SECONDS_TO_CLOSE = 60  # that the last figures may take on their way to a server


class Wandb:
    """A run of Weights & Biases. It captures nothing that the run prints."""

    def __init__(self, run: TrackedRun, known: str | None) -> None:
        import wandb

        self.image, self.id = wandb.Image, known or new_id()
        settings = wandb.Settings(
            silent=True,
            console="off",
            finish_timeout=SECONDS_TO_CLOSE,
            x_transaction_log_flush_interval=1.0,  # of 15 seconds, a killed run would lack the last ones
            x_disable_meta=True,  # it has the command line as typed, with the secrets of URLs
            disable_git=True,
            disable_code=True,
        )
        with keep_hooks():
            self.run = wandb.init(
                project=project("WANDB_PROJECT"),
                name=os.environ.get("WANDB_NAME") or run.name,
                dir=os.environ.get("WANDB_DIR") or run.output_dir or None,
                id=self.id,
                resume="allow",
                config=run.config(),
                settings=settings,
            )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.log(values, step)

    def pictures(self, images: dict[str, Tensor], step: int) -> None:
        self.log({f"pictures/{name}": self.image(pixels(image)) for name, image in images.items()}, step)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if step >= self.run.step:  # the server refuses those before it, with a warning each
            self.run.log(dict(values), step=step)

    def flush(self) -> None:
        pass

    def close(self, status: str) -> None:
        self.run.finish(exit_code=1 if status == "failed" else 0)


class MLflow:
    """A run of MLflow, on a server or in a file."""

    STATUS: ClassVar = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, run: TrackedRun, known: str | None) -> None:
        # MLflow's own 120 seconds and 7 tries would hold up the training for long
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self.client, self.metric = MlflowClient(), Metric
        self.id = known if known and self.reopens(known) else self.create_run(run)

    def reopens(self, known: str) -> bool:
        """Not on another server than before."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.update_run(known, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def create_run(self, run: TrackedRun) -> str:
        from mlflow.entities import Param

        name = project("MLFLOW_EXPERIMENT_NAME")
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        new: str = self.client.create_run(number, run_name=run.name).info.run_id
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in run.config().items()]
        for start in range(0, len(params), 100):  # at most so many at once
            self.client.log_batch(new, params=params[start : start + 100])
        return new

    def scalars(self, values: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(
            self.id, [self.metric(name, value, now, step) for name, value in values.items()]
        )

    def pictures(self, images: dict[str, Tensor], step: int) -> None:
        for name, image in images.items():
            self.client.log_image(self.id, pixels(image), key=name, step=step)

    def flush(self) -> None:
        pass

    def close(self, status: str) -> None:
        self.client.set_terminated(self.id, status=self.STATUS[status])


class Trackio:
    """A run of trackio, in a folder of this machine, on a server or in a Space."""

    def __init__(self, run: TrackedRun, known: str | None) -> None:
        import trackio

        self.image, self.finish = trackio.Image, trackio.finish
        self.id = known or f"{run.name}-{new_id()}"  # trackio knows a run by its name
        with silence_prints():
            self.run = trackio.init(
                project=project("TRACKIO_PROJECT"),
                name=self.id,
                config=run.config(),
                resume="allow",
                embed=False,
            )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def pictures(self, images: dict[str, Tensor], step: int) -> None:
        shown = {f"pictures/{name}": self.image(pixels(image)) for name, image in images.items()}
        self.run.log(shown, step=step)

    def flush(self) -> None:
        pass

    def close(self, status: str) -> None:
        with silence_prints():
            self.finish()  # not the run's own, which would print again at exit


def pixels(image: Tensor) -> np.ndarray:
    """(3, height, width) in [0, 1] -> (height, width, 3), 0 to 255."""
    return (image.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


@contextlib.contextmanager
def keep_hooks() -> Iterator[None]:
    """With wandb's own, an error would be printed twice, once with its secrets."""
    hooks = sys.excepthook, sys.exit
    try:
        yield
    finally:
        sys.excepthook, sys.exit = hooks  # type: ignore[assignment]


def silence_prints() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())

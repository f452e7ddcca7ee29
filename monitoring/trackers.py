"""Where a run's figures are followed, beside its own files."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class Tracker(Protocol):
    """What a run tells. Every `step` counts the optimizer steps of the whole run."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def pictures(self, images: dict[str, Tensor], step: int) -> None:
        """Images (3, height, width) in [0, 1], by name."""

    def flush(self) -> None:
        """At the end of an epoch."""

    def close(self) -> None: ...


class TensorBoard:
    """Files in `folder`; of a run that goes on, what came after `first_step` is taken
    back.
    """

    def __init__(self, folder: str, first_step: int) -> None:
        self.writer = SummaryWriter(folder, purge_step=first_step or None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def pictures(self, images: dict[str, Tensor], step: int) -> None:
        for name, image in images.items():
            self.writer.add_image(name, image, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

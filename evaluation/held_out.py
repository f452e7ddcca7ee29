"""Held-out images on their way to an evaluation, and the samples that pictures show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.files import BadFiles, SampleDataset
from data_pipeline.samplers import Loader, evenly_spaced
from runtime import distributed
from runtime.device import Precision, to_device
from runtime.metrics import RunningMeans
from runtime.terminal import log

Step = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]


def evaluation_batches(
    loader: Loader, device: torch.device, origin: str = "`eval_data_path`"
) -> Iterator[dict[str, Any]]:
    """Batches on the device, as the network takes them.

    Files that do not decode are left out, named and counted, and too many of them end
    the run, as in training. All ranks must read to the end: there they tell each other
    what was left out.

    origin: where the images are from, for messages.
    """
    bad_files = BadFiles(flag=origin, instead="left out")
    bad_files.start_epoch(len(loader.dataset))
    read = 0
    for batch in loader:
        bad_files.add(batch["failed"])
        if "image" in batch:
            read += len(batch["image"])
            yield loader.dataset.device_transform(to_device(batch, device))
    found = distributed.gather_objects((read, list(bad_files.failed)))
    read, left_out = sum(count for count, _ in found), [name for _, names in found for name in names]
    if left_out:
        bad_files.add(left_out, found_image=read > 0)
        named = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        log.warning(
            f"warning: {len(left_out)} of {read + len(left_out)} images of {origin} cannot be read and do "
            f"not count: {named}"
        )


def average_steps(
    step: Step,
    model: nn.Module,
    batches: Iterator[dict[str, Any]],
    precision: Precision,
    weight: Callable[[dict[str, Any]], float],
) -> dict[str, float]:
    """Means of what a stage's own step reports, over held-out batches of all ranks.

    weight: of a batch in the mean.
    """
    model.eval()
    means = RunningMeans()
    for batch in batches:
        with precision.autocast():
            loss, logs = step(model, batch)
        means.add({"loss": loss} | logs, weight=weight(batch))
    return {f"test_{name}": value for name, value in means.compute(over_all_ranks=True).items()}


def pick_samples(dataset: SampleDataset, count: int) -> list[dict[str, Any]]:
    """`count` samples spread over the data set, always the same ones, for pictures and
    statistics: their tensors, as the network takes them.
    """
    picked = []
    for sample in (dataset[index] for index in evenly_spaced(len(dataset), count)):
        if "image" in sample:
            batch = {name: value[None] for name, value in sample.items() if isinstance(value, Tensor)}
            picked.append({name: value[0] for name, value in dataset.device_transform(batch).items()})
    return picked

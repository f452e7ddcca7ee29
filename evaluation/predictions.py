"""What a classifier answers for images without labels: a table of the likeliest classes,
and a list of the files that could not be read.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import nn

from checkpoint_io.checkpoints import PART
from data_pipeline.samplers import Loader
from errors import UserError
from runtime import distributed
from runtime.device import Precision, to_device

TOP = 5  # classes named for each image
TABLE, UNREADABLE = "predictions.csv", "unreadable.txt"
NAMED = 3  # unreadable files that a message names

Answer = list[tuple[int, float]]  # class and probability, the likeliest first


@dataclass(frozen=True)
class Predictions:
    """Of all ranks: index into the data set -> answer, in the order of the data set;
    and each file that did not decode, with the reason.
    """

    answers: dict[int, Answer]
    failed: list[str]

    def describe_failures(self) -> str:
        named = ", ".join(self.failed[:NAMED])
        return f"{named}, ..." if len(self.failed) > NAMED else named


@torch.no_grad()
def predict(model: nn.Module, loader: Loader, device: torch.device, precision: Precision) -> Predictions:
    """The likeliest classes of every image that can be read; all ranks must ask for them
    together.
    """
    model.eval()
    own: list[tuple[int, Answer]] = []
    failed: list[str] = []
    for batch in loader:
        failed += batch["failed"]
        if "image" not in batch:
            continue
        batch = loader.dataset.device_transform(to_device(batch, device))
        with precision.autocast():
            logits = model(batch["image"])
        probabilities, classes = logits.float().softmax(dim=1).topk(min(TOP, logits.shape[1]))
        pairs = zip(classes.tolist(), probabilities.tolist(), strict=True)
        answers = (list(zip(*pair, strict=True)) for pair in pairs)
        own += zip(batch["index"].tolist(), answers, strict=True)
    found = distributed.gather_objects((own, failed))
    merged = sorted(answer for answers, _ in found for answer in answers)
    return Predictions(dict(merged), sorted(text for _, texts in found for text in texts))


def write_predictions(
    folder: Path, predictions: Predictions, names: Sequence[str], classes: Sequence[str]
) -> None:
    """predictions.csv and unreadable.txt, complete or not at all, on rank 0. `names`: of
    the files, in the order of the data set.
    """
    if not distributed.is_main():
        return
    count = min(TOP, len(classes))
    header = ["path", "class", "probability"]
    header += [f"{column}_{place}" for place in range(2, count + 1) for column in header[1:]]
    parts = {name: folder / f".{name}{PART}" for name in (TABLE, UNREADABLE)}
    try:
        with _open_text(parts[TABLE]) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(header)
            for index, answer in predictions.answers.items():
                pairs = ((classes[number], f"{probability:.6f}") for number, probability in answer)
                table.writerow([names[index], *(value for pair in pairs for value in pair)])
        with _open_text(parts[UNREADABLE]) as file:
            unread = (name for index, name in enumerate(names) if index not in predictions.answers)
            file.writelines(f"{name}\n" for name in unread)
        for name, part in parts.items():
            os.replace(part, folder / name)
    except OSError as error:
        raise UserError(
            f"{folder / TABLE} could not be written ({error.strerror}): make room, or name another folder"
        ) from None


def _open_text(path: Path) -> IO[str]:
    """Names of files are kept as they are, including those that are not UTF-8."""
    return open(path, "w", encoding="utf-8", errors="surrogateescape", newline="")

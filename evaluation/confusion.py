"""Which class is taken for which: counts of (true class, predicted class), over all
ranks, and the classes that do worst.

A full matrix of ImageNet-21k's classes would be 4 GB; here memory grows with the pairs
that occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline.imagenet_classes import in_words
from runtime import distributed

PENDING = 1 << 22  # elements kept as they come before they are counted: 32 MiB
LOW_BITS = (1 << 32) - 1


class Confusion:
    """Counts of pairs of class numbers, whole numbers throughout; on the labels'
    device, without synchronizing it at every `add`.
    """

    def __init__(self, device: torch.device) -> None:
        # true class << 32 | predicted class; sorted, unique
        self.keys = torch.zeros(0, dtype=torch.int64, device=device)
        self.counts = torch.zeros(0, dtype=torch.int64, device=device)
        self.pending: list[Tensor] = []
        self.waiting = 0

    def add(self, labels: Tensor, predictions: Tensor) -> None:
        """Class numbers from 0 up, integers of one shape (images (B,), pixels (B,
        height, width), ...).
        """
        keys = labels.reshape(-1).long() << 32 | predictions.reshape(-1).long()
        self.pending.append(keys)
        self.waiting += len(keys)
        if self.waiting >= PENDING:
            self._count()

    def _count(self) -> None:
        keys = torch.cat((self.keys, *self.pending))
        counts = torch.cat((self.counts, self.counts.new_ones(len(keys) - len(self.keys))))
        self.pending, self.waiting = [], 0
        self._set(keys, counts)

    def _set(self, keys: Tensor, counts: Tensor) -> None:
        self.keys, where = keys.unique(return_inverse=True)
        self.counts = torch.zeros_like(self.keys).index_add_(0, where, counts)

    def sum_over_ranks(self) -> None:
        """Every rank's counts, on every rank; a rank that added nothing takes part all
        the same.
        """
        self._count()
        self._set(distributed.all_gather_rows(self.keys), distributed.all_gather_rows(self.counts))

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(true classes, predicted classes, counts), each (pairs,) int64, sorted by
        true, then by predicted class.
        """
        self._count()
        return self.keys >> 32, self.keys & LOW_BITS, self.counts

    def by_class(self) -> tuple[Tensor, Tensor]:
        """(correct, total) of each class that occurs, int64, in the order of the class
        numbers.
        """
        labels, predictions, counts = self.pairs()
        seen, row = labels.unique(return_inverse=True)
        total = torch.zeros_like(seen).index_add_(0, row, counts)
        return torch.zeros_like(seen).index_add_(0, row, counts * (labels == predictions)), total

    def macro_f1(self) -> float:
        """Mean over the classes of 2 TP / (2 TP + FP + FN), 0 to 1; the classes are
        those that occur or were predicted, as scikit-learn's. NaN without images.
        """
        labels, predictions, counts = self.pairs()
        seen, row = torch.cat((labels, predictions)).unique(return_inverse=True)
        correct = torch.zeros_like(seen).index_add_(0, row[: len(labels)], counts * (labels == predictions))
        total = torch.zeros_like(seen).index_add_(0, row, counts.repeat(2))
        return float((2 * correct.double() / total).mean())

    def worst(self, count: int) -> list[WorstClass]:
        """The `count` classes of lowest recall; of equal ones first the one with more
        images, then the lower number.
        """
        rows: dict[int, dict[int, int]] = {}
        for label, prediction, number in zip(*(column.tolist() for column in self.pairs()), strict=True):
            rows.setdefault(label, {})[prediction] = number
        classes = [WorstClass.of(label, row) for label, row in rows.items()]
        return sorted(classes, key=lambda c: (c.correct / c.images, -c.images, c.label))[:count]


@dataclass(frozen=True)
class WorstClass:
    """One class: how many of its images were recognized, and which wrong answer was
    given most often (None: none was).
    """

    label: int
    images: int
    correct: int
    taken_for: int | None = None
    times: int = 0

    @classmethod
    def of(cls, label: int, row: dict[int, int]) -> WorstClass:
        """`row`: predicted class -> count, of the images of class `label`."""
        wrong = {prediction: number for prediction, number in row.items() if prediction != label}
        most = min(wrong, key=lambda prediction: (-wrong[prediction], prediction), default=None)
        return cls(label, sum(row.values()), row.get(label, 0), most, 0 if most is None else wrong[most])


def describe_worst(worst: Sequence[WorstClass], classes: Sequence[str]) -> list[dict[str, Any]]:
    """As plain data with the classes' names; recall and share are percent of the
    class's images.
    """

    def name_of(label: int) -> dict[str, str]:
        return {"class": classes[label], "name": in_words(classes[label])}

    lines: list[dict[str, Any]] = []
    for row in worst:
        line: dict[str, Any] = {
            **name_of(row.label),
            "recall": 100 * row.correct / row.images,
            "images": row.images,
            "taken_for": None,
        }
        if row.taken_for is not None:
            line["taken_for"] = name_of(row.taken_for) | {"share": 100 * row.times / row.images}
        lines.append(line)
    return lines


def format_worst(worst: Sequence[dict[str, Any]]) -> list[str]:
    """describe_worst as lines for a terminal."""

    def name(entry: dict[str, Any]) -> str:
        text = entry["class"] if entry["class"] == entry["name"] else f"{entry['class']} {entry['name']}"
        return text if len(text) <= 40 else text[:37] + "..."

    width = max([5, *(len(name(line)) for line in worst)])
    lines = [f"{'class':{width}}  recall  images  most often taken for"]
    for line in worst:
        other = line["taken_for"]
        answer = f"{name(other)} ({other['share']:.1f}%)" if other else "-"
        lines.append(f"{name(line):{width}}  {line['recall']:5.1f}%  {line['images']:6d}  {answer}")
    return lines

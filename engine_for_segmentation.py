"""Semantic segmentation: one step, and an evaluation in which every labeled pixel of
every image counts exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.samplers import Loader
from engine import Stage
from errors import UserError
from evaluation.held_out import evaluation_batches, pick_samples
from evaluation.trained_classifier import refuse_resuming_other_classes
from runtime import distributed
from runtime.device import Precision
from segmentation.mask_files import IGNORED
from segmentation.sliding_window import SlidingWindow, predict
from visualization import drawing

PICTURES = 4


class Scores(NamedTuple):
    """Of a confusion matrix, in percent; a class that is neither there nor predicted
    has no IoU (NaN) and is in no mean.
    """

    miou: float
    macc: float  # mean over classes of the share of their pixels that is found
    aacc: float  # share of all pixels
    iou: list[float]
    acc: list[float]


def scores_of(matrix: Tensor) -> Scores:
    """`matrix` (K, K): pixels, row = true class, column = predicted class."""
    matrix = matrix.double()
    hit, there, said = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou, acc = 100 * hit / (there + said - hit), 100 * hit / there  # 0 / 0 is NaN
    aacc = 100 * float(hit.sum() / matrix.sum())
    return Scores(float(iou.nanmean()), float(acc.nanmean()), aacc, iou.tolist(), acc.tolist())


class SegmentationStage(Stage):
    """Cross-entropy of every labeled pixel, of the decode head and, with a weight, of
    the auxiliary head.

    `classes`: a checkpoint keeps them. `colors` (K, 3) and `statistics` (mean, std) of
    the images: for pictures.
    """

    def __init__(
        self,
        device: torch.device,
        precision: Precision,
        how: SlidingWindow,
        classes: Sequence[str],
        colors: Tensor,
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
        validation: Loader | None = None,
        aux_weight: float = 0.4,
    ) -> None:
        super().__init__(device, precision)
        self.how, self.validation = how, validation
        self.classes, self.colors, self.statistics, self.aux_weight = (
            list(classes),
            colors,
            statistics,
            aux_weight,
        )

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch["label"]
        logits, auxiliary = model(batch["image"])
        loss = pixel_loss(logits, labels)
        logs = {"seg_loss": loss, "pixel_acc": pixel_accuracy(logits, labels)}
        if auxiliary is None:
            return loss, logs
        logs["aux_loss"] = pixel_loss(auxiliary, labels)
        return loss + self.aux_weight * logs["aux_loss"], logs

    def rehearse(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Its parts stay in eval mode, which leaves their statistics as they are."""
        model.training = True  # with the auxiliary head
        self.step(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if self.validation is None:
            return {}
        scores = self.measure(model)
        return {"test_miou": scores.miou, "test_macc": scores.macc, "test_aacc": scores.aacc}

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Scores:
        """mIoU, mAcc and aAcc on the validation images of all ranks, at the size of
        their masks.
        """
        assert self.validation is not None
        model.eval()
        classes = len(self.classes)
        # of (true class, predicted class), and behind them the pixels without a label
        counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=self.device)
        for batch in evaluation_batches(self.validation, self.device):
            for image, labels in zip(batch["image"], batch["label"], strict=True):
                predicted = predict(model, image, tuple(labels.shape), self.how, self.precision)
                # not by a mask, nor by bincount: both read from the device
                cells = torch.where(labels != IGNORED, labels * classes + predicted, classes * classes)
                counts.index_add_(0, cells.flatten(), torch.ones_like(cells).flatten())
        counts = counts[:-1]
        distributed.all_reduce_sum(counts)
        if not counts.any():
            raise UserError(
                "the validation masks have not one labeled pixel (255, and 0 with `reduce_zero_label`, are "
                "ignored)"
            )
        return scores_of(counts.view(classes, classes))

    def best_metric(self, test: dict[str, float]) -> float | None:
        return test.get("test_miou")

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """Image, truth and prediction of a few validation images."""
        if self.validation is None:
            return {}
        dataset: Any = self.validation.dataset
        model.eval()
        rows = []
        for sample in pick_samples(dataset, PICTURES):
            image, labels = sample["image"].to(self.device), sample["label"]
            predicted = predict(model, image, tuple(labels.shape), self.how, self.precision)
            picture = drawing.as_rgb(drawing.denormalize(sample["image"], *self.statistics))
            row = drawing.segmentation_row(picture, [labels, predicted.cpu()], self.colors)
            rows.append(drawing.add_caption(row, "image, its classes, and the predicted ones"))
        return {"segmentation": drawing.stack_rows(rows)} if rows else {}

    def state_dict(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        refuse_resuming_other_classes(state, self.classes, "the same `class_names`")


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labeled pixels of logits (B, K, H, W) against labels (B, H, W); 0
    where none is labeled.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def pixel_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    right = (logits.argmax(dim=1) == labels) & (labels != IGNORED)
    return right.sum() / (labels != IGNORED).sum().clamp(min=1)

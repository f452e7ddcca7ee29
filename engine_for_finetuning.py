"""Fine-tuning for classification: one step, and an evaluation that counts every image
exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from data_pipeline.samplers import Loader
from engine import Stage
from errors import UserError
from evaluation.confident_errors import ConfidentErrors
from evaluation.confusion import Confusion
from evaluation.held_out import evaluation_batches
from evaluation.trained_classifier import refuse_resuming_other_classes
from runtime import distributed
from runtime.device import Precision
from runtime.metrics import accuracy, top_k_correct


class FinetuningStage(Stage):
    """Cross-entropy with label smoothing, or with mixed images and labels (mixup,
    cutmix).

    `classes`: the names behind the labels; a checkpoint keeps them, so that other
    images are labeled the same way. `class_weights` (classes,): each class's factor in
    the loss. `best`: which test_ figure the best checkpoint has the highest of.
    `mean_std`: how the images are normalized, for pictures.
    """

    def __init__(
        self,
        device: torch.device,
        precision: Precision,
        validation: Loader | None = None,
        mixup: Mixup | None = None,
        smoothing: float = 0.0,
        classes: Sequence[str] | None = None,
        class_weights: Tensor | None = None,
        best: str = "acc1",
        mean_std: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__(device, precision)
        self.class_weights = None if class_weights is None else class_weights.to(device)
        self.best = best
        self.validation = validation
        self.mixup, self.smoothing, self.classes = mixup, smoothing, list(classes or ())
        self.soft_cross_entropy = SoftTargetCrossEntropy()
        self.mean_std, self.errors = mean_std, ConfidentErrors()

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch["image"], batch["label"]
        if self.mixup is not None and len(images) > 1:
            even = len(images) // 2 * 2  # timm mixes pairs
            images, targets = self.mixup(images[:even], labels[:even])
            logits = model(images).float()
            loss = (
                self.soft_cross_entropy(logits, targets)
                if self.class_weights is None
                else self.weighted_cross_entropy(logits, targets)  # smoothed by mixup
            )
            return loss, {"class_acc": accuracy(logits, targets)}
        logits = model(images).float()
        loss = (
            F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
            if self.class_weights is None
            else self.weighted_cross_entropy(logits, labels, self.smoothing)
        )
        return loss, {"class_acc": accuracy(logits, labels)}

    def weighted_cross_entropy(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The mean over the images, whose weights are 1 in the mean over the data set.
        Torch's own mean divides by the weights of the batch, so that a step would
        depend on how it is split into processes and micro-steps.
        """
        return F.cross_entropy(
            logits, targets, weight=self.class_weights, reduction="none", label_smoothing=smoothing
        ).mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self.measure(model)[0]

    @torch.no_grad()
    def measure(self, model: nn.Module) -> tuple[dict[str, float], Confusion]:
        """Top-1 and top-5 accuracy in percent, balanced accuracy (mean over classes),
        macro F1 and loss on the validation images, and which classes were taken for
        which. {} without validation images.
        """
        confusion, self.errors = Confusion(self.device), ConfidentErrors()
        if self.validation is None:
            return {}, confusion
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, top 5, images
        for batch in evaluation_batches(self.validation, self.device):
            labels = batch["label"]
            with self.precision.autocast():
                logits = model(batch["image"]).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack(
                [loss, top_k_correct(logits, labels, 5), loss.new_full((), len(labels))]
            ).double()
            confusion.add(labels, logits.argmax(dim=1))
            if self.mean_std is not None and distributed.is_main():
                self.errors.add(batch["image"], labels, logits)
        distributed.all_reduce_sum(sums)
        confusion.sum_over_ranks()
        correct, total = confusion.by_class()
        loss_sum, top5, images = sums.tolist()
        images = max(images, 1.0)
        results = {
            "test_loss": loss_sum / images,
            "test_acc1": 100 * int(correct.sum()) / images,
            "test_acc5": 100 * top5 / images,
            "test_balanced_acc": 100 * float((correct.double() / total).mean()),  # NaN without images
            "test_f1": 100 * confusion.macro_f1(),
            "test_images": int(images) if len(total) else 0,
        }
        return results, confusion

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """The most confident errors of the evaluation just done, among this process's
        share of the validation images; none without an evaluation.
        """
        errors, self.errors = self.errors, ConfidentErrors()
        picture = None if self.mean_std is None else errors.draw(self.classes, self.mean_std)
        return {} if picture is None else {"confident_errors": picture}

    def best_metric(self, test: dict[str, float]) -> float | None:
        return test.get(f"test_{self.best}")

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"classes": self.classes} if self.classes else {}
        return state if self.best == "acc1" else state | {"best_metric": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = state.get("best_metric", "acc1")
        if before != self.best:
            raise UserError(
                f"the best checkpoint of the run to resume was chosen by {before}, whose figures do not "
                f"compare with {self.best}'s: give `best_metric` {before}, or start again in another "
                "`output_dir`"
            )
        refuse_resuming_other_classes(state, self.classes, "`data_path` the same class folders")


def balanced_class_weights(images: Tensor) -> Tensor:
    """Factor of each class in the loss (classes,), in inverse proportion to its number
    of `images` (classes,), such that the mean over all images is 1; 0 for a class
    without images.
    """
    images = images.double()
    share = images.sum() / (images > 0).sum()  # of each class, were they equally large
    return torch.where(images > 0, share / images.clamp(min=1), 0.0).float()


class SomeLogits(nn.Module):
    """A classifier that chooses among some of its classes only, in the order of
    `indices`.
    """

    def __init__(self, model: nn.Module, indices: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("indices", torch.tensor(indices))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, len(indices))"""
        return self.model(images)[:, self.indices]


class WithMirrorImage(nn.Module):
    """A classifier that sees each image and its mirror image and answers with the mean
    of both probabilities.

    Of the probabilities, not of the logits: each view has one vote of equal weight,
    whereas one with large logits would outvote the other; and the mean is a
    distribution, so that the loss remains one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> logarithm of the mean probabilities (B, classes),
        which is its own log-softmax.
        """
        views = [self.model(view).float().log_softmax(dim=1) for view in (images, images.flip(-1))]
        return torch.logaddexp(*views) - math.log(2)

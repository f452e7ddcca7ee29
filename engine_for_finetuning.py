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
    images are labeled the same way.
    """

    def __init__(
        self,
        device: torch.device,
        precision: Precision,
        validation: Loader | None = None,
        mixup: Mixup | None = None,
        smoothing: float = 0.0,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(device, precision)
        self.validation = validation
        self.mixup, self.smoothing, self.classes = mixup, smoothing, list(classes or ())
        self.soft_cross_entropy = SoftTargetCrossEntropy()

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch["image"], batch["label"]
        if self.mixup is not None and len(images) > 1:
            even = len(images) // 2 * 2  # timm mixes pairs
            images, targets = self.mixup(images[:even], labels[:even])
            logits = model(images).float()
            return self.soft_cross_entropy(logits, targets), {"class_acc": accuracy(logits, targets)}
        logits = model(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        return loss, {"class_acc": accuracy(logits, labels)}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self.measure(model)[0]

    @torch.no_grad()
    def measure(self, model: nn.Module) -> tuple[dict[str, float], Confusion]:
        """Top-1 and top-5 accuracy in percent, balanced accuracy (mean over classes)
        and loss on the validation images, and which classes were taken for which. {}
        without validation images.
        """
        confusion = Confusion(self.device)
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
                [loss, top_k_correct(logits, labels, 5), loss.new_tensor(len(labels))]
            ).double()
            confusion.add(labels, logits.argmax(dim=1))
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
            "test_images": int(images) if len(total) else 0,
        }
        return results, confusion

    def best_metric(self, test: dict[str, float]) -> float | None:
        return test.get("test_acc1")

    def state_dict(self) -> dict[str, Any]:
        return {"classes": self.classes} if self.classes else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        refuse_resuming_other_classes(state, self.classes, "`data_path` the same class folders")


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
